//! Telling models apart without reading them whole.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::Gguf;
use crate::error::{Error, Result};

/// Bytes read of each tensor. Training changes all of a tensor, or nothing.
const SAMPLE: u64 = 4096;

/// A SHA-256 over a file's length, all of its metadata and the first bytes of each tensor, as hex
/// digits: two models of one shape differ in it, and no file is too large for it.
///
/// # Errors
/// [`Error::File`] for what is no GGUF, [`Error::Io`].
pub fn fingerprint(path: &Path) -> Result<String> {
    // Checks that all that is read below lies in the file.
    of(&Gguf::open(path)?)
}

/// The same of a file that is open.
///
/// # Errors
/// As [`fingerprint`].
pub(in crate::llama) fn of(gguf: &Gguf) -> Result<String> {
    let path = gguf.path();
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    let mut hash = Sha256::new();
    hash.update(file.metadata().map_err(io)?.len().to_le_bytes());
    let mut add = |from: u64, n: u64| -> Result<()> {
        file.seek(SeekFrom::Start(from)).map_err(io)?;
        let copied = std::io::copy(&mut file.by_ref().take(n), &mut hash).map_err(io)?;
        match copied == n {
            true => Ok(()),
            false => Err(Error::file(path, "was made shorter while it was read")),
        }
    };
    add(0, gguf.header().data_offset)?;
    for tensor in gguf.tensors() {
        add(tensor.offset, tensor.bytes.min(SAMPLE))?;
    }
    Ok(format!("{:x}", hash.finalize()))
}
