//! JSON files of a Hugging Face directory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::text::without_bom;

/// The largest of these files, a tokenizer.json, has some 10 MB.
const MAX_BYTES: u64 = 1 << 28;

/// Ids of tokens: a number, a list, or nothing. Transformers writes -1 for none, too.
#[derive(Deserialize, Default)]
#[serde(untagged, expecting = "expected a token id, or a list of them")]
pub enum Ids {
    #[default]
    None,
    One(i64),
    Many(Vec<i64>),
}

impl Ids {
    /// Those that are ids, in their order.
    pub fn known(&self) -> Vec<u32> {
        let ids = match self {
            Ids::None => &[],
            Ids::One(id) => std::slice::from_ref(id),
            Ids::Many(ids) => ids,
        };
        ids.iter()
            .filter_map(|&id| u32::try_from(id).ok())
            .collect()
    }
}

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
    let bytes = read_bytes(path)?;
    serde_json::from_slice(without_bom(&bytes)).map_err(|e| Error::file(path, e.to_string()))
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
