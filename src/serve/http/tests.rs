//! Every path against a hall without a model.

mod chats;
mod completions;
mod fields;
mod guards;
mod hall;
mod limits;
mod natives;
mod page;
mod pictures;
mod responses;
mod sockets;
mod states;

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::service::{About, Constrain, Render, Rule, Rules, Service, Talk};
use crate::attend::Attend;
use crate::engine::{Constraint, Token};
use crate::error::{Error, Result};
use crate::llama::SamplerOptions;
use crate::policy::{Limits, PolicySpec};
use crate::serve::ask::Hall;
use hall::Scripted;

/// `role: content` line by line, with the tools in front.
struct Lines;

impl Render for Lines {
    fn render(&self, talk: &Talk<'_>) -> Result<String> {
        let mut text = String::new();
        if let Some(tools) = talk.tools {
            for tool in tools.as_array().unwrap() {
                text += &format!("tool {}\n", tool["function"]["name"].as_str().unwrap());
            }
        }
        if let Some(kwargs) = talk.kwargs {
            text += &format!("{}\n", Value::Object(kwargs.clone()));
        }
        for message in talk.messages {
            let content = match &message["content"] {
                Value::String(text) => text.clone(),
                Value::Array(parts) => (parts.iter())
                    .map(|part| part["text"].as_str().unwrap_or(talk.media))
                    .collect(),
                _ => message["tool_calls"].to_string(),
            };
            if content == "raise" {
                return Err(Error::option("chat_template", "it raised"));
            }
            text += &format!("{}: {content}\n", message["role"].as_str().unwrap());
        }
        if talk.add_generation_prompt {
            text += "assistant: ";
        }
        Ok(text)
    }

    fn text(&self) -> &str {
        "{{ lines }}"
    }
}

/// Allows the first byte of the rule's text.
struct First(Token);

impl Constraint for First {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        for (token, logit) in (0..).zip(logits) {
            if token != self.0 {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, _: Token) -> Result<()> {
        Ok(())
    }
}

struct Firsts;

impl Constrain for Firsts {
    fn constraint(&self, rule: &Rule<'_>) -> Result<Box<dyn Constraint>> {
        let first = match rule {
            Rule::Grammar("bad") => return Err(Error::option("grammar", "is none")),
            Rule::Grammar(text) => text.bytes().next().unwrap(),
            Rule::Schema(schema) if schema["type"] == "hiccup" => {
                return Err(Error::option("json_schema", "no such type"));
            }
            Rule::Schema(_) => b'[',
            Rule::Object => b'{',
        };
        Ok(Box::new(First(Token::from(first))))
    }
}

fn about() -> About {
    About {
        aliases: Vec::new(),
        tags: Vec::new(),
        build: "b1-test".into(),
        limits: Limits {
            n_layer: 4,
            n_cells: hall::N_CTX,
        },
        eog: vec![hall::EOG],
        sampler: SamplerOptions {
            seed: 7,
            temp: 0.8,
            ..SamplerOptions::GREEDY
        },
        random_seed: false,
        policy: PolicySpec::full(),
        attend: Attend::default(),
    }
}

/// A server and what stands behind it.
struct Server {
    hall: Arc<Scripted>,
    service: Arc<Service>,
}

/// What came back.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The message of a failure, which has OpenAI's shape.
    fn error(&self) -> (u16, String, String) {
        let error = &self.json()["error"];
        assert_eq!(error["code"], self.status.as_u16(), "{}", self.text);
        let text = |name: &str| error[name].as_str().unwrap().to_owned();
        assert!(!text("message").contains('\n'));
        (self.status.as_u16(), text("type"), text("message"))
    }

    /// The data of events, `[DONE]` as a text.
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let data = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| match data {
            "[DONE]" => json!("[DONE]"),
            data => serde_json::from_str(data).unwrap(),
        })
        .collect()
    }
}

impl Server {
    fn new(answer: &str) -> Self {
        Server::with(Scripted::new(answer), |_, _| {})
    }

    fn with(hall: Scripted, change: impl FnOnce(&mut About, &mut Rules)) -> Self {
        let hall = Arc::new(hall);
        let (mut about, mut rules) = (about(), Rules::default());
        change(&mut about, &mut rules);
        let service = Service::new(
            Arc::clone(&hall) as Arc<dyn Hall>,
            Some(Arc::new(Lines)),
            Some(Arc::new(Firsts)),
            about,
            rules,
        );
        Server { hall, service }
    }

    async fn send(&self, request: Request<Body>) -> Reply {
        let response = super::router(&self.service).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        Reply {
            status: parts.status,
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    async fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut request = Request::builder().method(method).uri(path);
        request = request.header("content-length", body.len());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Body::from(body.to_owned())).unwrap())
            .await
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        self.raw("POST", path, &[], &body.to_string()).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.raw("GET", path, &[], "").await
    }
}

/// A chat of one message.
fn chat(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }] })
}

/// With more fields.
fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}
