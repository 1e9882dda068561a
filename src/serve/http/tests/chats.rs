use super::*;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_chat_is_rendered_and_answered() {
    let server = Server::new("Hello é!");
    for path in [CHAT, "/chat/completions"] {
        let reply = server
            .post(
                path,
                json!({
                    "model": "whatever",
                    "unknown": { "field": 1 },
                    "messages": [
                        { "role": "system", "content": "Be brief." },
                        { "role": "user", "content": [
                            { "type": "text", "text": "Hi" }, { "type": "text", "text": " there" },
                        ] },
                    ],
                }),
            )
            .await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        let body = reply.json();
        let prompt = "system: Be brief.\nuser: Hi there\nassistant: ";
        assert_eq!(server.hall.last().prompt, prompt);
        assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
        assert_eq!(body["object"], "chat.completion");
        assert_eq!(body["model"], "tiny");
        assert_eq!(body["system_fingerprint"], "b1-test");
        let choice = &body["choices"][0];
        assert_eq!(
            choice["message"],
            json!({ "role": "assistant", "content": "Hello é!" })
        );
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["logprobs"], Value::Null);
        let n = prompt.len() + 1;
        assert_eq!(
            body["usage"],
            json!({
                "completion_tokens": 9, "prompt_tokens": n, "total_tokens": n + 9,
                "prompt_tokens_details": { "cached_tokens": 2 },
            })
        );
        assert_eq!(body["timings"]["cache_n"], 2);
        assert_eq!(body["timings"]["prompt_n"], n - 2);
        assert_eq!(body["timings"]["prompt_ms"], 10.0);
        assert_eq!(body["timings"]["predicted_per_second"], 400.0);
        let hae = &body["hae"];
        assert_eq!(hae["cells"]["live"], json!({ "text": 7, "vision": 3 }));
        assert_eq!(hae["cells"]["evicted"]["vision"], 4);
        assert_eq!(hae["bytes"]["in_use"], 1000);
        assert_eq!(hae["bytes"]["allocated"], 50_000);
        assert_eq!(hae["policy"]["name"], "full");
        assert_eq!(hae["evicted"]["after_prefill"], 5);
    }
}

#[tokio::test]
async fn a_stream_has_role_text_reason_and_done_in_order() {
    let server = Server::new("Hé!");
    let reply = server
        .post(CHAT, with(chat("Hi"), json!({ "stream": true })))
        .await;
    let events = reply.events();
    let deltas: Vec<&Value> = events.iter().map(|e| &e["choices"][0]["delta"]).collect();
    assert_eq!(deltas[0], &json!({ "role": "assistant", "content": null }));
    let text = |delta: &&Value| Some(delta["content"].as_str()?.to_owned());
    assert_eq!(deltas.iter().filter_map(text).collect::<String>(), "Hé!");
    let (done, rest) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let last = rest.last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["timings"]["predicted_n"], 4);
    assert!(last["hae"]["cells"].is_object());
    for event in &rest[..rest.len() - 1] {
        assert_eq!(event["choices"][0]["finish_reason"], Value::Null);
        assert_eq!(event["id"], last["id"]);
        assert_eq!(event["object"], "chat.completion.chunk");
        assert!(event.get("timings").is_none() && event.get("usage").is_none());
    }
    assert!(deltas[1..].iter().all(|delta| delta.get("role").is_none()));
}

#[tokio::test]
async fn usage_comes_last_where_it_was_asked_for() {
    let server = Server::new("abc");
    let ask =
        json!({ "stream": true, "stream_options": { "include_usage": true }, "max_tokens": 2 });
    let events = server.post(CHAT, with(chat("Hi"), ask)).await.events();
    let [.., reason, usage, done] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(reason["choices"][0]["finish_reason"], "length");
    assert!(reason.get("timings").is_none());
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 2);
    assert_eq!(usage["timings"]["predicted_n"], 2);
    assert!(usage["hae"].is_object());
    assert_eq!(done, "[DONE]");
}

#[tokio::test]
async fn several_answers_have_seeds_of_their_own() {
    let server = Server::new("abc");
    let body = server
        .post(CHAT, with(chat("Hi"), json!({ "n": 3, "seed": 5 })))
        .await
        .json();
    let indices: Vec<&Value> = (body["choices"].as_array().unwrap().iter())
        .map(|c| &c["index"])
        .collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(body["usage"]["completion_tokens"], 9);
    assert_eq!(
        body["usage"]["prompt_tokens"],
        1 + "user: Hi\nassistant: ".len()
    );
    let asked = server.hall.asked.lock().unwrap().clone();
    let seeds: Vec<u32> = asked.iter().map(|asked| asked.sampler.seed).collect();
    assert_eq!(seeds, [5, 6, 7]);
    let ask = json!({ "n": 2, "stream": true, "stream_options": { "include_usage": true } });
    let events = server.post(CHAT, with(chat("Hi"), ask)).await.events();
    for index in [0, 1] {
        let own = events.iter().filter(|e| e["choices"][0]["index"] == index);
        let text: String = own
            .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, "abc");
    }
    assert_eq!(events[events.len() - 2]["usage"]["completion_tokens"], 6);
    assert_eq!(events.iter().filter(|e| *e == "[DONE]").count(), 1);
}

#[tokio::test]
async fn probabilities_come_with_tokens() {
    let server = Server::new("éa");
    let ask = json!({ "logprobs": true, "top_logprobs": 2 });
    let body = server
        .post(CHAT, with(chat("Hi"), ask.clone()))
        .await
        .json();
    let content = body["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 3);
    assert_eq!(content[2]["token"], "a");
    assert_eq!(content[2]["bytes"], json!([97]));
    assert_eq!(content[2]["logprob"], -0.5);
    assert_eq!(content[2]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[2]["top_logprobs"][1]["token"], "b");
    let events = server
        .post(CHAT, with(with(chat("Hi"), ask), json!({ "stream": true })))
        .await
        .events();
    let probs = events
        .iter()
        .filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(probs.map(Vec::len).sum::<usize>(), 3);
    let body = server
        .post(CHAT, with(chat("Hi"), json!({ "logprobs": true })))
        .await
        .json();
    let content = &body["choices"][0]["logprobs"]["content"][0];
    assert_eq!(content["top_logprobs"], json!([]));
    assert_eq!(server.hall.last().n_probs, 1);
}

fn tool() -> Value {
    json!({ "type": "function", "function": {
        "name": "add", "parameters": { "type": "object", "properties": { "a": { "type": "integer" } } },
    } })
}

#[tokio::test]
async fn calls_of_tools_are_told_apart_from_text() {
    let server = Server::new(
        "Let me see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>",
    );
    let ask = with(chat("Hi"), json!({ "tools": [tool()] }));
    let body = server.post(CHAT, ask.clone()).await.json();
    assert!(server.hall.last().prompt.starts_with("tool add\n"));
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "Let me see.\n");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["type"], "function");
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(
        call["function"],
        json!({ "name": "add", "arguments": "{\"a\":1}" })
    );

    let events = server
        .post(CHAT, with(ask.clone(), json!({ "stream": true })))
        .await
        .events();
    let text: String = (events.iter())
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "Let me see.\n");
    let calls: Vec<&Value> = (events.iter())
        .filter_map(|e| e["choices"][0]["delta"].get("tool_calls"))
        .collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0][0]["index"], 0);
    assert_eq!(calls[0][0]["function"]["name"], "add");
    assert_eq!(
        events[events.len() - 2]["choices"][0]["finish_reason"],
        "tool_calls"
    );

    let none = server
        .post(CHAT, with(ask, json!({ "tool_choice": "none" })))
        .await
        .json();
    assert!(
        none["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .contains("<tool_call>")
    );
    assert!(!server.hall.last().prompt.contains("tool add"));
}

#[tokio::test]
async fn a_required_call_is_held_to_its_schema() {
    let server = Server::new("{\"name\": \"add\", \"arguments\": {\"a\": 1}}");
    let ask = with(
        chat("Hi"),
        json!({ "tools": [tool()], "tool_choice": "required" }),
    );
    let body = server.post(CHAT, ask.clone()).await.json();
    assert_eq!(server.hall.last().allowed, Some(vec![Token::from(b'[')]));
    let message = &body["choices"][0]["message"];
    assert_eq!(message["content"], Value::Null);
    assert_eq!(message["tool_calls"][0]["function"]["name"], "add");
    let both = with(ask, json!({ "response_format": { "type": "json_object" } }));
    assert_eq!(server.post(CHAT, both).await.error().0, 400);
}

#[tokio::test]
async fn calls_and_their_results_go_back_to_the_template() {
    let server = Server::new("3");
    let body = json!({ "messages": [
        { "role": "user", "content": "1+2?" },
        { "role": "assistant", "content": null, "tool_calls": [{ "id": "c" }] },
        { "role": "tool", "tool_call_id": "c", "content": "3" },
    ] });
    let reply = server.post(CHAT, body).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let prompt = "user: 1+2?\nassistant: [{\"id\":\"c\"}]\ntool: 3\nassistant: ";
    assert_eq!(server.hall.last().prompt, prompt);
}

#[tokio::test]
async fn a_last_message_of_the_assistant_begins_the_answer() {
    let server = Server::new("c");
    let messages =
        json!([{ "role": "user", "content": "x" }, { "role": "assistant", "content": "ab" }]);
    let body = json!({ "messages": messages });
    server.post(CHAT, body.clone()).await;
    assert_eq!(server.hall.last().prompt, "user: x\nassistant: ab");
    let more = json!({ "add_generation_prompt": false, "continue_final_message": true });
    server.post(CHAT, with(body.clone(), more)).await;
    assert_eq!(server.hall.last().prompt, "user: x\nassistant: ab");
    server
        .post(
            CHAT,
            with(body.clone(), json!({ "add_generation_prompt": false })),
        )
        .await;
    assert_eq!(server.hall.last().prompt, "user: x\nassistant: ab\n");
    let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
    let last = json!({ "role": "assistant", "content": parts });
    let messages = json!([{ "role": "user", "content": "x" }, last]);
    server.post(CHAT, json!({ "messages": messages })).await;
    assert_eq!(server.hall.last().prompt, "user: x\nassistant: a\n\nb");
    let both = json!({ "add_generation_prompt": true, "continue_final_message": true });
    assert_eq!(server.post(CHAT, with(body, both)).await.error().0, 400);
    assert_eq!(
        server
            .post(
                CHAT,
                with(chat("x"), json!({ "continue_final_message": true }))
            )
            .await
            .error()
            .0,
        400
    );
}

#[tokio::test]
async fn progress_and_times_are_told_while_it_goes_on() {
    let server = Server::new("abc");
    let ask = json!({ "stream": true, "return_progress": true, "timings_per_token": true });
    let events = server.post(CHAT, with(chat("Hi"), ask)).await.events();
    let progress: Vec<&Value> = events
        .iter()
        .filter_map(|e| e.get("prompt_progress"))
        .collect();
    assert_eq!(progress.len(), 3);
    assert_eq!(progress[0]["processed"], progress[0]["cache"]);
    assert_eq!(progress[2]["processed"], progress[2]["total"]);
    assert_eq!(progress[2]["total"], 1 + "user: Hi\nassistant: ".len());
    assert!(events[0].get("timings").is_none());
    let timed = events.iter().filter(|e| e.get("timings").is_some()).count();
    // The prompt's progress, two pieces of text, and the end.
    assert_eq!(timed, 6);
    let first = events
        .iter()
        .find(|e| e.get("prompt_progress").is_some())
        .unwrap();
    assert_eq!(first["timings"]["prompt_n"], 0);
    assert_eq!(first["timings"]["prompt_ms"], 0.0);
}

#[tokio::test]
async fn what_becomes_of_pictures_is_told_where_it_is_watched() {
    let server = Server::new("abc");
    let ask = json!({ "stream": true, "hae": { "watch": true } });
    let events = server.post(CHAT, with(chat("Hi"), ask)).await.events();
    let seen: Vec<&Value> = events.iter().filter_map(|e| e["hae"].get("seen")).collect();
    let picture = json!({ "image": 0, "cols": 2, "rows": 1, "frame": null, "states": [0, 2] });
    let none = json!(crate::cache::Counts::default());
    assert_eq!(
        seen,
        [&json!({ "step": 0, "cells": none, "pictures": [picture] })]
    );
}

#[tokio::test]
async fn the_template_can_be_asked_alone() {
    let server = Server::new("");
    let ask = with(
        chat("Hi"),
        json!({ "chat_template_kwargs": { "think": false } }),
    );
    let body = server.post("/apply-template", ask).await.json();
    assert_eq!(
        body,
        json!({ "prompt": "{\"think\":false}\nuser: Hi\nassistant: " })
    );
    let body = server
        .post(
            "/apply-template",
            with(chat("Hi"), json!({ "add_generation_prompt": false })),
        )
        .await
        .json();
    assert_eq!(body["prompt"], "user: Hi\n");
    assert!(server.hall.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn prompts_are_shown_to_those_who_ask() {
    let server = Server::new("a");
    let body = server
        .post(CHAT, with(chat("Hi"), json!({ "verbose": true })))
        .await
        .json();
    assert_eq!(body["__verbose"]["prompt"], "<s>user: Hi\nassistant: ");
    let body = server.post(CHAT, chat("Hi")).await.json();
    assert!(body.get("__verbose").is_none());
    // Who runs the server can ask for all.
    let server = Server::with(Scripted::new("a"), |_, rules| rules.verbose = true);
    let body = server.post(CHAT, chat("Hi")).await.json();
    assert_eq!(body["__verbose"]["prompt"], "<s>user: Hi\nassistant: ");
}

#[tokio::test]
async fn messages_that_cannot_be_are_refused() {
    let server = Server::new("a");
    let user = json!({ "role": "user", "content": "x" });
    let own = json!({ "role": "assistant", "content": "x" });
    for messages in [
        Value::Null,
        json!("text"),
        json!([]),
        json!([123]),
        json!([{}]),
        json!([{ "role": 123 }]),
        json!([{ "role": "system", "content": 123 }]),
        json!([{ "role": "user" }]),
        json!([user, {}]),
        json!([user, own, own]),
        json!([{ "role": "user", "content": [{ "text": "x" }] }]),
        json!([{ "role": "user", "content": [{ "type": "text" }] }]),
        json!([{ "role": "user", "content": [{ "type": "input_audio" }] }]),
        json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
        json!([{ "role": "user", "content": [7] }]),
        json!([{ "role": "assistant", "tool_calls": 7 }]),
        json!([{ "role": "user", "content": "raise" }]),
    ] {
        let reply = server.post(CHAT, json!({ "messages": messages })).await;
        let (status, kind, _) = reply.error();
        assert_eq!(
            (status, kind.as_str()),
            (400, "invalid_request_error"),
            "{messages}"
        );
    }
    assert_eq!(server.post(CHAT, json!({})).await.error().0, 400);
    for tools in [
        json!(7),
        json!([{}]),
        json!([{ "type": "function" }]),
        json!([{ "type": "web_search" }]),
    ] {
        let reply = server
            .post(CHAT, with(chat("x"), json!({ "tools": tools })))
            .await;
        assert_eq!(reply.error().0, 400, "{tools}");
    }
    assert!(server.hall.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_model_without_a_template_does_not_chat() {
    let hall = Arc::new(Scripted::new("a"));
    let service = Service::new(hall.clone(), None, None, about(), Rules::default());
    let server = Server { hall, service };
    let (status, _, message) = server.post(CHAT, chat("x")).await.error();
    assert_eq!(status, 400);
    assert!(message.contains("no chat template"), "{message}");
    let reply = server
        .post("/completion", json!({ "prompt": "x", "grammar": "g" }))
        .await;
    assert_eq!(reply.error().0, 501);
}

#[tokio::test]
async fn prompts_are_counted_without_an_answer() {
    let server = Server::new("a");
    let n = "user: Hi\nassistant: ".len();
    for (path, body) in [
        (
            "/v1/chat/completions/input_tokens",
            json!({ "messages": [{ "role": "user", "content": "Hi" }] }),
        ),
        ("/responses/input_tokens", json!({ "input": "Hi" })),
    ] {
        let told = server.post(path, body).await.json();
        let expected = json!({ "object": "response.input_tokens", "input_tokens": n });
        assert_eq!(told, expected, "{path}");
    }
    let empty = json!({ "messages": [] });
    let reply = server.post("/chat/completions/input_tokens", empty).await;
    assert_eq!(reply.error().0, 400);
}
