//! Every path, once: what answers it, and what the description of the interface says of it.

use std::sync::Arc;

use axum::routing::{MethodRouter, get, post};
use utoipa::PartialSchema;
use utoipa::openapi::path::HttpMethod;
use utoipa::openapi::schema::Type;
use utoipa::openapi::{RefOr, Schema};

use super::chat::ChatRequest;
use super::completions::CompletionRequest;
use super::native::NativeRequest;
use super::responses::ResponsesRequest;
use super::service::Service;
use super::slots::SlotRequest;
use super::tokens::{DetokenizeRequest, TokenizeRequest};
use super::{chat, completions, metrics, native, responses, slots, state, tokens};

/// Describes what is sent.
type MakeSchema = fn() -> RefOr<Schema>;

/// What comes back, as far as it is described.
pub(super) enum Answer {
    /// A JSON object that has these fields, beside others.
    Object(&'static [(&'static str, Type)]),
    /// A JSON list.
    List,
    /// JSON.
    Any,
    /// Lines of text.
    Text,
}

/// A handler under its paths.
pub(super) struct Route {
    pub paths: &'static [&'static str],
    pub method: HttpMethod,
    pub handler: fn() -> MethodRouter<Arc<Service>>,
    pub summary: &'static str,
    /// What is sent, and whether it has the fields of all requests for an answer.
    pub body: Option<(MakeSchema, bool)>,
    /// Parameters behind `?`.
    pub query: &'static [(&'static str, &'static str)],
    pub answer: Answer,
}

const PLAIN: Route = Route {
    paths: &[],
    method: HttpMethod::Get,
    handler: || get(state::health),
    summary: "",
    body: None,
    query: &[],
    answer: Answer::Any,
};

const COUNT: Answer = Answer::Object(&[("object", Type::String), ("input_tokens", Type::Integer)]);

/// Of chats and completions.
const CHOICES: Answer = Answer::Object(&[
    ("id", Type::String),
    ("object", Type::String),
    ("created", Type::Integer),
    ("model", Type::String),
    ("choices", Type::Array),
    ("usage", Type::Object),
    ("hae", Type::Object),
]);

/// The paths are those of llama.cpp's server.
pub(super) const ROUTES: &[Route] = &[
    Route {
        paths: &["/health", "/v1/health"],
        summary: "Whether the server can be asked",
        answer: Answer::Object(&[("status", Type::String)]),
        ..PLAIN
    },
    Route {
        paths: &["/v1/models", "/models"],
        handler: || get(state::models),
        summary: "The model",
        answer: Answer::Object(&[
            ("object", Type::String),
            ("data", Type::Array),
            ("models", Type::Array),
        ]),
        ..PLAIN
    },
    Route {
        paths: &["/props"],
        handler: || get(state::props),
        summary: "The model, its slots, and what answers are like where a request says nothing",
        answer: Answer::Object(&[
            ("default_generation_settings", Type::Object),
            ("total_slots", Type::Integer),
            ("model_path", Type::String),
            ("hae", Type::Object),
        ]),
        ..PLAIN
    },
    Route {
        paths: &["/metrics"],
        handler: || get(metrics::metrics),
        summary: "Counts for Prometheus",
        answer: Answer::Text,
        ..PLAIN
    },
    Route {
        paths: &["/slots"],
        handler: || get(slots::list),
        summary: "What each slot does",
        query: &[("fail_on_no_slot", "1: 503 where no slot is idle")],
        answer: Answer::List,
        ..PLAIN
    },
    Route {
        paths: &["/slots/{id}"],
        method: HttpMethod::Post,
        handler: || post(slots::act),
        summary: "Keep what a slot holds in a file, read it back, or empty the slot",
        body: Some((SlotRequest::schema, false)),
        answer: Answer::Object(&[("id_slot", Type::Integer)]),
        query: &[("action", "save, restore or erase")],
    },
    Route {
        paths: &["/v1/chat/completions", "/chat/completions"],
        method: HttpMethod::Post,
        handler: || post(chat::completions),
        summary: "The next message of a chat",
        body: Some((ChatRequest::schema, true)),
        answer: CHOICES,
        ..PLAIN
    },
    Route {
        paths: &["/v1/completions"],
        method: HttpMethod::Post,
        handler: || post(completions::completions),
        summary: "What comes behind a text",
        body: Some((CompletionRequest::schema, true)),
        answer: CHOICES,
        ..PLAIN
    },
    Route {
        paths: &["/completion", "/completions"],
        method: HttpMethod::Post,
        handler: || post(native::completion),
        summary: "What comes behind a text, in the shape of llama.cpp's server",
        body: Some((NativeRequest::schema, true)),
        ..PLAIN
    },
    Route {
        paths: &["/v1/responses", "/responses"],
        method: HttpMethod::Post,
        handler: || post(responses::responses),
        summary: "The next message of a chat, in OpenAI's newer shape",
        body: Some((ResponsesRequest::schema, true)),
        answer: Answer::Object(&[
            ("id", Type::String),
            ("object", Type::String),
            ("status", Type::String),
            ("output", Type::Array),
            ("usage", Type::Object),
            ("hae", Type::Object),
        ]),
        ..PLAIN
    },
    Route {
        paths: &[
            "/v1/chat/completions/input_tokens",
            "/chat/completions/input_tokens",
        ],
        method: HttpMethod::Post,
        handler: || post(chat::input_tokens),
        summary: "How many tokens a chat's prompt has",
        body: Some((ChatRequest::schema, true)),
        answer: COUNT,
        ..PLAIN
    },
    Route {
        paths: &["/v1/responses/input_tokens", "/responses/input_tokens"],
        method: HttpMethod::Post,
        handler: || post(responses::input_tokens),
        summary: "How many tokens a prompt in OpenAI's newer shape has",
        body: Some((ResponsesRequest::schema, true)),
        answer: COUNT,
        ..PLAIN
    },
    Route {
        paths: &["/tokenize"],
        method: HttpMethod::Post,
        handler: || post(tokens::tokenize),
        summary: "The tokens of a text",
        body: Some((TokenizeRequest::schema, false)),
        answer: Answer::Object(&[("tokens", Type::Array)]),
        ..PLAIN
    },
    Route {
        paths: &["/detokenize"],
        method: HttpMethod::Post,
        handler: || post(tokens::detokenize),
        summary: "The text of tokens",
        body: Some((DetokenizeRequest::schema, false)),
        answer: Answer::Object(&[("content", Type::String)]),
        ..PLAIN
    },
    Route {
        paths: &["/apply-template"],
        method: HttpMethod::Post,
        handler: || post(chat::apply_template),
        summary: "The prompt that a chat becomes",
        body: Some((ChatRequest::schema, false)),
        answer: Answer::Object(&[("prompt", Type::String)]),
        ..PLAIN
    },
];
