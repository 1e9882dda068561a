use super::*;
use crate::policy::Amount;

const CHAT: &str = "/v1/chat/completions";

async fn asked(server: &Server, more: Value) -> hall::Asked {
    let reply = server.post(CHAT, with(chat("x"), more.clone())).await;
    assert_eq!(reply.status, StatusCode::OK, "{more}: {}", reply.text);
    server.hall.last()
}

#[tokio::test]
async fn samplers_are_as_asked_or_as_started() {
    let server = Server::new("a");
    let own = asked(
        &server,
        json!({ "temperature": null, "stop": null, "seed": null }),
    )
    .await;
    assert_eq!(own.sampler, about().sampler);
    assert_eq!((own.n_predict, own.slot, own.allowed), (None, None, None));
    let ask = json!({
        "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repeat_penalty": 1.5,
        "repeat_last_n": -1, "seed": 99, "id_slot": 1, "stop": ["", "b", "cd"],
    });
    let asked = asked(&server, ask).await;
    let sampler = asked.sampler;
    assert_eq!((sampler.temp, sampler.top_p, sampler.top_k), (0.25, 0.5, 7));
    assert_eq!((sampler.min_p, sampler.repeat_penalty), (0.125, 1.5));
    assert_eq!((sampler.repeat_last_n, sampler.seed), (-1, 99));
    assert_eq!(
        (asked.slot, asked.stop),
        (Some(1), vec!["b".to_owned(), "cd".into()])
    );
}

#[tokio::test]
async fn seeds_are_drawn_where_none_is_given() {
    let random = Server::with(Scripted::new("a"), |about, _| about.random_seed = true);
    let first = asked(&random, json!({})).await.sampler.seed;
    let second = asked(&random, json!({})).await.sampler.seed;
    assert_ne!(first, second);
    let fixed = Server::new("a");
    assert_ne!(asked(&fixed, json!({ "seed": -1 })).await.sampler.seed, 7);
    assert_eq!(
        asked(&fixed, json!({ "seed": 4_294_967_296_u64 + 3 }))
            .await
            .sampler
            .seed,
        3
    );
}

#[tokio::test]
async fn lengths_have_three_names_and_a_default() {
    let server = Server::with(Scripted::new("a"), |_, rules| rules.n_predict = Some(10));
    for (ask, n) in [
        (json!({}), 10),
        (json!({ "max_tokens": 3 }), 3),
        (json!({ "max_tokens": 3, "max_completion_tokens": 4 }), 4),
        (json!({ "max_completion_tokens": 4, "n_predict": 5 }), 5),
        (json!({ "max_tokens": 11 }), 11),
        (json!({ "max_tokens": -1 }), 10),
        (json!({ "max_tokens": 0 }), 0),
    ] {
        assert_eq!(
            asked(&server, ask.clone()).await.n_predict,
            Some(n),
            "{ask}"
        );
    }
}

#[tokio::test]
async fn forms_of_the_answer_become_constraints() {
    let server = Server::new("a");
    let schema = json!({ "type": "array" });
    for (ask, first) in [
        (json!({ "grammar": "root" }), b'r'),
        (json!({ "json_schema": schema }), b'['),
        (
            json!({ "response_format": { "type": "json_object" } }),
            b'{',
        ),
        (
            json!({ "response_format": { "type": "json_object", "schema": schema } }),
            b'[',
        ),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema } } }),
            b'[',
        ),
    ] {
        let allowed = asked(&server, ask.clone()).await.allowed;
        assert_eq!(allowed, Some(vec![Token::from(first)]), "{ask}");
    }
    for ask in [
        json!({ "grammar": "" }),
        json!({ "response_format": { "type": "text" } }),
    ] {
        assert_eq!(asked(&server, ask).await.allowed, None);
    }
}

#[tokio::test]
async fn biases_reach_the_logits() {
    let server = Server::new("a");
    let all = N_TOKENS - 1;
    for bias in [
        json!({ "97": false }),
        json!({ "a": false }),
        json!([[97, false], ["bc", 1.5]]),
        json!([["a", false]]),
    ] {
        let allowed = asked(&server, json!({ "logit_bias": bias }))
            .await
            .allowed
            .unwrap();
        assert_eq!(allowed.len(), all, "{bias}");
        assert!(!allowed.contains(&97));
    }
    let allowed = asked(&server, json!({ "ignore_eos": true }))
        .await
        .allowed
        .unwrap();
    assert_eq!(allowed.len(), all);
    assert!(!allowed.contains(&hall::EOG));
    let body = server
        .post("/completion", json!({ "prompt": "x", "ignore_eos": true }))
        .await
        .json();
    assert_eq!(
        body["generation_settings"]["logit_bias"],
        json!([{ "token": hall::EOG, "bias": null }])
    );
    assert!(
        asked(&server, json!({ "presence_penalty": 0.5 }))
            .await
            .allowed
            .is_some()
    );
    assert!(
        asked(
            &server,
            json!({ "presence_penalty": 0, "frequency_penalty": 0.0 })
        )
        .await
        .allowed
        .is_none()
    );
}

const N_TOKENS: usize = hall::N_VOCAB;

#[tokio::test]
async fn the_cache_of_one_answer_can_be_chosen() {
    let server = Server::new("a");
    let own = asked(&server, json!({})).await;
    assert_eq!((own.policy, own.attend), (None, None));
    let ask = json!({ "hae": { "kv_policy": "hae", "kv_budget": 0.5, "attend": "1.0", "attend_text": 64 } });
    let own = asked(&server, ask).await;
    let policy = own.policy.unwrap();
    assert_eq!(policy.name, "hae");
    assert_eq!(policy.options.kv_budget, Some(Amount::Share(0.5)));
    let attend = own.attend.unwrap();
    assert_eq!(
        (attend.vision, attend.text),
        (Some(Amount::Share(1.0)), Some(Amount::Cells(64)))
    );
    let ask = json!({ "hae": { "kv_policy": "h2o", "kv_budget": 128, "options": { "sinks": 2 } } });
    let policy = asked(&server, ask).await.policy.unwrap();
    assert_eq!(
        (policy.options.kv_budget, policy.options.sinks),
        (Some(Amount::Cells(128)), 2)
    );

    let started = Server::with(Scripted::new("a"), |about, _| {
        about.policy = PolicySpec::hae();
        about.policy.options.sinks = 9;
    });
    let policy = asked(&started, json!({ "hae": { "kv_budget": 100 } }))
        .await
        .policy
        .unwrap();
    assert_eq!((policy.name.as_str(), policy.options.sinks), ("hae", 9));
}

#[tokio::test]
async fn fields_that_cannot_be_are_refused_by_name() {
    let server = Server::new("a");
    for (ask, name) in [
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "temperature": 1e30 }), "temperature"),
        (json!({ "top_p": 2 }), "top_p"),
        (json!({ "top_p": -0.1 }), "top_p"),
        (json!({ "top_k": 1.5 }), "top_k"),
        (json!({ "min_p": 7 }), "min_p"),
        (json!({ "repeat_penalty": 0 }), "repeat_penalty"),
        (json!({ "repeat_penalty": -1 }), "repeat_penalty"),
        (json!({ "repeat_last_n": -2 }), "repeat_last_n"),
        (json!({ "presence_penalty": 3 }), "presence_penalty"),
        (json!({ "seed": "x" }), "seed"),
        (json!({ "stop": 7 }), "stop"),
        (json!({ "stop": [7] }), "stop"),
        (json!({ "stop": vec!["a"; 33] }), "stop"),
        (json!({ "n": 0 }), "`n`"),
        (json!({ "n": 9 }), "`n`"),
        (json!({ "n": -1 }), "`n`"),
        (json!({ "max_tokens": -3 }), "max_tokens"),
        (json!({ "max_tokens": "many" }), "max_tokens"),
        (json!({ "stream": "yes" }), "stream"),
        (json!({ "stream_options": 7 }), "stream_options"),
        (
            json!({ "stream_options": { "include_usage": 7 } }),
            "stream_options.include_usage",
        ),
        (
            json!({ "logprobs": true, "top_logprobs": 21 }),
            "top_logprobs",
        ),
        (
            json!({ "logprobs": true, "top_logprobs": -1 }),
            "top_logprobs",
        ),
        (json!({ "top_logprobs": 3 }), "logprobs"),
        (json!({ "id_slot": 2 }), "id_slot"),
        (json!({ "id_slot": -2 }), "id_slot"),
        (json!({ "mirostat": 2 }), "mirostat"),
        (json!({ "typical_p": 0.5 }), "typical_p"),
        (json!({ "dry_multiplier": 0.8 }), "dry_multiplier"),
        (json!({ "logit_bias": 7 }), "logit_bias"),
        (json!({ "logit_bias": { "97": "x" } }), "logit_bias"),
        (json!({ "logit_bias": [[97]] }), "logit_bias"),
        (json!({ "logit_bias": [[null, 1]] }), "logit_bias"),
        (json!({ "logit_bias": { "258": 1 } }), "token 258"),
        (json!({ "grammar": 7 }), "grammar"),
        (json!({ "grammar": "bad" }), "grammar"),
        (json!({ "grammar": "g", "json_schema": {} }), "json_schema"),
        (
            json!({ "json_schema": { "type": "hiccup" } }),
            "json_schema",
        ),
        (json!({ "response_format": "text" }), "response_format"),
        (
            json!({ "response_format": { "type": "sound" } }),
            "response_format",
        ),
        (
            json!({ "response_format": { "type": "json_object", "schema": 123 } }),
            "response_format",
        ),
        (
            json!({ "response_format": { "type": "json_schema" } }),
            "response_format",
        ),
        (json!({ "response_format": {} }), "response_format"),
        (json!({ "hae": 7 }), "hae"),
        (json!({ "hae": { "kv_police": "hae" } }), "kv_police"),
        (json!({ "hae": { "kv_policy": "nothing" } }), "kv_policy"),
        (
            json!({ "hae": { "kv_policy": "full", "kv_budget": 0.5 } }),
            "kv_budget",
        ),
        (
            json!({ "hae": { "kv_policy": "hae", "kv_budget": 0 } }),
            "kv_budget",
        ),
        (
            json!({ "hae": { "kv_policy": "hae", "kv_budget": 1.5 } }),
            "kv_budget",
        ),
        (
            json!({ "hae": { "kv_policy": "hae", "kv_budget": "much" } }),
            "kv_budget",
        ),
        (
            json!({ "hae": { "kv_policy": "hae", "kv_budget": [] } }),
            "kv_budget",
        ),
        (
            json!({ "hae": { "kv_policy": "hae", "options": { "sink": 1 } } }),
            "options.sink",
        ),
        (
            json!({ "hae": { "kv_policy": "hae", "options": { "sinks": "x" } } }),
            "options.sinks",
        ),
        (json!({ "hae": { "attend": 0 } }), "attend"),
        (json!({ "hae": { "attend_text": 7.5 } }), "attend_text"),
        (
            json!({ "tool_choice": "all", "tools": [{ "type": "function", "function": { "name": "a" } }] }),
            "tool_choice",
        ),
        (json!({ "chat_template_kwargs": 7 }), "chat_template_kwargs"),
    ] {
        let reply = server.post(CHAT, with(chat("x"), ask.clone())).await;
        let (status, kind, message) = reply.error();
        assert_eq!(
            (status, kind.as_str()),
            (400, "invalid_request_error"),
            "{ask}"
        );
        assert!(message.contains(name), "{ask}: {message}");
    }
    let reply = server
        .post("/completion", json!({ "prompt": "x", "n_probs": 101 }))
        .await;
    assert_eq!(reply.error().0, 400);
    assert!(server.hall.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn bodies_that_are_none_are_refused() {
    let server = Server::new("a");
    for body in ["", "{", "[]", "7", "\u{1}", "{\"a\":1}x", "null"] {
        for path in [
            CHAT,
            "/v1/completions",
            "/completion",
            "/v1/responses",
            "/tokenize",
            "/detokenize",
        ] {
            let reply = server.raw("POST", path, &[], body).await;
            assert_eq!(reply.error().0, 400, "{path} {body:?}");
        }
    }
    let deep = "[".repeat(100_000);
    assert_eq!(server.raw("POST", CHAT, &[], &deep).await.error().0, 400);
}

#[tokio::test]
async fn lists_are_no_objects() {
    let server = Server::new("a");
    for name in ["stream_options", "response_format", "hae"] {
        let (status, _, message) = server
            .post("/completion", json!({ "prompt": "x", name: [] }))
            .await
            .error();
        assert_eq!(status, 400, "{name}");
        assert!(message.contains(name), "{message}");
    }
}
