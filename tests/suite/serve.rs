//! `hae serve` with the built-in model, over real sockets.
#![cfg(all(unix, feature = "serve"))]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::bin::hae;
use crate::model::repository;

const CHAT: &str = "/v1/chat/completions";

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(hae().get_program())
            .args([
                "serve", "--port", "0", "-t", "1", "-c", "2048", "--temp", "0",
            ])
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening at http://");
        let address = address.unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Server { child, address }
    }

    /// Status and body.
    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (host, n) = (&self.address, body.len());
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: {host}\r\n{headers}Content-Length: {n}\r\n\r\n{body}"
        )
        .unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let status = reply.split(' ').nth(1).unwrap().parse().unwrap();
        let body = reply.split_once("\r\n\r\n").unwrap().1;
        (status, body.to_owned())
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let (status, text) = self.send("POST", path, "", &body.to_string());
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Asks it to end, and waits; the status that it leaves.
    fn end(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", "TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
        self.child.wait().unwrap().code()
    }
}

/// A test that fails leaves no server behind.
impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn shows_the_demo(question: &str) -> Value {
    let picture = std::fs::read(repository("models/demo.png")).unwrap();
    let url = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(picture));
    json!({
        "max_tokens": 8,
        "messages": [{ "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": url } },
            { "type": "text", "text": question },
        ] }],
    })
}

/// Layers and their cache lie on two workers (`--rpc`).
#[cfg(feature = "rpc")]
#[test]
fn workers_that_have_its_layers_change_no_answer() {
    let workers = crate::rpc::Worker::two();
    let rpc = crate::rpc::list(&workers);
    let policy = ["--kv-policy", "hae", "--kv-budget", "0.5"];
    let answers = |there: &[&str]| {
        let server = Server::start(&[&policy[..], there].concat());
        let question = shows_the_demo("Where is the red triangle?");
        // The second goes on from what is left of the first.
        [(); 2].map(|()| {
            let answer = server.post(CHAT, &question);
            let text = answer["choices"][0]["message"]["content"].clone();
            (text, answer["hae"]["cells"].clone())
        })
    };
    let there = answers(&crate::rpc::halves(&rpc));
    assert!(there[0].1["evicted"]["vision"].as_u64().unwrap() > 0);
    assert_eq!(there, answers(&["--device", "none"]));
}

#[test]
fn a_picture_is_asked_about_whole_and_in_pieces() {
    let server = Server::start(&[]);
    let ask = shows_the_demo("Where is the red triangle?");
    let first = server.post(CHAT, &ask);
    let text = &first["choices"][0]["message"]["content"];
    assert_eq!(text.as_str().unwrap().trim(), "Row 6, column 7");
    assert!(first["usage"]["prompt_tokens"].as_u64().unwrap() > 100);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(first["hae"]["policy"]["name"], "full");
    assert_eq!(first["hae"]["cells"]["evicted"]["vision"], 0);
    assert!(first["hae"]["bytes"]["in_use"].as_u64().unwrap() > 0);

    let again = server.post(CHAT, &ask);
    assert_eq!(again["choices"][0]["message"]["content"], *text);
    let cached = &again["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64().unwrap() > 100, "{cached}");

    let mut streamed = ask.clone();
    streamed["stream"] = true.into();
    let (status, events) = server.send("POST", CHAT, "", &streamed.to_string());
    assert_eq!(status, 200);
    let events: Vec<&str> = events
        .lines()
        .filter_map(|l| l.strip_prefix("data: "))
        .collect();
    let (done, pieces) = events.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    let pieces = pieces
        .iter()
        .map(|piece| serde_json::from_str::<Value>(piece).unwrap());
    let said: String = pieces
        .filter_map(|piece| Some(piece["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(*text, said);

    let mut small = ask;
    small["hae"] = json!({ "kv_policy": "hae", "options": { "recall": false } });
    let small = server.post(CHAT, &small);
    assert_eq!(small["hae"]["policy"]["name"], "hae");
    assert!(small["hae"]["cells"]["evicted"]["vision"].as_u64().unwrap() > 0);
    assert_eq!(server.end(), Some(143));
}

#[test]
fn texts_are_continued_within_a_schema_and_with_probabilities() {
    let server = Server::start(&["--api-key", "secret"]);
    let body = json!({
        "prompt": "The", "n_predict": 12, "n_probs": 2,
        "json_schema": { "type": "integer", "minimum": 10, "maximum": 99 },
    });
    let (status, _) = server.send("POST", "/completion", "", &body.to_string());
    assert_eq!(status, 401);
    let key = "Authorization: Bearer secret\r\n";
    let (status, text) = server.send("POST", "/completion", key, &body.to_string());
    assert_eq!(status, 200, "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    let number: u32 = answer["content"].as_str().unwrap().trim().parse().unwrap();
    assert!((10..100).contains(&number));
    let probs = answer["completion_probabilities"].as_array().unwrap();
    assert_eq!(
        probs.len() as u64,
        answer["tokens_predicted"].as_u64().unwrap()
    );
    assert!(
        probs
            .iter()
            .all(|prob| prob["logprob"].as_f64().unwrap() <= 0.0)
    );
    let (status, text) = server.send("GET", "/health", "", "");
    assert_eq!((status, text.as_str()), (200, "{\"status\":\"ok\"}"));
}

#[test]
fn a_client_that_goes_frees_its_slot() {
    let server = Server::start(&["-np", "1"]);
    let body = json!({ "prompt": "The", "ignore_eos": true, "stream": true }).to_string();
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let (host, n) = (&server.address, body.len());
    write!(
        stream,
        "POST /completion HTTP/1.1\r\nHost: {host}\r\nContent-Length: {n}\r\n\r\n{body}"
    )
    .unwrap();
    let mut first = [0; 200];
    stream.read_exact(&mut first).unwrap();
    drop(stream);
    let start = Instant::now();
    loop {
        let (_, slots) = server.send("GET", "/slots", "", "");
        let slots: Value = serde_json::from_str(&slots).unwrap();
        if slots[0]["is_processing"] == false {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{slots}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_cannot_be_served_is_said_in_a_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, reason) in [
        (vec!["--port", &port], "--host: cannot listen at"),
        (vec!["--media-path", "no/such/folder"], "--media-path: "),
        (vec!["--api-key", ""], "--api-key: is empty"),
        (vec!["--api-key-file", "no/such/file"], "no/such/file: "),
        (vec!["-np", "0"], "--parallel: 0 slots"),
        (vec!["-to", "0"], "--timeout: 0 seconds"),
        (vec!["-n", "-3"], "-n: -3"),
    ] {
        let output = hae().arg("serve").args(&args).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(
            text.contains(reason) && text.lines().count() == 1,
            "{args:?}: {text}"
        );
    }
    let output = hae().args(["run", "--port", "1"]).output().unwrap();
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("hae serve")
    );
}
