use super::*;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

const CHAT: &str = "/v1/chat/completions";

fn png(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = ::image::RgbImage::new(width, height);
    image
        .write_to(&mut bytes, ::image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

fn data(width: u32, height: u32) -> String {
    let bytes = BASE64_STANDARD.encode(png(width, height));
    format!("data:image/png;base64,{bytes}")
}

fn shows(source: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": [
        { "type": "text", "text": "See " },
        { "type": "image_url", "image_url": { "url": source } },
        { "type": "text", "text": "!" },
    ] }] })
}

#[tokio::test]
async fn pictures_stand_where_they_were_put() {
    let server = Server::new("a");
    let reply = server.post(CHAT, shows(&data(4, 3))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    assert_eq!(server.hall.last().prompt, "user: See [4x3]!\nassistant: ");
    let bare = BASE64_STANDARD.encode(png(5, 3));
    server.post(CHAT, shows(&bare)).await;
    assert_eq!(server.hall.last().prompt, "user: See [5x3]!\nassistant: ");

    let body = json!({ "messages": [
        { "role": "user", "content": [{ "type": "image_url", "image_url": data(6, 3) }] },
        { "role": "assistant", "content": null, "tool_calls": [] },
        { "role": "tool", "content": [
            { "type": "image_url", "image_url": { "url": data(7, 3), "detail": "low" } },
            { "type": "text", "text": " <__media__>" },
        ] },
    ] });
    server.post(CHAT, body.clone()).await;
    assert_eq!(
        server.hall.last().prompt,
        "user: [6x3]\nassistant: []\ntool: [7x3] <__media__>\nassistant: "
    );
    let shown = server.post("/apply-template", body).await.json();
    assert!(
        shown["prompt"]
            .as_str()
            .unwrap()
            .starts_with("user: <__media__>\n")
    );
}

#[tokio::test]
async fn pictures_of_other_paths_are_seen_too() {
    let server = Server::new("a");
    let body = json!({ "input": [{ "role": "user", "content": [
        { "type": "input_text", "text": "See " },
        { "type": "input_image", "image_url": data(4, 3) },
    ] }] });
    let reply = server.post("/v1/responses", body).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    assert_eq!(server.hall.last().prompt, "user: See [4x3]\nassistant: ");
    let output = json!([{ "type": "input_image", "image_url": data(5, 3) }]);
    let body = json!({ "input": [
        { "role": "user", "content": "x" },
        { "type": "function_call_output", "call_id": "c", "output": output },
    ] });
    server.post("/v1/responses", body).await;
    assert_eq!(
        server.hall.last().prompt,
        "user: x\ntool: [5x3]\nassistant: "
    );

    let bare = BASE64_STANDARD.encode(png(6, 3));
    let prompt = json!({ "prompt_string": "See <__media__>!", "multimodal_data": [bare] });
    let body = server
        .post("/completion", json!({ "prompt": prompt }))
        .await
        .json();
    assert_eq!(server.hall.last().prompt, "See [6x3]!");
    assert_eq!(body["prompt"], "<s>See <__media__>!");
    for prompt in [
        json!({ "prompt_string": "See", "multimodal_data": [bare] }),
        json!({ "prompt_string": "<__media__><__media__>", "multimodal_data": [bare] }),
        json!({ "prompt_string": "<__media__>", "multimodal_data": [""] }),
        json!({ "prompt_string": "<__media__>", "multimodal_data": ["malformed"] }),
    ] {
        assert_eq!(
            server
                .post("/completion", json!({ "prompt": prompt }))
                .await
                .error()
                .0,
            400
        );
    }
}

#[tokio::test]
async fn what_is_no_picture_is_refused() {
    let server = Server::new("a");
    let cut = BASE64_STANDARD.encode(&png(40, 30)[..40]);
    for source in [
        "malformed",
        "",
        "data:text/html;base64,aGVsbG8=",
        "data:image/png;base64,aGVsbG8=",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "http://127.0.0.1/a.png",
        "https://example.org/a.png",
        "https://127.0.0.1/a.png",
        "ftp://example.org/a.png",
        "gopher://example.org",
        "file:///etc/passwd",
        "/etc/passwd",
        "a.png",
        "../a.png",
        &cut,
        &data(1, 1),
        &data(300, 2),
    ] {
        let (status, kind, message) = server.post(CHAT, shows(source)).await.error();
        assert_eq!(
            (status, kind.as_str()),
            (400, "invalid_request_error"),
            "{source}"
        );
        assert!(message.starts_with("picture 1: "), "{message}");
    }
    assert!(server.hall.asked.lock().unwrap().is_empty());
    let blind = Server::with(
        Scripted {
            vision: false,
            ..Scripted::new("a")
        },
        |_, _| {},
    );
    let (status, _, message) = blind.post(CHAT, shows(&data(4, 3))).await.error();
    assert_eq!(status, 400);
    assert!(message.contains("sees no pictures"), "{message}");
    let body = blind.get("/v1/models").await.json();
    assert_eq!(body["models"][0]["capabilities"], json!(["completion"]));
}

#[tokio::test]
async fn files_are_read_below_the_media_folder_alone() {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("media");
    std::fs::create_dir_all(folder.join("deep")).unwrap();
    std::fs::write(folder.join("deep/a.png"), png(4, 3)).unwrap();
    std::fs::write(outside.path().join("secret.png"), png(4, 3)).unwrap();
    let path = folder.clone();
    let server = Server::with(Scripted::new("a"), move |_, rules| {
        rules.media_path = Some(path)
    });
    let whole = folder.join("deep/a.png");
    let whole = whole.to_str().unwrap();
    for source in [
        "file://deep/a.png",
        "file:////deep//a.png",
        "deep/a.png",
        whole,
        &format!("file://{whole}"),
    ] {
        let reply = server.post(CHAT, shows(source)).await;
        assert_eq!(reply.status, StatusCode::OK, "{source}: {}", reply.text);
    }
    let secret = outside.path().join("secret.png");
    let secret = secret.to_str().unwrap();
    for source in [
        "file://../secret.png",
        "file://deep/../../secret.png",
        "file://%2e%2e/secret.png",
        &format!("file://{secret}"),
        secret,
        "file:///etc/passwd",
        "file://deep/nothing.png",
    ] {
        let (status, _, message) = server.post(CHAT, shows(source)).await.error();
        assert_eq!(status, 400, "{source}");
        assert_eq!(message, "picture 1: no such file below the media folder");
    }
}

#[tokio::test]
async fn remote_pictures_come_from_the_public_internet_alone() {
    let server = Server::with(Scripted::new("a"), |_, rules| rules.media_remote = true);
    for source in [
        "https://127.0.0.1/a.png",
        "https://[::1]/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1:8443/a.png",
        "https://[::ffff:192.168.0.1]/a.png",
        "https://localhost/a.png",
    ] {
        let (status, _, message) = server.post(CHAT, shows(source)).await.error();
        assert_eq!(status, 400, "{source}");
        assert!(
            message.contains("not on the public internet"),
            "{source}: {message}"
        );
    }
}

#[tokio::test]
async fn pictures_are_bounded_in_number_and_size() {
    let server = Server::with(Scripted::new("a"), |_, rules| {
        rules.pictures = 2;
        rules.pixels = 100;
        rules.picture.file = 2000;
    });
    let body = |sources: &[String]| {
        let parts: Vec<Value> = (sources.iter())
            .map(|source| json!({ "type": "image_url", "image_url": { "url": source } }))
            .collect();
        json!({ "messages": [{ "role": "user", "content": parts }] })
    };
    assert_eq!(
        server
            .post(CHAT, body(&[data(5, 10), data(5, 10)]))
            .await
            .status,
        StatusCode::OK
    );
    let message = |reply: Reply| {
        let (status, _, message) = reply.error();
        assert_eq!(status, 400);
        message
    };
    let many = message(
        server
            .post(CHAT, body(&[data(2, 2), data(2, 2), data(2, 2)]))
            .await,
    );
    assert!(many.contains("more than 2 pictures"), "{many}");
    let large = message(server.post(CHAT, body(&[data(5, 10), data(6, 10)])).await);
    assert!(
        large.starts_with("picture 2: ") && large.contains("50 pixels"),
        "{large}"
    );
    let heavy = message(server.post(CHAT, body(&["A".repeat(4000)])).await);
    assert!(heavy.contains("more than 2000 bytes"), "{heavy}");
}
