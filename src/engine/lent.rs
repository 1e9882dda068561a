//! An engine that is lent: a conversation can have it for a step and give it back.

use std::ops::Range;

use super::{
    Batch, Capabilities, Engine, KvBytes, Observation, Part, Sampler, SeqId, TrialRuns, Vocabulary,
};
use crate::attend::Attend;
use crate::cache::{Cell, Pos};
use crate::error::Result;

impl<E: Engine + ?Sized> Engine for &mut E {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        (**self).decode(batch, cells, seen)
    }

    fn decode_parts(&mut self, parts: &mut [Part<'_>]) -> Result<()> {
        (**self).decode_parts(parts)
    }

    fn attend(&self) -> Option<&Attend> {
        (**self).attend()
    }

    fn sets(&mut self, each: &mut dyn FnMut(&[Cell])) -> Result<()> {
        (**self).sets(each)
    }

    fn logits(&self) -> Result<&[f32]> {
        (**self).logits()
    }

    fn logits_of(&self, seq: SeqId) -> Result<&[f32]> {
        (**self).logits_of(seq)
    }

    fn vocabulary(&self) -> Option<&(dyn Vocabulary + '_)> {
        (**self).vocabulary()
    }

    fn sampler(&self) -> Box<dyn Sampler> {
        (**self).sampler()
    }

    fn remove(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        (**self).remove(seq, ranges)
    }

    fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
        (**self).rewind(seq, from, left)
    }

    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }

    fn shift(&mut self, seq: SeqId, from: Pos, by: Pos) -> Result<()> {
        (**self).shift(seq, from, by)
    }

    fn trials(&mut self) -> Option<&mut (dyn TrialRuns + '_)> {
        (**self).trials()
    }

    fn make_room(&mut self, n: usize) -> Result<()> {
        (**self).make_room(n)
    }

    fn compact(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        (**self).compact(seq, moves)
    }

    fn moved(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) {
        (**self).moved(seq, moves);
    }

    fn save_rows(&mut self, cells: &[Cell], out: &mut Vec<u8>) -> Result<bool> {
        (**self).save_rows(cells, out)
    }

    fn restore_rows(
        &mut self,
        seq: SeqId,
        pos: &[Pos],
        rows: &[u8],
        cells: &mut Vec<Cell>,
    ) -> Result<()> {
        (**self).restore_rows(seq, pos, rows, cells)
    }

    fn n_cells(&self) -> usize {
        (**self).n_cells()
    }

    fn cells_for(&self, seq: SeqId) -> usize {
        (**self).cells_for(seq)
    }

    fn n_batch(&self) -> usize {
        (**self).n_batch()
    }

    fn kv_bytes(&self) -> KvBytes {
        (**self).kv_bytes()
    }
}
