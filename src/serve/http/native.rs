//! llama.cpp's own `/completion`.

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
use super::completions::asks;
use super::failure::Failure;
use super::fields::{Settings, settings};
use super::messages::shown;
use super::prompts::{Prompt, prompts};
use super::pump::{Writer, pump};
use super::service::Service;
use super::{report, wire};
use crate::engine::Token;

/// A completion as llama.cpp's server takes it, beside the fields that all requests have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct NativeRequest {
    /// A text, a list of ids, both in turns, an object with `prompt_string` and `multimodal_data`, or a
    /// list of these.
    #[schema(value_type = Prompt, inline, required = true)]
    #[serde(default)]
    pub prompt: Value,
    /// Likeliest tokens beside each.
    pub n_probs: Option<usize>,
    /// Whether these come as probabilities instead of their logarithms.
    pub post_sampling_probs: Option<bool>,
    /// Whether a whole answer comes with its ids.
    pub return_tokens: Option<bool>,
    /// Fields of the answer to give, such as `timings/predicted_ms`; none: all.
    pub response_fields: Option<Vec<String>>,
}

/// How answers are shown.
#[derive(Clone, Debug)]
struct Shape {
    n_probs: usize,
    plain: bool,
    tokens: bool,
    fields: Vec<String>,
}

/// `POST /completion`
pub(super) async fn completion(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Response, Failure> {
    let request: NativeRequest = read(&body)?;
    let shape = Shape {
        n_probs: request.n_probs.unwrap_or(0),
        plain: request.post_sampling_probs.unwrap_or(false),
        tokens: request.return_tokens.unwrap_or(false),
        fields: request.response_fields.unwrap_or_default(),
    };
    let settings = settings(&service, &body)?.with_probs("n_probs", shape.n_probs)?;
    let (prompts, list) = prompts(&service, &request.prompt).await?;
    let texts = prompts
        .iter()
        .map(|prompt: &Vec<Part>| shown(&service, prompt));
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    let asks = asks(&service, &settings, prompts)?;
    let about = About {
        model: service.name().to_owned(),
        settings: report::settings(&settings),
        prompts: texts,
        n: settings.n,
        shape,
    };
    if settings.stream {
        return streamed(service, settings, asks, about).await;
    }
    let answers = answering::wholes(&service, asks).await?;
    let mut out: Vec<Value> = (answers.iter().enumerate())
        .map(|(index, whole)| about.answer(index, whole))
        .collect();
    match out.len() {
        1 if !list => Ok(Json(out.remove(0)).into_response()),
        _ => Ok(Json(out).into_response()),
    }
}

/// What answers say of their questions.
#[derive(Clone)]
struct About {
    model: String,
    settings: Value,
    prompts: Vec<String>,
    /// Answers to each.
    n: usize,
    shape: Shape,
}

impl About {
    fn last(&self, index: usize, whole: &Whole, content: &str, tokens: &[Token]) -> Value {
        let (stop_type, stopping_word) = report::stop_type(&whole.end);
        json!({
            "index": index,
            "content": content,
            "tokens": tokens,
            "id_slot": whole.slot,
            "stop": true,
            "model": self.model,
            "tokens_predicted": whole.predicted(),
            "tokens_evaluated": whole.prompt,
            "generation_settings": self.settings,
            "prompt": self.prompts.get(index / self.n.max(1)),
            "has_new_line": whole.text().contains('\n'),
            "truncated": whole.truncated(),
            "stop_type": stop_type,
            "stopping_word": stopping_word,
            "tokens_cached": whole.answer.kv.cells.cells(),
            "timings": report::timings(whole),
            "hae": report::hae(whole),
        })
    }

    fn probs(&self, probs: &[Prob]) -> Value {
        let n = self.shape.n_probs;
        let each = |prob: &Prob| match self.shape.plain {
            true => report::prob_plain(prob, n),
            false => report::prob(prob, n),
        };
        probs.iter().map(each).collect()
    }

    fn answer(&self, index: usize, whole: &Whole) -> Value {
        let tokens = match self.shape.tokens {
            true => &whole.tokens[..],
            false => &[],
        };
        let mut out = self.last(index, whole, whole.text(), tokens);
        if self.shape.n_probs > 0 {
            out["completion_probabilities"] = self.probs(&whole.probs);
        }
        chosen(out, &self.shape.fields)
    }
}

/// The fields that were asked for; those that are not there are left out.
fn chosen(whole: Value, fields: &[String]) -> Value {
    if fields.is_empty() {
        return whole;
    }
    let of = |field: &String| {
        let value = whole.pointer(&format!("/{field}"))?;
        Some((field.clone(), value.clone()))
    };
    Value::Object(fields.iter().filter_map(of).collect::<Map<_, _>>())
}

async fn streamed(
    service: Arc<Service>,
    settings: Settings,
    asks: Vec<Ask>,
    about: About,
) -> Result<Response, Failure> {
    let listening = answering::open(&service, asks).await?;
    Ok(wire::stream(move |wire| async move {
        let pumps = listening.into_iter().enumerate().map(|(index, listening)| {
            let writer = Pieces {
                about: about.clone(),
                index,
                slot: listening.slot(),
                prompt: listening.sizes().0,
                predicted: 0,
            };
            pump(&wire, listening, writer, &settings)
        });
        futures_util::future::try_join_all(pumps).await?;
        Ok(())
    }))
}

/// The pieces of one answer.
struct Pieces {
    about: About,
    index: usize,
    slot: usize,
    prompt: usize,
    predicted: usize,
}

impl Pieces {
    fn piece(&self, content: &str, tokens: &[Token]) -> Value {
        json!({
            "index": self.index,
            "content": content,
            "tokens": tokens,
            "stop": false,
            "id_slot": self.slot,
            "tokens_predicted": self.predicted,
            "tokens_evaluated": self.prompt,
        })
    }
}

impl Writer for Pieces {
    const NAMED: bool = false;

    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn empty(&mut self) -> Value {
        self.piece("", &[])
    }

    fn said(&mut self, token: Token, text: &str, prob: Option<&Prob>) -> Vec<Value> {
        self.predicted += 1;
        let mut piece = self.piece(text, &[token]);
        if let Some(prob) = prob.filter(|_| self.about.shape.n_probs > 0) {
            piece["completion_probabilities"] = self.about.probs(std::slice::from_ref(prob));
        }
        vec![piece]
    }

    fn ended(&mut self, whole: &Whole) -> Vec<Value> {
        let last = self.about.last(self.index, whole, &whole.rest, &[]);
        vec![chosen(last, &self.about.shape.fields)]
    }
}
