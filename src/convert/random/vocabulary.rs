//! A vocabulary as large as Phi-3.5's, laid out like it, of made-up pieces: letters, and
//! everything up to four of them that merging two shorter pieces can reach. It takes any text in,
//! three or four letters a token.

use crate::convert::piece::{Kind, Piece};
use crate::convert::vocab::Vocabulary;
use crate::error::{Error, Result};

/// Rows at the end that are for added tokens, of which some stay unused.
const ADDED: u32 = 64;
/// The mark of a space.
const SPACE: &str = "\u{2581}";

/// A vocabulary of exactly `n` tokens.
///
/// # Errors
/// [`Error::Option`] where they are too few for the bytes and letters, or more than there are
/// pieces.
pub(super) fn made_up(n: u32) -> Result<Vocabulary> {
    let mut all: Vec<Piece> = [
        ("<unk>", Kind::Unknown),
        ("<s>", Kind::Control),
        ("</s>", Kind::UserDefined),
    ]
    .map(|(text, kind)| piece(text, 0.0, kind))
    .into();
    all.extend((0..=255u8).map(|b| piece(&format!("<0x{b:02X}>"), 0.0, Kind::Byte)));
    let room = n.saturating_sub(ADDED + all.len() as u32) as usize;
    let pieces: Vec<String> = singles().chain(merged()).take(room).collect();
    if pieces.len() < room || room < singles().count() {
        return Err(Error::option(
            "n_vocab",
            format!("{n} tokens, expected 420 to 40000"),
        ));
    }
    for (rank, text) in pieces.iter().enumerate() {
        all.push(piece(text, -(rank as f32), Kind::Normal));
    }
    let first_added = all.len();
    all.extend(added().map(|text| piece(&text, -1000.0, Kind::Control)));
    all.extend((all.len()..n as usize).map(|id| piece(&format!("[PAD{id}]"), -1e4, Kind::Unused)));
    let id = |text: &str| {
        let at = all[first_added..].iter().position(|p| p.text == text);
        at.map(|at| (first_added + at) as u32)
    };
    let (end, assistant, end_of_text) = (id("<|end|>"), id("<|assistant|>"), id("<|endoftext|>"));
    Ok(Vocabulary {
        scores: all.iter().map(|p| p.score).collect(),
        kinds: all.iter().map(|p| p.kind as i32).collect(),
        bos: 1,
        eos: end_of_text.unwrap_or(2),
        eot: end,
        eom: assistant,
        unk: Some(0),
        pad: end_of_text,
        add_bos: true,
        add_eos: false,
        add_space_prefix: true,
        chat_template: Some(chat_template()),
        notes: Vec::new(),
        tokens: all.into_iter().map(|p| p.text).collect(),
    })
}

fn piece(text: &str, score: f32, kind: Kind) -> Piece {
    Piece {
        text: text.to_owned(),
        score,
        kind,
    }
}

/// The space mark and what a keyboard has.
fn singles() -> impl Iterator<Item = String> {
    let printable = (b'!'..=b'~').map(|b| char::from(b).to_string());
    std::iter::once(SPACE.to_owned()).chain(printable)
}

/// Pieces by rising length; each is two earlier ones.
fn merged() -> impl Iterator<Item = String> {
    let letters = || (b'a'..=b'z').map(char::from);
    let pairs = move || letters().flat_map(move |a| letters().map(move |b| format!("{a}{b}")));
    let triples = move || pairs().flat_map(move |ab| letters().map(move |c| format!("{ab}{c}")));
    let spaced = |text: String| format!("{SPACE}{text}");
    pairs()
        .chain(letters().map(move |a| spaced(a.to_string())))
        .chain(pairs().map(spaced))
        .chain(triples())
        .chain(triples().map(spaced))
}

/// The added tokens of Phi-3.5-vision, in their order.
fn added() -> impl Iterator<Item = String> {
    let named = |texts: &'static [&'static str]| texts.iter().map(|&text| text.to_owned());
    let places = |from, to| (from..=to).map(|i: u32| format!("<|placeholder{i}|>"));
    named(&["<|endoftext|>", "<|assistant|>"])
        .chain(places(1, 4))
        .chain(named(&["<|system|>", "<|end|>"]))
        .chain(places(5, 6))
        .chain(named(&["<|user|>"]))
        .chain(places(7, 39))
        .chain(named(&["<|image|>"]))
}

/// Phi-3.5's, in its own spelling, by which llama.cpp knows it.
fn chat_template() -> String {
    [
        "{% for message in messages %}",
        r"{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}",
        "{% endfor %}",
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}",
        r"{{- '<|assistant|>\n' -}}",
        "{% endif %}",
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::made_up;

    #[test]
    fn every_token_has_one_id_and_every_longer_piece_two_parts() {
        let vocabulary = made_up(32064).unwrap();
        let tokens: HashSet<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
        assert_eq!((tokens.len(), vocabulary.tokens.len()), (32064, 32064));
        assert_eq!(vocabulary.tokens[32007], "<|end|>");
        assert_eq!(vocabulary.tokens[32044], "<|image|>");
        for token in &vocabulary.tokens[259..32000] {
            let cuts = token.char_indices().skip(1);
            let merges = cuts.clone().any(|(at, _)| {
                let (left, right) = token.split_at(at);
                tokens.contains(left) && tokens.contains(right)
            });
            assert!(merges || cuts.count() == 0, "{token}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for n in [0, 100, 400, 1 << 20] {
            let error = made_up(n).unwrap_err().to_string();
            assert!(error.starts_with("`n_vocab`: "), "{error}");
        }
    }
}
