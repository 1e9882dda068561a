//! The vocabulary as llama.cpp's "llama" (SentencePiece) tokenizer takes it: one entry for every
//! row of the embedding table.
//!
//! Scores and types follow llama.cpp's converter for phi3, so that a file made here tokenizes like
//! one made there: added tokens have the score -1000 and are control tokens if special, else user
//! defined; rows without a token are unused and called `[PAD<id>]`.

use std::collections::HashMap;
use std::path::Path;

use super::config::TextConfig;
use super::piece::{Kind, Piece};
use super::sentencepiece;
use super::tokenizer::{self, TokenizerFiles};
use crate::error::{Error, Result};

/// Parallel arrays of `n_vocab` entries, and what is special.
#[derive(Debug)]
pub struct Vocabulary {
    pub tokens: Vec<String>,
    pub scores: Vec<f32>,
    pub kinds: Vec<i32>,
    pub bos: u32,
    pub eos: u32,
    /// Further tokens that end a generation.
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    pub add_bos: bool,
    pub add_eos: bool,
    pub add_space_prefix: bool,
    pub chat_template: Option<String>,
    /// What the reader of a conversion should know.
    pub notes: Vec<String>,
}

/// Tokens that llama.cpp looks up by name in a model called phi-3, failing where one is missing.
const REQUIRED: [&str; 4] = ["<unk>", "<s>", "</s>", "<|endoftext|>"];
/// Tokens that llama.cpp takes for the end of a generation by their text alone.
const ENDS_BY_TEXT: [&str; 3] = ["<|end|>", "<|endoftext|>", "</s>"];

/// Reads the tokenizer files of `dir`.
///
/// # Errors
/// [`Error::File`] naming the file and the token.
pub fn read(dir: &Path, config: &TextConfig) -> Result<Vocabulary> {
    let model_path = dir.join("tokenizer.model");
    let json_path = dir.join("tokenizer.json");
    let (source, pieces, add_space_prefix) = if model_path.is_file() {
        let model = sentencepiece::read(&model_path)?;
        (model_path, model.pieces, model.add_space_prefix)
    } else if json_path.is_file() {
        let pieces = tokenizer::pieces(&json_path)?;
        (json_path, pieces, true)
    } else {
        return Err(Error::file(
            dir,
            "holds neither tokenizer.model nor tokenizer.json",
        ));
    };
    let n = config.n_vocab as usize;
    if pieces.len() > n {
        return Err(Error::file(
            source,
            format!("has {} pieces, the embedding table {n} rows", pieces.len()),
        ));
    }
    let files = tokenizer::read(dir)?;
    let mut all: Vec<Piece> = pieces;
    all.extend((all.len()..n).map(|id| Piece {
        text: format!("[PAD{id}]"),
        score: -10000.0,
        kind: Kind::Unused,
    }));
    for added in &files.added {
        let slot = all.get_mut(added.id as usize).ok_or_else(|| {
            Error::file(
                dir,
                format!(
                    "added token \"{}\" has id {}, the embedding table {n} rows",
                    added.text.escape_debug(),
                    added.id
                ),
            )
        })?;
        if added.text.is_empty() || added.text.contains('\0') {
            return Err(Error::file(
                dir,
                format!("added token {} is empty or holds a zero byte", added.id),
            ));
        }
        let kind = if added.special {
            Kind::Control
        } else {
            Kind::UserDefined
        };
        *slot = Piece {
            text: added.text.clone(),
            score: -1000.0,
            kind,
        };
    }
    let ids = check(dir, &all)?;
    let mut vocabulary = Vocabulary {
        tokens: Vec::new(),
        scores: all.iter().map(|p| p.score).collect(),
        kinds: all.iter().map(|p| p.kind as i32).collect(),
        bos: special(dir, &ids, "bos", files.bos.as_deref(), config.bos, n)?
            .ok_or_else(|| Error::file(dir, "no file names a bos token"))?,
        eos: special(
            dir,
            &ids,
            "eos",
            files.eos.as_deref(),
            config.eos.first().copied(),
            n,
        )?
        .ok_or_else(|| Error::file(dir, "no file names an eos token"))?,
        eot: None,
        eom: None,
        unk: special(dir, &ids, "unk", files.unk.as_deref(), None, n)?,
        pad: special(dir, &ids, "pad", files.pad.as_deref(), config.pad, n)?,
        add_bos: files.add_bos.unwrap_or(true),
        add_eos: files.add_eos.unwrap_or(false),
        add_space_prefix,
        chat_template: files.chat_template.clone(),
        notes: notes(&files),
    };
    vocabulary.tokens = all.into_iter().map(|p| p.text).collect();
    stops(dir, &mut vocabulary, config, &files)?;
    Ok(vocabulary)
}

/// What llama.cpp aborts on or fails at: a text with two ids, a missing byte or special token.
fn check(dir: &Path, pieces: &[Piece]) -> Result<HashMap<String, u32>> {
    let mut ids = HashMap::new();
    for (id, piece) in pieces.iter().enumerate() {
        if let Some(first) = ids.insert(piece.text.clone(), id as u32) {
            let text = piece.text.escape_debug();
            return Err(Error::file(
                dir,
                format!("token \"{text}\" has the ids {first} and {id}, expected one"),
            ));
        }
    }
    let bytes = (0..=255u8).map(|b| format!("<0x{b:02X}>"));
    for text in bytes.chain(REQUIRED.map(str::to_owned)) {
        if !ids.contains_key(&text) {
            return Err(Error::file(
                dir,
                format!("the vocabulary has no token {text}"),
            ));
        }
    }
    Ok(ids)
}

/// The id of a special token: by its text in tokenizer_config.json, else the number in config.json.
fn special(
    dir: &Path,
    ids: &HashMap<String, u32>,
    what: &str,
    text: Option<&str>,
    id: Option<u32>,
    n: usize,
) -> Result<Option<u32>> {
    if let Some(text) = text {
        let id = ids.get(text).copied().ok_or_else(|| {
            Error::file(
                dir.join("tokenizer_config.json"),
                format!(
                    "{what}_token \"{}\" is not in the vocabulary",
                    text.escape_debug()
                ),
            )
        })?;
        return Ok(Some(id));
    }
    match id {
        Some(id) if id as usize >= n => Err(Error::file(
            dir.join("config.json"),
            format!("{what}_token_id is {id}, the embedding table has {n} rows"),
        )),
        id => Ok(id),
    }
}

/// Sets the keys by which llama.cpp ends a generation. It ends at eos, eot and eom whatever they
/// are, and at [`ENDS_BY_TEXT`]; Phi-3.5 also stops where the other side would begin to speak
/// (`<|assistant|>`), for which only eom is left.
fn stops(
    dir: &Path,
    vocabulary: &mut Vocabulary,
    config: &TextConfig,
    files: &TokenizerFiles,
) -> Result<()> {
    vocabulary.eot = vocabulary
        .tokens
        .iter()
        .position(|t| t == "<|end|>")
        .map(|id| id as u32);
    let n = vocabulary.tokens.len();
    let named = |file: &'static str, ids: &[u32]| -> Vec<(&'static str, u32)> {
        ids.iter().map(|&id| (file, id)).collect()
    };
    let mut ids = named(tokenizer::GENERATION, &files.stop_ids);
    let more = named("config.json", &config.eos);
    ids.extend(
        more.into_iter()
            .filter(|(_, id)| !files.stop_ids.contains(id)),
    );
    for (file, id) in ids {
        let text = vocabulary.tokens.get(id as usize).ok_or_else(|| {
            Error::file(
                dir.join(file),
                format!("eos_token_id is {id}, the embedding table has {n} rows"),
            )
        })?;
        let known = [Some(vocabulary.eos), vocabulary.eot, vocabulary.eom];
        if ENDS_BY_TEXT.contains(&text.as_str()) || known.contains(&Some(id)) {
            continue;
        }
        if vocabulary.eot.is_none() {
            vocabulary.eot = Some(id);
        } else if vocabulary.eom.is_none() {
            vocabulary.eom = Some(id);
        } else {
            vocabulary.notes.push(format!(
                "llama.cpp will not stop at {text} ({id}): a GGUF has no key left for it"
            ));
        }
    }
    Ok(())
}

fn notes(files: &TokenizerFiles) -> Vec<String> {
    let mut notes = rstrip_notes(files);
    if files.chat_template.is_none() {
        notes.push(
            "no chat template in tokenizer_config.json, chat_template.jinja or chat_template.json: \
             prompts will go in as they are, unless `chat_template` names one"
                .into(),
        );
    }
    notes
}

/// llama.cpp cannot be told which tokens take in the white space to their right; it has a rule for
/// models called phi-3 (llama-vocab.cpp). Says where the files differ from that rule.
fn rstrip_notes(files: &TokenizerFiles) -> Vec<String> {
    let rule = |text: &str| !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
    let mut odd: Vec<&str> = files
        .added
        .iter()
        .filter(|t| t.rstrip.is_some_and(|rstrip| rstrip != rule(&t.text)))
        .map(|t| t.text.as_str())
        .collect();
    odd.sort_unstable();
    odd.dedup();
    if odd.is_empty() {
        return Vec::new();
    }
    vec![format!(
        "llama.cpp's rule for phi-3 strips the white space behind these tokens otherwise than the files say: {}",
        odd.join(" ")
    )]
}
