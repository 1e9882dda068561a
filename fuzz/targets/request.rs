//! Requests to `hae serve`, against a hall without a model. The first byte says what path is asked; the rest is
//! the body.

#![no_main]

use std::cell::RefCell;
use std::sync::{Arc, LazyLock};

use axum::body::{Body, to_bytes};
use axum::http::Request;
use hae::constrain::{Grammar, Grammars};
use hae::engine::{Constraint, Token};
use hae::llama::{Around, SamplerOptions};
use hae::policy::{Limits, PolicySpec};
use hae::prompt::{ChatTemplate, Input};
use hae::serve::http::router;
use hae::serve::http::service::{About, Constrain, Render, Rule, Rules, Service, Talk};
use libfuzzer_sys::fuzz_target;
use serde_json::Map;
use tokio::runtime::Runtime;
use tower::ServiceExt;

// The hall of hae's own tests, which names hae's modules as its own.
mod error {
    pub use hae::{Error, Result};
}
#[allow(unused_imports)]
use hae::{answer, attend, cache, engine, generate, llama, policy, serve};
#[allow(dead_code)]
#[path = "../../src/serve/http/tests/hall.rs"]
mod hall;

const PATHS: [&str; 16] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/completion",
    "/v1/models",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/slots/0?action=erase",
    "/v1/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
    "/completions",
    "/chat/completions",
    "/slots/0?action=save",
    "/props",
    "/health",
];

struct Own(ChatTemplate);

impl Render for Own {
    fn render(&self, talk: &Talk<'_>) -> hae::Result<String> {
        self.0.render(&Input {
            messages: talk.messages,
            tools: talk.tools,
            kwargs: talk.kwargs,
            add_generation_prompt: talk.add_generation_prompt,
            media: talk.media,
            now: None,
        })
    }

    fn text(&self) -> &str {
        self.0.text()
    }
}

struct Words(Grammars);

/// What no token can go on from is the model's to say, of which there is none here.
struct Lenient(Box<dyn Constraint>);

impl Constraint for Lenient {
    fn mask(&mut self, logits: &mut [f32]) -> hae::Result<()> {
        hae_fuzz::one_line(self.0.mask(logits));
        Ok(())
    }

    fn accept(&mut self, token: Token) -> hae::Result<()> {
        self.0.accept(token)
    }
}

impl Constrain for Words {
    fn constraint(&self, rule: &Rule<'_>) -> hae::Result<Box<dyn Constraint>> {
        let grammar = match rule {
            Rule::Grammar(text) => Grammar::gbnf(text)?,
            Rule::Schema(schema) => Grammar::json_schema(schema)?,
            Rule::Object => Grammar::json_object()?,
        };
        Ok(Box::new(Lenient(self.0.constraint(&grammar)?)))
    }
}

static SERVICE: LazyLock<Arc<Service>> = LazyLock::new(|| {
    let text = include_str!("../../tests/golden/chat/qwen2_tools.jinja");
    let template = ChatTemplate::new(text, true, Around::default(), Map::new()).unwrap();
    let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    words.push(b"\xff<s>".to_vec());
    words.push(b"\xff<end>".to_vec());
    let grammars = Grammars::of_words(&words, &[hall::EOG]).unwrap();
    let mut scripted = hall::Scripted::new(
        "Well, <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>é.",
    );
    scripted.queue = 64;
    let rules = Rules {
        pictures: 4,
        pixels: 1 << 20,
        only_local_hosts: false,
        ..Rules::default()
    };
    let about = About {
        aliases: Vec::new(),
        tags: Vec::new(),
        build: "fuzz".into(),
        limits: Limits {
            n_layer: 4,
            n_cells: hall::N_CTX,
        },
        eog: vec![hall::EOG],
        sampler: SamplerOptions::GREEDY,
        random_seed: false,
        policy: PolicySpec::full(),
        attend: attend::Attend::default(),
    };
    Service::new(
        Arc::new(scripted),
        Some(Arc::new(Own(template))),
        Some(Arc::new(Words(grammars))),
        about,
        rules,
    )
});

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
    );
}

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let Some((&first, body)) = data.split_first() else {
        return;
    };
    let path = PATHS[usize::from(first) % PATHS.len()];
    RUNTIME.with_borrow(|runtime| {
        runtime.block_on(async {
            let request = Request::builder()
                .method("POST")
                .uri(path)
                .header("host", "localhost")
                .header("content-type", "application/json")
                .body(Body::from(body.to_vec()))
                .unwrap();
            let Ok(response) = router(&SERVICE).oneshot(request).await;
            let status = response.status();
            let text = to_bytes(response.into_body(), usize::MAX).await.unwrap();
            assert_ne!(status.as_u16(), 500, "{}", String::from_utf8_lossy(&text));
            if !status.is_success() {
                let said: serde_json::Value = serde_json::from_slice(&text).unwrap();
                assert!(said["error"]["message"].is_string(), "{said}");
            }
        });
    });
});
