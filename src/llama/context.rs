//! [`LlamaEngine`]: one llama.cpp context, one sequence, as an [`Engine`].

use std::num::NonZeroU32;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use super::callback::{Owned, on_node};
use super::layers::Hidden;
use super::memory::OwnBlocks;
use super::observer::Observer;
use super::options::{ContextOptions, FlashAttention};
use super::room::{self, Room};
use super::rows::{Rows, Takes, check_token};
use super::sampler::Sampler;
use super::state::SequenceState;
use super::taps;
use super::threads::Threads;
use super::{Model, RopeFactors, SamplerOptions, attend, backend, log, memory, trial};
use crate::attend::Attend;
use crate::cache::{Cell, Pos};
use crate::engine::{Batch, Engine, Input, KvBytes, Observation, Token};
use crate::error::{Error, Result};

/// What makes a context and its batches need less memory.
const SMALLER: &str = "a smaller -c or -ub, or -ctk and -ctv q8_0";

/// Held while a context is made.
static MAKING: Mutex<()> = Mutex::new(());

/// The one sequence of the context.
pub(super) const SEQ: sys::llama_seq_id = 0;

/// A context on a [`Model`].
pub struct LlamaEngine {
    // Declared first, so dropped before the observer that it points to.
    ctx: LlamaContext<'static>,
    /// The same context, for calls that the wrapper has no name for. Those that change it borrow
    /// the engine mutably.
    pub(super) raw: NonNull<sys::llama_context>,
    observer: Owned,
    /// Whether llama.cpp calls the observer: where nothing else tells cells, sizes or scores.
    watched: bool,
    pub(super) model: Model,
    sampler: Sampler,
    pub(super) options: ContextOptions,
    pub(super) n_ctx: usize,
    /// Cells handed out by counting, where the memory has no cells that could be read.
    pub(super) counted: Option<Cell>,
    pub(super) room: Room,
    /// What the host needs to restore the copy of the sequence that is on the device.
    pub(super) on_device: Option<SequenceState>,
    /// A context of the first layers, during a trial run or kept for the next one.
    pub(super) trial: Option<Box<LlamaEngine>>,
    /// In a trial run: what its tokens were when they came to the last layer.
    pub(super) hidden: Option<Hidden>,
    /// Query rows of a batch that the graph has buffers for.
    tap_rows: u32,
    /// Whether the last batch asked for logits: reading absent ones would end the process.
    has_logits: bool,
    rows: Rows,
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
        if watched || engine.is_plain() {
            return Ok(engine);
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
            .with_n_seq_max(1)
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
            true => taps::set(&mut ctx, &options.score_layers, 1)?,
            false => 0,
        };
        if !options.attend.is_whole() && n_layer_first.is_none() {
            attend::allow(&mut ctx, &options)?;
        }
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
            sampler: Sampler::new(sampler, model.n_vocab(), n_ctx),
            counted: model.eviction_obstacle().map(|_| 0),
            ctx,
            observer,
            model: model.clone(),
            options,
            n_ctx,
            trial: None,
            hidden: None,
            tap_rows,
            has_logits: false,
            rows: Rows::default(),
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

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How it was made.
    pub fn options(&self) -> &ContextOptions {
        &self.options
    }

    /// Forgets every token and the sampler's history.
    pub fn clear(&mut self) {
        self.ctx.clear_kv_cache();
        self.sampler.reset();
        self.count(0);
        self.room.emptied();
    }

    /// The tokens that were sampled since the sampler was last empty, oldest first: what a repeat
    /// penalty looks back on.
    pub fn sampled(&self) -> Vec<Token> {
        self.sampler.chosen().collect()
    }

    /// Lets the sampler go on as if these had been its last tokens.
    ///
    /// # Errors
    /// [`Error::Llama`] for a token that is not in the vocabulary.
    pub fn resume_sampler(&mut self, sampled: &[Token]) -> Result<()> {
        if let Some(token) = sampled.iter().find(|&&token| !self.model.has_token(token)) {
            let n_vocab = self.model.n_vocab();
            let reason = format!("token {token} is not in the vocabulary of {n_vocab}");
            return Err(Error::llama("llama_sampler_accept", reason));
        }
        self.sampler.resume(sampled);
        Ok(())
    }

    /// Rows that are computed at once: a picture whose tokens attend to all of it needs as many.
    pub fn n_ubatch(&self) -> usize {
        self.options.n_ubatch.min(self.options.n_batch) as usize
    }

    /// Sets how many cells are in use, where they are only counted.
    pub(super) fn count(&mut self, n: Cell) {
        if let Some(counted) = &mut self.counted {
            *counted = n;
        }
    }

    /// Refuses query rows that nothing would be read of: their missing attention would let every
    /// token look unused.
    fn check_queries(&self, batch: &Batch<'_>) -> Result<()> {
        let (rows, most) = (batch.input.len(), self.n_ubatch());
        let refused = |reason: String| Err(Error::llama("llama_decode", reason));
        if batch.queries.is_empty() || self.options.calls_back() {
            return Ok(());
        }
        if self.options.score_layers.is_empty() {
            return refused("attention of a context that was made without score layers".to_owned());
        }
        if rows > most {
            return refused(format!("scores of {rows} rows in batches of {most}"));
        }
        Ok(())
    }

    /// Tells the graph which rows to score; whether there will be scores to read.
    fn begin_taps(&mut self, batch: &Batch<'_>) -> Result<bool> {
        if !self.options.taps() {
            return Ok(false);
        }
        let n_rows = u32::try_from(batch.queries.len()).unwrap_or(u32::MAX);
        if n_rows > self.tap_rows {
            let n_rows = taps::rows_for(n_rows, self.n_ubatch());
            self.tap_rows = taps::set(&mut self.ctx, &self.options.score_layers, n_rows)?;
        }
        taps::begin(&mut self.ctx, batch.queries)?;
        Ok(!batch.queries.is_empty())
    }

    /// After a batch: which rows' attention was seen, and which cells its tokens took.
    fn account(
        &mut self,
        batch: &Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        if !seen.sum.is_empty() {
            let pos_of = |&row: &u32| batch.pos.get(row as usize);
            seen.queries.extend(batch.queries.iter().filter_map(pos_of));
        }
        if let Some(next) = &mut self.counted {
            cells.clear();
            cells.extend((*next..).take(batch.input.len()));
            *next += batch.input.len() as Cell;
        } else if !self.watched {
            self.cells_of(batch, cells)?;
        }
        self.room.filled(cells);
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

    /// Takes a batch out again after an error behind its decoding, which says more than what may
    /// go wrong here.
    fn discard(&mut self, pos: &[Pos]) {
        let runs = pos.chunk_by(|a, b| b - a <= 1);
        let ranges: Vec<Range<Pos>> = runs
            .filter_map(|run| Some(*run.first()?..run.last()? + 1))
            .collect();
        drop(self.remove(&ranges).and_then(|()| self.recount()));
    }
}

/// While it lives, the tokens of a batch attend to all of it.
struct NonCausal(NonNull<sys::llama_context>);

impl NonCausal {
    /// The context outlives the result.
    fn new(raw: NonNull<sys::llama_context>) -> Self {
        // SAFETY: the caller's engine owns the context and is borrowed by the call.
        unsafe { sys::llama_set_causal_attn(raw.as_ptr(), false) };
        NonCausal(raw)
    }
}

impl Drop for NonCausal {
    fn drop(&mut self) {
        // SAFETY: as above: it is a local of a method of the context's owner.
        unsafe { sys::llama_set_causal_attn(self.0.as_ptr(), true) };
    }
}

impl Engine for LlamaEngine {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        self.check_queries(&batch)?;
        let takes = Takes {
            n_batch: self.ctx.n_batch() as usize,
            n_vocab: self.model.n_vocab(),
            n_embd: self.model.n_embd(),
        };
        let hidden = self.trial.as_deref().and_then(|t| t.hidden.as_ref());
        let raw = self.rows.batch(&batch, takes, hidden)?;
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
        // Such a memory never fills, so llama.cpp would go on for ever.
        let rows = batch.input.len();
        if self.counted.is_some_and(|n| n as usize + rows > self.n_ctx) {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        self.grow(rows)?;
        let tapped = self.begin_taps(&batch)?;
        self.begin_lookup(batch.lookup)?;
        self.observer.get_mut().begin(batch.queries);
        self.has_logits = false;
        // Until they are dropped, whatever happens meanwhile.
        let first_layer = self.go_on(&batch.input)?;
        let attends_to_all = non_causal.then(|| NonCausal::new(self.raw));
        log::forget();
        // SAFETY: every pointer in the batch is null or points to n_tokens valid elements that
        // outlive the call (llama.cpp only reads them); token ids and lengths were checked; the
        // observer is not touched by anyone else during the call.
        let status = unsafe { sys::llama_decode(self.ctx.as_mut_ptr(), raw) };
        drop(attends_to_all);
        drop(first_layer);
        let observed = self.observer.get_mut().finish(cells, seen);
        match status {
            0 => {}
            1 => return Err(Error::ContextFull { n_ctx: self.n_ctx }),
            code => {
                let reason = log::take_reason(&format!("status {code}"));
                let what = format!("a batch of {rows} tokens beside {} cells", self.n_ctx);
                return Err(Error::llama(
                    "llama_decode",
                    memory::explained(reason, &what, SMALLER),
                ));
            }
        }
        let done = observed
            .map_err(|reason| Error::llama("llama_decode", reason))
            .and_then(|()| {
                if tapped {
                    taps::read(&mut self.ctx, seen)?;
                }
                self.account(&batch, cells, seen)?;
                self.pass_on(&batch.input, cells)?;
                Ok(())
            });
        match done {
            Ok(()) => self.has_logits = batch.logits,
            Err(_) => self.discard(batch.pos),
        }
        done
    }

    fn attend(&self) -> Option<&Attend> {
        (!self.options.attend.is_whole()).then_some(&self.options.attend)
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
        log::forget();
        let token = self.sampler.sample(&self.ctx);
        check_token("llama_sampler_sample", token, self.model.n_vocab())
            .map_err(|error| match log::take_reason("") {
                reason if reason.is_empty() => error,
                reason => Error::llama("llama_sampler_sample", reason),
            })
            .map(|()| token)
    }

    fn is_eog(&self, token: Token) -> bool {
        self.model.inner.vocab().is_eog(LlamaToken(token))
    }

    fn piece(&self, token: Token, out: &mut Vec<u8>) -> Result<()> {
        self.model.piece(token, out)
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
        self.count(Cell::try_from(left).unwrap_or(Cell::MAX));
        self.recount()
    }

    fn can_shift(&self) -> bool {
        // SAFETY: the context is alive, the call only reads it.
        unsafe { sys::llama_memory_can_shift(sys::llama_get_memory(self.raw.as_ptr())) }
    }

    fn shift(&mut self, from: Pos, by: Pos) -> Result<()> {
        let fail = |reason: &str| Err(Error::llama("llama_memory_seq_add", reason));
        if !self.can_shift() {
            return fail("this model's cached keys cannot be moved to other positions");
        }
        if by <= 0 || from < by {
            return fail(&format!("positions from {from} down by {by}"));
        }
        // SAFETY: the context is alive; llama.cpp asserts on a memory that cannot shift, which was
        // asked; no position becomes negative; an end of -1 means "to the end".
        unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
            sys::llama_memory_seq_add(memory, SEQ, from, -1, -by);
        }
        Ok(())
    }

    fn takes_any_position(&self) -> bool {
        // Rows of a picture that attend to later ones would see what they came before.
        self.counted.is_none() && !self.options.non_causal_images
    }

    fn trial(&mut self, n_cells: usize, goes_on: bool) -> Result<Option<&mut (dyn Engine + '_)>> {
        self.begin_trial(n_cells, goes_on)
    }

    fn continues_trial(&self) -> bool {
        // The callback finds cells in the first layer's nodes, which are left out then.
        self.takes_any_position()
            && !self.options.calls_back()
            && self.last_score_layer().is_some_and(|il| il > 0)
    }

    fn end_trial(&mut self) -> Result<()> {
        self.finish_trial();
        Ok(())
    }

    fn expect_trials(&mut self) -> Result<()> {
        self.prepare_trials()
    }

    fn make_room(&mut self, n: usize) -> Result<()> {
        self.grow(n)
    }

    fn compact(&mut self, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        self.tidy(moves)
    }

    fn save_rows(&mut self, cells: &[Cell], out: &mut Vec<u8>) -> Result<bool> {
        if !self.is_plain() {
            return Ok(false);
        }
        out.extend(self.rows(cells)?);
        Ok(true)
    }

    fn restore_rows(&mut self, pos: &[Pos], rows: &[u8], cells: &mut Vec<Cell>) -> Result<()> {
        self.recount()?;
        if self.room.used + pos.len() > self.n_ctx {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        self.grow(pos.len())?;
        self.put_rows(pos, rows, cells)?;
        self.room.filled(cells);
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
        if let Some(bytes) = self.cache_bytes() {
            return bytes;
        }
        self.observer.get().kv_bytes(self.n_ctx)
    }
}
