use super::*;

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_text_goes_on() {
    let server = Server::new("one, two");
    let body = server
        .post(PATH, json!({ "prompt": "Count:", "max_tokens": 4 }))
        .await
        .json();
    assert_eq!(server.hall.last().prompt, "Count:");
    assert_eq!(server.hall.last().n_predict, Some(4));
    assert_eq!(body["object"], "text_completion");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(
        body["choices"],
        json!([{ "index": 0, "text": "one,", "logprobs": null, "finish_reason": "length" }])
    );
    assert_eq!(body["usage"]["completion_tokens"], 4);
    assert_eq!(body["usage"]["total_tokens"], 4 + 7);
    assert!(body["hae"].is_object());
}

#[tokio::test]
async fn a_text_comes_in_pieces() {
    let server = Server::new("one, two");
    let ask = json!({ "prompt": "x", "stream": true, "stop": [",", "two"], "stream_options": { "include_usage": true } });
    let events = server.post(PATH, ask).await.events();
    let (done, rest) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let (usage, rest) = rest.split_last().unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 3);
    let text: String = rest
        .iter()
        .filter_map(|e| e["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(text, "one");
    let (last, rest) = rest.split_last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert!(
        rest.iter()
            .all(|e| e["choices"][0]["finish_reason"].is_null())
    );
}

#[tokio::test]
async fn several_prompts_have_several_answers_each() {
    let hall = Scripted {
        queue: 8,
        ..Scripted::new("a")
    };
    let server = Server::with(hall, |_, _| {});
    let body = server
        .post(PATH, json!({ "prompt": ["x", [1, 2], "yz"], "n": 2 }))
        .await
        .json();
    assert_eq!(body["choices"].as_array().unwrap().len(), 6);
    let asked = server.hall.asked.lock().unwrap().clone();
    let prompts: Vec<&str> = asked.iter().map(|asked| asked.prompt.as_str()).collect();
    assert_eq!(prompts, ["x", "x", "[1, 2]", "[1, 2]", "yz", "yz"]);
    // Each prompt counts once, with its first token.
    assert_eq!(body["usage"]["prompt_tokens"], 2 + 3 + 3);
    for ask in [
        json!({ "prompt": [] }),
        json!({ "prompt": vec!["x"; 9] }),
        json!({ "prompt": ["x", "y"], "n": 5 }),
    ] {
        assert_eq!(server.post(PATH, ask).await.error().0, 400);
    }
}

#[tokio::test]
async fn probabilities_come_in_both_shapes() {
    let server = Server::new("ab");
    let ask = json!({ "prompt": "x", "logprobs": 2 });
    let body = server.post(PATH, ask.clone()).await.json();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b"]));
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5]));
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
    assert_eq!(logprobs["top_logprobs"][0], json!({ "a": -0.5, "b": -1.5 }));
    assert_eq!(logprobs["content"][1]["token"], "b");
    let events = server
        .post(PATH, with(ask, json!({ "stream": true })))
        .await
        .events();
    let tokens: Vec<&Value> = (events.iter())
        .filter_map(|e| e["choices"][0]["logprobs"].get("tokens"))
        .collect();
    assert_eq!(tokens, [&json!(["a"]), &json!(["b"])]);
}

#[tokio::test]
async fn prompts_that_cannot_be_are_refused() {
    let server = Server::new("a");
    for prompt in [
        Value::Null,
        json!(7),
        json!(true),
        json!([1, -2]),
        json!([1, 1.5]),
        json!([1, 258]),
        json!([1, 5_000_000_000_u64]),
        json!([[]]),
        json!([["x", [1]]]),
        json!([1, null]),
        json!({}),
        json!({ "prompt_string": 7 }),
        json!({ "prompt_string": "x", "multimodal_data": "AAAA" }),
        json!({ "prompt_string": "x", "multimodal_data": [7] }),
    ] {
        for path in [PATH, "/completion"] {
            let reply = server.post(path, json!({ "prompt": prompt })).await;
            assert_eq!(reply.error().0, 400, "{prompt}");
        }
    }
    assert_eq!(
        server
            .post(PATH, json!({ "prompt": "x", "echo": true }))
            .await
            .error()
            .0,
        400
    );
    assert!(server.hall.asked.lock().unwrap().is_empty());
}
