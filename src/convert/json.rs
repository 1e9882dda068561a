//! JSON files of a Hugging Face directory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// The largest of these files, a tokenizer.json, has some 10 MB.
const MAX_BYTES: u64 = 1 << 28;

/// Reads a whole small file.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] if it is larger than 256 MiB.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::file(
            path,
            format!("is larger than {MAX_BYTES} bytes"),
        ));
    }
    Ok(bytes)
}

/// Parses a JSON file.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] with the parser's message, which names line, column and field.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read_bytes(path)?).map_err(|e| Error::file(path, e.to_string()))
}

/// As [`read`], or `None` where the file does not exist.
///
/// # Errors
/// As [`read`].
pub fn read_optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.is_file() {
        read(path).map(Some)
    } else {
        Ok(None)
    }
}
