//! The small Phi-3.5-vision model inside the program, for a first look without a download.

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::tempfiles::TempFile;

const MODEL: &[u8] = include_bytes!("../models/small-phi3v-Q8_0.gguf");
const MMPROJ: &[u8] = include_bytes!("../models/mmproj-small-phi3v-F16.gguf");
/// The picture that `hae demo` shows when none is given.
pub const PICTURE: &[u8] = include_bytes!("../models/demo.png");
/// Crops of that picture: its cells are as large as the model's training pictures had them.
pub const PICTURE_CROPS: u32 = 16;

/// The model's two files, laid out where llama.cpp can map them. Removed on drop.
#[derive(Debug)]
pub struct Embedded {
    model: TempFile,
    mmproj: TempFile,
}

impl Embedded {
    /// # Errors
    /// [`Error::Io`] when the temporary folder cannot take the 12 MB.
    pub fn unpack() -> Result<Self> {
        Ok(Embedded {
            model: write("small-phi3v-", MODEL)?,
            mmproj: write("mmproj-small-phi3v-", MMPROJ)?,
        })
    }

    /// The text model.
    pub fn model(&self) -> &Path {
        self.model.path()
    }

    /// The vision file.
    pub fn mmproj(&self) -> &Path {
        self.mmproj.path()
    }
}

fn write(what: &str, bytes: &[u8]) -> Result<TempFile> {
    let folder = std::env::temp_dir();
    let temp = TempFile::create_in(&folder, what, 0o600).map_err(|e| Error::io(&folder, e))?;
    let mut file = temp.file();
    file.write_all(bytes)
        .map_err(|e| Error::io(temp.path(), e))?;
    Ok(temp)
}
