//! An engine that computes nothing: it keeps cells, and answers with the attention of a tape.
//!
//! The tape says what each query paid to every token of a full cache. Of what is still held here
//! the engine reports the same shares, scaled so that each row sums to 1: with the other keys
//! gone, softmax over the same logits is just that for a single head, and close to it for a mean
//! over heads that lose different shares. What that leaves out is that the queries themselves
//! would have been others.
//!
//! A token of the tape has a number, its position there. Policies that move tokens to other
//! positions change where it stands, not which it is.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::rc::Rc;

use super::tape::{Group, Tape};
use crate::cache::{Cell, Pos};
use crate::engine::{Batch, Capabilities, Engine, KvBytes, Observation, SeqId, TrialRuns};
use crate::error::{Error, Result};

const NOWHERE: Cell = Cell::MAX;

/// Answers with the attention of a tape to what is still held.
pub struct TapeEngine {
    tape: Rc<Tape>,
    n_cells: usize,
    /// By cell: number and position of its token.
    cells: Vec<Option<(usize, Pos)>>,
    /// By number.
    cell_of: Vec<Cell>,
    /// By position.
    cell_at: Vec<Cell>,
    free: BinaryHeap<Reverse<Cell>>,
    /// How far the newest token was moved down.
    shifted: Pos,
    /// Of each group of query rows in the batches since this was last emptied: the attention, of
    /// 1 for each row, that went to tokens no longer held.
    pub lost: Vec<f64>,
    wanted: Vec<Pos>,
    trial: Option<Box<TapeEngine>>,
}

impl TapeEngine {
    /// With an empty cache of so many cells.
    pub fn new(tape: Rc<Tape>, n_cells: usize) -> Self {
        TapeEngine {
            cell_of: vec![NOWHERE; tape.len()],
            cell_at: vec![NOWHERE; tape.len()],
            tape,
            n_cells,
            cells: Vec::new(),
            free: BinaryHeap::new(),
            shifted: 0,
            lost: Vec::new(),
            wanted: Vec::new(),
            trial: None,
        }
    }

    /// The number of the token that goes in at a position.
    fn number(&self, pos: Pos) -> Pos {
        pos.saturating_add(self.shifted)
    }

    fn place(&mut self, pos: Pos) -> Result<Cell> {
        let index = |pos: Pos| usize::try_from(pos).unwrap_or(usize::MAX);
        let (number, at) = (index(self.number(pos)), index(pos));
        let taken = |cells: &[Cell], i: usize| cells.get(i) != Some(&NOWHERE);
        if taken(&self.cell_of, number) || taken(&self.cell_at, at) {
            return Err(Error::contract(format!("position {pos} in a replay")));
        }
        let cell = match self.free.pop() {
            Some(Reverse(cell)) => cell,
            None => {
                self.cells.push(None);
                (self.cells.len() - 1) as Cell
            }
        };
        (self.cell_of[number], self.cell_at[at]) = (cell, cell);
        self.cells[cell as usize] = Some((number, pos));
        Ok(cell)
    }

    fn drop_at(&mut self, pos: Pos) {
        let at = usize::try_from(pos).unwrap_or(usize::MAX);
        let Some(&cell) = self.cell_at.get(at).filter(|cell| **cell != NOWHERE) else {
            return;
        };
        if let Some((number, _)) = self.cells[cell as usize].take() {
            self.cell_of[number] = NOWHERE;
        }
        self.cell_at[at] = NOWHERE;
        self.free.push(Reverse(cell));
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

    fn share(&self, group: &Group, held: f64, seen: &mut Observation) {
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
        let pos = |&row: &u32| batch.pos[row as usize];
        seen.queries.extend(batch.queries.iter().map(pos));
        self.wanted.clear();
        for &pos in &seen.queries {
            self.wanted.push(pos.saturating_add(self.shifted));
        }
        if !self.wanted.is_empty() {
            seen.sum.resize(self.cells.len(), 0.0);
            seen.max.resize(self.cells.len(), 0.0);
        }
        let tape = Rc::clone(&self.tape);
        let mut answered = 0;
        for &pos in batch.pos {
            let number = self.number(pos);
            // A group is complete with its last row.
            let first = batch.pos.first().map(|&first| self.number(first));
            let Some(group) = tape.group(number).filter(|group| {
                group.queries.last() == Some(&number) && first <= group.queries.first().copied()
            }) else {
                continue;
            };
            let (all, held) = self.masses(group);
            let rows = group.queries.len();
            let share = if all > 0.0 { 1.0 - held / all } else { 0.0 };
            self.lost.push(share * rows as f64);
            let wanted = |query| self.wanted.binary_search(query).is_ok();
            if group.queries.iter().all(wanted) {
                answered += rows;
                self.share(group, held, seen);
            }
        }
        match answered == self.wanted.len() {
            true => Ok(()),
            false => Err(Error::option(
                "kv_policy",
                format!(
                    "wants the attention of {} rows, of which the trace holds {answered} by themselves",
                    self.wanted.len()
                ),
            )),
        }
    }

    fn remove(&mut self, _: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        for pos in ranges.iter().cloned().flatten() {
            self.drop_at(pos);
        }
        Ok(())
    }

    fn rewind(&mut self, _: SeqId, from: Pos, _: usize) -> Result<()> {
        for pos in from..self.cell_at.len() as Pos {
            self.drop_at(pos);
        }
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            any_position: true,
            shifts: true,
            continues_trials: false,
            scores_by_part: false,
        }
    }

    fn shift(&mut self, _: SeqId, from: Pos, by: Pos) -> Result<()> {
        let moved = self.cells.iter_mut().flatten();
        for (_, pos) in moved.filter(|(_, pos)| *pos >= from) {
            *pos -= by;
        }
        self.shifted += by;
        self.cell_at.fill(NOWHERE);
        for (cell, token) in self.cells.iter().enumerate() {
            if let Some((_, pos)) = token {
                let at = usize::try_from(*pos).unwrap_or(usize::MAX);
                match self.cell_at.get_mut(at) {
                    Some(free @ &mut NOWHERE) => *free = cell as Cell,
                    _ => return Err(Error::contract(format!("a shift of {from} by {by}"))),
                }
            }
        }
        Ok(())
    }

    fn trials(&mut self) -> Option<&mut (dyn TrialRuns + '_)> {
        Some(self)
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

impl TrialRuns for TapeEngine {
    fn begin(&mut self, n_cells: usize, _: bool) -> Result<&mut (dyn Engine + '_)> {
        let engine = TapeEngine::new(Rc::clone(&self.tape), n_cells);
        Ok(self.trial.insert(Box::new(engine)).as_mut())
    }

    fn end(&mut self) -> Result<()> {
        self.trial = None;
        Ok(())
    }
}
