//! `context_shift`: what llama.cpp's own programs do with a full context. No paper; the server and
//! the completion tool of llama.cpp are the reference.
//!
//! When the next token would fill the context, the first n_keep tokens (`--sinks`, llama.cpp's
//! `--keep`) stay, the older half of the rest is discarded, and what follows moves down to close
//! the gap: n_left = n_past - n_keep, n_discard = n_left / 2, `seq_rm` of [n_keep, n_keep +
//! n_discard), `seq_add` of -n_discard behind it. No attention is read.
//!
//! Deviations:
//! - With a `--kv-budget` below 1.0, that many cells are the context that fills up; otherwise the
//!   real one.
//! - It shifts right after the token that leaves room for one more only, llama.cpp right before
//!   the next one. What that one sees is the same.
//! - A prompt larger than the budget is halved until it fits, at its end; llama.cpp cuts it before.
//!   One that does not fit beside the conversation so far shifts as often as it takes.
//! - llama.cpp refuses to shift with a vision file. Here pictures whose tokens have a position each
//!   are shifted like text.
//!
//! Where a model's rope scales attention (Phi-3.5's factor of 1.19), llama.cpp's shift applies the
//! factor to the moved keys once more each time. That is llama.cpp's, and is left as it is.

use serde_json::Value;

use super::budget::{BUDGET, Budget};
use super::registered::Registered;
use super::scores::Guard;
use super::{EvictionPolicy, Held, Limits, Observe, OptionKey, Plan, PolicyOptions, Shift};
use crate::cache::{Cell, Ledger, Pos};
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "context_shift",
    reads: &[BUDGET, &[OptionKey::Sinks]],
    create,
};

struct ContextShift {
    budget: Budget,
    n_ctx: usize,
    n_keep: usize,
    /// Cells that count as the context in this turn.
    cells: usize,
    params: Value,
    /// By position. Reused.
    tokens: Vec<(Pos, Cell)>,
}

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    let guard = Guard {
        sinks: options.sinks,
        ..Guard::NEWEST
    };
    Ok(Box::new(ContextShift {
        budget: Budget::always(options, guard, limits)?,
        n_ctx: limits.n_cells,
        n_keep: options.sinks,
        cells: limits.n_cells,
        params: POLICY.params(options),
        tokens: Vec::with_capacity(limits.n_cells),
    }))
}

impl EvictionPolicy for ContextShift {
    fn name(&self) -> &'static str {
        POLICY.name
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Nothing
    }

    fn evicts(&self) -> bool {
        true
    }

    fn shifts(&self) -> bool {
        true
    }

    fn before_prefill(&mut self, cache: &Ledger, rows: usize, plan: &mut Plan) -> Result<()> {
        let held = cache.counts().cells();
        if held + rows > self.n_ctx {
            self.shift(cache, rows, self.n_ctx, plan);
        }
        Ok(())
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.cells = match self.budget.is_whole() {
            true => self.n_ctx,
            false => self.budget.cells(Held::of(cache)),
        };
        self.after_step(cache, plan)
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        // With the next token the context would be full.
        self.shift(cache, 2, self.cells, plan);
        Ok(())
    }
}

impl ContextShift {
    /// Discards the older half of what is not kept until `rows` more fit into `n_ctx`; nothing
    /// where they never will.
    fn shift(&mut self, cache: &Ledger, rows: usize, n_ctx: usize, plan: &mut Plan) {
        let held = cache.counts().cells();
        let mut left = held;
        while left + rows > n_ctx {
            let discard = left.saturating_sub(self.n_keep) / 2;
            if discard == 0 {
                return;
            }
            left -= discard;
        }
        if left == held {
            return;
        }
        self.tokens.clear();
        self.tokens.extend(cache.entries().map(|e| (e.pos, e.cell)));
        self.tokens.sort_unstable();
        let (kept, rest) = self.tokens.split_at(self.n_keep);
        let (gone, moved) = rest.split_at(held - left);
        plan.evict.extend(gone.iter().map(|(_, cell)| *cell));
        let to = match kept.last() {
            Some((pos, _)) => pos + 1,
            None => gone[0].0,
        };
        plan.shift = moved.first().map(|&(from, _)| Shift {
            from,
            by: from - to,
        });
    }
}
