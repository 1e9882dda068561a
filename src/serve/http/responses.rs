//! `/v1/responses`: the same chats in OpenAI's newer shape. Nothing is kept between requests.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::answering::{self, Prob, Whole};
use super::body::{Body, read};
use super::chat::{self, Ready};
use super::failure::Failure;
use super::pump::{Writer, pump};
use super::service::Service;
use super::tools::{Call, Reader, Said};
use super::{ids, report, wire};
use crate::engine::Token;

/// A question in the shape of OpenAI's responses, beside the fields that all requests have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct ResponsesRequest {
    /// A text, or a list of messages, calls, and what came of them.
    #[schema(value_type = serde_json::Value)]
    #[serde(default)]
    pub input: Value,
    /// The system's message.
    pub instructions: Option<String>,
    /// Tokens at most.
    pub max_output_tokens: Option<i64>,
    /// The form of the answer: `{"format": {"type": "json_schema", "schema": ...}}`.
    #[schema(value_type = serde_json::Value)]
    pub text: Option<Value>,
    /// Functions that the model may call.
    #[schema(value_type = Vec<Object>)]
    pub tools: Option<Value>,
    /// Not kept here.
    pub previous_response_id: Option<String>,
}

/// The same as a request for a chat.
fn as_chat(body: &Value) -> Result<Value, Failure> {
    let request: ResponsesRequest = read(body)?;
    if request.previous_response_id.is_some() {
        let reason =
            "`previous_response_id`: answers are not kept here, send the whole conversation";
        return Err(Failure::invalid(reason));
    }
    let mut messages = Vec::new();
    if let Some(instructions) = &request.instructions {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    match &request.input {
        Value::String(text) => messages.push(json!({ "role": "user", "content": text })),
        Value::Array(items) => items
            .iter()
            .try_for_each(|item| push_item(item, &mut messages))?,
        _ => return Err(Failure::invalid("`input`: expected a text or a list")),
    }
    let mut chat = body.clone();
    chat["messages"] = messages.into();
    if let Some(most) = request.max_output_tokens {
        chat["max_completion_tokens"] = most.into();
    }
    if let Some(format) = request.text.as_ref().and_then(|text| text.get("format")) {
        chat["response_format"] = format.clone();
    }
    if let Some(Value::Array(tools)) = &request.tools {
        chat["tools"] = tools.iter().map(nested).collect();
    }
    if let Some(object) = chat.as_object_mut() {
        // Means something else there.
        object.shift_remove("n");
        object.shift_remove("logprobs");
        object.shift_remove("top_logprobs");
    }
    Ok(chat)
}

/// A tool as chats have it.
fn nested(tool: &Value) -> Value {
    if tool["type"] != "function" || tool.get("function").is_some() {
        return tool.clone();
    }
    let mut function = tool.clone();
    if let Some(function) = function.as_object_mut() {
        function.shift_remove("type");
    }
    json!({ "type": "function", "function": function })
}

/// Calls in a row are one message of the assistant.
fn push_item(item: &Value, messages: &mut Vec<Value>) -> Result<(), Failure> {
    match item["type"].as_str() {
        None | Some("message") => messages.push(json!({
            "role": item["role"],
            "content": item["content"],
        })),
        Some("function_call") => {
            let call = json!({
                "id": item["call_id"],
                "type": "function",
                "function": { "name": item["name"], "arguments": item["arguments"] },
            });
            let calling = |m: &&mut Value| m["role"] == "assistant";
            match messages.last_mut().filter(calling) {
                Some(last) => match last["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                },
                None => messages.push(json!({
                    "role": "assistant",
                    "content": null,
                    "tool_calls": [call],
                })),
            }
        }
        Some("function_call_output") => messages.push(json!({
            "role": "tool",
            "tool_call_id": item["call_id"],
            "content": item["output"],
        })),
        // What a model thought of earlier is no part of what it said.
        Some("reasoning") => {}
        Some(other) => {
            return Err(Failure::invalid(format!(
                "`input`: an item of the type {other:?}, expected message, function_call or function_call_output"
            )));
        }
    }
    Ok(())
}

/// `POST /v1/responses`
pub(super) async fn responses(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Response, Failure> {
    let chat = as_chat(&body)?;
    let ready = chat::ready(&service, &chat).await?;
    let ask = ready.settings.ask(&service, ready.prompt.clone(), 0)?;
    let shell = Shell {
        id: ids::id("resp_"),
        message: ids::id("msg_"),
        created: ids::now(),
        model: service.name().to_owned(),
        body,
    };
    if ready.settings.stream {
        let listening = answering::open(&service, vec![ask]).await?;
        let Ready {
            settings, tools, ..
        } = ready;
        return Ok(wire::stream(move |wire| async move {
            for listening in listening {
                let writer = Events {
                    shell: shell.clone(),
                    reader: tools.as_ref().map(super::tools::Tools::reader),
                    text: None,
                    calls: Vec::new(),
                    number: 0,
                };
                pump(&wire, listening, writer, &settings).await?;
            }
            Ok(())
        }));
    }
    let answers = answering::wholes(&service, vec![ask]).await?;
    let whole = answers
        .first()
        .ok_or_else(|| Failure::server("no answer"))?;
    let (text, calls) = chat::said(ready.tools.as_ref(), whole);
    let mut items = Vec::new();
    if !text.trim().is_empty() || calls.is_empty() {
        items.push(shell.item(&text, "completed"));
    }
    items.extend(calls.iter().map(|call| call_item(call, "completed")));
    let mut out = shell.response(whole, &items);
    out["timings"] = report::timings(whole);
    out["hae"] = report::hae(whole);
    Ok(Json(out).into_response())
}

/// `POST /v1/responses/input_tokens`: how long the prompt would be.
pub(super) async fn input_tokens(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Json<Value>, Failure> {
    let ready = chat::ready(&service, &as_chat(&body)?).await?;
    chat::counted(&service, ready.prompt).await
}

/// What all objects of an answer share.
#[derive(Clone)]
struct Shell {
    id: String,
    message: String,
    created: u64,
    model: String,
    body: Value,
}

impl Shell {
    fn begun(&self) -> Value {
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "model": self.model,
            "output": [],
            "tools": or(&self.body["tools"], json!([])),
            "tool_choice": or(&self.body["tool_choice"], json!("auto")),
            "parallel_tool_calls": or(&self.body["parallel_tool_calls"], json!(true)),
            "instructions": self.body["instructions"],
            "temperature": self.body["temperature"],
            "top_p": self.body["top_p"],
            "max_output_tokens": self.body["max_output_tokens"],
            "metadata": or(&self.body["metadata"], json!({})),
            "error": null,
            "incomplete_details": null,
        })
    }

    fn response(&self, whole: &Whole, items: &[Value]) -> Value {
        let mut out = self.begun();
        let cut = whole.finish_reason() == "length";
        out["status"] = status(whole).into();
        if cut {
            out["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        out["completed_at"] = ids::now().into();
        out["output"] = items.into();
        out["usage"] = report::responses_usage(whole);
        out
    }

    fn item(&self, text: &str, status: &str) -> Value {
        json!({
            "id": self.message,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [part(text)],
        })
    }
}

fn or(value: &Value, other: Value) -> Value {
    match value {
        Value::Null => other,
        value => value.clone(),
    }
}

fn status(whole: &Whole) -> &'static str {
    match whole.finish_reason() {
        "length" => "incomplete",
        _ => "completed",
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

/// The call's own name is `fc_...`, what the answer to it refers to is `call_...`.
fn call_item(call: &Call, status: &str) -> Value {
    json!({
        "id": format!("fc_{}", call.id.trim_start_matches("call_")),
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    })
}

/// The events of one answer.
struct Events {
    shell: Shell,
    reader: Option<Reader>,
    /// The message, once it has begun: where in the list of items it stands, and its text.
    text: Option<(usize, String)>,
    calls: Vec<Call>,
    number: usize,
}

impl Events {
    fn event(&mut self, kind: &str, mut data: Value) -> Value {
        data["type"] = kind.into();
        data["sequence_number"] = self.number.into();
        self.number += 1;
        data
    }

    /// Where in the list of items the next call comes.
    fn index(&self) -> usize {
        usize::from(self.text.is_some()) + self.calls.len()
    }

    fn push_text(&mut self, text: &str, events: &mut Vec<Value>) {
        let id = self.shell.message.clone();
        let index = self
            .text
            .as_ref()
            .map_or(self.calls.len(), |(index, _)| *index);
        if self.text.is_none() {
            let mut item = self.shell.item("", "in_progress");
            item["content"] = json!([]);
            let added = json!({ "output_index": index, "item": item });
            events.push(self.event("response.output_item.added", added));
            let added = json!({
                "item_id": id, "output_index": index, "content_index": 0, "part": part(""),
            });
            events.push(self.event("response.content_part.added", added));
        }
        self.text
            .get_or_insert((index, String::new()))
            .1
            .push_str(text);
        let delta = json!({
            "item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": [],
        });
        events.push(self.event("response.output_text.delta", delta));
    }

    fn push_call(&mut self, call: Call, events: &mut Vec<Value>) {
        let index = self.index();
        let done = call_item(&call, "completed");
        let id = done["id"].clone();
        let mut begun = call_item(&call, "in_progress");
        begun["arguments"] = "".into();
        let added = json!({ "output_index": index, "item": begun });
        events.push(self.event("response.output_item.added", added));
        let delta = json!({ "item_id": id, "output_index": index, "delta": call.arguments });
        events.push(self.event("response.function_call_arguments.delta", delta));
        let whole = json!({
            "item_id": id, "output_index": index, "name": call.name, "arguments": call.arguments,
        });
        events.push(self.event("response.function_call_arguments.done", whole));
        let done = json!({ "output_index": index, "item": done });
        events.push(self.event("response.output_item.done", done));
        self.calls.push(call);
    }

    fn push(&mut self, said: Vec<Said>, events: &mut Vec<Value>) {
        for said in said {
            match said {
                Said::Text(text) => self.push_text(&text, events),
                Said::Call(call) => self.push_call(call, events),
            }
        }
    }

    fn read(&mut self, text: &str) -> Vec<Said> {
        match &mut self.reader {
            Some(reader) => reader.feed(text),
            None if text.is_empty() => Vec::new(),
            None => vec![Said::Text(text.to_owned())],
        }
    }
}

impl Writer for Events {
    const NAMED: bool = true;

    fn begin(&mut self) -> Vec<Value> {
        let begun = json!({ "response": self.shell.begun() });
        let created = self.event("response.created", begun.clone());
        vec![created, self.event("response.in_progress", begun)]
    }

    fn empty(&mut self) -> Value {
        let begun = json!({ "response": self.shell.begun() });
        self.event("response.in_progress", begun)
    }

    fn said(&mut self, _: Token, text: &str, _: Option<&Prob>) -> Vec<Value> {
        let mut events = Vec::new();
        let said = self.read(text);
        self.push(said, &mut events);
        events
    }

    fn ended(&mut self, whole: &Whole) -> Vec<Value> {
        let mut events = Vec::new();
        let mut said = self.read(&whole.rest);
        if let Some(reader) = &mut self.reader {
            said.extend(reader.end());
        }
        self.push(said, &mut events);
        if self.text.is_none() && self.calls.is_empty() {
            self.push_text("", &mut events);
        }
        let mut items: Vec<Value> = self
            .calls
            .iter()
            .map(|call| call_item(call, "completed"))
            .collect();
        if let Some((index, text)) = self.text.clone() {
            let id = self.shell.message.clone();
            let done = json!({
                "item_id": id, "output_index": index, "content_index": 0, "text": text, "logprobs": [],
            });
            events.push(self.event("response.output_text.done", done));
            let done = json!({
                "item_id": id, "output_index": index, "content_index": 0, "part": part(&text),
            });
            events.push(self.event("response.content_part.done", done));
            let item = self.shell.item(&text, status(whole));
            let done = json!({ "output_index": index, "item": item });
            events.push(self.event("response.output_item.done", done));
            items.insert(index, item);
        }
        let response = self.shell.response(whole, &items);
        // llama.cpp's word for every end; the response's own status says more.
        let mut last = self.event("response.completed", json!({ "response": response }));
        last["timings"] = report::timings(whole);
        last["hae"] = report::hae(whole);
        events.push(last);
        events
    }
}
