//! Which chat template a conversation goes through.

use crate::error::{Error, Result};
use crate::llama::Model;
use crate::llama::chat::{self, Message};

/// Which chat template to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Template {
    /// The one in the model's file; where it has none, prompts go in as they are.
    #[default]
    Model,
    /// By llama.cpp's name for it, or its text.
    Named(String),
    /// None: prompts go in as they are.
    Raw,
}

impl Template {
    /// Its name or text; `None` where prompts go in as they are. What cannot be used is refused now,
    /// not at the first question.
    ///
    /// # Errors
    /// [`Error::File`] when llama.cpp does not know the model's own, [`Error::Option`] for another
    /// that it does not know, or for a system prompt that no template takes.
    pub fn of(&self, model: &Model, system_prompt: Option<&str>) -> Result<Option<String>> {
        let text = match self {
            Template::Model => model.chat_template(),
            Template::Named(name) => Some(name.clone()),
            Template::Raw => None,
        };
        let Some(text) = text else {
            return match system_prompt {
                None => Ok(None),
                Some(_) => Err(Error::option(
                    "system_prompt",
                    "the model has no chat template to put it into, name one with `chat_template`",
                )),
            };
        };
        let probe = Message {
            role: "user".into(),
            content: "?".into(),
        };
        match chat::apply(model, &text, &[probe], true) {
            Ok(_) => Ok(Some(text)),
            Err(_) if *self == Template::Model => Err(Error::file(
                model.path(),
                "llama.cpp does not know its chat template, expected `chat_template` with a name such as phi3 or chatml, or `no_conversation`",
            )),
            Err(error) => Err(error),
        }
    }
}
