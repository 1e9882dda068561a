//! `/v1/chat/completions`, and what goes with it: the template alone, and a count of tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::super::ask::{Ask, Part};
use super::answering::{self, Prob, Whole};
use super::body::{Body, read};
use super::failure::Failure;
use super::fields::{Settings, settings};
use super::messages::{Conversation, Manner, shown};
use super::pump::{Writer, choices};
use super::service::Service;
use super::slots::waiting;
use super::tools::{Call, Reader, Said, Tools, tools};
use super::{ids, report, wire};
use crate::engine::Token;

/// A message of a chat, for the description: [`super::messages`] reads it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what is sent")]
struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    role: String,
    /// May be null beside `tool_calls`.
    #[schema(inline)]
    content: Option<Content>,
}

/// What a message says, for the description.
#[derive(serde::Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "it describes what is sent")]
enum Content {
    Text(String),
    /// Of the type `text` with a `text`, or `image_url` with an `image_url`; or texts alone.
    Parts(Vec<Value>),
}

/// A chat, beside the fields that all requests have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct ChatRequest {
    /// In OpenAI's shape: `role` and `content`, a text or a list of parts; pictures are parts of the type
    /// `image_url`, in any message.
    #[schema(value_type = Vec<Message>, inline, required = true, min_items = 1)]
    #[serde(default)]
    pub messages: Value,
    /// Functions that the model may call.
    #[schema(value_type = Vec<Object>)]
    pub tools: Option<Value>,
    /// `auto`, `none`, `required`, or one function.
    #[schema(value_type = serde_json::Value)]
    pub tool_choice: Option<Value>,
    /// Whether tokens come with their probabilities.
    pub logprobs: Option<bool>,
    /// Likeliest tokens beside each.
    #[schema(maximum = 20)]
    pub top_logprobs: Option<usize>,
    /// Whether the prompt ends with the beginning of an answer. Default: yes.
    pub add_generation_prompt: Option<bool>,
    /// Whether the last message, the assistant's, is the beginning of the answer.
    pub continue_final_message: Option<bool>,
    /// For the chat template.
    #[schema(value_type = serde_json::Value)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// OpenAI's limit.
const TOP: usize = 20;

/// A request that can be asked.
pub(super) struct Ready {
    pub settings: Settings,
    pub prompt: Vec<Part>,
    pub tools: Option<Tools>,
    /// Likeliest tokens to tell; `None`: no probabilities.
    pub top: Option<usize>,
}

/// Checks all of a request, and renders it.
pub(super) async fn ready(service: &Service, body: &Value) -> Result<Ready, Failure> {
    let request: ChatRequest = read(body)?;
    let mut settings = settings(service, body)?;
    let tools = tools(request.tools.as_ref(), request.tool_choice.as_ref())?;
    if let Some(keep) = tools.as_ref().and_then(Tools::keep) {
        if settings.keep.is_some() {
            let reason =
                "`tool_choice`: a required call and another form of the answer, expected one";
            return Err(Failure::invalid(reason));
        }
        settings.keep = Some(keep);
    }
    let top = top(&request)?;
    // Nothing is computed for 0.
    let settings = settings.with_probs("top_logprobs", top.map_or(0, |top| top.max(1)))?;
    let (conversation, manner) = conversation(service, request, tools.as_ref()).await?;
    Ok(Ready {
        settings,
        prompt: conversation.prompt(service, &manner)?,
        tools,
        top,
    })
}

fn top(request: &ChatRequest) -> Result<Option<usize>, Failure> {
    match (request.logprobs, request.top_logprobs) {
        (_, Some(top)) if top > TOP => {
            let reason = format!("`top_logprobs`: {top}, expected at most {TOP}");
            Err(Failure::invalid(reason))
        }
        (Some(true), top) => Ok(Some(top.unwrap_or(0))),
        (_, Some(top)) if top > 0 => Err(Failure::invalid("`top_logprobs`: wants `logprobs`")),
        _ => Ok(None),
    }
}

async fn conversation(
    service: &Service,
    request: ChatRequest,
    tools: Option<&Tools>,
) -> Result<(Conversation, Manner), Failure> {
    let manner = Manner {
        tools: tools.map(|tools| tools.list.clone()),
        kwargs: request.chat_template_kwargs,
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message.unwrap_or(false),
    };
    let conversation = Conversation::read(service, &request.messages, &manner).await?;
    Ok((conversation, manner))
}

/// `POST /v1/chat/completions`
pub(super) async fn completions(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Response, Failure> {
    let ready = ready(&service, &body).await?;
    let verbose = match ready.settings.verbose {
        true => Some(json!({
            "prompt": shown(&service, &ready.prompt)?,
            "generation_settings": report::settings(&ready.settings),
        })),
        false => None,
    };
    let asks = (0..ready.settings.n).map(|i| ready.settings.ask(&service, ready.prompt.clone(), i));
    let asks = asks.collect::<Result<Vec<_>, _>>()?;
    match ready.settings.stream {
        true => streamed(service, ready, asks, verbose).await,
        false => whole(&service, &ready, asks, verbose).await,
    }
}

/// What all objects of an answer share.
fn head(service: &Service, id: &str, object: &str) -> Value {
    json!({
        "id": id,
        "object": object,
        "created": ids::now(),
        "model": service.name(),
        "system_fingerprint": service.about.build,
    })
}

async fn whole(
    service: &Arc<Service>,
    ready: &Ready,
    asks: Vec<Ask>,
    verbose: Option<Value>,
) -> Result<Response, Failure> {
    let answers = answering::wholes(service, asks).await?;
    let choices: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(i, whole)| choice(ready, i, whole))
        .collect();
    let mut out = head(service, &ids::id("chatcmpl-"), "chat.completion");
    out["choices"] = choices.into();
    out["usage"] = report::usage(&answers, ready.settings.n);
    if let Some(first) = answers.first() {
        out["timings"] = report::timings(first);
        out["hae"] = report::hae(first);
    }
    if let Some(verbose) = verbose {
        out["__verbose"] = verbose;
    }
    Ok(Json(out).into_response())
}

/// The text of an answer and the calls in it.
pub(super) fn said(tools: Option<&Tools>, whole: &Whole) -> (String, Vec<Call>) {
    match tools {
        Some(tools) => tools.reader().whole(whole.text()),
        None => (whole.text().to_owned(), Vec::new()),
    }
}

fn choice(ready: &Ready, index: usize, whole: &Whole) -> Value {
    let (text, calls) = said(ready.tools.as_ref(), whole);
    let mut message = json!({ "role": "assistant", "content": text });
    if !calls.is_empty() {
        if text.trim().is_empty() {
            message["content"] = Value::Null;
        }
        message["tool_calls"] = calls.iter().map(Call::json).collect();
    }
    let mut choice = json!({
        "index": index,
        "message": message,
        "finish_reason": finish_reason(whole, !calls.is_empty()),
        "logprobs": null,
    });
    if let Some(top) = ready.top {
        let probs = whole.probs.iter().map(|prob| report::prob(prob, top));
        choice["logprobs"] = json!({ "content": probs.collect::<Vec<_>>() });
    }
    choice
}

fn finish_reason(whole: &Whole, calls: bool) -> &'static str {
    match whole.finish_reason() {
        "stop" if calls => "tool_calls",
        reason => reason,
    }
}

async fn streamed(
    service: Arc<Service>,
    ready: Ready,
    asks: Vec<Ask>,
    mut verbose: Option<Value>,
) -> Result<Response, Failure> {
    let listening = answering::open(&service, asks).await?;
    let head = head(&service, &ids::id("chatcmpl-"), "chat.completion.chunk");
    let Ready {
        settings,
        tools,
        top,
        ..
    } = ready;
    Ok(wire::stream(move |wire| async move {
        let writer = |index, costs| Chunks {
            head: head.clone(),
            index,
            top,
            reader: tools.as_ref().map(Tools::reader),
            calls: 0,
            costs,
            verbose: verbose.take(),
        };
        choices(&wire, listening, &settings, head.clone(), writer).await
    }))
}

/// The pieces of one answer.
struct Chunks {
    head: Value,
    index: usize,
    top: Option<usize>,
    reader: Option<Reader>,
    calls: usize,
    /// Whether the last piece says what it cost.
    costs: bool,
    verbose: Option<Value>,
}

impl Chunks {
    fn chunk(&self, delta: Value, finish_reason: Option<&str>) -> Value {
        let mut chunk = self.head.clone();
        chunk["choices"] = json!([{
            "index": self.index,
            "delta": delta,
            "finish_reason": finish_reason,
        }]);
        chunk
    }

    fn deltas(&mut self, said: Vec<Said>) -> Vec<Value> {
        let mut chunks = Vec::new();
        for said in said {
            let delta = match said {
                Said::Text(text) => json!({ "content": text }),
                Said::Call(call) => {
                    let mut call = call.json();
                    call["index"] = self.calls.into();
                    self.calls += 1;
                    json!({ "tool_calls": [call] })
                }
            };
            chunks.push(self.chunk(delta, None));
        }
        chunks
    }

    fn read(&mut self, text: &str) -> Vec<Said> {
        match &mut self.reader {
            Some(reader) => reader.feed(text),
            None if text.is_empty() => Vec::new(),
            None => vec![Said::Text(text.to_owned())],
        }
    }
}

impl Writer for Chunks {
    const NAMED: bool = false;

    fn begin(&mut self) -> Vec<Value> {
        let mut first = self.chunk(json!({ "role": "assistant", "content": null }), None);
        if let Some(verbose) = self.verbose.take() {
            first["__verbose"] = verbose;
        }
        vec![first]
    }

    fn empty(&mut self) -> Value {
        self.chunk(json!({}), None)
    }

    fn said(&mut self, _: Token, text: &str, prob: Option<&Prob>) -> Vec<Value> {
        let said = self.read(text);
        let mut chunks = self.deltas(said);
        if let (Some(top), Some(prob)) = (self.top, prob) {
            // A token that is no whole character yet has its probability all the same.
            if chunks.is_empty() {
                chunks.push(self.chunk(json!({ "content": "" }), None));
            }
            chunks[0]["choices"][0]["logprobs"] = json!({ "content": [report::prob(prob, top)] });
        }
        chunks
    }

    fn ended(&mut self, whole: &Whole) -> Vec<Value> {
        let mut said = self.read(&whole.rest);
        if let Some(reader) = &mut self.reader {
            said.extend(reader.end());
        }
        let mut chunks = self.deltas(said);
        let reason = finish_reason(whole, self.calls > 0);
        let mut last = self.chunk(json!({}), Some(reason));
        if self.costs {
            last["timings"] = report::timings(whole);
            last["hae"] = report::hae(whole);
        }
        chunks.push(last);
        chunks
    }
}

/// `POST /apply-template`
pub(super) async fn apply_template(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Json<Value>, Failure> {
    let request: ChatRequest = read(&body)?;
    let tools = tools(request.tools.as_ref(), request.tool_choice.as_ref())?;
    let (conversation, manner) = conversation(&service, request, tools.as_ref()).await?;
    Ok(Json(
        json!({ "prompt": conversation.shown(&service, &manner)? }),
    ))
}

/// `POST /v1/chat/completions/input_tokens`: how long the prompt would be.
pub(super) async fn input_tokens(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Json<Value>, Failure> {
    let ready = ready(&service, &body).await?;
    counted(&service, ready.prompt).await
}

/// The tokens of a prompt, as OpenAI tells them.
pub(super) async fn counted(
    service: &Arc<Service>,
    prompt: Vec<Part>,
) -> Result<Json<Value>, Failure> {
    let tokens = waiting(service, move |service| service.hall.count(prompt)).await?;
    Ok(Json(
        json!({ "object": "response.input_tokens", "input_tokens": tokens }),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_told_where_they_were_asked_for() {
        let request = |logprobs, top_logprobs| ChatRequest {
            messages: Value::Null,
            tools: None,
            tool_choice: None,
            logprobs,
            top_logprobs,
            add_generation_prompt: None,
            continue_final_message: None,
            chat_template_kwargs: None,
        };
        assert_eq!(top(&request(None, None)), Ok(None));
        assert_eq!(top(&request(Some(false), Some(0))), Ok(None));
        assert_eq!(top(&request(Some(true), None)), Ok(Some(0)));
        assert_eq!(top(&request(Some(true), Some(20))), Ok(Some(20)));
        assert!(top(&request(Some(true), Some(21))).is_err());
        assert!(top(&request(None, Some(1))).is_err());
    }
}
