use super::*;

#[tokio::test]
async fn the_server_says_what_it_is() {
    let server = Server::with(Scripted::new("a"), |about, _| {
        about.aliases = vec!["one".into(), "two".into()];
        about.tags = vec!["small".into()];
    });
    for path in ["/health", "/v1/health"] {
        assert_eq!(server.get(path).await.json(), json!({ "status": "ok" }));
    }
    for path in ["/v1/models", "/models"] {
        let body = server.get(path).await.json();
        assert_eq!(body["object"], "list");
        assert_eq!(body["data"].as_array().unwrap().len(), 1);
        assert_eq!(body["data"][0]["id"], "one");
        assert_eq!(body["data"][0]["aliases"], json!(["one", "two"]));
        assert_eq!(body["data"][0]["tags"], json!(["small"]));
        assert_eq!(
            body["models"][0]["capabilities"],
            json!(["completion", "multimodal"])
        );
    }
    let props = server.get("/props").await.json();
    assert_eq!(props["total_slots"], 2);
    assert_eq!(props["model_path"], "tiny.gguf");
    assert_eq!(props["modalities"]["vision"], true);
    assert_eq!(props["chat_template"], "{{ lines }}");
    let settings = &props["default_generation_settings"];
    assert_eq!(settings["n_ctx"], hall::N_CTX);
    assert_eq!(settings["params"]["seed"], 7);
    assert_eq!(props["hae"]["policies"][0], "full");
}

#[tokio::test]
async fn tokens_and_texts_become_each_other() {
    let server = Server::new("");
    let tokens = async |body: Value| server.post("/tokenize", body).await.json()["tokens"].clone();
    assert_eq!(tokens(json!({ "content": "ab" })).await, json!([97, 98]));
    assert_eq!(
        tokens(json!({ "content": "ab", "add_special": true })).await,
        json!([256, 97, 98])
    );
    assert_eq!(
        tokens(json!({ "content": ["a", 7, "b"] })).await,
        json!([97, 7, 98])
    );
    assert_eq!(tokens(json!({})).await, json!([]));
    let pieces = tokens(json!({ "content": "aé", "with_pieces": true })).await;
    assert_eq!(
        pieces,
        json!([{ "id": 97, "piece": "a" }, { "id": 195, "piece": [195] }, { "id": 169, "piece": [169] }])
    );
    for body in [
        json!({ "content": 1.5 }),
        json!({ "content": {} }),
        json!({ "content": [258] }),
    ] {
        assert_eq!(server.post("/tokenize", body).await.error().0, 400);
    }
    let body = server
        .post("/detokenize", json!({ "tokens": [97, 195, 169] }))
        .await
        .json();
    assert_eq!(body, json!({ "content": "aé" }));
    for tokens in [json!([258]), json!([-1]), json!(["a"]), json!(7)] {
        assert_eq!(
            server
                .post("/detokenize", json!({ "tokens": tokens }))
                .await
                .error()
                .0,
            400
        );
    }
}

#[tokio::test]
async fn slots_are_shown_unless_they_are_hidden() {
    let server = Server::new("a");
    let slots = server.get("/slots").await.json();
    assert_eq!(slots.as_array().unwrap().len(), 2);
    assert_eq!(slots[1]["id"], 1);
    assert_eq!(slots[1]["is_processing"], false);
    assert_eq!(slots[1]["n_ctx"], hall::N_CTX);
    assert_eq!(
        server.get("/slots?fail_on_no_slot=1").await.status,
        StatusCode::OK
    );
    server
        .hall
        .open
        .store(2, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(server.get("/slots?fail_on_no_slot=1").await.error().0, 503);
    let hidden = Server::with(Scripted::new("a"), |_, rules| rules.show_slots = false);
    assert_eq!(hidden.get("/slots").await.error().0, 501);
}

#[tokio::test]
async fn slots_are_kept_in_their_folder_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let server = Server::with(Scripted::new("a"), move |_, rules| {
        rules.slot_save_path = Some(path)
    });
    let body = server
        .post("/slots/1?action=save", json!({ "filename": "a.bin" }))
        .await
        .json();
    assert_eq!(
        (&body["id_slot"], &body["n_saved"], &body["n_written"]),
        (&json!(1), &json!(41), &json!(1))
    );
    assert!(body["timings"]["save_ms"].is_number());
    assert!(folder.path().join("a.bin").is_file());
    let body = server
        .post("/slots/0?action=restore", json!({ "filename": "a.bin" }))
        .await
        .json();
    assert_eq!(
        (&body["id_slot"], &body["n_restored"], &body["n_read"]),
        (&json!(0), &json!(41), &json!(1))
    );
    let reply = server.raw("POST", "/slots/1?action=erase", &[], "").await;
    assert_eq!(reply.json(), json!({ "id_slot": 1, "n_erased": 41 }));
    std::fs::write(folder.path().join("broken"), "xx").unwrap();
    for (path, body) in [
        ("/slots/2?action=save", json!({ "filename": "a" })),
        ("/slots/x?action=save", json!({ "filename": "a" })),
        ("/slots/-1?action=erase", json!({})),
        ("/slots/0?action=burn", json!({ "filename": "a" })),
        ("/slots/0", json!({ "filename": "a" })),
        ("/slots/0?action=save", json!({})),
        ("/slots/0?action=save", json!({ "filename": 7 })),
        ("/slots/0?action=save", json!({ "filename": "../a" })),
        ("/slots/0?action=save", json!({ "filename": "/tmp/a" })),
        ("/slots/0?action=restore", json!({ "filename": "nothing" })),
        ("/slots/0?action=restore", json!({ "filename": "broken" })),
    ] {
        let (status, _, message) = server.post(path, body).await.error();
        assert_eq!(status, 400, "{path}");
        let folder = folder.path().to_str().unwrap();
        assert!(!message.contains(folder), "{message}");
    }
    let none = Server::new("a");
    assert_eq!(
        none.post("/slots/0?action=erase", json!({}))
            .await
            .error()
            .0,
        501
    );
}

#[tokio::test]
async fn metrics_are_there_where_they_were_asked_for() {
    let server = Server::new("a");
    assert_eq!(server.get("/metrics").await.error().0, 501);
    let server = Server::with(Scripted::new("a"), |_, rules| rules.metrics = true);
    let reply = server.get("/metrics").await;
    assert!(
        reply.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
    let started: u64 = reply.headers["process-start-time-unix"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(started > 1_500_000_000);
    for line in [
        "# TYPE llamacpp:prompt_tokens_total counter",
        "llamacpp:prompt_tokens_total 30",
        "llamacpp:prompt_tokens_seconds 15",
        "# TYPE llamacpp:requests_deferred gauge",
        "llamacpp:tokens_predicted_total 12",
        "hae:cells{slot=\"1\",modality=\"vision\",state=\"binned\"} 0",
    ] {
        assert!(
            reply.text.lines().any(|own| own == line),
            "{line}: {}",
            reply.text
        );
    }
    let names: Vec<&str> = reply
        .text
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| l.split([' ', '{']).next().unwrap())
        .collect();
    for name in names {
        assert!(reply.text.contains(&format!("# HELP {name} ")), "{name}");
    }
}

#[tokio::test]
async fn the_description_names_every_path() {
    let server = Server::new("a");
    let body = server.get("/openapi.json").await.json();
    assert!(body["openapi"].as_str().unwrap().starts_with("3."));
    let paths = body["paths"].as_object().unwrap();
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            assert!(!operation["summary"].as_str().unwrap().is_empty());
            let asked = path.replace("{id}", "0");
            let other = if method == "get" { "POST" } else { "GET" };
            // There, and with no other method.
            assert_eq!(
                server.raw(other, &asked, &[], "{}").await.status,
                405,
                "{path}"
            );
            let own = server
                .raw(&method.to_uppercase(), &asked, &[], "{}")
                .await
                .status;
            assert!(own != 404 && own != 405, "{path}: {own}");
        }
    }
    for path in [
        "/v1/chat/completions",
        "/completion",
        "/v1/responses",
        "/slots/{id}",
        "/props",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    // Every part that is referred to is there.
    let text = body.to_string();
    for name in text.split("#/components/schemas/").skip(1) {
        let name = name.split('"').next().unwrap();
        assert!(body["components"]["schemas"][name].is_object(), "{name}");
    }
    let fields = &body["components"]["schemas"]["Fields"]["properties"];
    assert!(fields["temperature"].is_object() && fields["hae"].is_object());
}
