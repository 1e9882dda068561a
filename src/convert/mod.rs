//! From a Hugging Face directory of Phi-3.5-vision-instruct to two GGUFs: the text model, which
//! any llama.cpp runs, and the vision file (mmproj).
//!
//! Everything is read from the configuration and from tensor shapes, and everything is checked
//! before the first byte is written. Both files get their names only when both are complete.

mod blocks;
mod checkpoint;
pub mod config;
mod json;
mod output;
mod piece;
pub mod random;
mod sentencepiece;
mod tensors;
mod text;
mod tokenizer;
mod vision;
mod vocab;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::outfile::FilesInUse;
use checkpoint::Checkpoint;
use config::Configs;
use output::Model;
use tensors::Planned;

pub use checkpoint::{Stored, tensors as safetensors};
pub use output::{Summary, Written};

/// The type that matrices get. Vectors stay F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutType {
    /// 32 bits a value.
    F32,
    /// 16 bits a value, IEEE's.
    F16,
    /// 16 bits a value, the upper half of an F32.
    Bf16,
    /// The text model only; the vision file gets F16.
    Q8_0,
}

impl OutType {
    /// llama.cpp's `llama_ftype`.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            OutType::F32 => 0,
            OutType::F16 => 1,
            OutType::Q8_0 => 7,
            OutType::Bf16 => 32,
        }
    }
}

/// What to convert, and to what.
#[derive(Clone, Debug)]
pub struct Options {
    /// The Hugging Face directory.
    pub model_dir: PathBuf,
    /// Where the text model goes.
    pub text_out: PathBuf,
    /// Where the vision file goes.
    pub mmproj_out: PathBuf,
    /// Of the matrices.
    pub outtype: OutType,
    /// `general.name` of both files. Must hold "phi-3" or "phi3", in any case: llama.cpp's
    /// tokenizer treats added tokens as Phi-3 does only in a model called so.
    pub name: Option<String>,
}

/// What a directory holds.
#[derive(Debug)]
pub struct Directory {
    /// By name.
    pub tensors: Vec<(String, Stored)>,
    /// What its configuration says, or why it cannot be converted.
    pub configs: Result<Configs>,
}

/// Reads what a directory holds, but for the weights themselves.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] naming the file of weights that is missing or damaged.
pub fn directory(dir: &Path) -> Result<Directory> {
    Ok(Directory {
        tensors: Checkpoint::open(dir)?.into_tensors(),
        configs: config::read(dir),
    })
}

/// Converts. `progress` is told the bytes written so far and in all, tensor data only.
///
/// # Errors
/// [`Error::File`], [`Error::Io`] or [`Error::Option`], each naming the file or value and what was
/// expected. No output is left behind then.
pub fn convert(options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Summary> {
    let dir = &options.model_dir;
    if !dir.is_dir() {
        return Err(Error::file(dir, "is not a directory"));
    }
    let (text_config, vision_config) = config::read(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let vocabulary = vocab::read(dir, &text_config)?;
    let name = model_name(options.name.as_deref(), text_config.name.as_deref())?;
    let vision_type = match options.outtype {
        OutType::Q8_0 => OutType::F16,
        other => other,
    };
    let text_tensors = text::tensors(&text_config, &mut |from, shape, name, role| {
        Planned::stored(&checkpoint, from, shape, name, role, options.outtype)
    })?;
    let vision_tensors = vision::tensors(
        &vision_config,
        &text_config,
        &mut |from, shape, name, role| {
            Planned::stored(&checkpoint, from, shape, name, role, vision_type)
        },
    )?;
    let model = Model {
        name,
        text: text_config,
        vision: vision_config,
        vocabulary,
        text_type: options.outtype.file_type(),
        text_tensors,
        vision_type: vision_type.file_type(),
        vision_tensors,
    };
    let read = files_in(dir)?;
    model.write(&options.text_out, &options.mmproj_out, read, progress)
}

/// What is in a model's folder, but for GGUFs of earlier conversions.
fn files_in(dir: &Path) -> Result<FilesInUse> {
    let mut files = FilesInUse::default();
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_none_or(|e| !e.eq_ignore_ascii_case("gguf"))
        {
            files.reads("a file of the model", &path);
        }
    }
    Ok(files)
}

fn is_phi3(name: &str) -> bool {
    let lower = name.to_lowercase();
    lower.contains("phi-3") || lower.contains("phi3")
}

/// The model's name must not depend on what its directory is called: the tokenizer follows it.
fn model_name(asked: Option<&str>, configured: Option<&str>) -> Result<String> {
    match asked {
        Some(name) if is_phi3(name) && !name.contains('\0') => Ok(name.to_owned()),
        Some(name) => Err(Error::option(
            "name",
            format!(
                "\"{}\" does not hold \"phi-3\" or \"phi3\", by which llama.cpp knows how to treat the added tokens",
                name.escape_debug()
            ),
        )),
        None => Ok(configured
            .filter(|n| is_phi3(n))
            .unwrap_or("Phi-3.5-vision")
            .to_owned()),
    }
}
