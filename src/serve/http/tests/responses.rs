use super::*;

const PATH: &str = "/v1/responses";

#[tokio::test]
async fn a_response_holds_a_message() {
    let server = Server::new("Hello");
    for path in [PATH, "/responses"] {
        let ask = json!({ "model": "m", "instructions": "Be brief.", "input": "Hi", "max_output_tokens": 3, "temperature": 0.5 });
        let body = server.post(path, ask).await.json();
        assert_eq!(
            server.hall.last().prompt,
            "system: Be brief.\nuser: Hi\nassistant: "
        );
        assert_eq!(server.hall.last().n_predict, Some(3));
        assert_eq!(server.hall.last().sampler.temp, 0.5);
        assert!(body["id"].as_str().unwrap().starts_with("resp_"));
        assert_eq!(body["object"], "response");
        assert_eq!(body["status"], "incomplete");
        assert_eq!(body["incomplete_details"]["reason"], "max_output_tokens");
        let item = &body["output"][0];
        assert!(item["id"].as_str().unwrap().starts_with("msg_"));
        assert_eq!(
            (&item["type"], &item["role"]),
            (&json!("message"), &json!("assistant"))
        );
        assert_eq!(item["content"][0]["type"], "output_text");
        assert_eq!(item["content"][0]["text"], "Hel");
        assert_eq!(body["usage"]["output_tokens"], 3);
        assert_eq!(body["usage"]["input_tokens_details"]["cached_tokens"], 2);
        assert!(body["hae"].is_object());
    }
}

#[tokio::test]
async fn conversations_with_calls_become_chats() {
    let server = Server::new("<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>");
    let ask = json!({
        "input": [
            { "role": "user", "content": [{ "type": "input_text", "text": "1+2?" }] },
            { "type": "reasoning", "summary": [] },
            { "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "So" }] },
            { "type": "function_call", "call_id": "c", "name": "add", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "c", "output": "3" },
        ],
        "tools": [{ "type": "function", "name": "add", "parameters": { "type": "object" } }],
    });
    let body = server.post(PATH, ask.clone()).await.json();
    assert_eq!(
        server.hall.last().prompt,
        "tool add\nuser: 1+2?\nassistant: So\ntool: 3\nassistant: "
    );
    let item = &body["output"][0];
    assert_eq!(item["type"], "function_call");
    assert_eq!(
        (&item["name"], &item["arguments"]),
        (&json!("add"), &json!("{}"))
    );
    assert!(item["call_id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(body["output"].as_array().unwrap().len(), 1);

    let events = server
        .post(PATH, with(ask, json!({ "stream": true })))
        .await
        .events();
    let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    assert_eq!(events[6]["response"]["output"][0], events[5]["item"]);
}

#[tokio::test]
async fn events_come_in_order_and_with_their_names() {
    let server = Server::new("Hé");
    let reply = server
        .post(PATH, json!({ "input": "Hi", "stream": true }))
        .await;
    let events = reply.events();
    let names: Vec<&str> = reply
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(names, kinds);
    let mut once = kinds.clone();
    once.dedup();
    assert_eq!(
        once,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let numbers: Vec<u64> = events
        .iter()
        .map(|e| e["sequence_number"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let text: String = (events.iter())
        .filter(|e| e["type"] == "response.output_text.delta")
        .map(|e| e["delta"].as_str().unwrap())
        .collect();
    assert_eq!(text, "Hé");
    let last = events.last().unwrap();
    assert_eq!(last["response"]["id"], events[0]["response"]["id"]);
    assert_eq!(last["response"]["status"], "completed");
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], "Hé");
    assert_eq!(last["response"]["usage"]["output_tokens"], 3);
    assert!(last["timings"].is_object() && last["hae"].is_object());
}

#[tokio::test]
async fn forms_of_the_answer_are_kept_to() {
    let server = Server::new("[]");
    let format = json!({ "type": "json_schema", "name": "x", "schema": { "type": "array" } });
    let ask = json!({ "input": "Hi", "text": { "format": format } });
    assert_eq!(server.post(PATH, ask).await.status, StatusCode::OK);
    assert_eq!(server.hall.last().allowed, Some(vec![Token::from(b'[')]));
}

#[tokio::test]
async fn what_cannot_be_answered_is_refused() {
    let server = Server::new("a");
    for ask in [
        json!({}),
        json!({ "input": 7 }),
        json!({ "input": [] }),
        json!({ "input": [{ "type": "web_search_call" }] }),
        json!({ "input": [{ "content": "x" }] }),
        json!({ "input": "x", "previous_response_id": "resp_1" }),
        json!({ "input": "x", "tools": [{ "type": "web_search" }] }),
    ] {
        let reply = server.post(PATH, ask.clone()).await;
        assert_eq!(reply.error().0, 400, "{ask}");
    }
}
