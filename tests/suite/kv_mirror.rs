//! An engine on the real cache that says of every call beforehand what each cell will hold
//! ([`crate::kv_model`], and the rule of growing and shrinking in docs/kv-cache.md), and compares
//! every token's logits with a twin's in which nothing is ever removed, moved or resized
//! ([`crate::kv_twin`]), where there is one.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use hae::attend::{Attend, Kind, Lookup};
use hae::cache::{Cell, Pos};
use hae::engine::{
    Batch, Capabilities, Engine, Input, KvBytes, Observation, Sampler, SeqId, TrialRuns, Vocabulary,
};
use hae::llama::LlamaEngine;
use hae::{Error, Result};

use crate::kv_model::Cells;
use crate::kv_twin::Twin;
use crate::npz::max_abs_diff;
use crate::precision;

/// Cells by which a cache grows.
pub const STEP: usize = 256;

/// What all runs of a test did.
#[derive(Debug, Default)]
pub struct Tally {
    pub decoded: usize,
    pub steps: usize,
    pub removed: usize,
    pub moved: usize,
    pub grown: usize,
    pub shrunk: usize,
    pub recalled: usize,
    pub from_host: usize,
    pub reopened: usize,
    pub cancelled: usize,
    pub refused: usize,
    pub pruned_early: usize,
    /// Rows that went on from a trial run.
    pub went_on: usize,
    /// Steps that looked something up.
    pub looked_up: usize,
    /// Cells that layers attended to in them, and those that the twin's layers did, too.
    pub chosen: usize,
    pub chosen_by_both: usize,
    /// Logits that had to have the same bits.
    pub exact: usize,
    /// Of the others, how many there were, the largest difference, and how many were farther apart than a GPU's bound.
    pub compared: usize,
    pub worst: f32,
    pub beyond: usize,
}

pub struct Mirrored<'m> {
    pub engine: LlamaEngine,
    /// None for what no twin can do: prompts that go on from a trial run.
    pub twin: Option<Twin<'m>>,
    pub cells: Cells,
    /// All tokens lay in the twin's cells whenever any was computed, so that sums had one order.
    pub alike: bool,
    /// An F32 cache without flash attention: what is the same sum has the same bits.
    pub is_exact: bool,
    pub tally: Rc<RefCell<Tally>>,
}

fn padded(n: usize) -> usize {
    n.max(1).next_multiple_of(STEP)
}

impl Mirrored<'_> {
    /// What a cache does that needs room for `n` more.
    pub fn grow(&mut self, n: usize) {
        let needed = self.cells.used() + n;
        if needed > self.cells.cells.len() {
            assert!(self.cells.resize(padded(needed).min(self.engine.n_cells())));
            self.tally.borrow_mut().grown += 1;
        }
    }

    pub fn check(&self, after: &str) {
        let mut map = Vec::new();
        self.engine.cell_map(&mut map).unwrap();
        assert_eq!(map, self.cells.cells, "after {after}");
        let mut held: Vec<Pos> = map.iter().flatten().copied().collect();
        held.sort_unstable();
        if let Some(twin) = &self.twin {
            assert!(held.iter().eq(twin.cells().keys()), "after {after}");
        }
        let bytes = self.engine.kv_bytes();
        let live = bytes.per_cell * self.cells.cells.len() as u64;
        // Each layer's buffer may have padding.
        assert!(
            (live..live + 6 * 4096).contains(&bytes.allocated),
            "{bytes:?}"
        );
    }

    /// What the layers of the last step attended to, by position.
    fn compare_sets(&mut self, lookup: &Lookup) {
        let Some(twin) = &self.twin else {
            return;
        };
        let of = |kind| lookup.kinds.iter().filter(|&&k| k == kind).count();
        // What reports count.
        let left_out = of(Kind::Vision) - lookup.n_vision + of(Kind::Text) - lookup.n_text;
        let mut tally = self.tally.borrow_mut();
        tally.looked_up += 1;
        for layer in 0..self.engine.model().n_layer() {
            let cells = self.engine.looked_up(layer).unwrap();
            let pos = |&cell: &Cell| self.cells.cells[cell as usize].unwrap();
            let ours: BTreeSet<Pos> = cells.iter().map(pos).collect();
            let theirs = twin.looked_up(layer);
            assert_eq!(ours.len(), self.cells.used() - left_out);
            assert_eq!(theirs.len(), ours.len());
            if self.is_exact && self.alike && !precision::on_gpu() {
                assert_eq!(ours, theirs);
            }
            tally.chosen += ours.len();
            tally.chosen_by_both += ours.intersection(&theirs).count();
        }
    }

    /// Of a batch that was just computed.
    fn compare(&mut self, logits: bool) -> Result<()> {
        let Some(twin) = &self.twin else {
            let finite = |x: &f32| x.is_finite();
            assert!(!logits || self.engine.logits()?.iter().all(finite));
            return Ok(());
        };
        let twins = twin.cells();
        let mut entries = self.cells.entries();
        self.alike &= entries.all(|(cell, pos)| twins.get(&pos) == Some(&cell));
        if !logits {
            return Ok(());
        }
        let (ours, theirs) = (self.engine.logits()?, twin.logits());
        let mut tally = self.tally.borrow_mut();
        let exact = self.is_exact && self.alike;
        tally.exact += usize::from(exact);
        // A GPU divides sums by the number of cells in view, which is the twin's own.
        if exact && !precision::on_gpu() {
            let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            assert!(bits(ours) == bits(theirs), "{}", max_abs_diff(ours, theirs));
        } else {
            let difference = max_abs_diff(ours, theirs);
            tally.compared += 1;
            tally.worst = tally.worst.max(difference);
            tally.beyond += usize::from(difference >= precision::logits(0.0));
        }
        Ok(())
    }
}

impl Engine for Mirrored<'_> {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        let n = batch.input.len();
        if self.cells.used() + n > self.engine.n_cells() {
            let refused = self.engine.decode(batch, cells, seen);
            assert!(
                matches!(refused, Err(Error::ContextFull { .. })),
                "{refused:?}"
            );
            self.check("a refused batch");
            return refused;
        }
        self.grow(n);
        let expected = self.cells.insert(batch.pos).unwrap();
        self.engine.decode(batch, cells, seen)?;
        assert!(
            cells.iter().map(|&cell| cell as usize).eq(expected),
            "cells of {:?}",
            batch.pos
        );
        let mut tally = self.tally.borrow_mut();
        tally.decoded += n;
        if matches!(batch.input, Input::Trial(_)) {
            tally.went_on += n;
        }
        drop(tally);
        if let Some(twin) = &mut self.twin {
            if let Some(lookup) = batch.lookup {
                twin.look_up(lookup, &self.cells.cells);
            }
            twin.decode(batch);
        }
        self.check("a batch");
        self.compare(batch.logits)?;
        if let Some(lookup) = batch.lookup {
            self.compare_sets(lookup);
        }
        Ok(())
    }

    fn attend(&self) -> Option<&Attend> {
        self.engine.attend()
    }

    fn logits(&self) -> Result<&[f32]> {
        self.engine.logits()
    }

    fn vocabulary(&self) -> Option<&(dyn Vocabulary + '_)> {
        self.engine.vocabulary()
    }

    fn sampler(&self) -> Box<dyn Sampler> {
        self.engine.sampler()
    }

    fn remove(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        self.engine.remove(seq, ranges)?;
        for range in ranges {
            self.cells.remove(range.clone());
            if let Some(twin) = &mut self.twin {
                twin.hide(range.clone());
            }
            self.tally.borrow_mut().removed += range.len();
        }
        self.check("a removal");
        Ok(())
    }

    fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
        self.engine.rewind(seq, from, left)?;
        self.cells.remove(from..Pos::MAX);
        if let Some(twin) = &mut self.twin {
            twin.forget_from(from);
        }
        assert_eq!(self.cells.used(), left);
        self.check("a rewind");
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            shifts: false,
            ..self.engine.capabilities()
        }
    }

    fn trials(&mut self) -> Option<&mut (dyn TrialRuns + '_)> {
        self.engine.trials()?;
        Some(self)
    }

    fn make_room(&mut self, n: usize) -> Result<()> {
        self.grow(n);
        self.engine.make_room(n)?;
        self.check("making room");
        Ok(())
    }

    fn compact(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        let (used, span, now) = (self.cells.used(), self.cells.end(), self.cells.cells.len());
        let too_large = now > used + used / 10 + STEP;
        let mut expected = Vec::new();
        if padded(span) > padded(used) || too_large && span > padded(used) {
            expected = self.cells.compact();
        }
        if too_large {
            assert!(self.cells.resize(padded(used)));
            self.tally.borrow_mut().shrunk += 1;
        }
        self.engine.compact(seq, moves)?;
        assert_eq!(moves, &expected, "moves");
        self.tally.borrow_mut().moved += moves.len();
        self.check("a compaction");
        Ok(())
    }

    fn save_rows(&mut self, cells: &[Cell], out: &mut Vec<u8>) -> Result<bool> {
        self.engine.save_rows(cells, out)
    }

    fn restore_rows(
        &mut self,
        seq: SeqId,
        pos: &[Pos],
        rows: &[u8],
        cells: &mut Vec<Cell>,
    ) -> Result<()> {
        if self.cells.used() + pos.len() > self.engine.n_cells() {
            let refused = self.engine.restore_rows(seq, pos, rows, cells);
            assert!(
                matches!(refused, Err(Error::ContextFull { .. })),
                "{refused:?}"
            );
            self.check("refused rows");
            return refused;
        }
        self.grow(pos.len());
        let expected = self.cells.put(pos).unwrap();
        self.engine.restore_rows(seq, pos, rows, cells)?;
        assert_eq!(cells, &expected, "cells of rows");
        if let Some(twin) = &mut self.twin {
            pos.iter().for_each(|&pos| twin.show(pos));
        }
        self.tally.borrow_mut().from_host += pos.len();
        self.check("rows from the host");
        Ok(())
    }

    fn n_cells(&self) -> usize {
        self.engine.n_cells()
    }

    fn n_batch(&self) -> usize {
        self.engine.n_batch()
    }

    fn kv_bytes(&self) -> KvBytes {
        self.engine.kv_bytes()
    }
}

impl TrialRuns for Mirrored<'_> {
    fn begin(&mut self, n_cells: usize, goes_on: bool) -> Result<&mut (dyn Engine + '_)> {
        self.tally.borrow_mut().pruned_early += 1;
        self.engine.trials().unwrap().begin(n_cells, goes_on)
    }

    fn end(&mut self) -> Result<()> {
        self.engine.trials().unwrap().end()
    }
}
