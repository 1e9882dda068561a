//! [`LlamaEngine`]: one llama.cpp context, for one sequence or several, and how it is made.

use std::num::NonZeroU32;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_sys_2 as sys;

use super::callback::{Owned, on_node};
use super::memory::OwnBlocks;
use super::observer::Observer;
use super::options::{ContextOptions, FlashAttention};
use super::room::{self, Room};
use super::rows::Rows;
use super::state::SequenceState;
use super::taps;
use super::threads::Threads;
use super::{Model, RopeFactors, SamplerOptions, attend, backend, log, memory, trial};
use crate::cache::Cell;
use crate::engine::SeqId;
use crate::error::{Error, Result};

/// What makes a context and its batches need less memory.
pub(super) const SMALLER: &str = "a smaller `n_ctx` or `n_ubatch`, or `type_k` and `type_v` q8_0";

/// Held while a context is made.
static MAKING: Mutex<()> = Mutex::new(());

/// A context on a [`Model`].
pub struct LlamaEngine {
    // Declared first, so dropped before the observer that it points to.
    pub(super) ctx: LlamaContext<'static>,
    /// The same context, for calls that the wrapper has no name for. Those that change it borrow
    /// the engine mutably.
    pub(super) raw: NonNull<sys::llama_context>,
    pub(super) observer: Owned,
    /// Whether llama.cpp calls the observer: where nothing else tells cells, sizes or scores.
    pub(super) watched: bool,
    pub(super) model: Model,
    /// Of samplers for its conversations.
    pub(super) sampling: SamplerOptions,
    pub(super) options: ContextOptions,
    pub(super) n_ctx: usize,
    /// Cells handed out by counting, where the memory has no cells that could be read.
    pub(super) counted: Option<Cell>,
    pub(super) room: Room,
    /// What the host needs to restore the copy of the sequence that is on the device.
    pub(super) on_device: Option<SequenceState>,
    /// A context of the first layers, during a trial run or kept for the next one.
    pub(super) trial: Option<Box<LlamaEngine>>,
    /// Query rows of a batch that the graph has buffers for.
    pub(super) tap_rows: u32,
    /// Rows of the last batch that have logits, and whose they are: reading absent ones would end
    /// the process.
    pub(super) outputs: Vec<(SeqId, i32)>,
    /// Whether decoding steps may attend to less than everything.
    pub(super) looks_up: bool,
    /// Moves that their sequences have not asked for yet.
    pub(super) moved: Vec<(SeqId, (Cell, Cell))>,
    pub(super) rows: Rows,
    /// Cells of the last batch, all parts. Reused.
    pub(super) taken: Vec<Cell>,
    // Declared last, so dropped after the contexts that compute with them.
    pub(super) threads: Option<Arc<Threads>>,
}

// SAFETY: a context is bound to no thread. What it points to is reached by the engine alone, which
// is not `Sync`: the observer by the callback, which llama.cpp calls inside `llama_decode`; the
// pool of threads by this engine's contexts.
unsafe impl Send for LlamaEngine {}

impl LlamaEngine {
    /// Makes a context with an empty cache.
    ///
    /// # Errors
    /// [`Error::Option`] for a cache type or score layer that cannot be served,
    /// [`Error::Llama`] when llama.cpp refuses (not enough memory, most often).
    pub fn new(model: &Model, options: ContextOptions, sampler: &SamplerOptions) -> Result<Self> {
        let threads = Threads::new(&options)?;
        Self::of_layers(model, options, sampler, None, threads)
    }

    /// As [`LlamaEngine::new`], with this many of the model's first layers.
    pub(super) fn of_layers(
        model: &Model,
        options: ContextOptions,
        sampler: &SamplerOptions,
        n_layer_first: Option<u32>,
        threads: Option<Arc<Threads>>,
    ) -> Result<Self> {
        options.check(model, n_layer_first)?;
        let watched = options.calls_back();
        let make = |options, watched| {
            Self::make(
                model,
                options,
                sampler,
                n_layer_first,
                watched,
                threads.clone(),
            )
        };
        let engine = make(options, watched)?;
        if watched || engine.is_plain() || model.options().measure {
            return Ok(engine);
        }
        if engine.options.n_seq_max > 1 {
            let reason = "several sequences in a cache that is not plain";
            return Err(Error::option("n_seq_max", reason));
        }
        // Only the callback knows the cells of this model's memory.
        let options = engine.options.clone();
        drop(engine);
        make(options, true)
    }

    fn make(
        model: &Model,
        options: ContextOptions,
        sampler: &SamplerOptions,
        n_layer_first: Option<u32>,
        watched: bool,
        threads: Option<Arc<Threads>>,
    ) -> Result<Self> {
        let called_back = match options.calls_back() {
            true => options.score_layers.clone(),
            false => Vec::new(),
        };
        let observer = Owned::new(Observer::new(called_back));
        let mut params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(options.n_ctx))
            .with_n_batch(options.n_batch)
            .with_n_ubatch(options.n_ubatch.min(options.n_batch))
            .with_n_seq_max(options.n_seq_max)
            .with_n_threads(options.n_threads)
            .with_n_threads_batch(options.n_threads_batch)
            .with_flash_attention_policy(match options.effective_flash_attention() {
                FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
                FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            })
            .with_type_k(options.type_k.raw())
            .with_type_v(options.type_v.raw());
        let raw = params.as_raw_mut();
        // Sequences share the cells: what one leaves the others can have.
        raw.kv_unified = options.n_seq_max > 1;
        raw.offload_kqv = !model.options().placement.kv_on_host;
        options.rope_factors.set(raw);
        trial::set(n_layer_first, raw);
        room::set(options.kv_size, raw);
        if watched {
            raw.cb_eval = Some(on_node);
            raw.cb_eval_user_data = observer.user_data();
        }

        log::forget();
        let blocks = OwnBlocks::new();
        let ctx = {
            // Contexts of one model are made one after the other: llama.cpp writes into the model.
            let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
            model.inner.new_context(backend()?, params)
        };
        let ctx = ctx.map_err(|e| {
            let reason = log::take_reason(&e.to_string());
            let what = format!("a context of {} cells", options.n_ctx);
            Error::llama(
                "llama_init_from_model",
                memory::explained(reason, &what, SMALLER),
            )
        })?;
        // SAFETY: only the lifetime changes. The context needs the model for as long as it lives, and
        // the engine owns a clone of it that is dropped after the context.
        let mut ctx: LlamaContext<'static> = unsafe { std::mem::transmute(ctx) };
        // As many query rows as most policies have, the last one; a batch with more asks for more.
        let tap_rows = match options.taps() {
            true => {
                taps::by_layer(&mut ctx, options.scores_by_layer)?;
                taps::set(&mut ctx, &options.score_layers, 1)?
            }
            false => 0,
        };
        let looks_up = n_layer_first.is_none() && attend::begin(&mut ctx, model, &options)?;
        drop(blocks);
        if let Some(threads) = &threads {
            threads.attach(&mut ctx);
        }
        let n_ctx = ctx.n_ctx() as usize;
        let raw = NonNull::new(ctx.as_mut_ptr())
            .ok_or_else(|| Error::llama("llama_init_from_model", "returned null"))?;
        let mut engine = LlamaEngine {
            raw,
            watched,
            room: Room::default(),
            on_device: None,
            sampling: *sampler,
            counted: model.eviction_obstacle().map(|_| 0),
            ctx,
            observer,
            model: model.clone(),
            options,
            n_ctx,
            trial: None,
            tap_rows,
            outputs: Vec::new(),
            looks_up,
            moved: Vec::new(),
            rows: Rows::default(),
            taken: Vec::new(),
            threads,
        };
        engine.room.resizable = engine.options.kv_size.is_some() && engine.is_plain();
        Ok(engine)
    }

    /// The rope factors that it computes with.
    pub fn rope_factors(&self) -> RopeFactors {
        let options = &self.options;
        options.rope_factors.resolved(&self.model, options.n_ctx)
    }

    /// The model that it runs.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How it was made.
    pub fn options(&self) -> &ContextOptions {
        &self.options
    }

    /// Forgets every token of every sequence.
    pub fn clear(&mut self) {
        self.moved.clear();
        self.ctx.clear_kv_cache();
        self.count(0);
        self.room.emptied();
    }

    /// Rows that are computed at once: a picture whose tokens attend to all of it needs as many.
    pub fn n_ubatch(&self) -> usize {
        self.options.n_ubatch.min(self.options.n_batch) as usize
    }

    /// Whether there can be such a sequence: llama.cpp asserts on it, and takes a negative one for
    /// all of them.
    pub(super) fn check_seq(&self, call: &'static str, seq: SeqId) -> Result<()> {
        let n = self.options.n_seq_max;
        match u32::try_from(seq).is_ok_and(|seq| seq < n) {
            true => Ok(()),
            false => Err(Error::llama(call, format!("sequence {seq} of {n}"))),
        }
    }

    /// Sets how many cells are in use, where they are only counted.
    pub(super) fn count(&mut self, n: Cell) {
        if let Some(counted) = &mut self.counted {
            *counted = n;
        }
    }
}
