//! What the interface serves, and what it allows. The command line makes it; nothing here knows a model.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::Semaphore;

use super::super::ask::Hall;
use super::ids;
use crate::attend::Attend;
use crate::engine::{Constraint, Token};
use crate::error::Result;
use crate::image;
use crate::llama::SamplerOptions;
use crate::policy::{self, PolicySpec};

/// A conversation for a chat template.
pub struct Talk<'a> {
    /// In OpenAI's shape. What is no text among the parts of a content is a picture.
    pub messages: &'a [Value],
    /// Tools in OpenAI's shape, an array.
    pub tools: Option<&'a Value>,
    /// What else the request says to the template (`chat_template_kwargs`).
    pub kwargs: Option<&'a Map<String, Value>>,
    /// Whether the beginning of an answer comes behind the last message.
    pub add_generation_prompt: bool,
    /// What stands in the text for each picture, in order. No message holds it.
    pub media: &'a str,
}

/// A chat template.
pub trait Render: Send + Sync {
    /// The conversation as the model reads it.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for what the template refuses.
    fn render(&self, talk: &Talk<'_>) -> Result<String>;
    /// Its own text.
    fn text(&self) -> &str;
}

/// What an answer has to keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule<'a> {
    /// llama.cpp's grammars, from the rule `root`.
    Grammar(&'a str),
    /// A JSON schema.
    Schema(&'a Value),
    /// Any JSON object.
    Object,
}

/// Makes constraints for the model's vocabulary.
pub trait Constrain: Send + Sync {
    /// One for one answer.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for a grammar or a schema that cannot be.
    fn constraint(&self, rule: &Rule<'_>) -> Result<Box<dyn Constraint>>;
}

/// What clients are told beside the hall's facts, and what answers are like where a request says nothing.
#[derive(Clone, Debug)]
pub struct About {
    /// Names that the model answers to, the first one first; none: the hall's.
    pub aliases: Vec<String>,
    /// What clients may want to know of it, beside its names.
    pub tags: Vec<String>,
    /// What the program was built from: `system_fingerprint`.
    pub build: String,
    /// What policies have to keep to.
    pub limits: policy::Limits,
    /// Tokens that end an answer.
    pub eog: Vec<Token>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Whether each request without a seed gets one of its own.
    pub random_seed: bool,
    /// What leaves the cache.
    pub policy: PolicySpec,
    /// What decoding steps attend to.
    pub attend: Attend,
}

/// What is allowed.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Keys that requests may come with; none: everybody may ask.
    pub keys: Vec<String>,
    /// Folder below which requests may name pictures.
    pub media_path: Option<PathBuf>,
    /// Whether pictures are fetched from other machines, by https.
    pub media_remote: bool,
    /// Folder of saved slots.
    pub slot_save_path: Option<PathBuf>,
    /// Whether `/metrics` is there.
    pub metrics: bool,
    /// Whether `/slots` is there.
    pub show_slots: bool,
    /// Whether the page for people is there.
    pub page: bool,
    /// Web pages of other origins that may ask: `*`, `localhost`, or origins. None: no page.
    pub origins: Vec<String>,
    /// Whether names of other machines in `Host` are refused: where only this machine can ask, one is
    /// the sign of a web page that gave its own name this machine's address.
    pub only_local_hosts: bool,
    /// Bytes of a request.
    pub body: usize,
    /// Pictures of a request.
    pub pictures: usize,
    /// Each picture.
    pub picture: image::Limits,
    /// Crops that a picture is cut into at most; `None`: as the vision file says.
    pub num_crops: Option<u32>,
    /// Pixels of all pictures of a request.
    pub pixels: u64,
    /// Whether answers tell of their prompts and settings where a request says nothing.
    pub verbose: bool,
    /// Tokens of an answer at most where a request does not say; `None`: as many as there is room for.
    pub n_predict: Option<usize>,
    /// Answers that one request may ask for.
    pub answers: usize,
    /// How long an answer may take, waiting included.
    pub timeout: Duration,
    /// How long a client may take to send the head of a request.
    pub patience: Duration,
    /// How long it may take to send the rest.
    pub upload: Duration,
}

impl Default for Rules {
    fn default() -> Self {
        Rules {
            keys: Vec::new(),
            media_path: None,
            media_remote: false,
            slot_save_path: None,
            metrics: false,
            show_slots: true,
            page: true,
            origins: Vec::new(),
            only_local_hosts: true,
            body: 64 << 20,
            pictures: 16,
            picture: image::Limits {
                file: 32 << 20,
                ..image::Limits::default()
            },
            pixels: 64 << 20,
            verbose: false,
            num_crops: None,
            n_predict: None,
            answers: 8,
            timeout: Duration::from_secs(3600),
            patience: Duration::from_secs(30),
            upload: Duration::from_secs(300),
        }
    }
}

/// Pictures that are decoded at once: each may take hundreds of MiB.
const DECODERS: usize = 2;

/// All that requests are answered from.
pub struct Service {
    pub(super) hall: Arc<dyn Hall>,
    pub(super) render: Option<Arc<dyn Render>>,
    pub(super) constrain: Option<Arc<dyn Constrain>>,
    pub(super) about: About,
    pub(super) rules: Rules,
    /// Seconds since 1970 at which it began.
    pub(super) started: u64,
    pub(super) decoders: Arc<Semaphore>,
}

impl Service {
    /// `render`: the chat template, `None`: there is none, and chats are refused. `constrain`: `None`:
    /// grammars and schemas are refused.
    pub fn new(
        hall: Arc<dyn Hall>,
        render: Option<Arc<dyn Render>>,
        constrain: Option<Arc<dyn Constrain>>,
        about: About,
        rules: Rules,
    ) -> Arc<Self> {
        Arc::new(Service {
            hall,
            render,
            constrain,
            about,
            rules,
            started: ids::now(),
            decoders: Arc::new(Semaphore::new(DECODERS)),
        })
    }

    /// The names that the model answers to, one at least.
    pub(super) fn names(&self) -> Vec<&str> {
        match &self.about.aliases[..] {
            [] => vec![&self.hall.facts().alias],
            aliases => aliases.iter().map(String::as_str).collect(),
        }
    }

    /// The model's own name.
    pub(super) fn name(&self) -> &str {
        match self.about.aliases.first() {
            Some(name) => name,
            None => &self.hall.facts().alias,
        }
    }
}
