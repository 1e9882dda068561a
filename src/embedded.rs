//! The small Phi-3.5-vision model inside the program, for a first look without a download.

use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::error::{Error, Result};
use crate::tempfiles::Listed;

const MODEL: &[u8] = include_bytes!("../models/small-phi3v-Q8_0.gguf");
const MMPROJ: &[u8] = include_bytes!("../models/mmproj-small-phi3v-F16.gguf");
/// The picture that `hae demo` shows when none is given.
pub const PICTURE: &[u8] = include_bytes!("../models/demo.png");
/// Crops of that picture: its cells are as large as the model's training pictures had them.
pub const PICTURE_CROPS: u32 = 16;

/// The model's two files, laid out where llama.cpp can map them. Removed on drop.
#[derive(Debug)]
pub struct Embedded {
    model: NamedTempFile,
    mmproj: NamedTempFile,
    _listed: [Listed; 2],
}

impl Embedded {
    /// # Errors
    /// [`Error::Io`] when the temporary folder cannot take the 12 MB.
    pub fn unpack() -> Result<Self> {
        let model = write("small-phi3v-", MODEL)?;
        let mmproj = write("mmproj-small-phi3v-", MMPROJ)?;
        Ok(Embedded {
            _listed: [&model, &mmproj].map(|file| Listed::new(file.path())),
            model,
            mmproj,
        })
    }

    pub fn model(&self) -> &Path {
        self.model.path()
    }

    pub fn mmproj(&self) -> &Path {
        self.mmproj.path()
    }
}

fn write(prefix: &str, bytes: &[u8]) -> Result<NamedTempFile> {
    let folder = std::env::temp_dir();
    let mut file = tempfile::Builder::new()
        .prefix(prefix)
        .suffix(".gguf")
        .tempfile_in(&folder)
        .map_err(|e| Error::io(&folder, e))?;
    file.write_all(bytes)
        .and_then(|()| file.flush())
        .map_err(|e| Error::io(file.path(), e))?;
    Ok(file)
}
