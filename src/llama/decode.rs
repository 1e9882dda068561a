//! One batch through llama.cpp, and what is read after it.

use std::ops::Range;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::engine::{LlamaEngine, SMALLER};
use super::rows::Takes;
use super::{log, memory, taps};
use crate::cache::{Cell, Pos};
use crate::engine::{Batch, Engine, Input, Observation, SeqId};
use crate::error::{Error, Result};

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

impl LlamaEngine {
    /// As [`crate::engine::Engine::decode`].
    pub(super) fn run(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        self.check_seq("llama_decode", batch.seq)?;
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
        (self.has_logits, self.answered) = (false, batch.seq);
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
            code => {
                let reason = log::take_reason(&format!("status {code}"));
                // No cell was found; looking for one takes memory, too.
                if code == 1 && !memory::was_refused(&reason) {
                    return Err(Error::ContextFull { n_ctx: self.n_ctx });
                }
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
            Err(_) => self.discard(batch.seq, batch.pos),
        }
        done
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
    fn discard(&mut self, seq: SeqId, pos: &[Pos]) {
        let runs = pos.chunk_by(|a, b| b - a <= 1);
        let ranges: Vec<Range<Pos>> = runs
            .filter_map(|run| Some(*run.first()?..run.last()? + 1))
            .collect();
        drop(self.remove(seq, &ranges).and_then(|()| self.recount()));
    }
}
