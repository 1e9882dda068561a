//! `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::ask::Ask;
use super::answering::{self, Prob, Whole};
use super::body::{Body, read};
use super::failure::Failure;
use super::fields::{Settings, settings};
use super::prompts::{Prompt, prompts};
use super::pump::{Writer, choices};
use super::service::Service;
use super::{ids, report, wire};
use crate::engine::Token;

/// A completion, beside the fields that all requests have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct CompletionRequest {
    /// A text, a list of texts, or ids.
    #[schema(value_type = Prompt, inline, required = true)]
    #[serde(default)]
    pub prompt: Value,
    /// Likeliest tokens beside each.
    pub logprobs: Option<usize>,
    /// Whether the answer begins with the prompt.
    pub echo: Option<bool>,
}

/// `POST /v1/completions`
pub(super) async fn completions(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Response, Failure> {
    let request: CompletionRequest = read(&body)?;
    if request.echo == Some(true) {
        return Err(Failure::invalid("`echo`: prompts are not repeated here"));
    }
    let top = request.logprobs;
    let settings =
        settings(&service, &body)?.with_probs("logprobs", top.map_or(0, |top| top.max(1)))?;
    let (prompts, _) = prompts(&service, &request.prompt).await?;
    let asks = asks(&service, &settings, prompts)?;
    let head = json!({
        "id": ids::id("cmpl-"),
        "object": "text_completion",
        "created": ids::now(),
        "model": service.name(),
        "system_fingerprint": service.about.build,
    });
    if settings.stream {
        return streamed(service, settings, asks, head, top).await;
    }
    let answers = answering::wholes(&service, asks).await?;
    let choices: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(index, whole)| {
            json!({
                "index": index,
                "text": whole.text(),
                "logprobs": top.map(|top| report::completion_logprobs(&whole.probs, top, 0)),
                "finish_reason": whole.finish_reason(),
            })
        })
        .collect();
    let mut out = head;
    out["choices"] = choices.into();
    out["usage"] = report::usage(&answers, settings.n);
    if let Some(first) = answers.first() {
        out["timings"] = report::timings(first);
        out["hae"] = report::hae(first);
    }
    Ok(Json(out).into_response())
}

/// The questions of `n` answers to each prompt.
pub(super) fn asks(
    service: &Service,
    settings: &Settings,
    prompts: Vec<Vec<super::super::ask::Part>>,
) -> Result<Vec<Ask>, Failure> {
    let most = service.rules.answers;
    if prompts.len() * settings.n > most {
        let (n, of) = (settings.n, prompts.len());
        let reason = format!("`n`: {n} answers to each of {of} prompts, expected at most {most}");
        return Err(Failure::invalid(reason));
    }
    let each = prompts
        .into_iter()
        .flat_map(|prompt| (0..settings.n).map(move |i| settings.ask(service, prompt.clone(), i)));
    each.collect()
}

async fn streamed(
    service: Arc<Service>,
    settings: Settings,
    asks: Vec<Ask>,
    head: Value,
    top: Option<usize>,
) -> Result<Response, Failure> {
    let listening = answering::open(&service, asks).await?;
    Ok(wire::stream(move |wire| async move {
        let writer = |index, costs| Chunks {
            head: head.clone(),
            index,
            top,
            offset: 0,
            costs,
        };
        choices(&wire, listening, &settings, head.clone(), writer).await
    }))
}

/// The pieces of one answer.
struct Chunks {
    head: Value,
    index: usize,
    top: Option<usize>,
    /// Characters so far.
    offset: usize,
    costs: bool,
}

impl Chunks {
    fn chunk(&self, text: &str, finish_reason: Option<&str>) -> Value {
        let mut chunk = self.head.clone();
        chunk["choices"] = json!([{
            "index": self.index,
            "text": text,
            "logprobs": null,
            "finish_reason": finish_reason,
        }]);
        chunk
    }
}

impl Writer for Chunks {
    const NAMED: bool = false;

    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn empty(&mut self) -> Value {
        self.chunk("", None)
    }

    fn said(&mut self, _: Token, text: &str, prob: Option<&Prob>) -> Vec<Value> {
        let prob = self.top.zip(prob);
        if text.is_empty() && prob.is_none() {
            return Vec::new();
        }
        let mut chunk = self.chunk(text, None);
        if let Some((top, prob)) = prob {
            let probs = report::completion_logprobs(std::slice::from_ref(prob), top, self.offset);
            chunk["choices"][0]["logprobs"] = probs;
        }
        self.offset += text.chars().count();
        vec![chunk]
    }

    fn ended(&mut self, whole: &Whole) -> Vec<Value> {
        // Some clients leave out the text of the piece that says why it ended.
        let rest = (!whole.rest.is_empty()).then(|| self.chunk(&whole.rest, None));
        let mut last = self.chunk("", Some(whole.finish_reason()));
        if self.costs {
            last["timings"] = report::timings(whole);
            last["hae"] = report::hae(whole);
        }
        rest.into_iter().chain([last]).collect()
    }
}
