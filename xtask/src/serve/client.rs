//! Those who ask: polite ones, slow ones, ones that go, and ones that send garbage.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use ureq::Agent;

/// An answer takes no longer than this on any machine; one that does is lost.
const PATIENCE: Duration = Duration::from_secs(300);

const CHAT: &str = "/v1/chat/completions";

/// A client of one server.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    address: String,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub text: String,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those that the slot held.
    pub cached: usize,
}

/// What came of a request.
#[derive(Debug)]
pub enum Reply {
    Said(Said),
    /// The queue was full: try again after so many seconds.
    Busy(u64),
}

/// How a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    Fast,
    /// With a rest after each line.
    Slow(Duration),
    /// Gone after so many pieces.
    Vanishes(usize),
}

impl Client {
    /// Of the server at this address.
    pub fn new(address: &str) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build();
        Client {
            agent: config.into(),
            address: address.to_owned(),
        }
    }

    /// Asks, and reads the whole answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn ask(&self, request: &Value) -> Result<Reply> {
        let mut response = self.post(request.to_string())?;
        if let Some(busy) = busy(&response) {
            return Ok(busy);
        }
        let status = response.status();
        let text = response.body_mut().read_to_string().context("an answer")?;
        ensure!(status == 200, "{status}: {text}");
        let answer: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let content = answer["choices"][0]["message"]["content"].as_str();
        let text = content.context("an answer without a text")?.to_owned();
        let usage = &answer["usage"];
        Ok(Reply::Said(Said {
            text,
            tokens: number(&usage["completion_tokens"])?,
            prompt: number(&usage["prompt_tokens"])?,
            cached: number(&usage["prompt_tokens_details"]["cached_tokens"])?,
        }))
    }

    /// Asks in pieces. The text, and whether all of it came; `None`: the queue was full, for so long.
    ///
    /// # Errors
    /// When the stream ends early, or says that it failed.
    pub fn stream(&self, request: &Value, pace: Pace) -> Result<std::result::Result<String, u64>> {
        let response = self.post(request.to_string())?;
        if let Some(Reply::Busy(seconds)) = busy(&response) {
            return Ok(Err(seconds));
        }
        let status = response.status();
        let lines = BufReader::new(response.into_body().into_reader());
        let (mut text, mut pieces) = (String::new(), 0);
        for line in lines.lines() {
            let line = line.context("a stream")?;
            ensure!(status == 200, "{status}: {line}");
            let Some(data) = line.strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                return Ok(Ok(text));
            }
            let piece: Value = serde_json::from_str(data).with_context(|| data.to_owned())?;
            ensure!(piece["error"].is_null(), "{}", piece["error"]);
            let content = piece["choices"][0]["delta"]["content"].as_str();
            text += content.unwrap_or_default();
            pieces += usize::from(content.is_some_and(|content| !content.is_empty()));
            match pace {
                Pace::Fast => {}
                Pace::Slow(rest) => std::thread::sleep(rest),
                // The connection is closed with what is left of the answer in it.
                Pace::Vanishes(after) if pieces >= after => return Ok(Ok(text)),
                Pace::Vanishes(_) => {}
            }
        }
        bail!("a stream without an end, after {text:?}")
    }

    /// Sends what is no request. It has to be refused, or the connection closed.
    ///
    /// # Errors
    /// When it is answered as if it were one.
    pub fn garbage(&self, kind: usize) -> Result<()> {
        let host = &self.address;
        let header = format!("POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
        let with_body =
            |body: &str| format!("{header}Content-Length: {}\r\n\r\n{body}", body.len());
        let sent = match kind % 6 {
            0 => "\u{16}\u{3}\u{1}no TLS here\r\n\r\n".to_owned(),
            1 => with_body("{\"messages\": [{\"role\": \"us"),
            2 => with_body("{\"messages\": [], \"temperature\": \"hot\"}"),
            3 => with_body(
                "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \
                 \"image_url\": {\"url\": \"data:image/png;base64,iVBORw0KGgoAAAA\"}}]}]}",
            ),
            4 => format!("{header}Content-Length: 18446744073709551615\r\n\r\n{{"),
            // Promises more than it sends.
            _ => format!("{header}Content-Length: 1000\r\n\r\n{{\"messages\": ["),
        };
        let mut stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(sent.as_bytes())?;
        if kind % 6 == 5 {
            return Ok(());
        }
        let mut reply = Vec::new();
        // Cut off is refused, too.
        let _ = stream.read_to_end(&mut reply);
        let reply = String::from_utf8_lossy(&reply);
        let status = reply.split(' ').nth(1).unwrap_or("4");
        ensure!(status.starts_with('4'), "garbage {kind} got {reply:?}");
        Ok(())
    }

    /// What the server counts, by name; of those with labels none.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub fn metrics(&self) -> Result<HashMap<String, f64>> {
        let url = format!("http://{}/metrics", self.address);
        let text = self.agent.get(url).call()?.body_mut().read_to_string()?;
        Ok(counts(&text))
    }

    fn post(&self, body: String) -> Result<ureq::http::Response<ureq::Body>> {
        let url = format!("http://{}{CHAT}", self.address);
        let request = self
            .agent
            .post(url)
            .header("content-type", "application/json");
        request.send(body).context("a request")
    }
}

fn busy(response: &ureq::http::Response<ureq::Body>) -> Option<Reply> {
    let after = || {
        response
            .headers()
            .get("retry-after")?
            .to_str()
            .ok()?
            .parse()
            .ok()
    };
    (response.status() == 503).then(after)?.map(Reply::Busy)
}

fn number(value: &Value) -> Result<usize> {
    let n = value.as_u64().context("an answer without counts")?;
    Ok(usize::try_from(n)?)
}

fn counts(text: &str) -> HashMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let (name, n) = line.split_once(' ')?;
            Some((name.to_owned(), n.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Answers one connection with this.
    fn served(reply: &'static str) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = Client::new(&listener.local_addr().unwrap().to_string());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).unwrap();
            stream.write_all(reply.as_bytes()).unwrap();
        });
        client
    }

    #[test]
    fn a_stream_that_is_cut_off_is_no_answer() {
        const HEAD: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\
            data: {\"choices\":[{\"delta\":{\"content\":\"Red\"}}]}\n\n";
        let request = Value::Null;
        assert!(served(HEAD).stream(&request, Pace::Fast).is_err());
        let vanished = served(HEAD).stream(&request, Pace::Vanishes(1)).unwrap();
        assert_eq!(vanished, Ok("Red".to_owned()));
        let failed =
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {\"error\":{}}\n\ndata: [DONE]\n\n";
        assert!(served(failed).stream(&request, Pace::Fast).is_err());
    }

    #[test]
    fn a_full_queue_says_how_long() {
        let full =
            "HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let reply = served(full).ask(&Value::Null).unwrap();
        assert!(matches!(reply, Reply::Busy(7)), "{reply:?}");
        let ended = "HTTP/1.1 503 Closing\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        assert!(served(ended).ask(&Value::Null).is_err());
    }

    #[test]
    fn counts_are_those_without_labels() {
        let all = counts("# HELP a b\na 3\nb{slot=\"0\"} 4\nc 0.5\n");
        assert_eq!((all.get("a"), all.get("c")), (Some(&3.0), Some(&0.5)));
        assert!(!all.contains_key("b"));
    }
}
