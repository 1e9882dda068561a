//! Conversations on disk (`--session`): what was said and shown, what the cache holds and what it
//! has lost, so that a later run goes on as if it had never ended.
//!
//! The file is a header (magic, version, SHA-256 of the rest) and the [`Saved`] structure in
//! postcard's encoding. llama.cpp checks what it finds in its own part; the checksum keeps damage
//! from getting that far.

mod session;

use std::io::Write;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::SavedLedger;
use crate::engine::Token;
use crate::error::{Error, Result};
use crate::generate::{History, Saved as SavedRows};
use crate::llama::{CacheType, FlashAttention, RopeFactors, SequenceState};
use crate::outfile::OutFile;
use crate::prompt::Transcript;

const KIND: Kind = Kind {
    magic: *b"HAE-SESS",
    version: 4,
    name: "session",
};
const HEADER: usize = KIND.magic.len() + 4 + 32;

/// What a model must share with the one that a session was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// `general.architecture`.
    pub arch: String,
    /// Layers.
    pub n_layer: u32,
    /// Width of a row of embeddings.
    pub n_embd: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Of the text model's file.
    pub bytes: u64,
    /// Tells it from others of the same shape.
    pub fingerprint: String,
}

/// How K and V were stored, by the flags that say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    /// What K was stored as.
    pub type_k: CacheType,
    /// What V was stored as.
    pub type_v: CacheType,
    /// Without it V is transposed.
    pub flash_attention: FlashAttention,
}

impl Storage {
    /// The flags that were others, with their values.
    pub fn flags_beside(&self, other: &Storage) -> String {
        let all = [
            ("type_k", self.type_k.name(), other.type_k.name()),
            ("type_v", self.type_v.name(), other.type_v.name()),
            (
                "flash_attention",
                self.flash_attention.name(),
                other.flash_attention.name(),
            ),
        ];
        let differ = all.iter().filter(|(_, own, other)| own != other);
        let flags: Vec<String> = differ
            .map(|(flag, own, _)| format!("`{flag}` {own}"))
            .collect();
        flags.join(" ")
    }
}

/// Everything that a conversation is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// What it was made with.
    pub model: ModelIdentity,
    /// The set that the cached keys were rotated with.
    pub rope_factors: RopeFactors,
    /// How the state holds K and V.
    pub storage: Storage,
    /// What was said, as the model has seen it.
    pub transcript: Transcript,
    /// Last token of the last answer, when it has not gone through the model yet.
    pub pending: Option<Token>,
    /// The last tokens that were sampled: what a repeat penalty looks back on.
    pub sampled: Vec<Token>,
    /// Pictures that were shown so far.
    pub images: u32,
    /// The books of the cache.
    pub ledger: SavedLedger,
    /// The segments that went in, in the order of their positions.
    pub history: History,
    /// Evicted text that the host keeps.
    pub host_bin: Vec<SavedRows>,
    /// llama.cpp's own state of the sequence.
    #[serde(with = "state_bytes")]
    pub state: SequenceState,
}

mod state_bytes {
    use serde::{Deserializer, Serializer};

    use crate::llama::SequenceState;

    pub fn serialize<S: Serializer>(state: &SequenceState, to: S) -> Result<S::Ok, S::Error> {
        serde_bytes::serialize(state.bytes(), to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SequenceState, D::Error> {
        let bytes: Vec<u8> = serde_bytes::deserialize(from)?;
        Ok(SequenceState::from_file(bytes))
    }
}

impl Saved {
    /// Writes the file, whole or not at all. A new one is its owner's alone: it holds what was
    /// said and shown.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        KIND.write(self, path)?;
        Ok(())
    }

    /// Reads a file that [`Saved::write`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when it is something else, of another version, or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        KIND.read(path).map(|(saved, _)| saved)
    }

    /// As [`Saved::read`], of a file's bytes; `path` is what messages name.
    ///
    /// # Errors
    /// As [`Saved::read`].
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        KIND.decode(path, bytes)
    }
}

/// A kind of file: a header (magic, version, SHA-256 of the rest) and a value in postcard's encoding.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What it begins with.
    pub magic: [u8; 8],
    /// Of what is in it.
    pub version: u32,
    /// What messages call it.
    pub name: &'static str,
}

impl Kind {
    /// Writes the file, whole or not at all, as its owner's alone. Gives its bytes.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when it cannot be written.
    pub fn write(self, value: &impl Serialize, path: &Path) -> Result<u64> {
        let body = postcard::to_stdvec(value).map_err(|e| Error::file(path, e.to_string()))?;
        let out = OutFile::create_private(path)?;
        let digest = Sha256::digest(&body);
        let mut file = out.file();
        [&self.magic[..], &self.version.to_le_bytes(), &digest, &body]
            .into_iter()
            .try_for_each(|part| file.write_all(part))
            .map_err(|e| Error::io(path, e))?;
        out.commit()?;
        Ok((HEADER + body.len()) as u64)
    }

    /// Reads such a file; with its bytes.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when it is something else, of another version, or damaged.
    pub fn read<T: DeserializeOwned>(self, path: &Path) -> Result<(T, u64)> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Ok((self.decode(path, &bytes)?, bytes.len() as u64))
    }

    /// As [`Kind::read`], of a file's bytes; `path` is what messages name.
    ///
    /// # Errors
    /// As [`Kind::read`].
    pub fn decode<T: DeserializeOwned>(self, path: &Path, bytes: &[u8]) -> Result<T> {
        let Kind { name, version, .. } = self;
        let Some((header, body)) = bytes.split_at_checked(HEADER) else {
            let reason = format!("is no {name} of hae: too short");
            return Err(Error::file(path, reason));
        };
        let (magic, rest) = header.split_at(self.magic.len());
        let (found, digest) = rest.split_at(4);
        if magic != self.magic {
            return Err(Error::file(path, format!("is no {name} of hae")));
        }
        if found != version.to_le_bytes() {
            let found = found.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b));
            let reason = format!("is a {name} of version {found}, expected {version}");
            return Err(Error::file(path, reason));
        }
        if Sha256::digest(body).as_slice() != digest {
            return Err(Error::file(path, "is damaged: its checksum does not match"));
        }
        postcard::from_bytes(body).map_err(|e| Error::file(path, format!("is damaged: {e}")))
    }
}
