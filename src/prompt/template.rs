//! Which chat template a conversation goes through, and what it makes of messages.

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::jinja::{Given, Jinja};
use super::shape::Shape;
use crate::error::{Error, Result};
use crate::llama::chat::{self, Message};
use crate::llama::{Around, Model};

const NAME: &str = "chat_template";

/// Where a chat template comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// The one in the model's file; where it has none, prompts go in as they are.
    #[default]
    Model,
    /// By llama.cpp's name for it, or its text.
    Named(String),
    /// None: prompts go in as they are.
    Raw,
}

/// Which chat template to use, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Where it comes from.
    pub source: Source,
    /// Whether its text is run. Otherwise llama.cpp's list of templates tells which one it is.
    pub jinja: bool,
    /// What the template is given besides the messages, by the names that it knows.
    pub kwargs: Map<String, Value>,
}

/// The model's own.
impl Default for Template {
    fn default() -> Self {
        Template::from(Source::Model)
    }
}

impl From<Source> for Template {
    fn from(source: Source) -> Self {
        Template {
            source,
            jinja: true,
            kwargs: Map::new(),
        }
    }
}

impl Template {
    /// Ready for messages; `None` where prompts go in as they are. What cannot be used is refused now,
    /// not at the first question.
    ///
    /// # Errors
    /// [`Error::File`] for a template of the model's that cannot be used, [`Error::Option`] for
    /// another.
    pub fn of(&self, model: &Model) -> Result<Option<ChatTemplate>> {
        let text = match &self.source {
            Source::Model => model.chat_template(),
            Source::Named(name) => Some(name.clone()),
            Source::Raw => None,
        };
        let Some(text) = text else { return Ok(None) };
        let made = ChatTemplate::new(&text, self.jinja, model.around(), self.kwargs.clone());
        match made {
            Ok(template) => Ok(Some(template)),
            Err(Error::Option { reason, .. }) if self.source == Source::Model => {
                let reason = format!(
                    "its chat template cannot be used ({reason}), expected `{NAME}` with a name such as phi3 or chatml, or `no_conversation`"
                );
                Err(Error::file(model.path(), reason))
            }
            Err(error) => Err(error),
        }
    }
}

/// What a template makes a prompt of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// As OpenAI's interface has them: objects with a `role`, a `content` that is a text, a list of
    /// parts or null, and what else templates know.
    pub messages: &'a [Value],
    /// Tools that the model may call, a list as in OpenAI's interface.
    pub tools: Option<&'a Value>,
    /// What the template is given besides, over what [`Template::kwargs`] has.
    pub kwargs: Option<&'a Map<String, Value>>,
    /// Whether it ends with the tokens that start an answer.
    pub add_generation_prompt: bool,
    /// Takes the place of each part of a message that is no text, in their order.
    pub media: &'a str,
    /// What templates take for now; `None`: the system's clock.
    pub now: Option<SystemTime>,
}

/// A chat template that is ready for messages. Clones share it.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Ready>);

struct Ready {
    text: String,
    /// `None`: llama.cpp's list tells which template it is.
    jinja: Option<(Jinja, Shape)>,
    /// Why the text is not run, where it was to be.
    fallback: Option<String>,
    around: Around,
    kwargs: Map<String, Value>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("text", &self.0.text)
            .field("jinja", &self.is_jinja())
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// From a name of llama.cpp's list, or a text. `jinja`: the text is run, and where that does not
    /// work, llama.cpp's list tells which template it is.
    ///
    /// # Errors
    /// [`Error::Option`] where neither works.
    pub fn new(
        text: &str,
        jinja: bool,
        around: Around,
        kwargs: Map<String, Value>,
    ) -> Result<Self> {
        let made = |jinja, fallback| {
            ChatTemplate(Arc::new(Ready {
                text: text.to_owned(),
                jinja,
                fallback,
                around,
                kwargs,
            }))
        };
        if !jinja || chat::names().iter().any(|name| name == text) {
            known(text)?;
            return Ok(made(None, None));
        }
        match Jinja::compile(text).and_then(|jinja| Ok((Shape::of(&jinja)?, jinja))) {
            // A word that is no name is a template, too, of which nobody would want the text.
            Ok((shape, _)) if !shape.says_anything() => {
                known(text)?;
                Ok(made(None, None))
            }
            Ok((shape, jinja)) => Ok(made(Some((jinja, shape)), None)),
            Err(error) => match known(text) {
                Ok(()) => Ok(made(None, Some(reason(error)))),
                Err(_) => Err(error),
            },
        }
    }

    /// One of llama.cpp's list, by its name or a text that it knows.
    ///
    /// # Errors
    /// [`Error::Option`] for one that it does not know.
    pub fn built_in(name: &str) -> Result<Self> {
        ChatTemplate::new(name, false, Around::default(), Map::new())
    }

    /// Its text, or its name in llama.cpp's list.
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// Whether its text is run; otherwise it is one of llama.cpp's list.
    pub fn is_jinja(&self) -> bool {
        self.0.jinja.is_some()
    }

    /// Why it is one of llama.cpp's list although its text was to be run.
    pub fn fallback(&self) -> Option<&str> {
        self.0.fallback.as_deref()
    }

    /// Whether it tells the model of tools by itself.
    pub fn takes_tools(&self) -> bool {
        let shape = self.0.jinja.as_ref().map(|(_, shape)| shape);
        shape.is_some_and(|shape| shape.tools)
    }

    /// The text of a conversation.
    ///
    /// A message goes in as the template knows it: a list of parts as one text or a text as a list, a
    /// system message in the first user's where there is no such role, a call's `arguments` as an
    /// object. A BOS or EOS at the ends is left out where tokenizing adds it.
    ///
    /// # Errors
    /// [`Error::Option`]: of `messages` that are none, of `tools` for a template that is not run, and
    /// of `chat_template` for what the template itself says, or is.
    pub fn render(&self, input: &Input<'_>) -> Result<String> {
        let ready = &*self.0;
        let text = match &ready.jinja {
            Some((jinja, shape)) => {
                let messages = shape.fitted(input.messages, input.media)?;
                let more: Vec<&Map<String, Value>> =
                    input.kwargs.into_iter().chain([&ready.kwargs]).collect();
                jinja.render(&Given {
                    messages: &messages,
                    tools: input.tools,
                    more: &more,
                    bos: &ready.around.bos,
                    eos: &ready.around.eos,
                    add_generation_prompt: input.add_generation_prompt,
                    now: input.now.unwrap_or_else(SystemTime::now),
                })?
            }
            None => {
                if input.tools.is_some() {
                    let reason = "its text has to be run for that, which it is not";
                    return Err(Error::option("tools", reason));
                }
                let messages = Shape::PLAIN.fitted(input.messages, input.media)?;
                let messages: Vec<Message> = messages.iter().map(plain).collect();
                chat::apply(&ready.text, &messages, input.add_generation_prompt)?
            }
        };
        Ok(ready.without_ends(text))
    }

    /// The text of messages that are nothing but texts.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub(super) fn apply(&self, messages: &[Message], open_answer: bool) -> Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| json!({"role": m.role, "content": m.content}))
            .collect();
        self.render(&Input {
            messages: &messages,
            add_generation_prompt: open_answer,
            ..Input::default()
        })
    }
}

impl Ready {
    /// As llama.cpp does it (`common_chat_template_direct_apply`).
    fn without_ends(&self, text: String) -> String {
        let Around {
            bos,
            eos,
            adds_bos,
            adds_eos,
        } = &self.around;
        let mut rest = text.as_str();
        if *adds_bos && !bos.is_empty() {
            rest = rest.strip_prefix(bos.as_str()).unwrap_or(rest);
        }
        if *adds_eos && !eos.is_empty() {
            rest = rest.strip_suffix(eos.as_str()).unwrap_or(rest);
        }
        match rest.len() == text.len() {
            true => text,
            false => rest.to_owned(),
        }
    }
}

/// Checks that llama.cpp's list has it.
fn known(text: &str) -> Result<()> {
    let probe = Message {
        role: "user".into(),
        content: "?".into(),
    };
    chat::apply(text, &[probe], true).map(|_| ())
}

fn plain(message: &Value) -> Message {
    let text = |key| message[key].as_str().unwrap_or_default().to_owned();
    Message {
        role: text("role"),
        content: text("content"),
    }
}

fn reason(error: Error) -> String {
    match error {
        Error::Option { reason, .. } => reason,
        error => error.to_string(),
    }
}

/// As a session keeps it.
#[derive(Serialize, Deserialize)]
struct Kept {
    text: String,
    jinja: bool,
    around: Around,
    /// JSON, since the session's own encoding needs to know its types.
    kwargs: String,
}

impl Serialize for ChatTemplate {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let kwargs = serde_json::to_string(&self.0.kwargs).map_err(serde::ser::Error::custom)?;
        let kept = Kept {
            text: self.0.text.clone(),
            jinja: self.is_jinja(),
            around: self.0.around.clone(),
            kwargs,
        };
        kept.serialize(to)
    }
}

impl<'de> Deserialize<'de> for ChatTemplate {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let kept = Kept::deserialize(from)?;
        let kwargs = serde_json::from_str(&kept.kwargs).map_err(serde::de::Error::custom)?;
        ChatTemplate::new(&kept.text, kept.jinja, kept.around, kwargs)
            .map_err(serde::de::Error::custom)
    }
}
