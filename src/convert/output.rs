//! The last part of making a model: both files, written side by side.

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use super::config::{TextConfig, VisionConfig};
use super::tensors::Planned;
use super::vocab::Vocabulary;
use super::{text, vision};
use crate::error::{Error, Result};
use crate::llama::gguf::Writer;
use crate::outfile::{FilesInUse, OutFile};

/// A file that is complete.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its name.
    pub path: PathBuf,
    /// Tensors in it.
    pub n_tensors: usize,
    /// Its size.
    pub bytes: u64,
}

/// What a conversion made.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The text model.
    pub text: Written,
    /// The vision file.
    pub mmproj: Written,
    /// The model's name, as both files have it.
    pub name: String,
    /// One line each, for the user.
    pub notes: Vec<String>,
}

/// All that goes into the two files.
pub struct Model<'a> {
    /// `general.name` of both.
    pub name: String,
    pub text: TextConfig,
    pub vision: VisionConfig,
    pub vocabulary: Vocabulary,
    /// llama.cpp's `llama_ftype` of each file.
    pub text_type: u32,
    pub vision_type: u32,
    pub text_tensors: Vec<Planned<'a>>,
    pub vision_tensors: Vec<Planned<'a>>,
}

impl Model<'_> {
    /// Writes both files, which get their names only when both are complete. `read` are those that
    /// the model comes from. `progress` is told the bytes written so far and in all, tensor data only.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Io`] or [`Error::Option`]. No output is left behind then.
    pub fn write(
        self,
        text_out: &Path,
        mmproj_out: &Path,
        mut read: FilesInUse,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Summary> {
        read.writes("output", text_out)?;
        read.writes("mmproj", mmproj_out)?;
        let text_file = OutFile::create(text_out)?;
        let vision_file = OutFile::create(mmproj_out)?;

        let kind = ("phi3", "model", self.text_type);
        let mut text = Output::new(text_file, kind, &self.name, self.text_tensors)?;
        text::metadata(&mut text.writer, &self.text, &self.vocabulary)?;
        let kind = ("clip", "mmproj", self.vision_type);
        let mut vision = Output::new(vision_file, kind, &self.name, self.vision_tensors)?;
        vision::metadata(&mut vision.writer, &self.vision, &self.text)?;

        let total = text.data_bytes() + vision.data_bytes();
        let mut done = 0;
        let mut advance = |n: u64| {
            done += n;
            progress(done, total);
        };
        let (text_file, text) = text.write(&mut advance)?;
        let (vision_file, mmproj) = vision.write(&mut advance)?;
        text_file.commit()?;
        if let Err(e) = vision_file.commit() {
            // One without the other is of no use; the first error is the one to report.
            let _ = std::fs::canonicalize(&text.path).and_then(std::fs::remove_file);
            return Err(e);
        }
        Ok(Summary {
            text,
            mmproj,
            name: self.name,
            notes: self.vocabulary.notes,
        })
    }
}

/// A GGUF about to be written.
pub(super) struct Output<'a> {
    pub writer: Writer,
    tensors: Vec<Planned<'a>>,
    file: OutFile,
}

impl<'a> Output<'a> {
    /// With the keys that every file has. `kind`: architecture, type, and number of the file type.
    pub fn new(
        file: OutFile,
        kind: (&str, &str, u32),
        name: &str,
        tensors: Vec<Planned<'a>>,
    ) -> Result<Self> {
        let mut writer = Writer::new(file.target())?;
        general(&mut writer, kind, name, &tensors)?;
        Ok(Output {
            writer,
            tensors,
            file,
        })
    }

    fn data_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .filter_map(|t| t.kind.tensor_bytes(&t.dims))
            .sum()
    }

    /// Writes the tensors behind the metadata; the file gets its name from the caller.
    pub fn write(mut self, advance: &mut dyn FnMut(u64)) -> Result<(OutFile, Written)> {
        for tensor in &self.tensors {
            self.writer
                .add_tensor(&tensor.name, tensor.kind, &tensor.dims)?;
        }
        let mut data = self
            .writer
            .begin(BufWriter::with_capacity(1 << 20, self.file.file()))?;
        for tensor in &self.tensors {
            tensor.convert(&mut |bytes| {
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

/// The keys that both files have. `kind`: architecture, type, and number of the file type.
fn general(
    writer: &mut Writer,
    kind: (&str, &str, u32),
    name: &str,
    tensors: &[Planned<'_>],
) -> Result<()> {
    let (architecture, kind, file_type) = kind;
    writer.set_text("general.architecture", architecture)?;
    writer.set_text("general.type", kind)?;
    writer.set_text("general.name", name)?;
    writer.set_text(
        "general.size_label",
        &size_label(tensors.iter().map(Planned::elements).sum()),
    )?;
    writer.set_u32("general.file_type", file_type)?;
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
