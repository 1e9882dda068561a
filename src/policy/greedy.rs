//! What policies share that evict one token for each that comes: as many as the budget has too
//! few cells for, the lowest first, for good.

use super::budget::Budget;
use super::scores::{Candidate, Guard};
use super::{Held, Limits, Plan, PolicyOptions};
use crate::cache::{Entry, Ledger};
use crate::error::Result;

pub(super) struct Greedy {
    budget: Budget,
    pub guard: Guard,
    /// Cells of this turn's budget.
    cells: usize,
    /// Reused, so that a decoding step takes no memory.
    open: Vec<Candidate>,
}

impl Greedy {
    /// # Errors
    /// As [`Budget::new`].
    pub fn new(options: &PolicyOptions, guard: Guard, limits: Limits) -> Result<Self> {
        let amount = options.kv_budget.unwrap_or(PolicyOptions::WHOLE_PROMPT);
        Ok(Greedy {
            budget: Budget::new(amount, guard, limits)?,
            guard,
            cells: limits.n_cells,
            open: Vec::with_capacity(limits.n_cells),
        })
    }

    /// Begins a turn, whose prompt is now in the cache; gives its budget.
    pub fn begin(&mut self, cache: &Ledger) -> usize {
        self.cells = self.budget.cells(Held::of(cache));
        self.cells
    }

    /// Evicts until the next token fits.
    pub fn evict(&mut self, cache: &Ledger, mut score: impl FnMut(&Entry) -> f32, plan: &mut Plan) {
        let cells = cache.counts().cells();
        let over = (cells + 1).saturating_sub(self.cells);
        if over == 0 {
            return;
        }
        let range = self.guard.open(cache);
        self.open.clear();
        self.open.extend(
            cache
                .entries()
                .filter(|e| range.contains(&e.pos))
                .map(|e| Candidate {
                    score: score(&e),
                    pos: e.pos,
                    cell: e.cell,
                }),
        );
        let over = over.min(self.open.len());
        if 0 < over && over < self.open.len() {
            self.open.select_nth_unstable(over - 1);
        }
        plan.evict
            .extend(self.open[..over].iter().map(|token| token.cell));
    }
}
