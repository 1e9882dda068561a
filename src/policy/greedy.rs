//! The schedule that policies share that evict one token for each that comes: as many as the
//! budget has too few cells for, the lowest-scored first, for good. A policy of this kind is a
//! score.

use serde_json::{Value, json};

use super::budget::Budget;
use super::registered::Registered;
use super::scores::{Candidate, Guard};
use super::{Amount, EvictionPolicy, Held, Limits, Observe, Plan, PolicyOptions, Queries};
use crate::cache::{Entry, Ledger};
use crate::error::Result;

/// All of a policy but its score.
pub(super) struct Greedy {
    name: &'static str,
    params: Value,
    observe: Observe,
    layers: Vec<u32>,
    budget: Budget,
    guard: Guard,
    /// The recent window, where it follows the budget.
    window: Option<Amount>,
    /// Cells of this turn's budget.
    cells: usize,
    /// Reused, so that a decoding step takes no memory.
    open: Vec<Candidate>,
}

impl Greedy {
    /// Without attention, unless [`Greedy::judged_by`] says otherwise.
    ///
    /// # Errors
    /// As [`Budget::new`], and for layers that the model does not have.
    pub fn new(
        policy: &Registered,
        options: &PolicyOptions,
        guard: Guard,
        limits: Limits,
    ) -> Result<Self> {
        options.layers.check(limits.n_layer)?;
        Ok(Greedy {
            name: policy.name,
            params: policy.params(options),
            observe: Observe::Nothing,
            layers: options.layers.resolve(limits.n_layer),
            budget: Budget::always(options, guard, limits)?,
            guard,
            window: None,
            cells: limits.n_cells,
            open: Vec::with_capacity(limits.n_cells),
        })
    }

    /// By the attention of these rows of the prompt, and of every decoded token.
    pub fn judged_by(mut self, queries: Queries) -> Self {
        let layers = self.layers.clone();
        self.params["layers"] = json!(layers);
        self.observe = Observe::Layers { layers, queries };
        self
    }

    /// So much of the budget is the recent window.
    pub fn with_window(mut self, window: Amount) -> Self {
        self.window = Some(window);
        self
    }

    /// The policy. `score` is asked once for each token that may leave, in the order of cells;
    /// higher is more worth keeping, of equal scores the older token goes first. What it can go by
    /// is attention from the rows that judge: all so far (`sum`, `max`, `seen`), or that of the
    /// whole newest prompt or the newest step alone (`latest`). It must take no memory.
    pub fn boxed(
        self,
        score: impl FnMut(&Entry) -> f32 + Send + 'static,
    ) -> Box<dyn EvictionPolicy> {
        Box::new(Scored {
            greedy: self,
            score,
        })
    }

    /// Begins a turn, whose prompt is now in the cache.
    fn begin(&mut self, cache: &Ledger) {
        self.cells = self.budget.cells(Held::of(cache));
        if let Some(window) = self.window {
            // One token must be able to leave, and the next one needs a cell.
            let most = self.cells.saturating_sub(self.guard.sinks + 2);
            self.guard.recent = window.of(self.cells).clamp(1, most.max(1));
        }
    }

    /// Evicts until the next token fits.
    fn evict(&mut self, cache: &Ledger, mut score: impl FnMut(&Entry) -> f32, plan: &mut Plan) {
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

struct Scored<S> {
    greedy: Greedy,
    score: S,
}

impl<S: FnMut(&Entry) -> f32 + Send> EvictionPolicy for Scored<S> {
    fn name(&self) -> &'static str {
        self.greedy.name
    }

    fn params(&self) -> Value {
        self.greedy.params.clone()
    }

    fn observe(&self) -> Observe {
        self.greedy.observe.clone()
    }

    fn evicts(&self) -> bool {
        true
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.greedy.begin(cache);
        self.after_step(cache, plan)
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.greedy.evict(cache, &mut self.score, plan);
        Ok(())
    }
}
