use super::*;

#[tokio::test]
async fn llama_cpps_own_answer_has_its_fields() {
    let server = Server::new("one\ntwo");
    for path in ["/completion", "/completions"] {
        let ask = json!({ "prompt": "Count:", "n_predict": 5, "return_tokens": true, "id_slot": 0, "seed": 42 });
        let body = server.post(path, ask).await.json();
        assert_eq!(body["content"], "one\nt");
        assert_eq!(body["tokens"], json!([111, 110, 101, 10, 116]));
        assert_eq!(body["stop"], true);
        assert_eq!(body["stop_type"], "limit");
        assert_eq!(body["stopping_word"], "");
        assert_eq!(body["has_new_line"], true);
        assert_eq!(body["truncated"], false);
        assert_eq!(body["id_slot"], 0);
        assert_eq!(body["index"], 0);
        assert_eq!(body["model"], "tiny");
        assert_eq!(body["prompt"], "<s>Count:");
        assert_eq!(body["tokens_predicted"], 5);
        assert_eq!(body["tokens_evaluated"], 7);
        assert_eq!(body["tokens_cached"], 10);
        assert_eq!(body["timings"]["prompt_n"], 5);
        assert_eq!(body["generation_settings"]["n_predict"], 5);
        assert_eq!(body["generation_settings"]["seed"], 42);
        assert!(body["hae"].is_object());
        assert!(body.get("completion_probabilities").is_none());
    }
    assert!(server.hall.last().cache_prompt);
    let ask = json!({ "prompt": "x", "stop": "\n", "cache_prompt": false });
    let body = server.post("/completion", ask).await.json();
    assert_eq!(
        (&body["stop_type"], &body["stopping_word"]),
        (&json!("word"), &json!("\n"))
    );
    assert_eq!(
        (&body["content"], &body["tokens"]),
        (&json!("one"), &json!([]))
    );
    assert!(!server.hall.last().cache_prompt);
    let body = server
        .post("/completion", json!({ "prompt": "x" }))
        .await
        .json();
    assert_eq!(body["stop_type"], "eos");
}

#[tokio::test]
async fn pieces_of_llama_cpps_answer_have_a_token_each() {
    let server = Server::new("aéb");
    let ask = json!({ "prompt": "x", "stream": true, "n_probs": 3 });
    let reply = server.post("/completion", ask).await;
    let events = reply.events();
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!(pieces.len(), 4);
    for piece in pieces {
        assert_eq!(piece["stop"], false);
        assert_eq!(piece["tokens"].as_array().unwrap().len(), 1);
        let probs = piece["completion_probabilities"].as_array().unwrap();
        assert_eq!(probs[0]["top_logprobs"].as_array().unwrap().len(), 3);
        assert!(probs[0]["logprob"].as_f64().unwrap() <= 0.0);
    }
    assert_eq!(last["stop"], true);
    assert_eq!(last["stop_type"], "eos");
    assert_eq!(last["tokens"], json!([]));
    assert!(last.get("completion_probabilities").is_none());
    let text: String = events
        .iter()
        .map(|e| e["content"].as_str().unwrap())
        .collect();
    assert_eq!(text, "aéb");
    assert!(!reply.text.contains("[DONE]"));
}

#[tokio::test]
async fn probabilities_can_be_plain() {
    let server = Server::new("a");
    let ask = json!({ "prompt": "x", "n_probs": 2, "post_sampling_probs": true });
    let body = server.post("/completion", ask).await.json();
    let prob = &body["completion_probabilities"][0];
    assert!((prob["prob"].as_f64().unwrap() - 0.6065).abs() < 1e-3);
    assert_eq!(prob["top_probs"].as_array().unwrap().len(), 2);
    assert!(prob.get("logprob").is_none());
}

#[tokio::test]
async fn single_fields_can_be_asked_for() {
    let server = Server::new("a");
    let fields = [
        "content",
        "generation_settings/n_predict",
        "prompt",
        "nothing",
    ];
    let ask = json!({ "prompt": "x", "n_predict": 3, "response_fields": fields });
    let body = server.post("/completion", ask).await.json();
    assert_eq!(
        body,
        json!({ "content": "a", "generation_settings/n_predict": 3, "prompt": "<s>x" })
    );
}

#[tokio::test]
async fn prompts_come_in_many_forms() {
    let server = Server::new("a");
    let body = server
        .post("/completion", json!({ "prompt": [1, 2, "ab", 3, "c"] }))
        .await
        .json();
    assert_eq!(server.hall.last().prompt, "[1, 2]ab[3]c");
    assert!(body.is_object());
    let body = server
        .post("/completion", json!({ "prompt": { "prompt_string": "x" } }))
        .await
        .json();
    assert!(body.is_object());
    let body = server
        .post(
            "/completion",
            json!({ "prompt": [[1, 2], { "prompt_string": "x" }] }),
        )
        .await
        .json();
    let indices: Vec<&Value> = body
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["index"])
        .collect();
    assert_eq!(indices, [0, 1]);
    assert_eq!(body[1]["prompt"], "<s>x");
    let body = server
        .post("/completion", json!({ "prompt": ["x"] }))
        .await
        .json();
    assert_eq!(body.as_array().unwrap().len(), 1);
}
