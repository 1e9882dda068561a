//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::body::{Body, read};
use super::failure::Failure;
use super::fields::token;
use super::service::Service;
use crate::engine::Token;

/// A text to be cut into tokens.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct TokenizeRequest {
    /// A text, or a list of texts and ids.
    #[schema(value_type = serde_json::Value)]
    #[serde(default)]
    pub content: Value,
    /// Whether the tokens that texts begin with are added.
    pub add_special: Option<bool>,
    /// Whether special tokens are read as such. Default: yes.
    pub parse_special: Option<bool>,
    /// Whether each token comes with its text.
    pub with_pieces: Option<bool>,
}

/// Tokens to be put together.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct DetokenizeRequest {
    /// Ids.
    #[serde(default)]
    pub tokens: Vec<i64>,
}

/// `POST /tokenize`
pub(super) async fn tokenize(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Json<Value>, Failure> {
    let request: TokenizeRequest = read(&body)?;
    let bos = request.add_special.unwrap_or(false);
    let special = request.parse_special.unwrap_or(true);
    let parts = match request.content {
        Value::Null => Vec::new(),
        Value::Array(parts) => parts,
        one => vec![one],
    };
    let mut tokens: Vec<Token> = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        match part {
            Value::String(text) => {
                tokens.extend(service.hall.tokenize(text, bos && i == 0, special)?);
            }
            Value::Number(id) => {
                let id = id.as_i64().ok_or_else(|| {
                    Failure::invalid(format!("`content`: {id} is no id of a token"))
                })?;
                tokens.push(token(&service, id)?);
            }
            _ => {
                return Err(Failure::invalid(
                    "`content`: expected a text, or a list of texts and ids",
                ));
            }
        }
    }
    if !request.with_pieces.unwrap_or(false) {
        return Ok(Json(json!({ "tokens": tokens })));
    }
    let pieces = tokens.into_iter().map(|token| {
        // A part of a character is told by its bytes.
        let piece = match String::from_utf8(service.hall.piece(token)?) {
            Ok(text) => Value::from(text),
            Err(e) => json!(e.into_bytes()),
        };
        Ok(json!({ "id": token, "piece": piece }))
    });
    let pieces = pieces.collect::<Result<Vec<_>, Failure>>()?;
    Ok(Json(json!({ "tokens": pieces })))
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    State(service): State<Arc<Service>>,
    Body(body): Body,
) -> Result<Json<Value>, Failure> {
    let request: DetokenizeRequest = read(&body)?;
    let mut bytes = Vec::new();
    for id in request.tokens {
        bytes.extend(service.hall.piece(token(&service, id)?)?);
    }
    Ok(Json(json!({ "content": String::from_utf8_lossy(&bytes) })))
}
