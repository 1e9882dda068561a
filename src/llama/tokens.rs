//! Vocabularies that llama.cpp asserts on, or refuses by the name of a function inside (`llama_vocab::impl::load`).

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

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
    let Some((n, text)) = gguf.strings(TOKENS) else {
        return wrong(format!("{TOKENS} is missing, or no array of strings"));
    };
    if n == 0 {
        return wrong(format!("{TOKENS} is empty, expected tokens"));
    }
    let name = |id| match text(id).to_bytes() {
        // What llama.cpp calls one without a text.
        [] => Cow::from(format!("[EMPTY_{id}]").into_bytes()),
        text => Cow::from(text),
    };
    if let Some((first, id)) = twice(n, &name) {
        let text = name(id);
        let text = String::from_utf8_lossy(&text).escape_debug().to_string();
        return wrong(format!(
            "{TOKENS} has \"{text}\" at {first} and at {id}, expected each text once"
        ));
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
    let called = gguf.text("general.name").unwrap_or_default().to_lowercase();
    let lacks = |token: &&&[u8]| (0..n).all(|id| name(id) != **token);
    if ["phi-3", "phi3"].iter().any(|phi| called.contains(phi))
        && let Some(missing) = OF_PHI3.iter().find(lacks)
    {
        let missing = String::from_utf8_lossy(missing);
        return wrong(format!("{TOKENS} lacks {missing}, which Phi-3 models have"));
    }
    Ok(())
}

/// The first of `n` names that one before it equals: where that is, and where it stands.
///
/// A map of all names would take its time for memory that is far from the processor. Here each name has a bit, by
/// its hash, in a table that is near; the few whose bit another has as well are compared.
fn twice<'t>(n: usize, name: &impl Fn(usize) -> Cow<'t, [u8]>) -> Option<(usize, usize)> {
    // So that one name in thirty or more shares its bit by chance.
    let words = n.div_ceil(2).next_power_of_two();
    let last = (words * 64 - 1) as u64;
    let keys = RandomState::new();
    let (mut once, mut more) = (vec![0u64; words], vec![0u64; words]);
    let bit = |place: usize| (place / 64, 1 << (place % 64));
    let mut places = Vec::with_capacity(n);
    for id in 0..n {
        let place = (keys.hash_one(name(id)) & last) as usize;
        let (word, bit) = bit(place);
        more[word] |= once[word] & bit;
        once[word] |= bit;
        places.push(place);
    }
    let mut seen = HashMap::new();
    let is_shared = |&id: &usize| {
        let (word, bit) = bit(places[id]);
        more[word] & bit != 0
    };
    (0..n)
        .filter(is_shared)
        .find_map(|id| seen.insert(name(id), id).map(|first| (first, id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_text_that_comes_again_is_found_wherever_it_is() {
        let texts: Vec<String> = (0..20_000).map(|i| format!("{}", i * 7)).collect();
        let find = |texts: &[String]| {
            let name = |id: usize| Cow::from(texts[id].as_bytes());
            twice(texts.len(), &name)
        };
        assert_eq!(find(&texts), None);
        for (first, id) in [(0, 1), (0, 19_999), (19_998, 19_999), (77, 12_345)] {
            let mut texts = texts.clone();
            texts[id] = texts[first].clone();
            assert_eq!(find(&texts), Some((first, id)));
            // Others behind it change nothing.
            texts[19_999] = texts[first].clone();
            assert_eq!(find(&texts), Some((first, id)));
        }
        assert_eq!(find(&texts[..1]), None);
        assert_eq!(find(&["".into(), "".into()]), Some((0, 1)));
    }
}
