//! [`LlamaEngine`]: one llama.cpp context, one sequence, as an [`Engine`].

use std::num::NonZeroU32;
use std::ops::Range;
use std::ptr::NonNull;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use super::observer::{Observer, on_node};
use super::state::SequenceState;
use super::{Model, SamplerOptions, backend, log, memory};
use crate::cache::{Cell, Pos};
use crate::engine::{Batch, Engine, Input, KvBytes, Observation, Token};
use crate::error::{Error, Result};

/// The one sequence of the context.
pub(super) const SEQ: sys::llama_seq_id = 0;

/// `-fa`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlashAttention {
    #[default]
    Auto,
    On,
    Off,
}

/// Element type of the K or V cache (`-ctk`, `-ctv`), by llama.cpp's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
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
    /// Cells that the cache begins with, rounded up to a multiple of 256; `None`: `n_ctx`. Needs the
    /// feature `kv-patches` and a plain cache (no windows, nothing recurrent), else it is ignored.
    pub kv_size: Option<u32>,
    /// Rows of one decode call.
    pub n_batch: u32,
    /// Rows that are computed at once.
    pub n_ubatch: u32,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    pub flash_attention: FlashAttention,
    pub type_k: CacheType,
    pub type_v: CacheType,
    /// Layers whose attention is read (sorted); reading any switches flash attention off.
    pub score_layers: Vec<u32>,
    /// Pictures attend to all of themselves (a property of the vision model).
    pub non_causal_images: bool,
}

/// A context on a [`Model`].
pub struct LlamaEngine<'m> {
    // Declared first, so dropped before the observer that it points to.
    ctx: LlamaContext<'m>,
    /// The same context, for calls that only read it.
    pub(super) raw: NonNull<sys::llama_context>,
    observer: Owned,
    pub(super) model: &'m Model,
    sampler: LlamaSampler,
    pub(super) options: ContextOptions,
    n_ctx: usize,
    /// Cells handed out by counting, where the memory has no cells that could be read.
    pub(super) counted: Option<Cell>,
    /// Whether the last batch asked for logits: reading absent ones would end the process.
    has_logits: bool,
    /// What the host needs to restore the copy of the sequence that is on the device.
    pub(super) on_device: Option<SequenceState>,
    rows: Rows,
}

/// The observer that llama.cpp holds a pointer to. It is only ever reached through this one
/// pointer, so that neither side's access invalidates the other's.
struct Owned(NonNull<Observer>);

impl Owned {
    fn new(observer: Observer) -> Self {
        Owned(NonNull::from(Box::leak(Box::new(observer))))
    }

    fn get(&self) -> &Observer {
        // SAFETY: alive until drop; llama.cpp uses it only inside llama_decode, which borrows
        // the engine mutably.
        unsafe { self.0.as_ref() }
    }

    fn get_mut(&mut self) -> &mut Observer {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by Box::leak in `new`, freed once; the context is gone by now.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// Per-row fields of a `llama_batch`, reused.
#[derive(Default)]
struct Rows {
    pos: Vec<sys::llama_pos>,
    n_seq_id: Vec<i32>,
    seq_id: Vec<*mut sys::llama_seq_id>,
    logits: Vec<i8>,
}

impl<'m> LlamaEngine<'m> {
    /// Makes a context with an empty cache.
    ///
    /// # Errors
    /// [`Error::Option`] for a cache type or score layer that cannot be served,
    /// [`Error::Llama`] when llama.cpp refuses (not enough memory, most often).
    pub fn new(
        model: &'m Model,
        options: ContextOptions,
        sampler: &SamplerOptions,
    ) -> Result<Self> {
        let observing = !options.score_layers.is_empty();
        if let Some(&il) = options
            .score_layers
            .iter()
            .find(|&&il| il >= model.n_layer())
        {
            return Err(Error::option(
                "--score-layers",
                format!(
                    "layer {il} does not exist, the model has layers 0 to {}",
                    model.n_layer().saturating_sub(1)
                ),
            ));
        }
        let flash = if observing {
            FlashAttention::Off
        } else {
            options.flash_attention
        };
        if options.type_v.is_quantized() && flash == FlashAttention::Off {
            let why = if observing {
                "reading attention scores switches off"
            } else {
                "-fa off switches off"
            };
            return Err(Error::option(
                "-ctv",
                format!("a quantized V cache needs flash attention, which {why}"),
            ));
        }
        if options.n_ctx == 0 || options.n_batch == 0 || options.n_ubatch == 0 {
            return Err(Error::option("-c, -b, -ub", "expected at least 1"));
        }
        let n_cells = match options.kv_size {
            Some(n) if cfg!(feature = "kv-patches") => n.min(options.n_ctx),
            _ => options.n_ctx,
        };
        memory::check(model, n_cells, options.type_k, options.type_v)?;
        let observer = Owned::new(Observer::new(options.score_layers.clone()));
        let mut params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(options.n_ctx))
            .with_n_batch(options.n_batch)
            .with_n_ubatch(options.n_ubatch.min(options.n_batch))
            .with_n_seq_max(1)
            .with_n_threads(options.n_threads)
            .with_n_threads_batch(options.n_threads_batch)
            .with_flash_attention_policy(match flash {
                FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
                FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            })
            .with_type_k(options.type_k.raw())
            .with_type_v(options.type_v.raw());
        let raw = params.as_raw_mut();
        raw.cb_eval = Some(on_node);
        raw.cb_eval_user_data = observer.0.as_ptr().cast();
        #[cfg(feature = "kv-patches")]
        {
            raw.kv_size = options.kv_size.unwrap_or(0);
        }

        log::forget();
        let mut ctx = model.inner.new_context(backend()?, params).map_err(|e| {
            Error::llama(
                "llama_init_from_model",
                format!(
                    "no context of {n_cells} cells: {}",
                    log::take_reason(&e.to_string())
                ),
            )
        })?;
        let n_ctx = ctx.n_ctx() as usize;
        let raw = NonNull::new(ctx.as_mut_ptr())
            .ok_or_else(|| Error::llama("llama_init_from_model", "returned null"))?;
        Ok(LlamaEngine {
            raw,
            on_device: None,
            sampler: sampler.chain(model.n_vocab(), n_ctx),
            counted: model.eviction_obstacle().map(|_| 0),
            ctx,
            observer,
            model,
            options,
            n_ctx,
            has_logits: false,
            rows: Rows::default(),
        })
    }

    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Forgets every token and the sampler's history.
    pub fn clear(&mut self) {
        self.ctx.clear_kv_cache();
        self.sampler.reset();
        if let Some(n) = &mut self.counted {
            *n = 0;
        }
    }

    /// Rows that are computed at once: a picture whose tokens attend to all of it needs as many.
    pub fn n_ubatch(&self) -> usize {
        self.options.n_ubatch.min(self.options.n_batch) as usize
    }

    fn set_causal(&mut self, causal: bool) {
        // SAFETY: the pointer is valid while `self.ctx` lives.
        unsafe { sys::llama_set_causal_attn(self.ctx.as_mut_ptr(), causal) };
    }

    /// Fills the per-row arrays and returns a batch that borrows them and the input.
    fn batch(
        &mut self,
        batch: &Batch<'_>,
        seq: &mut sys::llama_seq_id,
    ) -> Result<sys::llama_batch> {
        let n = batch.input.len();
        let n_tokens = i32::try_from(n)
            .map_err(|_| Error::llama("llama_decode", format!("{n} rows in one batch")))?;
        let last = batch.pos.checked_add(n_tokens).filter(|_| batch.pos >= 0);
        if last.is_none() {
            return Err(Error::llama(
                "llama_decode",
                format!("positions from {} on overflow", batch.pos),
            ));
        }
        let rows = &mut self.rows;
        rows.pos.clear();
        rows.logits.clear();
        let (tokens, embd) = match batch.input {
            Input::Tokens(tokens) => {
                let n_vocab = self.model.n_vocab();
                if let Some(t) = tokens
                    .iter()
                    .find(|&&t| usize::try_from(t).map_or(true, |t| t >= n_vocab))
                {
                    return Err(Error::llama(
                        "llama_decode",
                        format!("token {t} is not in the vocabulary of {n_vocab}"),
                    ));
                }
                rows.pos.extend(batch.pos..batch.pos + n_tokens);
                (tokens.as_ptr().cast_mut(), std::ptr::null_mut())
            }
            Input::Embeddings { data, n, mrope } => {
                let n_embd = self.model.n_embd();
                if n.checked_mul(n_embd) != Some(data.len()) {
                    return Err(Error::llama(
                        "llama_decode",
                        format!("{} values for {n} embeddings of width {n_embd}", data.len()),
                    ));
                }
                match mrope {
                    None => rows.pos.extend(batch.pos..batch.pos + n_tokens),
                    // llama.cpp wants the four axes one after the other, n values each.
                    Some(mrope) if mrope.len() == n => {
                        for axis in 0..4 {
                            rows.pos.extend(mrope.iter().map(|p| p[axis]));
                        }
                    }
                    Some(mrope) => {
                        return Err(Error::llama(
                            "llama_decode",
                            format!("{} positions for {n} embeddings", mrope.len()),
                        ));
                    }
                }
                (std::ptr::null_mut(), data.as_ptr().cast_mut())
            }
        };
        rows.n_seq_id.clear();
        rows.n_seq_id.resize(n, 1);
        rows.seq_id.clear();
        rows.seq_id.resize(n, std::ptr::from_mut(seq));
        rows.logits.resize(n, 0);
        if let (true, Some(last)) = (batch.logits, rows.logits.last_mut()) {
            *last = 1;
        }
        Ok(sys::llama_batch {
            n_tokens,
            token: tokens,
            embd,
            pos: rows.pos.as_mut_ptr(),
            n_seq_id: rows.n_seq_id.as_mut_ptr(),
            seq_id: rows.seq_id.as_mut_ptr(),
            logits: rows.logits.as_mut_ptr(),
        })
    }
}

impl Engine for LlamaEngine<'_> {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        let mut seq = SEQ;
        let raw = self.batch(&batch, &mut seq)?;
        let non_causal =
            self.options.non_causal_images && matches!(batch.input, Input::Embeddings { .. });
        if non_causal && batch.input.len() > self.n_ubatch() {
            return Err(Error::llama(
                "llama_decode",
                format!(
                    "a picture of {} tokens that attend to all of it, in batches of {}",
                    batch.input.len(),
                    self.n_ubatch()
                ),
            ));
        }
        if non_causal {
            self.set_causal(false);
        }
        // Such a memory never fills, so llama.cpp would go on for ever.
        let rows = batch.input.len();
        if self.counted.is_some_and(|n| n as usize + rows > self.n_ctx) {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        self.observer.get_mut().begin(batch.queries);
        self.has_logits = false;
        log::forget();
        // SAFETY: every pointer in the batch is null or points to n_tokens valid elements that
        // outlive the call (llama.cpp only reads them); token ids and lengths were checked; the
        // observer is not touched by anyone else during the call.
        let status = unsafe { sys::llama_decode(self.ctx.as_mut_ptr(), raw) };
        if non_causal {
            self.set_causal(true);
        }
        let observed = self.observer.get_mut().finish(cells, seen);
        match status {
            0 => {}
            1 => return Err(Error::ContextFull { n_ctx: self.n_ctx }),
            code => {
                return Err(Error::llama(
                    "llama_decode",
                    log::take_reason(&format!("status {code}")),
                ));
            }
        }
        self.has_logits = batch.logits;
        observed.map_err(|reason| Error::llama("llama_decode", reason))?;
        seen.queries
            .extend(batch.queries.iter().map(|&row| batch.pos + row as Pos));
        if let Some(next) = &mut self.counted {
            cells.clear();
            cells.extend((*next..).take(batch.input.len()));
            *next += batch.input.len() as Cell;
        }
        if cells.len() != batch.input.len() {
            return Err(Error::llama(
                "llama_decode",
                format!(
                    "{} cells reported for {} rows",
                    cells.len(),
                    batch.input.len()
                ),
            ));
        }
        Ok(())
    }

    fn logits(&self) -> Result<&[f32]> {
        let n_vocab = self.model.n_vocab();
        if !self.has_logits {
            return Err(Error::llama(
                "llama_get_logits_ith",
                "the last batch asked for no logits",
            ));
        }
        let logits = self.ctx.get_logits_ith(-1);
        logits
            .get(..n_vocab)
            .ok_or_else(|| Error::llama("llama_get_logits_ith", "no logits"))
    }

    fn sample(&mut self) -> Result<Token> {
        if !self.has_logits {
            return Err(Error::llama(
                "llama_sampler_sample",
                "the last batch asked for no logits",
            ));
        }
        Ok(self.sampler.sample(&self.ctx, -1).0)
    }

    fn is_eog(&self, token: Token) -> bool {
        self.model.inner.vocab().is_eog(LlamaToken(token))
    }

    fn piece(&self, token: Token, out: &mut Vec<u8>) -> Result<()> {
        self.model
            .inner
            .vocab()
            .token_to_piece_into(LlamaToken(token), out, false, None);
        Ok(())
    }

    fn remove(&mut self, ranges: &[Range<Pos>]) -> Result<()> {
        for range in ranges {
            if range.start < 0 || range.end <= range.start {
                return Err(Error::llama(
                    "llama_memory_seq_rm",
                    format!("range {range:?} is empty or negative"),
                ));
            }
            // SAFETY: the context is alive; the range was checked (a negative bound would mean
            // "everything").
            let done = unsafe {
                let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
                sys::llama_memory_seq_rm(memory, SEQ, range.start, range.end)
            };
            if !done {
                return Err(Error::llama(
                    "llama_memory_seq_rm",
                    format!("positions {range:?} cannot be removed"),
                ));
            }
        }
        Ok(())
    }

    fn rewind(&mut self, from: Pos, left: usize) -> Result<()> {
        let from = from.max(0);
        // SAFETY: the context is alive; an end of -1 means "to the end".
        let done = unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
            sys::llama_memory_seq_rm(memory, SEQ, from, -1)
        };
        if !done {
            return Err(Error::llama(
                "llama_memory_seq_rm",
                format!("positions from {from} on cannot be taken back"),
            ));
        }
        // A window's cells are taken again while a prompt goes in.
        let n_swa = self.model.n_swa();
        let oldest_needed = from.saturating_sub(n_swa).max(0);
        // SAFETY: the context is alive.
        let oldest = unsafe {
            sys::llama_memory_seq_pos_min(sys::llama_get_memory(self.ctx.as_mut_ptr()), SEQ)
        };
        if n_swa > 0 && from > 0 && oldest > oldest_needed {
            return Err(Error::llama(
                "llama_memory_seq_rm",
                format!("the window before position {from} is gone"),
            ));
        }
        if let Some(next) = &mut self.counted {
            *next = Cell::try_from(left).unwrap_or(*next);
        }
        Ok(())
    }

    fn n_cells(&self) -> usize {
        self.n_ctx
    }

    /// One micro-batch: llama.cpp would cut a larger batch into the same ones, but could not be
    /// interrupted between them.
    fn n_batch(&self) -> usize {
        self.n_ubatch()
    }

    fn kv_bytes(&self) -> KvBytes {
        #[cfg(feature = "kv-patches")]
        if let Some(bytes) = self.cache_bytes() {
            return bytes;
        }
        self.observer.get().kv_bytes(self.n_ctx)
    }
}
