//! DDES, the Dynamic Decoding Eviction Strategy with its recycle bin (arXiv 2602.02197).
//!
//! At most B tokens are live. The lowest-scored one too many goes into a bin of d cells, where it
//! is still attended to and still scored. A binned token whose score passes the lowest live one
//! comes back, and that one takes its place. A bin of d tokens is flushed: all of it is removed
//! at once. The cache never holds more than B + d cells; d = 1 without restoring is the greedy
//! policy (H2O) that the paper's Theorem 2.1 and Corollary 2.1 compare with.
//!
//! Ours, where the paper is silent or we differ:
//! - Visual tokens go first; text goes only when no unprotected visual token is live.
//! - A binned token competes with the lowest unprotected live token of its own modality, and must
//!   exceed it by the hysteresis: score > lowest * (1 + hysteresis). With no such live token it
//!   stays binned.
//! - The order within a step: tokens too many leave, binned tokens come back, a full bin is
//!   flushed.
//! - A prompt larger than B is brought down as if its tokens had come one at a time with the
//!   scores that they have at its end: whole bins of the lowest are removed, and the rest, fewer
//!   than d, begins the next bin.
//! - When the budget has grown (a share of a longer conversation), binned tokens come back while
//!   there is room, text first.
//! - `--kv-budget` is B + d. The bin is smaller where the budget leaves less beside what is
//!   protected. At a share of 1 B is the prompt's size and the bin comes on top.
//! - Scores per query row (`Norm::PerQuery`), a decay, sinks and a recent window.
//!
//! As a policy of its own, `ddes`, it also brings down prompts that are larger than the budget.

use super::budget::Budget;
use super::lowest::{CLASSES, Lowest};
use super::options::at_least_zero;
use super::scores::{Candidate, Guard, Norm};
use super::{Held, Limits, OptionKey, Plan, PolicyOptions};
use crate::cache::{Cell, Ledger, Modality, State};
use crate::error::{Error, Result};

/// What DDES reads beside scores, guard and budget.
pub(super) const READS: &[OptionKey] = &[
    OptionKey::Decay,
    OptionKey::BinSize,
    OptionKey::Hysteresis,
    OptionKey::Restore,
];

/// d by default.
pub(super) const BIN_SIZE: usize = 8;
pub(super) const HYSTERESIS: f64 = 0.1;

/// Checks the recycle bin's options.
///
/// # Errors
/// [`Error::Option`] for a bin of no cells, or a hysteresis that is none.
pub(super) fn check(options: &PolicyOptions) -> Result<()> {
    if options.bin_size == 0 {
        return Err(Error::option("bin_size", "0 cells, expected at least 1"));
    }
    at_least_zero("hysteresis", options.hysteresis)
}

fn class_of(modality: Modality) -> usize {
    usize::from(modality == Modality::Text)
}

/// One modality's part of a step. Buffers are reused.
struct Class {
    /// The recycle bin's tokens, best first once sorted.
    binned: Vec<Candidate>,
    /// The lowest unprotected live tokens, ascending: first those that must leave, then those
    /// that binned tokens compete with.
    ascending: Vec<Candidate>,
}

pub(super) struct Ddes {
    norm: Norm,
    guard: Guard,
    budget: Budget,
    /// The fewest live cells that leave a choice.
    least: usize,
    n_cells: usize,
    /// B.
    cells: usize,
    /// d.
    bin_size: usize,
    /// d where the budget allows it.
    most_binned: usize,
    restore: bool,
    /// 1 + hysteresis.
    factor: f32,
    classes: [Class; 2],
    lowest: Lowest,
    /// Tokens in the bin after this step, with whether they were live before it.
    bin: Vec<(Modality, Candidate, bool)>,
}

impl Ddes {
    /// `options` are valid for `limits`.
    ///
    /// # Errors
    /// [`Error::Option`] when the bin does not fit beside what is protected.
    pub fn new(options: &PolicyOptions, budget: Budget, limits: Limits) -> Result<Self> {
        let PolicyOptions {
            sinks,
            recent,
            bin_size,
            ..
        } = *options;
        let n_cells = limits.n_cells;
        let least = sinks + recent + 1;
        if budget.is_whole() && least.saturating_add(bin_size) > n_cells {
            let reason = format!(
                "{least} live cells and a bin of {bin_size} need {}, but the context holds {n_cells}",
                least.saturating_add(bin_size)
            );
            return Err(Error::option("bin_size", reason));
        }
        // As much as any step can need, so that none takes memory.
        let class = || Class {
            binned: Vec::with_capacity(bin_size.min(n_cells)),
            ascending: Vec::with_capacity(n_cells),
        };
        Ok(Ddes {
            norm: options.norm,
            guard: Guard { sinks, recent },
            budget,
            least,
            n_cells,
            cells: n_cells,
            bin_size,
            most_binned: bin_size,
            restore: options.restore,
            factor: 1.0 + options.hysteresis as f32,
            classes: [class(), class()],
            lowest: Lowest::new(options.norm, n_cells),
            bin: Vec::with_capacity(n_cells),
        })
    }

    /// Sets B and d for the turn whose prompt is now in the cache.
    pub fn set_budget(&mut self, cache: &Ledger) {
        if self.budget.is_whole() {
            let most = self.n_cells - self.most_binned;
            self.bin_size = self.most_binned;
            self.cells = Held::of(cache).went_in.clamp(self.least, most);
            return;
        }
        let cells = self.budget.cells(Held::of(cache));
        // At least 1: no budget is smaller than `least` and the next token.
        self.bin_size = self.most_binned.min(cells - self.least);
        self.cells = cells - self.bin_size;
    }

    /// Plans one step. `skip` marks cells that leave for another reason and do not count.
    pub fn rebalance(&mut self, cache: &Ledger, skip: impl Fn(Cell) -> bool, plan: &mut Plan) {
        let live = self.scan(cache, &skip);
        let (over, mut room) = (
            live.saturating_sub(self.cells),
            self.cells.saturating_sub(live),
        );
        let [vision, text] = [0, 1].map(|class| self.lowest.n_open(class));
        let vision_leaves = over.min(vision);
        let leave = [vision_leaves, (over - vision_leaves).min(text)];

        self.rank(leave, cache);
        self.bin.clear();
        // Text first, for the sake of the room; who leaves is settled above.
        for class in [1, 0] {
            self.exchange(class, leave[class], &mut room, plan);
        }
        self.settle(plan);
    }

    /// Who is lowest, who is binned. Gives the number of live cells.
    fn scan(&mut self, cache: &Ledger, skip: impl Fn(Cell) -> bool) -> usize {
        self.lowest.scan(cache, self.guard.open(cache), &skip);
        self.classes
            .iter_mut()
            .for_each(|class| class.binned.clear());
        let cells = cache.columns();
        let (mut binned, norm) = (cache.counts().binned.total(), self.norm);
        let skipped =
            |&i: &usize| skip(i as Cell) && cells.pos[i] >= 0 && cells.state[i] == State::Live;
        let skipped = (0..cells.pos.len()).filter(skipped).count();
        // A flag of several cells is found faster than that of one.
        for (i, states) in cells.state.chunks(16).enumerate() {
            if binned == 0 {
                break;
            }
            if !states
                .iter()
                .fold(false, |any, &state| any | (state == State::Binned))
            {
                continue;
            }
            for cell in i * 16..i * 16 + states.len() {
                // An empty cell has any state.
                if cells.state[cell] != State::Binned || cells.pos[cell] < 0 {
                    continue;
                }
                binned -= 1;
                if skip(cell as Cell) {
                    continue;
                }
                self.classes[class_of(cells.modality[cell])]
                    .binned
                    .push(Candidate {
                        score: norm.of(cells.sum[cell], cells.seen[cell]),
                        pos: cells.pos[cell],
                        cell: cell as Cell,
                    });
            }
        }
        cache.counts().live.total() - skipped
    }

    /// Fills `ascending` with as many of the lowest live tokens as the step can need, and sorts
    /// `binned`.
    fn rank(&mut self, leave: [usize; 2], cache: &Ledger) {
        for (i, class) in self.classes.iter_mut().enumerate() {
            self.lowest.take(i, 1, cache, &mut class.ascending);
            let mut needed = leave[i];
            if self.restore {
                class.binned.sort_unstable_by(|a, b| b.cmp(a));
                let lowest = class.ascending.first().unwrap_or(&Candidate::LAST);
                let threshold = lowest.score * self.factor;
                needed += class
                    .binned
                    .partition_point(|token| token.score > threshold);
            }
            match needed {
                0 => class.ascending.clear(),
                1 => {}
                _ => self.lowest.take(i, needed, cache, &mut class.ascending),
            }
        }
    }

    /// Decides who of a class leaves, who comes back and who is in the bin afterwards.
    fn exchange(&mut self, class: usize, leave: usize, room: &mut usize, plan: &mut Plan) {
        let Class {
            binned, ascending, ..
        } = &self.classes[class];
        let (leaving, staying) = ascending.split_at(leave);
        let mut back = 0;
        let mut swapped = 0;
        if self.restore {
            back = binned.len().min(*room);
            *room -= back;
            swapped = binned[back..]
                .iter()
                .zip(staying)
                .take_while(|(binned, live)| binned.score > live.score * self.factor)
                .count();
            back += swapped;
        }
        let (back, rest) = binned.split_at(back);
        plan.restore.extend(back.iter().map(|token| token.cell));
        let modality = CLASSES[class];
        self.bin
            .extend(rest.iter().map(|&token| (modality, token, false)));
        let newly = leaving.iter().chain(&staying[..swapped]);
        self.bin.extend(newly.map(|&token| (modality, token, true)));
    }

    /// Flushes full bins, the first to leave first, and bins what is left over.
    fn settle(&mut self, plan: &mut Plan) {
        let flushed = self.bin.len() - self.bin.len() % self.bin_size;
        if 0 < flushed && flushed < self.bin.len() {
            let is_text = |modality| modality == Modality::Text;
            self.bin.sort_unstable_by(|(m, a, _), (n, b, _)| {
                is_text(*m).cmp(&is_text(*n)).then(a.cmp(b))
            });
        }
        let (gone, kept) = self.bin.split_at(flushed);
        plan.evict
            .extend(gone.iter().map(|(_, token, _)| token.cell));
        plan.bin.extend(
            kept.iter()
                .filter(|(.., live)| *live)
                .map(|(_, token, _)| token.cell),
        );
    }
}
