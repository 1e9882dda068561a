//! The host side of the recycle bin: K and V rows of evicted text, until memory for them is full.

use std::collections::{HashSet, VecDeque};

use crate::cache::{Cell, Pos};
use crate::engine::Engine;
use crate::error::{Error, Result};

/// Rows of tokens that were evicted at once.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    /// `[n]`, in the order of the rows.
    pub pos: Vec<Pos>,
    /// `[n, row bytes]`
    #[serde(with = "serde_bytes")]
    pub rows: Vec<u8>,
}

/// Whether rows can be those of tokens that went in before position `next` and are not `held` now;
/// they may come from a file.
pub(super) fn check(saved: &[Saved], next: Pos, mut held: HashSet<Pos>) -> Result<()> {
    for Saved { pos, rows } in saved {
        let n = pos.len();
        if n == 0 || rows.is_empty() || rows.len() % n != 0 {
            return Err(Error::contract(format!(
                "{} bytes for {n} rows",
                rows.len()
            )));
        }
        let odd = pos
            .iter()
            .find(|&&pos| !(0..next).contains(&pos) || !held.insert(pos));
        if let Some(pos) = odd {
            return Err(Error::contract(format!(
                "rows of position {pos} on the host"
            )));
        }
    }
    Ok(())
}

/// Saved rows, oldest first. `max_bytes` 0: nothing is kept.
#[derive(Clone, Debug, Default)]
pub struct HostBin {
    max_bytes: usize,
    saved: VecDeque<Saved>,
    bytes: usize,
}

impl HostBin {
    /// Keeps at most `max_bytes` of rows; 0: nothing.
    pub fn new(max_bytes: usize) -> Self {
        HostBin {
            max_bytes,
            ..HostBin::default()
        }
    }

    /// Whether it keeps nothing at all.
    pub fn is_off(&self) -> bool {
        self.max_bytes == 0
    }

    /// Bytes of the rows that are kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Oldest first.
    pub fn saved(&self) -> impl DoubleEndedIterator<Item = &Saved> {
        self.saved.iter()
    }

    /// Copies rows that are about to be removed; the oldest make room.
    pub(super) fn keep(
        &mut self,
        engine: &mut dyn Engine,
        cells: &[Cell],
        pos: &[Pos],
    ) -> Result<()> {
        if cells.is_empty() {
            return Ok(());
        }
        let mut rows = Vec::new();
        if engine.save_rows(cells, &mut rows)? {
            self.push(Saved {
                pos: pos.to_vec(),
                rows,
            });
        }
        Ok(())
    }

    /// Adds rows; the oldest make room, and what is larger than the bin is not kept.
    pub fn push(&mut self, saved: Saved) {
        if saved.rows.len() > self.max_bytes {
            return;
        }
        self.bytes += saved.rows.len();
        self.saved.push_back(saved);
        while self.bytes > self.max_bytes {
            let Some(oldest) = self.saved.pop_front() else {
                break;
            };
            self.bytes -= oldest.rows.len();
        }
    }

    /// Takes the newest rows out again.
    pub(super) fn pop(&mut self) -> Option<Saved> {
        let newest = self.saved.pop_back()?;
        self.bytes -= newest.rows.len();
        Some(newest)
    }

    pub(super) fn clear(&mut self) {
        self.saved.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_tokens_that_left() {
        let rows = |pos: &[Pos], bytes: usize| Saved {
            pos: pos.to_vec(),
            rows: vec![0; bytes],
        };
        let held = || HashSet::from([0, 1, 9]);
        check(&[rows(&[2, 3], 8), rows(&[4], 4)], 10, held()).unwrap();
        for bad in [
            rows(&[2, 2], 8),
            rows(&[1], 4),
            rows(&[10], 4),
            rows(&[-1], 4),
            rows(&[2, 3], 7),
            rows(&[2], 0),
            rows(&[], 4),
        ] {
            assert!(
                check(std::slice::from_ref(&bad), 10, held()).is_err(),
                "{bad:?}"
            );
        }
        assert!(check(&[rows(&[2], 4), rows(&[2], 4)], 10, held()).is_err());
    }
}
