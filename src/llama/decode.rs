//! One batch through llama.cpp, and what is read after it.

use std::ops::Range;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::engine::{LlamaEngine, SMALLER};
use super::rows::Takes;
use super::{log, memory, taps};
use crate::cache::{Cell, Pos};
use crate::engine::{Batch, Engine, Input, Part, Pass, SeqId};
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
    /// As [`crate::engine::Engine::decode_parts`].
    pub(super) fn run(&mut self, parts: &mut [Part<'_>]) -> Result<()> {
        if self.model.options().measure {
            return Err(Error::contract("a model that was loaded to be measured"));
        }
        let n = Pass::new(self.n_ubatch(), self.options.taps()).check(parts)?;
        for part in parts.iter_mut() {
            self.check_seq("llama_decode", part.batch.seq)?;
            self.check_queries(&part.batch)?;
            part.seen.clear();
        }
        // What is said of the first holds for all: of several, each is of tokens alone.
        let Batch { input, lookup, .. } = parts[0].batch;
        let takes = Takes {
            n_batch: self.ctx.n_batch() as usize,
            n_vocab: self.model.n_vocab(),
            n_embd: self.model.n_embd(),
        };
        let raw = self.rows.batch(parts, takes)?;
        self.outputs.clear();
        let non_causal =
            self.options.non_causal_images && matches!(input, Input::Embeddings { .. });
        if non_causal && n > self.n_ubatch() {
            return Err(Error::llama(
                "llama_decode",
                format!(
                    "a picture of {n} tokens that attend to all of it, in batches of {}",
                    self.n_ubatch()
                ),
            ));
        }
        // Such a memory never fills, so llama.cpp would go on for ever.
        if self
            .counted
            .is_some_and(|held| held as usize + n > self.n_ctx)
        {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        self.grow(n)?;
        let tapped = self.begin_taps()?;
        self.begin_lookup(lookup)?;
        self.observer.get_mut().begin(&self.rows.queries);
        // Until they are dropped, whatever happens meanwhile.
        let attends_to_all = non_causal.then(|| NonCausal::new(self.raw));
        self.go_on(&input)?;
        log::forget();
        // SAFETY: every pointer in the batch is null or points to n_tokens valid elements that
        // outlive the call (llama.cpp only reads them); token ids and lengths were checked; the
        // observer is not touched by anyone else during the call.
        let status = unsafe { sys::llama_decode(self.ctx.as_mut_ptr(), raw) };
        drop(attends_to_all);
        // What the callback sees is of the only one with query rows, if there is one.
        let asked = parts.iter().position(|p| !p.batch.queries.is_empty());
        let asked = asked.unwrap_or(0);
        let mut taken = std::mem::take(&mut self.taken);
        let observed = self
            .observer
            .get_mut()
            .finish(&mut taken, parts[asked].seen);
        if status != 0 {
            let reason = log::take_reason(&format!("status {status}"));
            // No cell was found; looking for one takes memory, too.
            if status == 1 && !memory::was_refused(&reason) {
                return Err(Error::ContextFull { n_ctx: self.n_ctx });
            }
            let what = format!("a batch of {n} tokens beside {} cells", self.n_ctx);
            return Err(Error::llama(
                "llama_decode",
                memory::explained(reason, &what, SMALLER),
            ));
        }
        let done = observed
            .map_err(|reason| Error::llama("llama_decode", reason))
            .and_then(|()| {
                if tapped {
                    let n_asked = self.rows.ends.len();
                    taps::read(&mut self.ctx, n_asked, parts)?;
                    if self.options.scores_by_layer {
                        let n_layers = self.options.score_layers.len();
                        taps::read_layers(&mut self.ctx, n_layers, n_asked, parts)?;
                    }
                }
                self.account(parts, &mut taken)
            });
        self.taken = taken;
        match done {
            Ok(()) => self.outputs.extend(self.rows.outputs(parts)),
            Err(_) => parts
                .iter()
                .for_each(|part| self.discard(part.batch.seq, part.batch.pos)),
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

    /// Tells the graph which rows to score, part by part; whether there will be scores to read.
    fn begin_taps(&mut self) -> Result<bool> {
        if !self.options.taps() {
            return Ok(false);
        }
        let n_rows = u32::try_from(self.rows.queries.len()).unwrap_or(u32::MAX);
        if n_rows > self.tap_rows {
            let n_rows = taps::rows_for(n_rows, self.n_ubatch());
            self.tap_rows = taps::set(&mut self.ctx, &self.options.score_layers, n_rows)?;
        }
        taps::begin(&mut self.ctx, &self.rows.queries, &self.rows.ends)?;
        Ok(n_rows > 0)
    }

    /// After a batch: which rows' attention was seen, and which cells its tokens took.
    fn account(&mut self, parts: &mut [Part<'_>], taken: &mut Vec<Cell>) -> Result<()> {
        let n = parts.iter().map(|part| part.batch.input.len()).sum();
        if let Some(next) = &mut self.counted {
            taken.clear();
            taken.extend((*next..).take(n));
            *next += n as Cell;
        } else if !self.watched {
            self.cells_of(parts, taken)?;
        }
        self.room.filled(taken);
        if taken.len() != n {
            return Err(Error::llama(
                "llama_decode",
                format!("{} cells reported for {n} rows", taken.len()),
            ));
        }
        let mut rest = taken.as_slice();
        for Part { batch, cells, seen } in parts {
            let (own, others) = rest.split_at(batch.input.len());
            cells.clear();
            cells.extend_from_slice(own);
            rest = others;
            if !seen.sum.is_empty() {
                let pos_of = |&row: &u32| batch.pos.get(row as usize);
                seen.queries.extend(batch.queries.iter().filter_map(pos_of));
            }
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
