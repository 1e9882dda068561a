//! From a Hugging Face directory of Phi-3.5-vision-instruct to two GGUFs: the text model, which
//! any llama.cpp runs, and the vision file (mmproj).
//!
//! Everything is read from the configuration and from tensor shapes, and everything is checked
//! before the first byte is written. Both files get their names only when both are complete.

mod checkpoint;
pub mod config;
mod json;
mod sentencepiece;
mod tensors;
mod text;
mod tokenizer;
mod vision;
mod vocab;

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::llama::gguf::Writer;
use crate::outfile::OutFile;
use checkpoint::Checkpoint;
use tensors::Planned;

/// The type that matrices get. Vectors stay F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutType {
    F32,
    F16,
    Bf16,
    /// The text model only; the vision file gets F16.
    Q8_0,
}

impl OutType {
    /// llama.cpp's `llama_ftype`.
    fn file_type(self) -> u32 {
        match self {
            OutType::F32 => 0,
            OutType::F16 => 1,
            OutType::Q8_0 => 7,
            OutType::Bf16 => 32,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    /// The Hugging Face directory.
    pub model_dir: PathBuf,
    pub text_out: PathBuf,
    pub mmproj_out: PathBuf,
    pub outtype: OutType,
    /// `general.name` of both files. Must hold "phi-3" or "phi3", in any case: llama.cpp's
    /// tokenizer treats added tokens as Phi-3 does only in a model called so.
    pub name: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Written {
    pub path: PathBuf,
    pub n_tensors: usize,
    pub bytes: u64,
}

#[derive(Clone, Debug)]
pub struct Summary {
    pub text: Written,
    pub mmproj: Written,
    pub name: String,
    /// One line each, for the user.
    pub notes: Vec<String>,
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
    let text_tensors = text::tensors(&checkpoint, &text_config, options.outtype)?;
    let vision_tensors = vision::tensors(&checkpoint, &vision_config, &text_config, vision_type)?;

    let text_file = OutFile::create(&options.text_out)?;
    let vision_file = OutFile::create(&options.mmproj_out)?;
    if same_file(&options.text_out, &options.mmproj_out) {
        return Err(Error::option(
            "--mmproj",
            "is the same file as --output, expected another",
        ));
    }

    let mut writer = Writer::new(text_file.target())?;
    general(
        &mut writer,
        "phi3",
        "model",
        &name,
        options.outtype,
        &text_tensors,
    )?;
    text::metadata(&mut writer, &text_config, &vocabulary)?;
    let text = Output {
        writer,
        tensors: text_tensors,
        file: text_file,
    };

    let mut writer = Writer::new(vision_file.target())?;
    general(
        &mut writer,
        "clip",
        "mmproj",
        &name,
        vision_type,
        &vision_tensors,
    )?;
    vision::metadata(&mut writer, &vision_config, &text_config)?;
    let vision = Output {
        writer,
        tensors: vision_tensors,
        file: vision_file,
    };

    let total = text.data_bytes() + vision.data_bytes();
    let mut done = 0;
    let mut advance = |n: u64| {
        done += n;
        progress(done, total);
    };
    let (text_file, text) = text.write(&checkpoint, &mut advance)?;
    let (vision_file, mmproj) = vision.write(&checkpoint, &mut advance)?;
    text_file.commit()?;
    if let Err(e) = vision_file.commit() {
        // One without the other is of no use; the first error is the one to report.
        let _ = std::fs::remove_file(&text.path);
        return Err(e);
    }
    Ok(Summary {
        text,
        mmproj,
        name,
        notes: vocabulary.notes,
    })
}

struct Output {
    writer: Writer,
    tensors: Vec<Planned>,
    file: OutFile,
}

impl Output {
    fn data_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .filter_map(|t| t.kind.tensor_bytes(&t.dims))
            .sum()
    }

    fn write(
        mut self,
        checkpoint: &Checkpoint,
        advance: &mut dyn FnMut(u64),
    ) -> Result<(OutFile, Written)> {
        for tensor in &self.tensors {
            self.writer
                .add_tensor(&tensor.name, tensor.kind, &tensor.dims)?;
        }
        let mut data = self
            .writer
            .begin(BufWriter::with_capacity(1 << 20, self.file.file()))?;
        for tensor in &self.tensors {
            tensor.convert(checkpoint, &mut |bytes| {
                advance(bytes.len() as u64);
                data.write(bytes)
            })?;
            data.end_tensor()?;
        }
        data.finish()?;
        let path = self.file.target().to_owned();
        let bytes = self
            .file
            .file()
            .metadata()
            .map_err(|e| Error::io(&path, e))?
            .len();
        Ok((
            self.file,
            Written {
                path,
                n_tensors: self.tensors.len(),
                bytes,
            },
        ))
    }
}

/// The keys that both files have.
fn general(
    writer: &mut Writer,
    architecture: &str,
    kind: &str,
    name: &str,
    outtype: OutType,
    tensors: &[Planned],
) -> Result<()> {
    writer.set_text("general.architecture", architecture)?;
    writer.set_text("general.type", kind)?;
    writer.set_text("general.name", name)?;
    writer.set_text(
        "general.size_label",
        &size_label(tensors.iter().map(Planned::elements).sum()),
    )?;
    writer.set_u32("general.file_type", outtype.file_type())?;
    // The version of ggml's block formats (GGML_QNT_VERSION).
    writer.set_u32("general.quantization_version", 2)
}

/// Two significant digits and a unit, as in "3.8B".
fn size_label(parameters: u64) -> String {
    let n = parameters as f64;
    let (scaled, unit) = match parameters {
        1_000_000_000.. => (n / 1e9, "B"),
        1_000_000.. => (n / 1e6, "M"),
        _ => (n / 1e3, "K"),
    };
    if scaled < 9.95 {
        format!("{scaled:.1}{unit}")
    } else {
        format!("{scaled:.0}{unit}")
    }
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
            "--name",
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

/// Whether two targets in existing directories are one.
fn same_file(a: &Path, b: &Path) -> bool {
    let resolved = |p: &Path| {
        let dir = p
            .parent()
            .filter(|d| !d.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        dir.canonicalize()
            .ok()
            .map(|d| d.join(p.file_name().unwrap_or_default()))
    };
    resolved(a) == resolved(b)
}
