//! The page for people: what they see at `/`, and the files that belong to it. All of it is in the program.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use super::service::Service;

/// A file of the page.
struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

const INDEX: &str = include_str!("../page/index.html");

const FILES: [File; 6] = [
    File {
        path: "/",
        kind: "text/html; charset=utf-8",
        text: INDEX,
    },
    File {
        path: "/index.html",
        kind: "text/html; charset=utf-8",
        text: INDEX,
    },
    File {
        path: "/page.css",
        kind: "text/css; charset=utf-8",
        text: include_str!("../page/page.css"),
    },
    File {
        path: "/page.js",
        kind: "text/javascript; charset=utf-8",
        text: include_str!("../page/page.js"),
    },
    File {
        path: "/cache.js",
        kind: "text/javascript; charset=utf-8",
        text: include_str!("../page/cache.js"),
    },
    File {
        path: "/icon.svg",
        kind: "image/svg+xml",
        text: include_str!("../page/icon.svg"),
    },
];

/// Nothing but the page's own files runs or is fetched, whatever a model's answer says; no other page may
/// show it in a frame.
const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Whether a path is one of the page's.
pub(super) fn holds(path: &str) -> bool {
    FILES.iter().any(|file| file.path == path)
}

/// Adds the page's paths.
pub(super) fn routes(router: Router<Arc<Service>>) -> Router<Arc<Service>> {
    FILES.iter().fold(router, |router, file| {
        let tag = tag(file.text);
        let answer = async move |request: Request| serve(file, &tag, request.headers());
        router.route(file.path, get(answer))
    })
}

/// Changes with the text.
fn tag(text: &str) -> String {
    let hash = Sha256::digest(text);
    let first: String = hash.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("\"{first}\"")
}

/// Browsers keep the files, and ask each time whether they are still those of this program.
fn serve(file: &File, tag: &str, headers: &HeaderMap) -> Response {
    let known = headers
        .get(header::IF_NONE_MATCH)
        .and_then(|tags| tags.to_str().ok())
        .is_some_and(|tags| tags.split(',').any(|known| known.trim() == tag));
    let about = [
        (header::CACHE_CONTROL, "no-cache"),
        (header::ETAG, tag),
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ];
    match known {
        true => (StatusCode::NOT_MODIFIED, about).into_response(),
        false => (about, [(header::CONTENT_TYPE, file.kind)], file.text).into_response(),
    }
}
