//! An engine that computes nothing: it keeps cells, and answers with the attention of a tape.
//!
//! The tape says what each query paid to every token of a full cache. Of what is still held here
//! the engine reports the same shares, scaled so that each row sums to 1: with the other keys
//! gone, softmax over the same logits is just that for a single head, and close to it for a mean
//! over heads that lose different shares. What that leaves out is that the queries themselves
//! would have been others.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::rc::Rc;

use super::tape::{Group, Tape};
use crate::cache::{Cell, Pos};
use crate::engine::{Batch, Engine, KvBytes, Observation, Token};
use crate::error::{Error, Result};

const NOWHERE: Cell = Cell::MAX;

pub struct TapeEngine {
    tape: Rc<Tape>,
    n_cells: usize,
    /// By cell.
    cells: Vec<Option<Pos>>,
    /// By position.
    cell_of: Vec<Cell>,
    free: BinaryHeap<Reverse<Cell>>,
    /// Query rows of the batches since this was last emptied, and the attention, of 1 for each
    /// row, that went to tokens no longer held.
    pub lost: Vec<(usize, f64)>,
    wanted: Vec<Pos>,
}

impl TapeEngine {
    pub fn new(tape: Rc<Tape>, n_cells: usize) -> Self {
        TapeEngine {
            cell_of: vec![NOWHERE; tape.len()],
            tape,
            n_cells,
            cells: Vec::new(),
            free: BinaryHeap::new(),
            lost: Vec::new(),
            wanted: Vec::new(),
        }
    }

    fn place(&mut self, pos: Pos) -> Result<Cell> {
        let slot = usize::try_from(pos)
            .ok()
            .and_then(|i| self.cell_of.get_mut(i));
        let Some(slot) = slot.filter(|slot| **slot == NOWHERE) else {
            return Err(Error::contract(format!("position {pos} in a replay")));
        };
        let cell = match self.free.pop() {
            Some(Reverse(cell)) => cell,
            None => {
                self.cells.push(None);
                (self.cells.len() - 1) as Cell
            }
        };
        *slot = cell;
        self.cells[cell as usize] = Some(pos);
        Ok(cell)
    }

    fn drop_pos(&mut self, pos: Pos) {
        let slot = usize::try_from(pos)
            .ok()
            .and_then(|i| self.cell_of.get_mut(i));
        if let Some(slot) = slot.filter(|slot| **slot != NOWHERE) {
            let cell = std::mem::replace(slot, NOWHERE);
            self.cells[cell as usize] = None;
            self.free.push(Reverse(cell));
        }
    }

    /// The attention of all rows of the group, and the part of it that goes to what is held.
    fn masses(&self, group: &Group) -> (f64, f64) {
        let (mut all, mut held) = (0.0, 0.0);
        for (&value, &cell) in group.sum.iter().zip(&self.cell_of) {
            let value = f64::from(value);
            all += value;
            held += if cell == NOWHERE { 0.0 } else { value };
        }
        (all, held)
    }

    fn attend(&self, group: &Group, held: f64, seen: &mut Observation) {
        let scale = match held > 0.0 {
            true => group.queries.len() as f64 / held,
            false => 0.0,
        };
        let max = group.max.as_ref().unwrap_or(&group.sum);
        let values = group.sum.iter().zip(max).zip(&self.cell_of);
        for ((&sum, &max), &cell) in values.filter(|(_, cell)| **cell != NOWHERE) {
            let cell = cell as usize;
            seen.sum[cell] += (f64::from(sum) * scale) as f32;
            seen.max[cell] = seen.max[cell].max((f64::from(max) * scale) as f32);
        }
    }
}

impl Engine for TapeEngine {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        cells.clear();
        seen.clear();
        let held = self.cells.len() - self.free.len();
        if held + batch.pos.len() > self.n_cells {
            let n_ctx = self.n_cells;
            return Err(Error::ContextFull { n_ctx });
        }
        for &pos in batch.pos {
            cells.push(self.place(pos)?);
        }
        self.wanted.clear();
        let pos = |&row: &u32| batch.pos[row as usize];
        self.wanted.extend(batch.queries.iter().map(pos));
        if !self.wanted.is_empty() {
            seen.sum.resize(self.cells.len(), 0.0);
            seen.max.resize(self.cells.len(), 0.0);
        }
        let tape = Rc::clone(&self.tape);
        // A group is complete with its last row.
        let groups = batch.pos.iter().filter_map(|&pos| {
            let group = tape.group(pos)?;
            let whole = batch.pos.first() <= group.queries.first();
            (whole && group.queries.last() == Some(&pos)).then_some(group)
        });
        let mut answered = 0;
        for group in groups {
            let (all, held) = self.masses(group);
            let rows = group.queries.len();
            let lost = if all > 0.0 { 1.0 - held / all } else { 0.0 };
            self.lost.push((rows, lost * rows as f64));
            if group
                .queries
                .iter()
                .all(|q| self.wanted.binary_search(q).is_ok())
            {
                answered += rows;
                self.attend(group, held, seen);
            }
        }
        if answered != self.wanted.len() {
            let (first, last) = (self.wanted.first(), self.wanted.last());
            return Err(Error::option(
                "--kv-policy",
                format!(
                    "wants attention of positions {first:?} to {last:?} that the trace does not hold apart from others"
                ),
            ));
        }
        seen.queries.extend(&self.wanted);
        Ok(())
    }

    fn logits(&self) -> Result<&[f32]> {
        Err(Error::contract("logits of a replay"))
    }

    fn sample(&mut self) -> Result<Token> {
        Err(Error::contract("a sample of a replay"))
    }

    fn is_eog(&self, _: Token) -> bool {
        false
    }

    fn piece(&self, _: Token, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn remove(&mut self, ranges: &[Range<Pos>]) -> Result<()> {
        for pos in ranges.iter().cloned().flatten() {
            self.drop_pos(pos);
        }
        Ok(())
    }

    fn rewind(&mut self, from: Pos, _: usize) -> Result<()> {
        for pos in from..self.cell_of.len() as Pos {
            self.drop_pos(pos);
        }
        Ok(())
    }

    fn takes_any_position(&self) -> bool {
        true
    }

    fn trial(&self, n_cells: usize) -> Result<Option<Box<dyn Engine + '_>>> {
        let engine = TapeEngine::new(Rc::clone(&self.tape), n_cells);
        Ok(Some(Box::new(engine)))
    }

    fn n_cells(&self) -> usize {
        self.n_cells
    }

    /// A whole segment at once, so that no group of rows is divided.
    fn n_batch(&self) -> usize {
        usize::MAX
    }

    fn kv_bytes(&self) -> KvBytes {
        KvBytes::default()
    }
}
