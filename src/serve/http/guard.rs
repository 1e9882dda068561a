//! Who may ask: keys, web pages of other origins, names of this machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};
use tower_http::cors::{AllowOrigin, CorsLayer};
use url::{Host, Url};

use super::failure::Failure;
use super::page;
use super::service::Service;

/// What anybody may ask beside the page, as with llama.cpp's server.
const PUBLIC: [&str; 2] = ["/health", "/v1/health"];

/// Refuses who may not ask.
pub(super) async fn guard(
    State(service): State<Arc<Service>>,
    request: Request,
    next: Next,
) -> Response {
    let rules = &service.rules;
    let headers = request.headers();
    let path = request.uri().path();
    let public = PUBLIC.contains(&path) || (service.rules.page && page::holds(path));
    let checked = match public || has_key(&rules.keys, headers) {
        false => Err(Failure::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            "a valid API key is missing",
        )),
        // Who has a key is no web page that guessed the address.
        true if !rules.keys.is_empty() => Ok(()),
        true => check_host(rules.only_local_hosts, &request)
            .and_then(|()| check_origin(&rules.origins, &request)),
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}

/// Whether the request comes with one of the keys. Every key is compared to its end, so that the time it
/// takes tells nothing of them but their lengths.
fn has_key(keys: &[String], headers: &HeaderMap) -> bool {
    if keys.is_empty() {
        return true;
    }
    let bearer = headers
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    let bearer = bearer.and_then(|value| {
        let (scheme, key) = value.split_at_checked(b"Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
    });
    let own = headers.get("x-api-key").map(HeaderValue::as_bytes);
    let mut found = Choice::from(0);
    for given in [bearer, own].into_iter().flatten() {
        for key in keys {
            found |= key.as_bytes().ct_eq(given);
        }
    }
    found.into()
}

/// A web page that has its own name point to this machine asks under that name.
fn check_host(only_local: bool, request: &Request) -> Result<(), Failure> {
    if !only_local {
        return Ok(());
    }
    let host = match host(request) {
        // Programs of old send none; browsers always do.
        None => return Ok(()),
        Some(host) => host,
    };
    match is_local(&host) {
        true => Ok(()),
        false => Err(Failure::forbidden(format!(
            "the host {host:?} is not this machine: the server listens here alone"
        ))),
    }
}

/// The host that was asked for, without its port.
fn host(request: &Request) -> Option<String> {
    let named = request
        .headers()
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let whole = named.or(request.uri().authority().map(|a| a.as_str()))?;
    let url = Url::parse(&format!("http://{whole}/")).ok();
    Some(match url.as_ref().and_then(Url::host_str) {
        Some(host) => host.to_owned(),
        None => whole.to_owned(),
    })
}

/// Whether a name is this machine's, or an address, which no page can make its own.
fn is_local(host: &str) -> bool {
    let host = host.trim_end_matches('.');
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.ends_with(".localhost") || bare.parse::<IpAddr>().is_ok()
}

/// Browsers say which page asks. One of another origin may, where that was allowed.
fn check_origin(origins: &[String], request: &Request) -> Result<(), Failure> {
    let Some(origin) = request.headers().get(header::ORIGIN) else {
        return Ok(());
    };
    // Nothing changes by these, and a page cannot read the answer.
    if matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::OPTIONS
    ) {
        return Ok(());
    }
    let text = origin.to_str().unwrap_or_default();
    let own = || {
        let page = Url::parse(text).ok()?;
        let named = request.headers().get(header::HOST)?.to_str().ok()?;
        let server = Url::parse(&format!("{}://{named}/", page.scheme())).ok()?;
        (page.origin() == server.origin()).then_some(())
    };
    match allows(origins, origin) || own().is_some() {
        true => Ok(()),
        false => Err(Failure::forbidden(format!(
            "pages of the origin {text:?} may not ask"
        ))),
    }
}

/// Whether pages of an origin may ask.
fn allows(origins: &[String], origin: &HeaderValue) -> bool {
    origins.iter().any(|allowed| match allowed.as_str() {
        "*" => true,
        "localhost" => origin.to_str().is_ok_and(is_local_origin),
        allowed => origin.as_bytes() == allowed.trim_end_matches('/').as_bytes(),
    })
}

/// A page of this machine, of any port.
fn is_local_origin(origin: &str) -> bool {
    let Ok(url) = Url::parse(origin) else {
        return false;
    };
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => ip == Ipv4Addr::LOCALHOST,
        Some(Host::Ipv6(ip)) => ip == Ipv6Addr::LOCALHOST,
        None => false,
    }
}

/// What browsers are told; nothing, where no page may ask.
pub(super) fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = origins.to_vec();
    let may = AllowOrigin::predicate(move |origin, _| allows(&origins, origin));
    Some(
        CorsLayer::new()
            .allow_origin(may)
            .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
            .allow_headers([
                header::AUTHORIZATION,
                header::CONTENT_TYPE,
                header::HeaderName::from_static("x-api-key"),
            ]),
    )
}
