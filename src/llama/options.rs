//! How to make a context.

use llama_cpp_2::context::params::KvCacheType;

use super::taps::ScoreSource;
use super::threads::Poll;
use super::{Model, RopeFactors, memory};
use crate::attend::Attend;
use crate::error::{Error, Result};

/// `-fa`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlashAttention {
    #[default]
    Auto,
    On,
    Off,
}

/// Element type of the K or V cache (`-ctk`, `-ctv`), by llama.cpp's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    F32,
    #[default]
    F16,
    Bf16,
    #[serde(rename = "q8_0")]
    Q8_0,
    #[serde(rename = "q4_0")]
    Q4_0,
    #[serde(rename = "q4_1")]
    Q4_1,
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    #[serde(rename = "q5_0")]
    Q5_0,
    #[serde(rename = "q5_1")]
    Q5_1,
}

impl FlashAttention {
    /// As `-fa` spells it.
    pub fn name(self) -> &'static str {
        match self {
            FlashAttention::Auto => "auto",
            FlashAttention::On => "on",
            FlashAttention::Off => "off",
        }
    }
}

impl CacheType {
    pub(super) fn raw(self) -> KvCacheType {
        match self {
            CacheType::F32 => KvCacheType::F32,
            CacheType::F16 => KvCacheType::F16,
            CacheType::Bf16 => KvCacheType::BF16,
            CacheType::Q8_0 => KvCacheType::Q8_0,
            CacheType::Q4_0 => KvCacheType::Q4_0,
            CacheType::Q4_1 => KvCacheType::Q4_1,
            CacheType::Iq4Nl => KvCacheType::IQ4_NL,
            CacheType::Q5_0 => KvCacheType::Q5_0,
            CacheType::Q5_1 => KvCacheType::Q5_1,
        }
    }

    /// As the flags spell it.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Bf16 => "bf16",
            CacheType::Q8_0 => "q8_0",
            CacheType::Q4_0 => "q4_0",
            CacheType::Q4_1 => "q4_1",
            CacheType::Iq4Nl => "iq4_nl",
            CacheType::Q5_0 => "q5_0",
            CacheType::Q5_1 => "q5_1",
        }
    }

    /// Whether llama.cpp stores blocks of this type: as V it then needs flash attention.
    pub fn is_quantized(self) -> bool {
        !matches!(self, CacheType::F32 | CacheType::F16 | CacheType::Bf16)
    }
}

/// How to make a context.
#[derive(Clone, Debug)]
pub struct ContextOptions {
    /// Cells of the cache, or with `kv_size` the most that it may get.
    pub n_ctx: u32,
    /// Cells that the cache begins with, to grow and shrink with its tokens in steps of 256;
    /// `None`: all of them, for good. Needs a plain cache (no
    /// windows, nothing recurrent), otherwise it is ignored.
    pub kv_size: Option<u32>,
    /// Sequences that the cache holds at most, 1 or more. They share its cells. More than one needs a
    /// plain cache, and decoding steps that attend to everything.
    pub n_seq_max: u32,
    /// Rows of one decode call.
    pub n_batch: u32,
    /// Rows that are computed at once.
    pub n_ubatch: u32,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    /// How eagerly they wait for work, where ggml's own pool of threads serves.
    pub poll: Poll,
    pub flash_attention: FlashAttention,
    pub type_k: CacheType,
    pub type_v: CacheType,
    /// Layers whose attention is read (sorted).
    pub score_layers: Vec<u32>,
    pub score_source: ScoreSource,
    /// Pictures attend to all of themselves (a property of the vision model).
    pub non_causal_images: bool,
    pub rope_factors: RopeFactors,
    /// What decoding steps attend to.
    pub attend: Attend,
    /// Lets [`super::LlamaEngine::looked_up`] read what layers attended to, at the cost of memory.
    pub keep_sets: bool,
    /// Looks up by operations that every backend has, also where there is a faster way.
    pub plain_lookups: bool,
}

impl ContextOptions {
    /// Whether a context can be made so, with this many of the model's first layers.
    ///
    /// # Errors
    /// [`Error::Option`] naming the flag.
    pub(super) fn check(&self, model: &Model, n_layer_first: Option<u32>) -> Result<()> {
        if let Some(&il) = self.score_layers.iter().find(|&&il| il >= model.n_layer()) {
            return Err(Error::option(
                "--score-layers",
                format!(
                    "layer {il} does not exist, the model has layers 0 to {}",
                    model.n_layer().saturating_sub(1)
                ),
            ));
        }
        self.attend.check(model.n_layer())?;
        let flash = self.effective_flash_attention();
        if self.type_v.is_quantized() && flash == FlashAttention::Off {
            let why = if self.calls_back() {
                "reading attention scores switches off"
            } else {
                "-fa off switches off"
            };
            return Err(Error::option(
                "-ctv",
                format!("a quantized V cache needs flash attention, which {why}"),
            ));
        }
        if self.n_ctx == 0 || self.n_batch == 0 || self.n_ubatch == 0 {
            return Err(Error::option("-c, -b, -ub", "expected at least 1"));
        }
        self.check_sequences(model)?;
        let n_layer = n_layer_first.unwrap_or(model.n_layer());
        memory::check(
            model,
            n_layer,
            self.cells_at_first(),
            self.type_k,
            self.type_v,
        )?;
        Ok(())
    }

    fn check_sequences(&self, model: &Model) -> Result<()> {
        // `LLAMA_MAX_SEQ`, which the bindings lack.
        const MOST: u32 = 256;
        let refused = |reason: String| Err(Error::option("n_seq_max", reason));
        if !(1..=MOST).contains(&self.n_seq_max) {
            let n = self.n_seq_max;
            return refused(format!("{n} sequences, expected 1 to {MOST}"));
        }
        if self.n_seq_max == 1 {
            return Ok(());
        }
        if let Some(why) = model.eviction_obstacle() {
            return refused(format!("this model's cache holds one sequence: {why}"));
        }
        // What a step looks up is said by cell, and other sequences' cells are among them.
        if !self.attend.is_whole() {
            return refused("sequences beside --attend, which serves one".to_owned());
        }
        Ok(())
    }

    /// Cells that the cache begins with.
    pub(super) fn cells_at_first(&self) -> u32 {
        match self.kv_size {
            Some(n) => n.min(self.n_ctx),
            None => self.n_ctx,
        }
    }

    /// Whether the callback reads scores.
    pub(super) fn calls_back(&self) -> bool {
        !self.score_layers.is_empty() && self.score_source == ScoreSource::Callback
    }

    /// Whether the graph sums scores up.
    pub(super) fn taps(&self) -> bool {
        !self.score_layers.is_empty() && self.score_source == ScoreSource::Graph
    }

    /// What the context is made with: the callback's scores exist without flash attention only.
    pub fn effective_flash_attention(&self) -> FlashAttention {
        if self.calls_back() {
            FlashAttention::Off
        } else {
            self.flash_attention
        }
    }
}
