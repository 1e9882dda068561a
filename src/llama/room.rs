//! How many cells the cache has: as many as its tokens need, in steps.

use llama_cpp_sys_2 as sys;

use super::LlamaEngine;
use crate::cache::Cell;
use crate::error::Result;
use crate::{
    engine::{Engine, SeqId},
    error::Error,
};

/// Cells by which the cache grows. llama.cpp computes attention over multiples of as many.
const STEP: usize = 256;

/// What is in use, as the engine last knew it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    /// Whether the cache can change its size.
    pub resizable: bool,
    /// Cells that hold tokens.
    pub used: usize,
    /// One more than the highest of them.
    span: usize,
}

impl Room {
    /// A batch went into these cells.
    pub fn filled(&mut self, cells: &[Cell]) {
        self.used += cells.len();
        let span = cells.iter().max().map_or(0, |&cell| cell as usize + 1);
        self.span = self.span.max(span);
    }

    /// Everything is gone.
    pub fn emptied(&mut self) {
        (self.used, self.span) = (0, 0);
    }
}

/// The cells that the context begins with.
pub(super) fn set(kv_size: Option<u32>, params: &mut sys::llama_context_params) {
    params.kv_size = kv_size.unwrap_or(0);
}

fn padded(n: usize) -> usize {
    n.max(1).next_multiple_of(STEP)
}

/// Cells that the cache grows to when so many are needed: a step, but a sixteenth of a large cache, which costs
/// a copy of all of it to change.
pub fn grown(n: usize) -> usize {
    padded(n) + n / 16 / STEP * STEP
}

impl LlamaEngine {
    /// Looks at the cache again, after something other than a batch has changed it.
    pub(super) fn recount(&mut self) -> Result<()> {
        if !self.is_plain() {
            return Ok(());
        }
        let mut map = Vec::new();
        self.cell_map(&mut map)?;
        self.room.used = map.iter().flatten().count();
        self.room.span = map.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
        Ok(())
    }

    /// Lets the cache grow until it can take `n` more tokens.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when that is more than `-c` allows; those of [`LlamaEngine::resize`].
    pub(super) fn grow(&mut self, n: usize) -> Result<()> {
        if !self.room.resizable {
            return Ok(());
        }
        let needed = self.room.used + n;
        let n_ctx = self.n_cells();
        if needed > n_ctx {
            return Err(Error::ContextFull { n_ctx });
        }
        if needed > self.cells_now()? {
            self.resize(grown(needed).min(n_ctx))?;
        }
        Ok(())
    }

    /// Moves tokens together where attention gets shorter by it, and gives back memory that is
    /// a step and a tenth more than the tokens need. Sequences ask for their moves then.
    pub(super) fn tidy(&mut self) -> Result<()> {
        if !self.room.resizable {
            return Ok(());
        }
        self.recount()?;
        let Room { used, span, .. } = self.room;
        let now = self.cells_now()?;
        let too_large = now > used + used / 10 + STEP;
        if padded(span) > padded(used) || too_large && span > padded(used) {
            let mut moves = Vec::new();
            self.compact_cells(&mut moves)?;
            self.room.span = used;
            self.note_moves(&moves)?;
        }
        if too_large {
            self.resize(padded(used))?;
        }
        Ok(())
    }

    /// Keeps moves until the sequences whose tokens moved ask for them.
    fn note_moves(&mut self, moves: &[(Cell, Cell)]) -> Result<()> {
        if self.options.n_seq_max == 1 {
            self.moved.extend(moves.iter().map(|&moved| (0, moved)));
            return Ok(());
        }
        let cells = self.cells()?;
        for &(from, to) in moves {
            let cell = cells.get(to as usize).filter(|cell| cell.seq >= 0);
            let seq = cell.map(|cell| cell.seq).ok_or_else(|| {
                let reason = format!("cell {to} is empty after a move from {from}");
                Error::llama("llama_hae_kv_compact", reason)
            })?;
            self.moved.push((seq, (from, to)));
        }
        Ok(())
    }

    /// The sequence's moves since it last asked.
    pub(super) fn take_moves(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) {
        moves.clear();
        self.moved.retain(|&(of, moved)| {
            if of == seq {
                moves.push(moved);
            }
            of != seq
        });
    }

    /// Cells that the sequence can have beside what the others hold.
    pub(super) fn room_for(&self, seq: SeqId) -> usize {
        let n_ctx = self.n_ctx;
        if self.options.n_seq_max == 1 {
            return n_ctx;
        }
        let Ok(cells) = self.cells() else {
            return n_ctx;
        };
        let of_others = |cell: &&sys::llama_hae_cell| cell.seq >= 0 && cell.seq != seq;
        n_ctx.saturating_sub(cells.iter().filter(of_others).count())
    }
}

#[cfg(test)]
mod tests {
    use super::{STEP, grown};

    /// What grows is not at once too large again, and large caches do not grow at every step.
    #[test]
    fn a_cache_grows_by_less_than_it_may_hold_too_much() {
        for n in (1..100_000).step_by(37) {
            let cells = grown(n);
            assert!(n <= cells && cells < n + n / 10 + STEP, "{n}: {cells}");
        }
        assert_eq!([1, 256, 257, 4095].map(grown), [256, 256, 512, 4096]);
        assert_eq!(grown(16_385), 16_640 + 1024);
    }
}
