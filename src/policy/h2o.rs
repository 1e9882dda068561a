//! `h2o`, the Heavy-Hitter Oracle (arXiv 2306.14048): greedy eviction of the token with the lowest
//! attention so far.
//!
//! A token's score is the plain sum of the attention that every query so far has paid to it, those
//! of the prompt included. For each token that comes, the lowest one outside the recent window
//! goes, for good. The window is half of the budget, as in the paper's experiments, and heavy
//! hitters have the other half; `--h2o-recent` sets another.
//!
//! Deviations:
//! - The paper keeps a set for each layer and head. A cell here spans all layers and heads, so the
//!   mean over heads and scoring layers decides for all.
//! - `--sinks` first positions stay (ours; 0 is the paper).
//! - The paper evicts within the prompt as it comes; here the whole prompt goes in first and is
//!   brought down at its end, by the scores that it has then.

use serde_json::{Value, json};

use super::greedy::Greedy;
use super::scores::Guard;
use super::{EvictionPolicy, Limits, Observe, Plan, PolicyOptions, Queries};
use crate::cache::Ledger;
use crate::error::Result;

struct H2o {
    greedy: Greedy,
    options: PolicyOptions,
    layers: Vec<u32>,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    options.validate_layers(limits.n_layer)?;
    options.h2o_recent.check("--h2o-recent")?;
    let guard = Guard {
        sinks: options.sinks,
        // What the window may take depends on the budget, and leaves it a choice.
        recent: 1,
    };
    Ok(Box::new(H2o {
        greedy: Greedy::new(options, guard, limits)?,
        options: options.clone(),
        layers: options.layers.resolve(limits.n_layer),
    }))
}

impl EvictionPolicy for H2o {
    fn name(&self) -> &'static str {
        "h2o"
    }

    fn params(&self) -> Value {
        let PolicyOptions {
            kv_budget,
            sinks,
            h2o_recent,
            ..
        } = &self.options;
        json!({
            "kv_budget": kv_budget, "sinks": sinks, "h2o_recent": h2o_recent, "layers": self.layers,
        })
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: Queries::EVERY,
        }
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        let cells = self.greedy.begin(cache);
        // One token must be able to leave, and the next one needs a cell.
        let most = cells.saturating_sub(self.greedy.guard.sinks + 2);
        self.greedy.guard.recent = self.options.h2o_recent.of(cells).clamp(1, most.max(1));
        self.after_step(cache, plan)
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.greedy.evict(cache, |e| e.sum, plan);
        Ok(())
    }
}
