//! What the generation loop sees of [`LlamaEngine`].

use std::ops::Range;

use super::engine::LlamaEngine;
use super::sampler::{Chain, SamplerOptions};
use crate::attend::Attend;
use crate::cache::{Cell, Pos};
use crate::engine::{
    Batch, Capabilities, Engine, KvBytes, Observation, Part, Sampler, SeqId, TrialRuns, Vocabulary,
    no_logits,
};
use crate::error::{Error, Result};

const LOGITS: &str = "llama_get_logits_ith";

impl LlamaEngine {
    /// Of a row of the last batch that asked for them.
    pub(super) fn logits_at(&self, row: i32) -> Result<&[f32]> {
        let logits = self.ctx.get_logits_ith(row).get(..self.model.n_vocab());
        logits.ok_or_else(|| Error::llama(LOGITS, "no logits"))
    }
}

impl LlamaEngine {
    /// A sampler for a conversation that chooses in its own way.
    pub fn sampler_of(&self, options: &SamplerOptions) -> Box<dyn Sampler> {
        let n_vocab = self.model.n_vocab();
        Box::new(Chain::new(options, n_vocab, self.n_ctx))
    }
}

impl Engine for LlamaEngine {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        self.run(&mut [Part { batch, cells, seen }])
    }

    fn decode_parts(&mut self, parts: &mut [Part<'_>]) -> Result<()> {
        self.run(parts)
    }

    fn attend(&self) -> Option<&Attend> {
        self.looks_up.then_some(&self.options.attend)
    }

    fn sets(&mut self, each: &mut dyn FnMut(&[Cell])) -> Result<()> {
        if !self.options.keep_sets {
            return Ok(());
        }
        for layer in self.looking_layers() {
            each(&self.looked_up(layer)?);
        }
        Ok(())
    }

    fn logits(&self) -> Result<&[f32]> {
        let missing = || Error::llama(LOGITS, "the last batch asked for no logits");
        let &(_, row) = self.outputs.last().ok_or_else(missing)?;
        self.logits_at(row)
    }

    fn logits_of(&self, seq: SeqId) -> Result<&[f32]> {
        let own = self.outputs.iter().find(|(of, _)| *of == seq);
        let &(_, row) = own.ok_or_else(|| no_logits(seq))?;
        self.logits_at(row)
    }

    fn vocabulary(&self) -> Option<&(dyn Vocabulary + '_)> {
        Some(&self.model)
    }

    fn sampler(&self) -> Box<dyn Sampler> {
        self.sampler_of(&self.sampling)
    }

    fn remove(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        self.remove_ranges(seq, ranges)
    }

    fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
        self.take_back(seq, from, left)
    }

    fn capabilities(&self) -> Capabilities {
        // Rows of a picture that attend to later ones would see what they came before.
        let any_position = self.counted.is_none() && !self.options.non_causal_images;
        Capabilities {
            any_position,
            shifts: self.can_shift(),
            // The callback finds cells in the first layer's nodes, which are left out then.
            continues_trials: any_position
                && !self.options.calls_back()
                && self.last_score_layer().is_some_and(|il| il > 0),
            scores_by_part: self.options.taps(),
        }
    }

    fn shift(&mut self, seq: SeqId, from: Pos, by: Pos) -> Result<()> {
        self.move_down(seq, from, by)
    }

    fn trials(&mut self) -> Option<&mut (dyn TrialRuns + '_)> {
        match self.last_score_layer() {
            Some(_) => Some(self),
            None => None,
        }
    }

    fn make_room(&mut self, n: usize) -> Result<()> {
        self.grow(n)
    }

    fn compact(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        moves.clear();
        self.tidy()?;
        self.take_moves(seq, moves);
        Ok(())
    }

    fn moved(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) {
        self.take_moves(seq, moves);
    }

    fn save_rows(&mut self, cells: &[Cell], out: &mut Vec<u8>) -> Result<bool> {
        if !self.is_plain() {
            return Ok(false);
        }
        out.extend(self.rows(cells)?);
        Ok(true)
    }

    fn restore_rows(
        &mut self,
        seq: SeqId,
        pos: &[Pos],
        rows: &[u8],
        cells: &mut Vec<Cell>,
    ) -> Result<()> {
        self.check_seq("llama_hae_kv_rows_set", seq)?;
        self.recount()?;
        if self.room.used + pos.len() > self.n_ctx {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        self.grow(pos.len())?;
        self.put_rows(seq, pos, rows, cells)?;
        self.room.filled(cells);
        Ok(())
    }

    fn n_cells(&self) -> usize {
        self.n_ctx
    }

    fn cells_for(&self, seq: SeqId) -> usize {
        self.room_for(seq)
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
