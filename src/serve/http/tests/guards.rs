use super::*;

fn keyed() -> Server {
    Server::with(Scripted::new("a"), |_, rules| {
        rules.keys = vec!["first-key".into(), "second".into()];
    })
}

#[tokio::test]
async fn keys_are_asked_for_everywhere_but_at_health() {
    let server = keyed();
    for path in ["/health", "/v1/health"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK);
    }
    for path in [
        "/v1/models",
        "/props",
        "/slots",
        "/metrics",
        "/openapi.json",
        "/nothing",
        "/health/",
    ] {
        let reply = server.get(path).await;
        let (status, kind, _) = reply.error();
        assert_eq!(
            (status, kind.as_str()),
            (401, "authentication_error"),
            "{path}"
        );
        assert_eq!(reply.headers["www-authenticate"], "Bearer");
    }
    let body = json!({ "prompt": "x" }).to_string();
    for header in [
        ("authorization", "Bearer first-key"),
        ("authorization", "bearer second"),
        ("x-api-key", "second"),
    ] {
        let reply = server.raw("POST", "/completion", &[header], &body).await;
        assert_eq!(reply.status, StatusCode::OK, "{header:?}");
    }
    for header in [
        ("authorization", "Bearer first-ke"),
        ("authorization", "Bearer first-key2"),
        ("authorization", "Bearer  first-key"),
        ("authorization", "Bearer"),
        ("authorization", "Bearer "),
        ("authorization", "first-key"),
        ("authorization", "Basic first-key"),
        ("x-api-key", ""),
        ("x-api-key", "First-Key"),
        ("x-api-key", "Bearer second"),
        ("cookie", "first-key"),
    ] {
        let reply = server.raw("POST", "/completion", &[header], &body).await;
        assert_eq!(reply.error().0, 401, "{header:?}");
    }
    // Nothing of a body is read without a key.
    assert_eq!(
        server.raw("POST", "/completion", &[], "{").await.error().0,
        401
    );
}

#[tokio::test]
async fn pages_of_other_origins_may_not_ask() {
    let server = Server::new("a");
    let body = json!({ "prompt": "x" }).to_string();
    for (host, origin, status) in [
        ("127.0.0.1:8080", "http://127.0.0.1:8080", 200),
        ("localhost:8080", "http://localhost:8080", 200),
        ("127.0.0.1:8080", "http://evil.example", 403),
        ("127.0.0.1:8080", "http://127.0.0.1:9999", 403),
        ("127.0.0.1:8080", "null", 403),
        ("127.0.0.1:8080", "", 403),
        ("evil.example:8080", "http://evil.example:8080", 403),
    ] {
        let headers = [("host", host), ("origin", origin)];
        let reply = server.raw("POST", "/completion", &headers, &body).await;
        assert_eq!(reply.status, status, "{host} {origin}");
        assert!(!reply.headers.contains_key("access-control-allow-origin"));
    }
    let reply = server
        .raw(
            "OPTIONS",
            "/completion",
            &[("origin", "http://evil.example")],
            "",
        )
        .await;
    assert!(!reply.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn names_that_others_point_here_are_refused() {
    let server = Server::new("a");
    for (host, status) in [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("app.localhost:80", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("192.168.1.7:8080", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("notlocalhost", 403),
        ("a b", 403),
    ] {
        let reply = server.raw("GET", "/props", &[("host", host)], "").await;
        assert_eq!(reply.status, status, "{host}");
    }
    // With a key nothing is left to guess, and a server for others has many names.
    let key = [("host", "model.example"), ("x-api-key", "second")];
    assert_eq!(keyed().raw("GET", "/props", &key, "").await.status, 200);
    let open = Server::with(Scripted::new("a"), |_, rules| {
        rules.only_local_hosts = false
    });
    assert_eq!(open.raw("GET", "/props", &key[..1], "").await.status, 200);
}

async fn preflight(origins: &[&str], origin: &str) -> Option<String> {
    let origins = origins.iter().map(|&o| o.to_owned()).collect();
    let server = Server::with(Scripted::new("a"), |_, rules| {
        rules.origins = origins;
        rules.keys = vec!["key".into()];
    });
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization"),
    ];
    let reply = server.raw("OPTIONS", "/completions", &headers, "").await;
    assert_eq!(reply.status, StatusCode::OK, "{origin}");
    let allowed = reply.headers.get("access-control-allow-origin")?;
    Some(allowed.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn origins_that_were_allowed_are_told_so() {
    for origin in [
        "http://localhost",
        "http://localhost:8080",
        "http://127.0.0.1:3000",
        "http://[::1]:3000",
    ] {
        assert_eq!(
            preflight(&["localhost"], origin).await.as_deref(),
            Some(origin)
        );
    }
    for origin in [
        "http://evil.com",
        "http://notlocalhost",
        "http://localhost.evil.com",
        "null",
    ] {
        assert_eq!(preflight(&["localhost"], origin).await, None, "{origin}");
    }
    let own = "https://app.example";
    assert_eq!(preflight(&[own], own).await.as_deref(), Some(own));
    assert_eq!(preflight(&[own], "https://app.example.evil").await, None);
    assert_eq!(
        preflight(&["*"], "https://any.example").await.as_deref(),
        Some("https://any.example")
    );

    let server = Server::with(Scripted::new("a"), |_, rules| {
        rules.origins = vec!["https://app.example".into()]
    });
    let body = json!({ "prompt": "x" }).to_string();
    let headers = [
        ("origin", "https://app.example"),
        ("host", "127.0.0.1:8080"),
    ];
    let reply = server.raw("POST", "/completion", &headers, &body).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(
        reply.headers["access-control-allow-origin"],
        "https://app.example"
    );
}

#[tokio::test]
async fn paths_that_are_none_have_failures_like_others() {
    let server = Server::new("a");
    let (status, kind, _) = server.get("/v1/nothing").await.error();
    assert_eq!((status, kind.as_str()), (404, "not_found_error"));
    assert_eq!(server.get("/completion").await.error().0, 405);
    let reply = server.get("/health").await;
    assert_eq!(reply.headers["x-content-type-options"], "nosniff");
    assert_eq!(reply.headers["cache-control"], "no-store");
}
