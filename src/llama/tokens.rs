//! Vocabularies that llama.cpp asserts on, or refuses by the name of a function inside (`llama_vocab::impl::load`).

use std::borrow::Cow;
use std::collections::HashMap;

use super::gguf::{Gguf, Value};
use crate::error::{Error, Result};

const TOKENS: &str = "tokenizer.ggml.tokens";
/// Arrays with an element for each token, and the types that they may have.
const BESIDE: [(&str, &[&str]); 2] = [
    ("tokenizer.ggml.scores", &["f32", "i32"]),
    ("tokenizer.ggml.token_type", &["i32"]),
];
/// `LLAMA_TOKEN_TYPE_BYTE`
const BYTE: Value = Value::Signed(6);
/// What llama.cpp looks up without a question in models whose names say that they are Phi-3.
const OF_PHI3: [&[u8]; 4] = [b"</s>", b"<unk>", b"<s>", b"<|endoftext|>"];

/// Refuses vocabularies that would end the process, or that only code could explain.
///
/// # Errors
/// [`Error::File`] naming the key and what was expected.
pub(super) fn check(gguf: &Gguf) -> Result<()> {
    let wrong = |reason: String| Err(Error::file(gguf.path(), reason));
    let model = match gguf.get("tokenizer.ggml.model") {
        Some(Value::Text(model)) => model,
        // llama.cpp says so itself.
        _ => return Ok(()),
    };
    if ["none", "no_vocab"].contains(&model.as_str()) {
        return Ok(());
    }
    let Some(tokens) = gguf.strings(TOKENS) else {
        return wrong(format!("{TOKENS} is missing, or no array of strings"));
    };
    let n = tokens.len();
    if n == 0 {
        return wrong(format!("{TOKENS} is empty, expected tokens"));
    }
    let mut seen = HashMap::with_capacity(n);
    for (id, token) in tokens.enumerate() {
        // What llama.cpp calls one without a text.
        let token = match token.to_bytes() {
            [] => Cow::from(format!("[EMPTY_{id}]").into_bytes()),
            token => Cow::from(token),
        };
        if let Some(first) = seen.insert(token.clone(), id) {
            let token = String::from_utf8_lossy(&token).escape_debug().to_string();
            return wrong(format!(
                "{TOKENS} has \"{token}\" at {first} and at {id}, expected each text once"
            ));
        }
    }
    for (key, kinds) in BESIDE {
        let Some(found) = gguf.glimpse(key, 0) else {
            continue;
        };
        let kind = &found.kind;
        match found.len {
            Some(len) if len >= n && kinds.contains(&kind.as_str()) => {}
            Some(len) => {
                let kinds = kinds.join(" or ");
                return wrong(format!(
                    "{key} is an array of {len} {kind}, expected {kinds}, one for each of {n} tokens"
                ));
            }
            None => return wrong(format!("{key} is {kind}, expected an array")),
        }
    }
    let bytes = || match gguf.get("tokenizer.ggml.token_type") {
        Some(Value::Array(kinds)) => kinds.contains(&BYTE),
        _ => false,
    };
    if model == "bert" && bytes() {
        return wrong("tokenizer.ggml.model is bert with tokens of type 6 (bytes), which such vocabularies cannot have".into());
    }
    let name = gguf.text("general.name").unwrap_or_default().to_lowercase();
    if ["phi-3", "phi3"].iter().any(|phi| name.contains(phi))
        && let Some(missing) = OF_PHI3.iter().find(|token| !seen.contains_key(**token))
    {
        let missing = String::from_utf8_lossy(missing);
        return wrong(format!("{TOKENS} lacks {missing}, which Phi-3 models have"));
    }
    Ok(())
}
