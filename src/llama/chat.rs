//! Chat templates, through llama.cpp's own list of them.

use std::ffi::CStr;

use llama_cpp_2::model::{LlamaChatMessage, LlamaChatTemplate};
use llama_cpp_sys_2 as sys;

use super::{Model, log};
use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The message itself.
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
    let bad = |reason: String| Error::option("chat_template", reason);
    let template = LlamaChatTemplate::new(template)
        .map_err(|_| bad("the template contains a NUL byte".into()))?;
    let messages = messages
        .iter()
        .map(|m| LlamaChatMessage::new(m.role.to_owned(), m.content.clone()))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|_| Error::option("prompt_text", "the prompt contains a NUL byte"))?;
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

/// The names of the templates that llama.cpp knows.
pub fn names() -> Vec<String> {
    // SAFETY: with no room for any, the function only counts them.
    let n = unsafe { sys::llama_chat_builtin_templates(std::ptr::null_mut(), 0) };
    let mut names = vec![std::ptr::null(); usize::try_from(n).unwrap_or(0)];
    // SAFETY: there is room for as many pointers as the function is told.
    unsafe { sys::llama_chat_builtin_templates(names.as_mut_ptr(), names.len()) };
    names
        .into_iter()
        .filter(|name| !name.is_null())
        // SAFETY: the names are strings that live as long as the library.
        .map(|name| {
            unsafe { CStr::from_ptr(name) }
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}
