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

use std::collections::BinaryHeap;

use super::budget::Budget;
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

/// In the order in which they leave.
const CLASSES: [Modality; 2] = [Modality::Vision, Modality::Text];

fn class_of(modality: Modality) -> usize {
    usize::from(modality == Modality::Text)
}

/// One modality's part of a step. Buffers are reused.
struct Class {
    /// The lowest unprotected live token, if any is `open`.
    lowest: Candidate,
    /// How many live tokens are unprotected.
    open: usize,
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
            lowest: Candidate::LAST,
            open: 0,
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
        let [vision, text] = &self.classes;
        let vision_leaves = over.min(vision.open);
        let leave = [vision_leaves, (over - vision_leaves).min(text.open)];

        self.rank(leave, cache, &skip);
        self.bin.clear();
        // Text first, for the sake of the room; who leaves is settled above.
        for class in [1, 0] {
            self.exchange(class, leave[class], &mut room, plan);
        }
        self.settle(plan);
    }

    /// One pass over the cache: who is lowest, who is binned. Gives the number of live cells.
    fn scan(&mut self, cache: &Ledger, skip: impl Fn(Cell) -> bool) -> usize {
        let open = self.guard.open(cache);
        // Plain variables: the compiler keeps them in registers, which arrays by class are not.
        let (mut low_vision, mut low_text) = (Candidate::LAST, Candidate::LAST);
        let (mut open_vision, mut open_text, mut live) = (0, 0, 0);
        let norm = self.norm;
        let [vision, text] = &mut self.classes;
        vision.binned.clear();
        text.binned.clear();
        for entry in cache.entries() {
            if skip(entry.cell) {
                continue;
            }
            let token = Candidate {
                score: norm.score(&entry),
                pos: entry.pos,
                cell: entry.cell,
            };
            if entry.state == State::Binned {
                match entry.modality {
                    Modality::Vision => vision.binned.push(token),
                    Modality::Text => text.binned.push(token),
                }
                continue;
            }
            live += 1;
            if !open.contains(&entry.pos) {
                continue;
            }
            match entry.modality {
                Modality::Vision => {
                    open_vision += 1;
                    if token < low_vision {
                        low_vision = token;
                    }
                }
                Modality::Text => {
                    open_text += 1;
                    if token < low_text {
                        low_text = token;
                    }
                }
            }
        }
        (vision.lowest, vision.open) = (low_vision, open_vision);
        (text.lowest, text.open) = (low_text, open_text);
        live
    }

    /// Fills `ascending` with as many of the lowest live tokens as the step can need, and sorts
    /// `binned`. Mostly that is one token, which the scan has found already; otherwise a second
    /// pass keeps the lowest in two heaps.
    fn rank(&mut self, leave: [usize; 2], cache: &Ledger, skip: impl Fn(Cell) -> bool) {
        let mut needed = [0; 2];
        for (i, class) in self.classes.iter_mut().enumerate() {
            class.ascending.clear();
            let mut back = 0;
            if self.restore {
                class.binned.sort_unstable_by(|a, b| b.cmp(a));
                let threshold = class.lowest.score * self.factor;
                back = class
                    .binned
                    .partition_point(|token| token.score > threshold);
            }
            needed[i] = (leave[i] + back).min(class.open);
            class
                .ascending
                .extend((needed[i] == 1).then_some(class.lowest));
        }
        if needed.iter().all(|&needed| needed <= 1) {
            return;
        }
        let (open, norm) = (self.guard.open(cache), self.norm);
        // Converting between the two keeps the memory.
        let mut heaps = self.classes.each_mut().map(|class| {
            class.ascending.clear();
            BinaryHeap::from(std::mem::take(&mut class.ascending))
        });
        cache
            .entries()
            .filter(|e| e.state == State::Live && open.contains(&e.pos) && !skip(e.cell))
            .for_each(|e| {
                let class = class_of(e.modality);
                let heap = &mut heaps[class];
                let token = Candidate {
                    score: norm.score(&e),
                    pos: e.pos,
                    cell: e.cell,
                };
                if heap.len() < needed[class] {
                    heap.push(token);
                } else if let Some(mut highest) = heap.peek_mut()
                    && token < *highest
                {
                    *highest = token;
                }
            });
        for (class, heap) in self.classes.iter_mut().zip(heaps) {
            class.ascending = heap.into_sorted_vec();
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
