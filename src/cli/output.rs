//! What `-o json` prints: one object, field by field what a run was and what it cost.

use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;
use sha2::{Digest, Sha256};

use hae::Error;
use hae::answer::Answer;
use hae::attend::Attend;
use hae::build::Build;
use hae::llama::{CacheType, ContextOptions, FlashAttention, Poll, SamplerOptions};

/// How a run, or a plan, is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

#[derive(Debug, Serialize)]
pub struct Report<'a> {
    #[serde(flatten)]
    pub answer: &'a Answer,
    pub sampling: SamplerOptions,
    pub context: ContextReport,
    pub model: FileReport,
    pub mmproj: Option<FileReport>,
    /// Milliseconds that loading the files took.
    pub load_ms: f64,
    pub build: Build,
}

/// The context as it was made.
#[derive(Debug, Serialize)]
pub struct ContextReport {
    pub n_ctx: u32,
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    pub poll: Poll,
    pub flash_attention: FlashAttention,
    pub type_k: CacheType,
    pub type_v: CacheType,
    pub rope_factors: &'static str,
    /// What decoding steps attend to; absent: everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attend: Option<Attend>,
}

impl ContextReport {
    /// `attend`: what its decoding steps attend to, where that is not everything.
    pub fn new(
        options: &ContextOptions,
        attend: Option<Attend>,
        rope_factors: &'static str,
    ) -> Self {
        ContextReport {
            n_ctx: options.n_ctx,
            n_batch: options.n_batch,
            n_ubatch: options.n_ubatch,
            n_threads: options.n_threads,
            n_threads_batch: options.n_threads_batch,
            poll: options.poll,
            flash_attention: options.effective_flash_attention(),
            type_k: options.type_k,
            type_v: options.type_v,
            rope_factors,
            attend,
        }
    }
}

/// A file by name and content.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    pub file: String,
    pub sha256: String,
}

impl FileReport {
    pub fn read(path: &Path, shown: &str) -> Result<Self, Error> {
        let mut file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        let mut hash = Sha256::new();
        std::io::copy(&mut file, &mut hash).map_err(|e| Error::io(path, e))?;
        Ok(FileReport {
            file: shown.to_owned(),
            sha256: format!("{:x}", hash.finalize()),
        })
    }
}
