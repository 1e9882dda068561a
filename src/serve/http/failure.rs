//! What went wrong, in OpenAI's shape: `{"error": {"message", "type", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::super::ask::Refused;
use crate::error::Error;

/// Seconds after which a client may try again where the queue is full.
const RETRY_AFTER: u32 = 5;

/// Why a request gets no answer. The kinds are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    pub status: StatusCode,
    pub kind: &'static str,
    pub message: String,
    /// Tokens of a prompt that is too long, and what the context holds.
    pub sizes: Option<(usize, usize)>,
}

impl Failure {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        // Messages are one line, whatever a client put into them.
        let message: String = message.into();
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        Failure {
            status,
            kind,
            message,
            sizes: None,
        }
    }

    /// What the client asks for cannot be.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    /// Who runs the server has not allowed it.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// The server was not started with it.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable_error",
            message,
        )
    }

    /// A bug, or a machine that gave out.
    pub fn server(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub fn too_slow(seconds: u64) -> Self {
        let message = format!("no whole answer within {seconds} seconds");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message)
    }

    pub fn body(&self) -> Value {
        let mut error = json!({
            "code": self.status.as_u16(),
            "message": self.message,
            "type": self.kind,
        });
        if let Some((prompt, n_ctx)) = self.sizes {
            error["n_prompt_tokens"] = prompt.into();
            error["n_ctx"] = n_ctx.into();
        }
        json!({ "error": error })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            // Clients of llama.cpp's server look for these words.
            Error::PromptTooLong { needed, n_ctx } => Failure {
                sizes: Some((needed, n_ctx)),
                kind: "exceed_context_size_error",
                ..Failure::invalid(format!(
                    "the prompt of {needed} tokens exceeds the available context size of {n_ctx} tokens"
                ))
            },
            Error::ContextFull { .. } => Failure {
                kind: "exceed_context_size_error",
                ..Failure::invalid(message)
            },
            Error::Closed => Failure::unavailable(message),
            Error::Option { .. } | Error::File { .. } | Error::Unsupported { .. } => {
                Failure::invalid(message)
            }
            _ => Failure::server(message),
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Failure::unavailable(match refused {
            Refused::Busy => "all slots are taken and the queue is full, try again later",
            Refused::Closing => "the server is closing",
        })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
