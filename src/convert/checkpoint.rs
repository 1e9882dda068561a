//! The tensors of a Hugging Face directory: one `model.safetensors`, or shards listed by
//! `model.safetensors.index.json`. Files are read piece by piece, never mapped: a file that shrinks
//! meanwhile is an error here and would be a SIGBUS in a mapping.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::json;
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The limit of the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug)]
pub struct Stored {
    shard: usize,
    /// What its values are stored as.
    pub dtype: Dtype,
    /// Slowest dimension first, as in PyTorch.
    pub shape: Vec<usize>,
    /// Bytes from the start of the shard.
    offset: u64,
    /// Bytes that it takes there.
    pub bytes: u64,
}

#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    tensors: HashMap<String, Stored>,
    /// The file that says what there is, for messages about what there is not.
    source: PathBuf,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads the headers of all shards.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] naming the file that is missing, cut short or malformed.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        if single.is_file() {
            let (shard, tensors) = open_shard(single.clone(), 0)?;
            return Ok(Self {
                shards: vec![shard],
                tensors,
                source: single,
            });
        }
        let source = dir.join(INDEX);
        if !source.is_file() {
            return Err(Error::file(
                dir,
                format!("holds neither {SINGLE} nor {INDEX}"),
            ));
        }
        let index: Index = json::read(&source)?;
        let mut shards = Vec::new();
        let mut found: HashMap<String, HashMap<String, Stored>> = HashMap::new();
        let mut tensors = HashMap::new();
        for (name, file) in index.weight_map {
            if !found.contains_key(&file) {
                // A name with a directory in it could lead anywhere.
                if Path::new(&file)
                    .file_name()
                    .is_none_or(|f| f != file.as_str())
                {
                    return Err(Error::file(
                        &source,
                        format!("shard \"{file}\" is not a plain file name"),
                    ));
                }
                let (shard, held) = open_shard(dir.join(&file), shards.len())?;
                shards.push(shard);
                found.insert(file.clone(), held);
            }
            let stored = found
                .get_mut(&file)
                .and_then(|held| held.remove(&name))
                .ok_or_else(|| {
                    Error::file(
                        dir.join(&file),
                        format!("tensor {name} is missing, {INDEX} places it here"),
                    )
                })?;
            tensors.insert(name, stored);
        }
        Ok(Self {
            shards,
            tensors,
            source,
        })
    }

    /// All tensors, by name.
    pub fn into_tensors(self) -> Vec<(String, Stored)> {
        let mut tensors: Vec<(String, Stored)> = self.tensors.into_iter().collect();
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        tensors
    }

    /// The tensor `name`, which must have this shape (slowest dimension first) and hold floats.
    ///
    /// # Errors
    /// [`Error::File`] naming the tensor and what was expected.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&Stored> {
        let stored = self.tensors.get(name).ok_or_else(|| {
            Error::file(
                &self.source,
                format!("tensor {name} is missing, expected shape {shape:?}"),
            )
        })?;
        let path = &self.shards[stored.shard].path;
        if stored.shape != shape {
            return Err(Error::file(
                path,
                format!(
                    "tensor {name} has shape {:?}, expected {shape:?}",
                    stored.shape
                ),
            ));
        }
        if !matches!(stored.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::file(
                path,
                format!(
                    "tensor {name} is {:?}, expected F32, F16 or BF16",
                    stored.dtype
                ),
            ));
        }
        Ok(stored)
    }

    /// Reads bytes of a tensor, from `offset` bytes behind its start.
    ///
    /// # Errors
    /// [`Error::Io`] naming the shard.
    pub fn read(&self, tensor: &Stored, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let shard = &self.shards[tensor.shard];
        let mut file = &shard.file;
        file.seek(SeekFrom::Start(tensor.offset + offset))
            .and_then(|_| file.read_exact(bytes))
            .map_err(|e| Error::io(&shard.path, e))
    }

    /// The file that `tensor` lies in.
    pub fn path(&self, tensor: &Stored) -> &Path {
        &self.shards[tensor.shard].path
    }
}

/// The tensors of one file, by their places in it.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn tensors(path: &Path) -> Result<Vec<(String, Stored)>> {
    let (_, tensors) = open_shard(path.to_owned(), 0)?;
    let mut tensors: Vec<(String, Stored)> = tensors.into_iter().collect();
    tensors.sort_by(|(a, x), (b, y)| (x.offset, a).cmp(&(y.offset, b)));
    Ok(tensors)
}

fn open_shard(path: PathBuf, shard: usize) -> Result<(Shard, HashMap<String, Stored>)> {
    let io = |e| Error::io(&path, e);
    let mut file = File::open(&path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    if len < 8 {
        return Err(Error::file(
            &path,
            format!("{len} bytes are no safetensors file"),
        ));
    }
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(io)?;
    let header_len = u64::from_le_bytes(size);
    if header_len > MAX_HEADER || header_len > len - 8 {
        return Err(Error::file(
            &path,
            format!(
                "claims a header of {header_len} bytes in a file of {len}: not safetensors, or cut short"
            ),
        ));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(io)?;
    // Checks by itself that the tensors are contiguous and as large as their shapes say.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| Error::file(&path, format!("safetensors header: {e}")))?;
    let data_start = 8 + header_len;
    let expected = data_start.checked_add(metadata.data_len() as u64);
    if expected != Some(len) {
        let expected = expected.map_or("more than 2^64".to_owned(), |n| n.to_string());
        return Err(Error::file(
            &path,
            format!("has {len} bytes, its header describes {expected}: cut short?"),
        ));
    }
    let tensors = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let stored = Stored {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: data_start + info.data_offsets.0 as u64,
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            };
            (name, stored)
        })
        .collect();
    Ok((Shard { path, file }, tensors))
}
