//! The ledger: for every cell of the KV cache, the token in it and the attention it has had.

mod attention;
mod saved;

use std::ops::Range;

use super::counts::Counts;
use super::entry::{Columns, EMPTY, Entries, Entry, NO_IMAGE};
use super::{Cell, Modality, Observation, Pos, State};
use crate::error::{Error, Result};

pub use saved::SavedLedger;

/// Bookkeeping of the whole cache, one entry a cell, as arrays indexed by cell.
///
/// Empty cells hold `EMPTY` and zero scores. The arrays reach up to the highest cell used since
/// tokens were last moved together.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// `[cells]`
    pos: Vec<Pos>,
    /// `[cells]`
    modality: Vec<Modality>,
    /// `[cells]`
    state: Vec<State>,
    /// `[cells]`
    turns: Vec<u32>,
    /// `[cells]`
    image: Vec<u32>,
    /// `[cells]`
    separator: Vec<bool>,
    /// `[cells]` attention mass
    sum: Vec<f32>,
    /// `[cells]` attention mass
    max: Vec<f32>,
    /// `[cells]` query rows
    seen: Vec<f32>,
    /// `[cells]` attention mass since [`Ledger::begin_observation`]
    latest: Vec<f32>,
    n_cells: usize,
    turn: u32,
    first: Option<Pos>,
    newest: Option<(Pos, Cell)>,
    counts: Counts,
}

impl Ledger {
    /// An empty ledger of a cache of `n_cells` cells. All memory is taken here.
    pub fn new(n_cells: usize) -> Self {
        Ledger {
            pos: Vec::with_capacity(n_cells),
            modality: Vec::with_capacity(n_cells),
            state: Vec::with_capacity(n_cells),
            turns: Vec::with_capacity(n_cells),
            image: Vec::with_capacity(n_cells),
            separator: Vec::with_capacity(n_cells),
            sum: Vec::with_capacity(n_cells),
            max: Vec::with_capacity(n_cells),
            seen: Vec::with_capacity(n_cells),
            latest: Vec::with_capacity(n_cells),
            n_cells,
            ..Ledger::default()
        }
    }

    /// Writes down that the token at `pos` now lies in `cell`, in the current turn.
    ///
    /// # Errors
    /// When the cell is occupied or beyond the cache, or `pos` is not newer than every other.
    pub fn insert(
        &mut self,
        cell: Cell,
        pos: Pos,
        modality: Modality,
        image: Option<u32>,
    ) -> Result<()> {
        let oldest_allowed = self.newest.map_or(0, |(newest, _)| newest + 1);
        self.place(cell, pos, oldest_allowed, modality, image)
    }

    /// As [`Ledger::insert`], for a row of a picture whose rows share positions (M-RoPE): `pos`
    /// may also be the newest one.
    ///
    /// # Errors
    /// As [`Ledger::insert`].
    pub fn insert_shared(&mut self, cell: Cell, pos: Pos, image: Option<u32>) -> Result<()> {
        let oldest_allowed = self.newest.map_or(0, |(newest, _)| newest);
        self.place(cell, pos, oldest_allowed, Modality::Vision, image)
    }

    /// Writes down that an evicted token is back: in the current turn, live, without a score.
    ///
    /// # Errors
    /// When the cell is occupied or beyond the cache, or `pos` is newer than every other.
    pub fn recall(
        &mut self,
        cell: Cell,
        pos: Pos,
        modality: Modality,
        image: Option<u32>,
    ) -> Result<()> {
        let Some(newest) = self.newest.filter(|&(newest, _)| pos < newest) else {
            return Err(Error::cell(
                cell,
                format!("got position {pos} back, expected one before the newest"),
            ));
        };
        let first = self.first;
        self.place(cell, pos, 0, modality, image)?;
        (self.newest, self.first) = (Some(newest), first.map(|first| first.min(pos)));
        let evicted = self.counts.evicted.of_mut(modality);
        *evicted = evicted.saturating_sub(1);
        *self.counts.recalled.of_mut(modality) += 1;
        Ok(())
    }

    /// Marks a visual token that separates parts of a picture.
    ///
    /// # Errors
    /// When the cell is empty.
    pub fn mark_separator(&mut self, cell: Cell) -> Result<()> {
        let i = self.expect(cell, None)?;
        self.separator[i] = true;
        Ok(())
    }

    /// Counts visual tokens that were pruned before they took a cell; `pos` are their positions.
    pub fn skipped(&mut self, pos: &[Pos]) {
        self.counts.evicted.vision += pos.len();
        self.first = pos.iter().copied().chain(self.first).min();
    }

    /// Lets the current turn judge every visual token: scores of older turns are forgotten.
    pub fn reopen_pictures(&mut self) {
        for i in 0..self.pos.len() {
            if self.pos[i] != EMPTY && self.modality[i] == Modality::Vision {
                self.turns[i] = self.turn;
                self.forget(i);
            }
        }
    }

    /// Follows tokens that were moved: from a cell, to an empty one below it.
    ///
    /// # Errors
    /// When there is nothing to move, or the target is occupied.
    pub fn moved(&mut self, moves: &[(Cell, Cell)]) -> Result<()> {
        for &(from, to) in moves {
            let i = self.expect(from, None)?;
            let j = to as usize;
            if self.pos.get(j).is_none_or(|&pos| pos != EMPTY) {
                return Err(Error::cell(
                    to,
                    format!("is no empty cell to move cell {from} to"),
                ));
            }
            self.pos[j] = std::mem::replace(&mut self.pos[i], EMPTY);
            self.modality[j] = self.modality[i];
            self.state[j] = self.state[i];
            self.turns[j] = self.turns[i];
            self.image[j] = self.image[i];
            self.separator[j] = self.separator[i];
            self.sum[j] = std::mem::take(&mut self.sum[i]);
            self.max[j] = std::mem::take(&mut self.max[i]);
            self.seen[j] = std::mem::take(&mut self.seen[i]);
            self.latest[j] = std::mem::take(&mut self.latest[i]);
            if let Some((_, newest)) = &mut self.newest
                && *newest == from
            {
                *newest = to;
            }
        }
        let span = self.pos.iter().rposition(|&pos| pos != EMPTY);
        self.shrink(span.map_or(0, |last| last + 1));
        Ok(())
    }

    fn place(
        &mut self,
        cell: Cell,
        pos: Pos,
        oldest_allowed: Pos,
        modality: Modality,
        image: Option<u32>,
    ) -> Result<()> {
        let i = cell as usize;
        if i >= self.n_cells {
            let n = self.n_cells;
            return Err(Error::cell(
                cell,
                format!("is beyond the {n} cells of the cache"),
            ));
        }
        // Pos::MAX has no end for a half-open range.
        if pos < oldest_allowed || pos == Pos::MAX {
            return Err(Error::cell(
                cell,
                format!("got position {pos}, expected {oldest_allowed} or a newer one"),
            ));
        }
        if i >= self.pos.len() {
            self.grow(i + 1);
        } else if self.pos[i] != EMPTY {
            let old = self.pos[i];
            return Err(Error::cell(
                cell,
                format!("got position {pos} but holds position {old}"),
            ));
        }
        self.pos[i] = pos;
        self.modality[i] = modality;
        self.state[i] = State::Live;
        self.turns[i] = self.turn;
        self.image[i] = image.unwrap_or(NO_IMAGE);
        self.separator[i] = false;
        self.first.get_or_insert(pos);
        self.newest = Some((pos, cell));
        *self.counts.live.of_mut(modality) += 1;
        self.counts.peak = self.counts.peak.max(self.counts.cells());
        Ok(())
    }

    fn grow(&mut self, len: usize) {
        self.pos.resize(len, EMPTY);
        self.modality.resize(len, Modality::Text);
        self.state.resize(len, State::Live);
        self.turns.resize(len, 0);
        self.image.resize(len, NO_IMAGE);
        self.separator.resize(len, false);
        self.sum.resize(len, 0.0);
        self.max.resize(len, 0.0);
        self.seen.resize(len, 0.0);
        self.latest.resize(len, 0.0);
    }

    /// Empty cells at the end need not be walked over any more.
    fn shrink(&mut self, len: usize) {
        self.pos.truncate(len);
        self.modality.truncate(len);
        self.state.truncate(len);
        self.turns.truncate(len);
        self.image.truncate(len);
        self.separator.truncate(len);
        self.sum.truncate(len);
        self.max.truncate(len);
        self.seen.truncate(len);
        self.latest.truncate(len);
    }

    /// Adds one batch's attention: `sum' = sum * decay + observed`, `seen' = seen * decay + rows`,
    /// where `rows` counts the query rows at or after the token's own position. `decay` is 1 for
    /// plain accumulation. Cells beyond the observation were not in view and gain nothing.
    ///
    /// # Errors
    /// [`Error::NanScore`] when an occupied cell's score would not be a finite number; the ledger
    /// is then unchanged.
    pub fn observe(&mut self, seen: &Observation, decay: f32) -> Result<()> {
        let queries = seen.queries.as_slice();
        if queries.is_empty() {
            return Ok(());
        }
        let n = self.pos.len().min(seen.sum.len()).min(seen.max.len());
        let (add, peak) = (&seen.sum[..n], &seen.max[..n]);
        let finite = match *queries {
            [query] => attention::is_finite(
                (&self.pos[..n], query),
                (&self.sum[..n], decay),
                (add, peak),
            ),
            _ => false,
        };
        if !finite {
            self.check_finite(queries, add, peak, decay)?;
        }
        let columns = attention::Columns {
            pos: &self.pos[..n],
            add,
            peak,
            sum: &mut self.sum[..n],
            max: &mut self.max[..n],
            exposure: &mut self.seen[..n],
            latest: &mut self.latest[..n],
        };
        match *queries {
            [query] => attention::add_of_one(columns, query, decay),
            _ => attention::add_of_some(columns, |pos| attention::rows(queries, pos), decay),
        }
        if decay != 1.0 {
            self.sum[n..].iter_mut().for_each(|sum| *sum *= decay);
            self.seen[n..].iter_mut().for_each(|seen| *seen *= decay);
        }
        Ok(())
    }

    /// Names the first visible cell whose score would not be finite.
    fn check_finite(&self, queries: &[Pos], add: &[f32], peak: &[f32], decay: f32) -> Result<()> {
        for (i, (&add, &peak)) in add.iter().zip(peak).enumerate() {
            let (pos, total) = (self.pos[i], self.sum[i] * decay + add);
            if attention::rows(queries, pos) > 0 && !(total.is_finite() && peak.is_finite()) {
                let value = if total.is_finite() { peak } else { total };
                return Err(Error::NanScore { pos, value });
            }
        }
        Ok(())
    }

    /// What is observed from now on counts as the latest attention.
    pub fn begin_observation(&mut self) {
        self.latest.fill(0.0);
    }

    fn forget(&mut self, i: usize) {
        (self.sum[i], self.max[i], self.seen[i], self.latest[i]) = (0.0, 0.0, 0.0, 0.0);
    }

    /// Follows tokens that were moved to other positions: all at `from` or behind it, `by` down.
    ///
    /// # Errors
    /// When a token lies where they go.
    pub fn shift(&mut self, from: Pos, by: Pos) -> Result<()> {
        let to = from.saturating_sub(by);
        let in_the_way = self.entries().find(|e| (to..from).contains(&e.pos));
        if let Some(entry) = in_the_way.filter(|_| by > 0) {
            let pos = entry.pos;
            let reason = format!("holds position {pos}, where positions from {from} are to go");
            return Err(Error::cell(entry.cell, reason));
        }
        if by <= 0 || to < 0 {
            let reason = format!("positions from {from} moved down by {by}");
            return Err(Error::contract(reason));
        }
        // An empty cell's position is below every other.
        for pos in self.pos.iter_mut().filter(|pos| **pos >= from.max(0)) {
            *pos -= by;
        }
        if let Some((newest, _)) = self.newest.as_mut().filter(|(newest, _)| *newest >= from) {
            *newest -= by;
        }
        Ok(())
    }

    /// Puts a live token into the recycle bin.
    ///
    /// # Errors
    /// When the cell is empty or binned already, or holds the newest position.
    pub fn bin(&mut self, cell: Cell) -> Result<()> {
        let i = self.expect(cell, Some(State::Live))?;
        self.expect_not_newest(cell)?;
        self.state[i] = State::Binned;
        *self.counts.live.of_mut(self.modality[i]) -= 1;
        *self.counts.binned.of_mut(self.modality[i]) += 1;
        Ok(())
    }

    /// Takes a token out of the recycle bin again.
    ///
    /// # Errors
    /// When the cell is empty or its token is not in the bin.
    pub fn restore(&mut self, cell: Cell) -> Result<()> {
        let i = self.expect(cell, Some(State::Binned))?;
        self.state[i] = State::Live;
        *self.counts.binned.of_mut(self.modality[i]) -= 1;
        *self.counts.live.of_mut(self.modality[i]) += 1;
        *self.counts.restored.of_mut(self.modality[i]) += 1;
        Ok(())
    }

    /// Empties a cell and gives the position it held.
    ///
    /// # Errors
    /// When the cell is empty, or holds the newest position: the model counts on from there.
    pub fn remove(&mut self, cell: Cell) -> Result<Pos> {
        let i = self.expect(cell, None)?;
        self.expect_not_newest(cell)?;
        let modality = self.modality[i];
        match self.state[i] {
            State::Live => *self.counts.live.of_mut(modality) -= 1,
            State::Binned => *self.counts.binned.of_mut(modality) -= 1,
        }
        *self.counts.evicted.of_mut(modality) += 1;
        self.forget(i);
        Ok(std::mem::replace(&mut self.pos[i], EMPTY))
    }

    /// Takes back every token from position `from` on, as if it had never been there. The peak
    /// stays, and so does what those tokens paid to earlier ones.
    pub fn rewind(&mut self, from: Pos) {
        self.newest = None;
        for i in 0..self.pos.len() {
            let pos = self.pos[i];
            if pos == EMPTY {
                continue;
            }
            if pos < from {
                if self.newest.is_none_or(|(newest, _)| pos >= newest) {
                    self.newest = Some((pos, i as Cell));
                }
                continue;
            }
            match self.state[i] {
                State::Live => *self.counts.live.of_mut(self.modality[i]) -= 1,
                State::Binned => *self.counts.binned.of_mut(self.modality[i]) -= 1,
            }
            self.pos[i] = EMPTY;
            self.forget(i);
        }
        if self.newest.is_none() {
            self.first = None;
        }
    }

    fn expect(&self, cell: Cell, state: Option<State>) -> Result<usize> {
        let i = cell as usize;
        if self.pos.get(i).is_none_or(|&pos| pos == EMPTY) {
            return Err(Error::cell(cell, "is empty, expected a token"));
        }
        match state {
            Some(State::Live) if self.state[i] != State::Live => Err(Error::cell(
                cell,
                "is in the recycle bin, expected a live token",
            )),
            Some(State::Binned) if self.state[i] != State::Binned => Err(Error::cell(
                cell,
                "is live, expected a token in the recycle bin",
            )),
            _ => Ok(i),
        }
    }

    fn expect_not_newest(&self, cell: Cell) -> Result<()> {
        match self.newest {
            Some((pos, newest)) if newest == cell => Err(Error::cell(
                cell,
                format!("holds the newest position {pos}, which must stay"),
            )),
            _ => Ok(()),
        }
    }

    /// The token in a cell.
    pub fn get(&self, cell: Cell) -> Option<Entry> {
        let i = cell as usize;
        if i < self.pos.len() {
            self.entries_of(i..i + 1).next()
        } else {
            None
        }
    }

    /// All occupied cells, ascending by cell (not by position).
    #[inline]
    pub fn entries(&self) -> Entries<'_> {
        self.entries_of(0..self.pos.len())
    }

    #[inline]
    fn entries_of(&self, cells: Range<usize>) -> Entries<'_> {
        // Slices of one length spare a check of every array at every cell.
        let n = cells.end;
        Entries {
            pos: &self.pos[..n],
            modality: &self.modality[..n],
            state: &self.state[..n],
            turns: &self.turns[..n],
            image: &self.image[..n],
            separator: &self.separator[..n],
            sum: &self.sum[..n],
            max: &self.max[..n],
            seen: &self.seen[..n],
            latest: &self.latest[..n],
            cells,
        }
    }

    /// What a choice among all tokens goes by, column by column, as far as [`Ledger::span`].
    #[inline]
    pub fn columns(&self) -> Columns<'_> {
        Columns {
            pos: &self.pos,
            modality: &self.modality,
            state: &self.state,
            sum: &self.sum,
            seen: &self.seen,
        }
    }

    /// Cells that the arrays reach over: at least one more than the highest cell in use.
    pub fn span(&self) -> usize {
        self.pos.len()
    }

    /// The first position that went in since the cache was last empty.
    pub fn first(&self) -> Option<Pos> {
        self.first
    }

    /// The newest position; the next token takes the one after it.
    pub fn newest(&self) -> Option<Pos> {
        self.newest.map(|(pos, _)| pos)
    }

    /// Occupied cells by modality and state.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The current user turn; tokens that go in now belong to it.
    pub fn turn(&self) -> u32 {
        self.turn
    }

    /// Starts the next user turn.
    pub fn begin_turn(&mut self) {
        self.turn += 1;
    }

    /// Empties the ledger, counts and turns included.
    pub fn clear(&mut self) {
        self.shrink(0);
        self.turn = 0;
        self.first = None;
        self.newest = None;
        self.counts = Counts::default();
    }
}

#[cfg(test)]
mod tests;
