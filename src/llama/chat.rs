//! Chat templates, through llama.cpp's own list of them.

use llama_cpp_2::model::{LlamaChatMessage, LlamaChatTemplate};

use super::{Model, log};
use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

/// Formats a conversation. `template` is a name that llama.cpp knows or a template's text;
/// `open_answer` ends with the tokens that start an answer.
///
/// # Errors
/// [`Error::Option`] when llama.cpp does not know the template.
pub fn apply(
    model: &Model,
    template: &str,
    messages: &[Message],
    open_answer: bool,
) -> Result<String> {
    let bad = |reason: String| Error::option("--chat-template", reason);
    let template = LlamaChatTemplate::new(template)
        .map_err(|_| bad("the template contains a NUL byte".into()))?;
    let messages = messages
        .iter()
        .map(|m| LlamaChatMessage::new(m.role.to_owned(), m.content.clone()))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|_| Error::option("-p", "the prompt contains a NUL byte"))?;
    log::forget();
    model
        .inner
        .apply_chat_template(&template, &messages, open_answer)
        .map_err(|_| {
            bad(log::take_reason(
                "llama.cpp does not know this template, expected a name such as phi3, chatml or llama3",
            ))
        })
}
