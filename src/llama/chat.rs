//! Chat templates, through llama.cpp's own list of them.

use std::ffi::{CStr, CString};

use llama_cpp_sys_2 as sys;

use super::log;
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
pub fn apply(template: &str, messages: &[Message], open_answer: bool) -> Result<String> {
    let bad = |reason: String| Error::option("chat_template", reason);
    let template =
        CString::new(template).map_err(|_| bad("the template contains a NUL byte".into()))?;
    let text = |text: &str| {
        CString::new(text)
            .map_err(|_| Error::option("prompt_text", "the prompt contains a NUL byte"))
    };
    let texts = messages
        .iter()
        .map(|m| Ok((text(&m.role)?, text(&m.content)?)))
        .collect::<Result<Vec<_>>>()?;
    let chat: Vec<_> = texts
        .iter()
        .map(|(role, content)| sys::llama_chat_message {
            role: role.as_ptr(),
            content: content.as_ptr(),
        })
        .collect();
    let said: usize = messages.iter().map(|m| m.content.len()).sum();
    let mut out = vec![0_u8; 2 * said + 256];
    for _ in 0..2 {
        let room = i32::try_from(out.len()).unwrap_or(i32::MAX);
        log::forget();
        // SAFETY: the texts end with a NUL and outlive the call, and `out` has as much room as is said.
        let n = unsafe {
            sys::llama_chat_apply_template(
                template.as_ptr(),
                chat.as_ptr(),
                chat.len(),
                open_answer,
                out.as_mut_ptr().cast(),
                room,
            )
        };
        let Ok(n) = usize::try_from(n) else { break };
        let fits = n <= room as usize;
        out.resize(n, 0);
        if fits {
            return String::from_utf8(out)
                .map_err(|_| bad("what llama.cpp made of it is no UTF-8".into()));
        }
    }
    Err(bad(log::take_reason(
        "llama.cpp does not know this template, expected a name such as phi3, chatml or llama3",
    )))
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
