//! From the bytes of a request to what it says.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::failure::Failure;
use super::service::Service;

/// The JSON object that a request is, whatever type it says it has, as llama.cpp's server takes it.
pub(super) struct Body(pub Value);

impl FromRequest<Arc<Service>> for Body {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &Arc<Service>) -> Result<Self, Failure> {
        let kind = "invalid_request_error";
        let upload = state.rules.upload;
        let read = tokio::time::timeout(upload, Bytes::from_request(request, state)).await;
        let read = read.map_err(|_| {
            let seconds = upload.as_secs_f64();
            let reason = format!("the request did not come within {seconds} seconds");
            Failure::new(StatusCode::REQUEST_TIMEOUT, kind, reason)
        })?;
        let bytes = read.map_err(|e| match e.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                let reason = format!("more than {} bytes in one request", state.rules.body);
                Failure::new(StatusCode::PAYLOAD_TOO_LARGE, kind, reason)
            }
            _ => Failure::invalid(e.body_text()),
        })?;
        object(&bytes).map(Body)
    }
}

/// The same, where nothing at all is an empty object.
pub(super) struct MaybeBody(pub Value);

impl FromRequest<Arc<Service>> for MaybeBody {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &Arc<Service>) -> Result<Self, Failure> {
        let length = request.headers().get(axum::http::header::CONTENT_LENGTH);
        let chunked = request
            .headers()
            .contains_key(axum::http::header::TRANSFER_ENCODING);
        if !chunked && length.is_none_or(|n| n == "0") {
            return Ok(MaybeBody(Value::Object(serde_json::Map::new())));
        }
        let Body(value) = Body::from_request(request, state).await?;
        Ok(MaybeBody(value))
    }
}

/// The JSON object in these bytes.
fn object(bytes: &[u8]) -> Result<Value, Failure> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| Failure::invalid(format!("the body is not valid JSON: {e}")))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(Failure::invalid("the body is no JSON object")),
    }
}

/// Some fields of it; those that nobody asks for are left alone.
pub(super) fn read<T: DeserializeOwned>(body: &Value) -> Result<T, Failure> {
    serde_path_to_error::deserialize(body).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner();
        Failure::invalid(match path.as_str() {
            "." => inner.to_string(),
            path => format!("`{path}`: {inner}"),
        })
    })
}
