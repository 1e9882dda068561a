//! Which batches may go through the model in one pass.

use super::{Batch, Input, Part};
use crate::error::{Error, Result};

/// The batches of one pass, asked one after the other whether they join it. One by itself always
/// may. Several hold tokens, of a sequence each, and look nothing up.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    n_batch: usize,
    scores_by_part: bool,
    parts: usize,
    rows: usize,
    /// A batch of it takes no other beside it.
    alone: bool,
    /// A batch of it has query rows.
    asked: bool,
}

impl Pass {
    /// An empty one, of an engine through which `n_batch` rows go at once, and of which it may be
    /// said that [`Capabilities::scores_by_part`](super::Capabilities::scores_by_part).
    pub fn new(n_batch: usize, scores_by_part: bool) -> Self {
        Pass {
            n_batch,
            scores_by_part,
            parts: 0,
            rows: 0,
            alone: false,
            asked: false,
        }
    }

    /// Lets the batch join, if it can.
    pub fn takes(&mut self, batch: &Batch<'_>) -> bool {
        let alone = batch.lookup.is_some() || !matches!(batch.input, Input::Tokens(_));
        let asked = !batch.queries.is_empty();
        let rows = self.rows.saturating_add(batch.input.len());
        // One sum over the query rows of two would mix them up.
        let mixed = asked && self.asked && !self.scores_by_part;
        if self.parts > 0 && (self.alone || alone || mixed || rows > self.n_batch) {
            return false;
        }
        self.parts += 1;
        self.rows = rows;
        self.alone = alone;
        self.asked |= asked;
        true
    }

    /// Whether these can be the parts of a pass; how many rows they are.
    ///
    /// # Errors
    /// [`Error::Contract`] for none, for several of one sequence, and for what [`Pass::takes`]
    /// refuses.
    pub fn check(mut self, parts: &[Part<'_>]) -> Result<usize> {
        let pass = &mut self;
        for (i, part) in parts.iter().enumerate() {
            let seq = part.batch.seq;
            if parts[..i].iter().any(|other| other.batch.seq == seq) {
                return Err(Error::contract(format!("two parts of sequence {seq}")));
            }
            if !pass.takes(&part.batch) {
                let (n, rows) = (part.batch.input.len(), pass.rows);
                let what = format!("{n} rows of sequence {seq} beside {rows} others");
                return Err(Error::contract(what));
            }
        }
        match parts.is_empty() {
            true => Err(Error::contract("a pass without parts")),
            false => Ok(pass.rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::Lookup;

    #[test]
    fn what_cannot_be_told_apart_goes_by_itself() {
        let tokens = [1, 2, 3];
        let plain = Batch {
            logits: true,
            ..Batch::new(Input::Tokens(&tokens), &[0, 1, 2])
        };
        let asks = Batch {
            queries: &[2],
            ..plain
        };
        let lookup = Lookup::default();
        let looks_up = Batch {
            lookup: Some(&lookup),
            ..plain
        };
        let picture = Batch {
            input: Input::Embeddings {
                data: &[0.0; 3],
                n: 3,
                mrope: None,
            },
            ..plain
        };
        let goes_on = Batch {
            input: Input::Trial(&[0, 1, 2]),
            ..plain
        };
        let taken = |batches: &[Batch<'_>], n_batch| {
            let mut pass = Pass::new(n_batch, false);
            let taken = batches.iter().map(|batch| pass.takes(batch));
            taken.collect::<Vec<_>>()
        };
        let mut by_part = Pass::new(99, true);
        assert!([plain, asks, asks].iter().all(|batch| by_part.takes(batch)));
        for single in [plain, asks, looks_up, picture, goes_on] {
            assert_eq!(taken(&[single], 2), [true]);
        }
        assert_eq!(
            taken(&[plain, asks, asks, plain], 99),
            [true, true, false, true]
        );
        assert_eq!(taken(&[plain, plain, plain], 8), [true, true, false]);
        for alone in [looks_up, picture, goes_on] {
            assert_eq!(taken(&[plain, alone, plain], 99), [true, false, true]);
            assert_eq!(taken(&[alone, plain, asks], 99), [true, false, false]);
        }
    }
}
