//! The HTTP interface to a hall: OpenAI's paths and those of llama.cpp's server.
//!
//! A request is checked as a whole before anything is computed for it: its fields (`fields`), its
//! messages and pictures (`messages`, `media`), its tools (`tools`). What comes of it is a question to the
//! hall (`answering`). Answers go out whole or in pieces (`pump`, `wire`), in the shape of the path that
//! was asked: `chat`, `completions`, `native`, `responses`. `guard` says who may ask. `page` is for people.
//!
//! Nothing here knows a model: the hall is a trait, and so are the chat template and the grammars.

mod answering;
mod body;
mod chat;
mod completions;
mod failure;
mod fields;
mod guard;
mod hae;
mod ids;
pub mod listen;
mod media;
mod messages;
mod metrics;
mod native;
mod openapi;
mod page;
mod prompts;
mod pump;
mod report;
mod responses;
mod routes;
pub mod service;
mod shaped;
mod slots;
mod state;
mod tokens;
mod tools;
mod wire;

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower_http::catch_panic::CatchPanicLayer;

use failure::Failure;
use service::Service;

/// All paths, behind their guard.
pub fn router(service: &Arc<Service>) -> Router {
    let mut router = Router::new();
    for route in routes::ROUTES {
        for path in route.paths {
            router = router.route(path, (route.handler)());
        }
    }
    if service.rules.page {
        router = page::routes(router);
    }
    let router = router
        .route("/openapi.json", get(openapi::document))
        .fallback(nothing)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(bug))
        .layer(DefaultBodyLimit::max(service.rules.body))
        .layer(from_fn_with_state(Arc::clone(service), guard::guard));
    // Outside of the guard: browsers ask without a key whether they may ask.
    let router = match guard::cors(&service.rules.origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router
        .layer(map_response(plain))
        .with_state(Arc::clone(service))
}

async fn nothing(uri: Uri) -> Failure {
    Failure::not_found(format!("there is nothing at {:?}", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{:?} is not asked with {method}", uri.path());
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "invalid_request_error",
        message,
    )
}

/// The hook has reported it; the client is told as little as of any other.
fn bug(_: Box<dyn Any + Send>) -> Response {
    Failure::server("a bug in the server").into_response()
}

/// No browser takes an answer for anything but what it says it is, or keeps it.
async fn plain(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(
        HeaderName::from_static("x-content-type-options"),
        HeaderValue::from_static("nosniff"),
    );
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}
#[cfg(test)]
mod tests;
