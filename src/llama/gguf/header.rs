//! Walks a GGUF's header before ggml does, in Rust and with limits.
//!
//! ggml's reader (`gguf.cpp`) refuses most nonsense itself, but it copies every array it reads
//! outside of its handlers for failed allocations, and a file may claim arrays of a thousand
//! million elements in a sparse file. It also never compares the tensors with the file's length;
//! llama.cpp does that much later, after allocating. So the sizes are checked here, once, and what
//! passes is small enough for ggml to hold.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::{ALIGNMENT, MAX_DIMS, MAX_TENSOR_NAME, TensorType};
use crate::error::{Error, Result};

const MAGIC: [u8; 4] = *b"GGUF";
/// Version 1 had 32-bit counts and is refused by ggml, too.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
/// The largest vocabularies have some 10^5 tokens, the largest models some 10^3 tensors.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_ELEMENTS: u64 = 1 << 24;
const MAX_KEY_LEN: u64 = 1 << 16;
const MAX_METADATA: u64 = 1 << 28;

/// What the walk learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of the format.
    pub version: u32,
    /// Entries of metadata.
    pub n_keys: u64,
    /// Tensors.
    pub n_tensors: u64,
    /// Where tensor data starts, in bytes from the start of the file.
    pub data_offset: u64,
}

/// Checks everything that ggml will read from `path` without the tensor data.
///
/// # Errors
/// [`Error::File`] naming the first thing that is not as expected.
pub fn check(path: &Path) -> Result<Header> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let mut walk = Walk {
        input: BufReader::new(file),
        path,
        len: meta.len(),
        at: 0,
    };
    walk.header()
}

struct Walk<'a> {
    input: BufReader<File>,
    path: &'a Path,
    len: u64,
    at: u64,
}

impl Walk<'_> {
    fn header(&mut self) -> Result<Header> {
        let magic: [u8; 4] = self.bytes("magic")?;
        if magic != MAGIC {
            let seen = String::from_utf8_lossy(&magic).escape_debug().to_string();
            return Err(self.wrong(format!("starts with \"{seen}\", expected \"GGUF\"")));
        }
        let version = u32::from_le_bytes(self.bytes("version")?);
        if !VERSIONS.contains(&version) {
            return Err(self.wrong(format!("GGUF version {version}, expected 2 or 3")));
        }
        let n_tensors = self.count("tensor count", MAX_TENSORS)?;
        let n_keys = self.count("key count", MAX_KEYS)?;

        let mut alignment = ALIGNMENT as u64;
        let mut seen = HashSet::new();
        for _ in 0..n_keys {
            let key = self.string("key")?;
            if key.is_empty() || !seen.insert(key.clone()) {
                return Err(self.wrong(format!("key \"{key}\" is empty or occurs twice")));
            }
            let value = self.value(&key)?;
            if key == "general.alignment" {
                alignment = u64::from(value.unwrap_or(0));
                if !alignment.is_power_of_two() || alignment > 1 << 16 {
                    return Err(
                        self.wrong("general.alignment is not an unsigned power of two up to 65536")
                    );
                }
            }
        }
        let tensors = self.tensors(n_tensors)?;
        let data_offset = if n_tensors == 0 {
            self.at
        } else {
            self.at.next_multiple_of(alignment)
        };
        self.check_extents(&tensors, data_offset, alignment)?;
        Ok(Header {
            version,
            n_keys,
            n_tensors,
            data_offset,
        })
    }

    /// Skips a value; returns it if it is a u32.
    fn value(&mut self, key: &str) -> Result<Option<u32>> {
        let mut kind = u32::from_le_bytes(self.bytes("value type")?);
        let mut n = 1;
        let is_array = kind == 9;
        if is_array {
            kind = u32::from_le_bytes(self.bytes("array type")?);
            n = self.count(key, MAX_ELEMENTS)?;
        }
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..n {
                    let len = u64::from_le_bytes(self.bytes(key)?);
                    self.skip(len, key)?;
                }
                return Ok(None);
            }
            _ => return Err(self.wrong(format!("{key} has the unknown value type {kind}"))),
        };
        if kind == 4 && !is_array {
            return Ok(Some(u32::from_le_bytes(self.bytes(key)?)));
        }
        self.skip(n * size, key)?;
        Ok(None)
    }

    /// Reads the tensor table: name, bytes and offset of each.
    fn tensors(&mut self, n: u64) -> Result<Vec<(String, u64, u64)>> {
        let mut tensors = Vec::new();
        let mut seen = HashSet::new();
        for _ in 0..n {
            let name = self.string("tensor name")?;
            if name.len() >= MAX_TENSOR_NAME || !seen.insert(name.clone()) {
                return Err(self.wrong(format!(
                    "tensor name \"{name}\" is longer than 63 bytes or occurs twice"
                )));
            }
            let n_dims = u32::from_le_bytes(self.bytes(&name)?);
            if n_dims as usize > MAX_DIMS || n_dims == 0 {
                return Err(self.wrong(format!(
                    "tensor {name} has {n_dims} dimensions, expected 1 to {MAX_DIMS}"
                )));
            }
            let mut dims = Vec::with_capacity(MAX_DIMS);
            for _ in 0..n_dims {
                dims.push(u64::from_le_bytes(self.bytes(&name)?));
            }
            let raw = u32::from_le_bytes(self.bytes(&name)?);
            let kind = TensorType::from_raw(raw)
                .ok_or_else(|| self.wrong(format!("tensor {name} has the unknown type {raw}")))?;
            let bytes = kind
                .tensor_bytes(&dims)
                .filter(|_| dims.iter().all(|&d| d > 0))
                .ok_or_else(|| {
                    self.wrong(format!(
                        "tensor {name} of type {} cannot have shape {dims:?}",
                        kind.name()
                    ))
                })?;
            tensors.push((name.clone(), bytes, u64::from_le_bytes(self.bytes(&name)?)));
        }
        Ok(tensors)
    }

    /// ggml wants the tensors one after the other; the last must end within the file.
    fn check_extents(
        &self,
        tensors: &[(String, u64, u64)],
        data: u64,
        alignment: u64,
    ) -> Result<()> {
        let mut next = 0u64;
        for (name, bytes, offset) in tensors {
            if *offset != next {
                return Err(self.wrong(format!(
                    "tensor {name} lies at offset {offset}, expected {next}"
                )));
            }
            let end = data
                .checked_add(*offset)
                .and_then(|o| o.checked_add(*bytes));
            if end.is_none_or(|end| end > self.len) {
                return Err(self.wrong(format!(
                    "tensor {name} ({bytes} bytes at {offset}) ends behind the end of the file ({} bytes)",
                    self.len
                )));
            }
            // Cannot overflow: the end was just found to lie within the file.
            next = (offset + bytes).next_multiple_of(alignment);
        }
        Ok(())
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64> {
        let n = u64::from_le_bytes(self.bytes(what)?);
        if n > limit {
            return Err(self.wrong(format!("{what} counts {n}, expected at most {limit}")));
        }
        Ok(n)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.count(what, MAX_KEY_LEN)?;
        self.room(len, what)?;
        let mut bytes = vec![0; len as usize];
        self.input
            .read_exact(&mut bytes)
            .map_err(|e| Error::io(self.path, e))?;
        self.at += len;
        // ggml goes on with C strings, which end at the first zero.
        match String::from_utf8(bytes) {
            Ok(s) if !s.contains('\0') => Ok(s),
            _ => Err(self.wrong(format!("{what} at byte {} is not text", self.at - len))),
        }
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.room(N as u64, what)?;
        let mut bytes = [0; N];
        self.input
            .read_exact(&mut bytes)
            .map_err(|e| Error::io(self.path, e))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn skip(&mut self, n: u64, what: &str) -> Result<()> {
        self.room(n, what)?;
        // Fits: room() limits it to the size of the metadata.
        self.input
            .seek_relative(n as i64)
            .map_err(|e| Error::io(self.path, e))?;
        self.at += n;
        Ok(())
    }

    fn room(&self, n: u64, what: &str) -> Result<()> {
        if n > self.len - self.at {
            return Err(self.wrong(format!("ends within {what} (byte {})", self.len)));
        }
        if n > MAX_METADATA - self.at.min(MAX_METADATA) {
            return Err(self.wrong(format!("metadata is larger than {MAX_METADATA} bytes")));
        }
        Ok(())
    }

    fn wrong(&self, reason: impl Into<String>) -> Error {
        Error::file(self.path, reason)
    }
}
