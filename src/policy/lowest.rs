//! The lowest-scored tokens of each modality, for DDES.
//!
//! A decoding step looks at every cell and takes a few. So one vectorised walk writes down the lowest
//! score of each block of cells, and only the blocks that can hold one of the lowest tokens are looked
//! into: the k lowest lie in the k blocks whose own lowest are lowest.

use std::ops::Range;

use super::scores::{Candidate, Norm};
use crate::cache::{Cell, Columns, Ledger, Modality, Pos, State};

/// Cells of a block.
const BLOCK: usize = 64;

/// Cells that are looked at together within a block.
const PART: usize = 16;

/// Above every score: no open token.
const NONE: i32 = i32::MAX;

/// In the order in which they leave.
pub(super) const CLASSES: [Modality; 2] = [Modality::Vision, Modality::Text];

/// The lowest score of each block of cells. Buffers are reused.
pub(super) struct Lowest {
    norm: Norm,
    /// `[cells]`: what [`ordered`] makes of an open token's score, or [`NONE`].
    scores: Vec<i32>,
    /// `[blocks]` for each class: the lowest of these.
    blocks: [Vec<i32>; 2],
    /// Open tokens of each class.
    n_open: [usize; 2],
    /// `[blocks]`
    scratch: Vec<i32>,
}

/// Integers in the order of finite scores and infinity: their minimum is vectorised, that of floats is not.
#[inline(always)]
fn ordered(score: f32) -> i32 {
    // Both zeros are one.
    let bits = (score + 0.0).to_bits() as i32;
    bits ^ (((bits >> 31) as u32) >> 1) as i32
}

/// What is known of every cell's token: an integer for its score if it is open, else [`NONE`]. A function of
/// its own, whose arguments do not overlap, so that the compiler vectorises.
#[inline(never)]
fn rate(
    cells: (&[Pos], &[State], &[f32], &[f32]),
    open: Range<Pos>,
    score: impl Fn(f32, f32) -> f32,
    skip: impl Fn(Cell) -> bool,
    out: &mut [i32],
) {
    let n = out.len();
    let (pos, state, sum, seen) = cells;
    let (pos, state, sum, seen) = (&pos[..n], &state[..n], &sum[..n], &seen[..n]);
    for i in 0..n {
        let is_live = (state[i] == State::Live) & !skip(i as Cell);
        let is_open = (pos[i] >= open.start) & (pos[i] < open.end) & is_live;
        let score = ordered(score(sum[i], seen[i]));
        out[i] = if is_open { score } else { NONE };
    }
}

/// Of a block of cells: the lowest score of each class, and how many of it are open.
#[inline(never)]
fn summed_up(scores: &[i32], modality: &[Modality]) -> [(i32, u32); 2] {
    let n = scores.len();
    let modality = &modality[..n];
    let (mut low_vision, mut low_text) = (NONE, NONE);
    let (mut n_vision, mut n_both) = (0, 0);
    for i in 0..n {
        let (score, is_vision) = (scores[i], modality[i] == Modality::Vision);
        let vision = if is_vision { score } else { NONE };
        low_vision = low_vision.min(vision);
        low_text = low_text.min(if is_vision { NONE } else { score });
        n_vision += u32::from(vision != NONE);
        n_both += u32::from(score != NONE);
    }
    [(low_vision, n_vision), (low_text, n_both - n_vision)]
}

impl Lowest {
    /// For caches of `n_cells`. All memory is taken here.
    pub fn new(norm: Norm, n_cells: usize) -> Self {
        let blocks = || Vec::with_capacity(n_cells.div_ceil(BLOCK));
        Lowest {
            norm,
            scores: Vec::with_capacity(n_cells),
            blocks: [blocks(), blocks()],
            n_open: [0; 2],
            scratch: blocks(),
        }
    }

    /// Walks over the cache. Live tokens at these positions are open, but for those that `skip` names.
    #[inline]
    pub fn scan(&mut self, cache: &Ledger, open: Range<Pos>, skip: impl Fn(Cell) -> bool) {
        let Columns {
            pos,
            modality,
            state,
            sum,
            seen,
        } = cache.columns();
        let cells = (pos, state, sum, seen);
        self.scores.resize(pos.len(), NONE);
        let out = self.scores.as_mut_slice();
        // Each a loop of its own.
        match self.norm {
            Norm::PerQuery => rate(cells, open, |a, b| Norm::PerQuery.of(a, b), skip, out),
            Norm::Sum => rate(cells, open, |a, b| Norm::Sum.of(a, b), skip, out),
        }
        self.n_open = [0; 2];
        self.blocks.iter_mut().for_each(Vec::clear);
        for (scores, modality) in out.chunks(BLOCK).zip(modality.chunks(BLOCK)) {
            let classes = summed_up(scores, modality);
            for (class, (lowest, n_open)) in classes.into_iter().enumerate() {
                self.blocks[class].push(lowest);
                self.n_open[class] += n_open as usize;
            }
        }
    }

    /// How many tokens of the class are open.
    pub fn n_open(&self, class: usize) -> usize {
        self.n_open[class]
    }

    /// Fills `out` with the lowest `k` open tokens of the class, ascending, or with all if there are fewer.
    /// The cache is that of the scan.
    pub fn take(&mut self, class: usize, k: usize, cache: &Ledger, out: &mut Vec<Candidate>) {
        out.clear();
        let k = k.min(self.n_open[class]);
        if k == 0 {
            return;
        }
        let blocks = &self.blocks[class];
        self.scratch.clone_from(blocks);
        // Tokens of the limit itself are candidates in all blocks: of equal scores the older one goes first.
        let limit = match k <= blocks.len() {
            true => *self.scratch.select_nth_unstable(k - 1).1,
            false => NONE,
        };
        let limit = limit.min(NONE - 1);
        let cells = cache.columns();
        for (block, _) in blocks
            .iter()
            .enumerate()
            .filter(|&(_, &lowest)| lowest <= limit)
        {
            let start = block * BLOCK;
            let end = self.scores.len().min(start + BLOCK);
            let scores = &self.scores[start..end];
            for (part, scores) in scores.chunks(PART).enumerate() {
                if !scores
                    .iter()
                    .fold(false, |any, &score| any | (score <= limit))
                {
                    continue;
                }
                for (i, &score) in scores.iter().enumerate() {
                    let cell = start + part * PART + i;
                    if score <= limit && cells.modality[cell] == CLASSES[class] {
                        out.push(Candidate {
                            score: self.norm.of(cells.sum[cell], cells.seen[cell]),
                            pos: cells.pos[cell],
                            cell: cell as Cell,
                        });
                    }
                }
            }
        }
        if k < out.len() {
            out.select_nth_unstable(k - 1);
            out.truncate(k);
        }
        out.sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Observation;
    use crate::engine::scripted::hashed;

    /// A ledger of `n` tokens with holes, bins, both modalities, and scores of few values: many are equal.
    fn ledger(n: usize, values: u32) -> Ledger {
        let mut ledger = Ledger::new(n);
        let noise = |seed, i| hashed(seed, i as Pos, 0);
        for cell in 0..n {
            let modality = match noise(1, cell) < 0.05 {
                true => Modality::Vision,
                false => Modality::Text,
            };
            ledger
                .insert(cell as Cell, cell as Pos, modality, None)
                .unwrap();
        }
        let sum: Vec<f32> = (0..n)
            .map(|i| (noise(2, i) as f32 * values as f32).floor())
            .collect();
        let seen = Observation {
            max: sum.clone(),
            sum,
            queries: vec![n as Pos - n as Pos / 5],
            ..Observation::default()
        };
        ledger.observe(&seen, 1.0).unwrap();
        for cell in 0..n - 1 {
            match (noise(3, cell) * 64.0) as u32 % 8 {
                0 => drop(ledger.remove(cell as Cell).unwrap()),
                1 => ledger.bin(cell as Cell).unwrap(),
                _ => {}
            }
        }
        ledger
    }

    #[test]
    fn the_lowest_are_those_of_a_sorted_list() {
        for (n, values) in [
            (1, 9),
            (63, 3),
            (64, 900),
            (65, 2),
            (1000, 40),
            (1000, 100_000),
        ] {
            for norm in [Norm::PerQuery, Norm::Sum] {
                let ledger = ledger(n, values);
                let mut lowest = Lowest::new(norm, n);
                let open = 4..n as Pos - 16;
                let skip = |cell: Cell| cell % 7 == 3;
                for class in [0, 1] {
                    let mut all: Vec<Candidate> = ledger
                        .entries()
                        .filter(|e| e.state == State::Live && e.modality == CLASSES[class])
                        .filter(|e| open.contains(&e.pos) && !skip(e.cell))
                        .map(|e| Candidate {
                            score: norm.score(&e),
                            pos: e.pos,
                            cell: e.cell,
                        })
                        .collect();
                    all.sort();
                    lowest.scan(&ledger, open.clone(), skip);
                    assert_eq!(lowest.n_open(class), all.len());
                    let mut out = Vec::new();
                    for k in [0, 1, 2, 9, 200, n] {
                        lowest.take(class, k, &ledger, &mut out);
                        let cells = |tokens: &[Candidate]| {
                            tokens.iter().map(|t| t.cell).collect::<Vec<_>>()
                        };
                        assert_eq!(
                            cells(&out),
                            cells(&all[..k.min(all.len())]),
                            "{n} {values} {norm:?} {k}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn scores_keep_their_order_as_integers() {
        let scores = [
            -f32::INFINITY,
            -2.0,
            -1.5,
            -0.0,
            0.0,
            1e-40,
            1.0,
            1.5,
            f32::MAX,
            f32::INFINITY,
        ];
        for pair in scores.windows(2) {
            assert_eq!(
                ordered(pair[0]).cmp(&ordered(pair[1])),
                pair[0].partial_cmp(&pair[1]).unwrap()
            );
        }
        assert!(ordered(f32::INFINITY) < NONE);
    }
}
