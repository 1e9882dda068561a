use std::sync::atomic::Ordering;
use std::time::Duration;

use super::*;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = Server::new("a");
    server.hall.open.store(4, Ordering::SeqCst);
    for ask in [json!({}), json!({ "stream": true })] {
        let reply = server.post(CHAT, with(chat("x"), ask)).await;
        let (status, kind, _) = reply.error();
        assert_eq!((status, kind.as_str()), (503, "unavailable_error"));
        assert!(
            reply.headers["retry-after"]
                .to_str()
                .unwrap()
                .parse::<u32>()
                .unwrap()
                > 0
        );
    }
    server.hall.open.store(0, Ordering::SeqCst);
    server.hall.closing.store(true, Ordering::SeqCst);
    assert_eq!(server.post(CHAT, chat("x")).await.error().0, 503);
}

#[tokio::test]
async fn a_prompt_that_is_too_long_says_so_before_the_stream() {
    let server = Server::new("a");
    let long = chat(&"x".repeat(600));
    for ask in [
        json!({}),
        json!({ "stream": true }),
        json!({ "n": 2, "stream": true }),
    ] {
        let reply = server.post(CHAT, with(long.clone(), ask)).await;
        let (status, kind, _) = reply.error();
        assert_eq!((status, kind.as_str()), (400, "exceed_context_size_error"));
        let error = &reply.json()["error"];
        assert!(error["n_prompt_tokens"].as_u64().unwrap() > 600);
        assert_eq!(error["n_ctx"], hall::N_CTX);
    }
}

#[tokio::test]
async fn large_bodies_are_not_read() {
    let server = Server::with(Scripted::new("a"), |_, rules| rules.body = 1000);
    let reply = server.post(CHAT, chat(&"x".repeat(2000))).await;
    let (status, kind, message) = reply.error();
    assert_eq!((status, kind.as_str()), (413, "invalid_request_error"));
    assert!(message.contains("1000"), "{message}");
    assert_eq!(server.post(CHAT, chat("x")).await.status, StatusCode::OK);
}

fn slow(seconds: u64) -> Server {
    let hall = Scripted {
        pause: Duration::from_millis(20),
        ..Scripted::new(&"slow ".repeat(1000))
    };
    Server::with(hall, |_, rules| {
        rules.timeout = Duration::from_secs(seconds)
    })
}

/// Waits until the hall has noticed that nobody listens.
async fn let_go(server: &Server) {
    for _ in 0..200 {
        if server.hall.gone.load(Ordering::SeqCst) == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the hall goes on for nobody");
}

#[tokio::test]
async fn answers_end_when_their_time_is_up() {
    let server = slow(1);
    let (status, kind, _) = server.post(CHAT, chat("x")).await.error();
    assert_eq!((status, kind.as_str()), (504, "timeout_error"));
    let_go(&server).await;
    let server = slow(1);
    let events = server
        .post(CHAT, with(chat("x"), json!({ "stream": true })))
        .await
        .events();
    assert!(events.len() > 5);
    assert_eq!(events.last().unwrap()["error"]["type"], "timeout_error");
    let_go(&server).await;
}

#[tokio::test]
async fn a_client_that_goes_stops_its_answer() {
    let server = slow(600);
    let ask = with(chat("x"), json!({ "stream": true }));
    let request = Request::post(CHAT)
        .body(Body::from(ask.to_string()))
        .unwrap();
    let response = super::super::router(&server.service)
        .oneshot(request)
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    drop(response);
    let_go(&server).await;

    let server = slow(600);
    let asked = server.post(CHAT, chat("x"));
    assert!(
        tokio::time::timeout(Duration::from_millis(200), asked)
            .await
            .is_err()
    );
    let_go(&server).await;
}
