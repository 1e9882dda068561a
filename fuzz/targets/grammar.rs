//! Grammars, schemas and expressions, and answers of single bytes that keep to them. The first byte says which.

#![no_main]

use std::sync::LazyLock;

use hae::constrain::{Grammar, Grammars};
use libfuzzer_sys::fuzz_target;

/// Every byte is a token, the last one ends the answer.
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
    let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    words.push(b"\xff<end>".to_vec());
    Grammars::of_words(&words, &[256]).unwrap()
});

const STEPS: usize = 12;

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let Some((&first, data)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let grammar = match first % 4 {
        0 => Grammar::gbnf(text),
        1 => match serde_json::from_str(text) {
            Ok(schema) => Grammar::json_schema(&schema),
            Err(_) => return,
        },
        2 => Grammar::regex(text),
        _ => Grammar::lark(text),
    };
    let Some(grammar) = hae_fuzz::one_line(grammar) else {
        return;
    };
    let Some(mut constraint) = hae_fuzz::one_line(GRAMMARS.constraint(&grammar)) else {
        return;
    };
    for step in 0..STEPS {
        let mut logits = [0.0; 257];
        if hae_fuzz::one_line(constraint.mask(&mut logits)).is_none() {
            return;
        }
        // One of those that may come, another one at each step.
        let may: Vec<usize> = (0..257).filter(|&token| logits[token] == 0.0).collect();
        let token = may[(usize::from(first) * 31 + step * 7) % may.len()];
        if hae_fuzz::one_line(constraint.accept(token as i32)).is_none() || token == 256 {
            return;
        }
    }
});
