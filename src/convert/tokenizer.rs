//! The files around the tokenizer: `tokenizer_config.json`, `tokenizer.json`, `added_tokens.json`,
//! `generation_config.json`, and the chat template's own.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;

use super::json::{self, Ids};
use super::piece::{Kind, Piece};
use crate::error::{Error, Result};
use crate::text;

/// The file with [`TokenizerFiles::stop_ids`].
pub const GENERATION: &str = "generation_config.json";

/// A token that was added to the trained vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Added {
    pub id: u32,
    pub text: String,
    pub special: bool,
    /// Whether it takes in the white space to its right; `None` where the file does not say.
    pub rstrip: Option<bool>,
}

#[derive(Debug, Default)]
pub struct TokenizerFiles {
    /// Later ones override earlier ones of the same id.
    pub added: Vec<Added>,
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub unk: Option<String>,
    pub pad: Option<String>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub chat_template: Option<String>,
    /// Ids at which generation stops.
    pub stop_ids: Vec<u32>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawConfig {
    added_tokens_decoder: BTreeMap<String, RawAdded>,
    bos_token: Option<Named>,
    eos_token: Option<Named>,
    unk_token: Option<Named>,
    pad_token: Option<Named>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<Template>,
}

#[derive(Deserialize)]
struct RawAdded {
    id: Option<u32>,
    content: String,
    #[serde(default)]
    special: bool,
    rstrip: Option<bool>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a token: text, or an object with its content"
)]
enum Named {
    Text(String),
    Token { content: String },
}

impl From<Named> for String {
    fn from(named: Named) -> Self {
        match named {
            Named::Text(text) | Named::Token { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a chat template: text, or a list of named ones"
)]
enum Template {
    One(String),
    Many(Vec<NamedTemplate>),
}

impl Template {
    /// The one for chats, where there are several.
    fn text(self) -> Option<String> {
        match self {
            Template::One(template) => Some(template),
            Template::Many(all) => {
                let default = all.into_iter().find(|t| t.name == "default");
                default.map(|t| t.template)
            }
        }
    }
}

#[derive(Deserialize)]
struct TemplateFile {
    chat_template: Template,
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct RawTokenizer {
    #[serde(default)]
    added_tokens: Vec<RawAdded>,
    model: Option<RawModel>,
}

#[derive(Deserialize)]
struct RawModel {
    r#type: Option<String>,
    #[serde(default)]
    vocab: HashMap<String, u32>,
    #[serde(default)]
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a merge: text, or a pair of texts")]
enum Merge {
    Joined(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct RawGeneration {
    #[serde(default)]
    eos_token_id: Ids,
}

/// Reads what `dir` has of these files. The order of the added tokens is llama.cpp's converter's:
/// `added_tokens.json`, then `tokenizer_config.json`, then `tokenizer.json`.
///
/// # Errors
/// [`Error::File`] naming the file and the field.
pub fn read(dir: &Path) -> Result<TokenizerFiles> {
    let mut files = TokenizerFiles::default();
    let plain: Option<BTreeMap<String, u32>> = json::read_optional(&dir.join("added_tokens.json"))?;
    for (text, id) in plain.into_iter().flatten() {
        files.added.push(Added {
            id,
            text,
            special: false,
            rstrip: None,
        });
    }
    let path = dir.join("tokenizer_config.json");
    let config: RawConfig = json::read_optional(&path)?.unwrap_or_default();
    for (id, token) in config.added_tokens_decoder {
        let id = id.parse().map_err(|_| {
            Error::file(
                &path,
                format!(
                    "added_tokens_decoder has the id \"{}\", expected a number",
                    id.escape_debug()
                ),
            )
        })?;
        files.added.push(Added {
            id,
            text: token.content,
            special: token.special,
            rstrip: token.rstrip,
        });
    }
    let path = dir.join("tokenizer.json");
    let tokenizer: Option<RawTokenizer> = json::read_optional(&path)?;
    for token in tokenizer.into_iter().flat_map(|t| t.added_tokens) {
        let id = token.id.ok_or_else(|| {
            Error::file(
                &path,
                format!("added token \"{}\" has no id", token.content.escape_debug()),
            )
        })?;
        files.added.push(Added {
            id,
            text: token.content,
            special: token.special,
            rstrip: token.rstrip,
        });
    }
    files.bos = config.bos_token.map(Into::into);
    files.eos = config.eos_token.map(Into::into);
    files.unk = config.unk_token.map(Into::into);
    files.pad = config.pad_token.map(Into::into);
    files.add_bos = config.add_bos_token;
    files.add_eos = config.add_eos_token;
    files.chat_template = match config.chat_template {
        Some(template) => template.text(),
        None => template_file(dir)?,
    };
    let generation: Option<RawGeneration> = json::read_optional(&dir.join(GENERATION))?;
    files.stop_ids = generation.map_or(Vec::new(), |g| g.eos_token_id.known());
    Ok(files)
}

/// The template in a file of its own, as llama.cpp's converter looks for it: what today's
/// transformers save, then what the processors of older ones did.
fn template_file(dir: &Path) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        return Ok(Some(text::decode(&path, json::read_bytes(&path)?)?));
    }
    let file: Option<TemplateFile> = json::read_optional(&dir.join("chat_template.json"))?;
    Ok(file.and_then(|file| file.chat_template.text()))
}

/// The vocabulary of a `tokenizer.json` of type BPE, for a directory without `tokenizer.model`.
///
/// Such a file has no scores. llama.cpp joins the pair whose result has the highest score, the
/// file joins the pair that comes first in its list: a piece gets minus the place of the first
/// pair that makes it. Converted from SentencePiece, all pairs that make a piece stand together,
/// so the order is the same.
///
/// # Errors
/// [`Error::File`] if the file is not such a vocabulary, or its ids are not 0, 1, 2, ...
pub fn pieces(path: &Path) -> Result<Vec<Piece>> {
    let wrong = |reason: String| Error::file(path, reason);
    let raw: RawTokenizer = json::read(path)?;
    let model = raw.model.ok_or_else(|| wrong("has no model".into()))?;
    if model.r#type.as_deref() != Some("BPE") || model.vocab.is_empty() {
        return Err(wrong("model is not a BPE with a vocabulary".into()));
    }
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, merge) in model.merges.into_iter().enumerate() {
        let result = match merge {
            Merge::Joined(pair) => pair.replacen(' ', "", 1),
            Merge::Pair(left, right) => left + &right,
        };
        ranks.entry(result).or_insert(rank);
    }
    let n = model.vocab.len();
    let mut pieces: Vec<Option<Piece>> = (0..n).map(|_| None).collect();
    for (text, id) in model.vocab {
        let slot = pieces
            .get_mut(id as usize)
            .filter(|slot| slot.is_none())
            .ok_or_else(|| {
                wrong(format!(
                    "piece \"{}\" has id {id}, expected each of 0 to {} once",
                    text.escape_debug(),
                    n - 1
                ))
            })?;
        let is_byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let (score, kind) = match ranks.get(&text) {
            Some(&rank) => (-(rank as f32), Kind::Normal),
            None if is_byte => (0.0, Kind::Byte),
            // Never the result of joining two, so its score is never asked for.
            None => (-(ranks.len() as f32) - id as f32, Kind::Normal),
        };
        *slot = Some(Piece { text, score, kind });
    }
    Ok(pieces.into_iter().flatten().collect())
}
