//! How to make a context.

use super::cache_type::CacheType;
use super::taps::ScoreSource;
use super::threads::Poll;
use super::{Model, RopeFactors, devices, memory};
use crate::attend::Attend;
use crate::cache::BinOptions;
use crate::error::{Error, Result};

/// `-fa`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlashAttention {
    /// Where the model and its devices can.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never: the cache then holds V transposed.
    Off,
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

/// What is left to the policy ([`crate::open`]), since nobody has said it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByPolicy {
    /// [`ContextOptions::type_k`] and [`ContextOptions::type_v`].
    pub types: bool,
    /// [`ContextOptions::attend`]. A model that cannot look up then attends to everything, where it
    /// is refused otherwise.
    pub attend: bool,
}

impl ByPolicy {
    /// Everything.
    pub const ALL: ByPolicy = ByPolicy {
        types: true,
        attend: true,
    };
}

/// How to make a context.
#[derive(Clone, Debug, PartialEq)]
pub struct ContextOptions {
    /// Cells of the cache, or with `kv_size` the most that it may get. For [`crate::open`] 0 is the
    /// length that the model was trained for.
    pub n_ctx: u32,
    /// Cells that the cache begins with, to grow and shrink with its tokens in steps of 256;
    /// `None`: all of them, for good. Needs a plain cache (no
    /// windows, nothing recurrent), otherwise it is ignored.
    pub kv_size: Option<u32>,
    /// Sequences that the cache holds at most: 1 to 256, and no more than `n_batch`. They share its
    /// cells. More than one needs a plain cache and decoding steps that attend to everything, and no
    /// token can be moved to another position then.
    pub n_seq_max: u32,
    /// Rows of one decode call.
    pub n_batch: u32,
    /// Rows that are computed at once.
    pub n_ubatch: u32,
    /// For one token.
    pub n_threads: i32,
    /// For batches of several.
    pub n_threads_batch: i32,
    /// How eagerly they wait for work, where ggml's own pool of threads serves.
    pub poll: Poll,
    /// Whether attention is computed in one operation.
    pub flash_attention: FlashAttention,
    /// What K is stored as.
    pub type_k: CacheType,
    /// What V is stored as.
    pub type_v: CacheType,
    /// Layers whose attention is read (sorted).
    pub score_layers: Vec<u32>,
    /// Whether [`crate::cache::Observation::layers`] is read as well, by [`ScoreSource::Graph`] alone.
    pub scores_by_layer: bool,
    /// How attention is read.
    pub score_source: ScoreSource,
    /// Pictures attend to all of themselves (a property of the vision model).
    pub non_causal_images: bool,
    /// Which factors a longrope model takes.
    pub rope_factors: RopeFactors,
    /// What decoding steps attend to.
    pub attend: Attend,
    /// Which of these the policy decides.
    pub by_policy: ByPolicy,
    /// Where rows of evicted tokens wait, under a policy that calls them back.
    pub bin: BinOptions,
    /// Lets [`super::LlamaEngine::looked_up`] read what layers attended to, at the cost of memory.
    pub keep_sets: bool,
    /// Looks up by operations that every backend has, also where there is a faster way.
    pub plain_lookups: bool,
}

/// llama.cpp's, with 4096 cells and a thread for each processor that the system offers.
impl Default for ContextOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let n_threads = i32::try_from(threads.min(512)).unwrap_or(1);
        ContextOptions {
            n_ctx: 4096,
            kv_size: None,
            n_seq_max: 1,
            n_batch: 2048,
            n_ubatch: 512,
            n_threads,
            n_threads_batch: n_threads,
            poll: Poll::default(),
            flash_attention: FlashAttention::Auto,
            type_k: CacheType::F16,
            type_v: CacheType::F16,
            score_layers: Vec::new(),
            scores_by_layer: false,
            score_source: ScoreSource::default(),
            non_causal_images: false,
            rope_factors: RopeFactors::default(),
            attend: Attend::default(),
            by_policy: ByPolicy::default(),
            bin: BinOptions::default(),
            keep_sets: false,
            plain_lookups: false,
        }
    }
}

impl ContextOptions {
    /// Whether a context can be made so, with this many of the model's first layers.
    ///
    /// # Errors
    /// [`Error::Option`] naming the flag.
    pub(super) fn check(&self, model: &Model, n_layer_first: Option<u32>) -> Result<()> {
        if let Some(&il) = self.score_layers.iter().find(|&&il| il >= model.n_layer()) {
            return Err(Error::option(
                "score_layers",
                format!(
                    "layer {il} does not exist, the model has layers 0 to {}",
                    model.n_layer().saturating_sub(1)
                ),
            ));
        }
        self.check_by_layer()?;
        self.attend.check(model.n_layer())?;
        let flash = self.effective_flash_attention();
        if self.type_v.is_quantized() && flash == FlashAttention::Off {
            let why = if self.calls_back() {
                "reading attention scores switches off"
            } else {
                "`flash_attention` off switches off"
            };
            return Err(Error::option(
                "type_v",
                format!("a quantized V cache needs flash attention, which {why}"),
            ));
        }
        if self.n_ctx == 0 || self.n_batch == 0 || self.n_ubatch == 0 {
            return Err(Error::option(
                "`n_ctx`, `n_batch`, `n_ubatch`",
                "expected at least 1",
            ));
        }
        self.check_sequences(model)?;
        self.check_types(model)?;
        if model.options().vocabulary {
            return Err(Error::contract("a context of a vocabulary"));
        }
        if model.options().measure {
            return Ok(());
        }
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

    /// What is read by layer comes in the layers' order, once each.
    fn check_by_layer(&self) -> Result<()> {
        let refused = |reason: &str| Err(Error::option("scores_by_layer", reason));
        match self.scores_by_layer {
            true if self.calls_back() => refused("the evaluation callback reads no sums by layer"),
            true if !self.score_layers.is_sorted_by(|a, b| a < b) => {
                refused("expected `score_layers` in ascending order, each once")
            }
            _ => Ok(()),
        }
    }

    /// A GPU has to write into what it holds.
    fn check_types(&self, model: &Model) -> Result<()> {
        let placement = &model.options().placement;
        if !model.may_use_gpu() || placement.kv_on_host {
            return Ok(());
        }
        let taken = placement.targets()?;
        for (name, kind) in [("type_k", self.type_k), ("type_v", self.type_v)] {
            if let Some(gpu) = devices::without_cache(&taken, kind) {
                let reason = format!(
                    "{}: the GPU {gpu} cannot write into such a cache",
                    kind.name()
                );
                return Err(Error::option(name, reason));
            }
        }
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
        // llama.cpp keeps room for logits of every sequence, and asserts that a batch can have them.
        if self.n_seq_max > self.n_batch {
            let (n, rows) = (self.n_seq_max, self.n_batch);
            return refused(format!("{n} sequences in batches of {rows} (`n_batch`)"));
        }
        if let Some(why) = model.eviction_obstacle() {
            return refused(format!("this model's cache holds one sequence: {why}"));
        }
        // What a step looks up is said by cell, and other sequences' cells are among them.
        if !self.attend.is_whole() {
            return refused("sequences beside `attend`, which serves one".to_owned());
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
