//! `fastv` (arXiv 2403.06764, "An Image is Worth 1/2 Tokens After Layer 2"): visual tokens are
//! ranked by the attention that the prompt's last token pays them in layer K, and the lowest go.
//!
//! K is 2, the paper's choice, counted from 1; `--score-layers` with a list names others, counted
//! from 0. `--dap-keep` says how many stay (the paper's 1 - R; half by default), or a
//! `--kv-budget` below 1.0, which leaves room for the tokens to come, where they are known.
//!
//! Deviations:
//! - The paper drops the tokens from layer K on and keeps them in the layers before. A cell here
//!   spans all layers: what is decoded later sees them in none.
//! - The paper spares the compute of the layers behind K, too. With `--dap-mode midway` so do we:
//!   the prompt's tokens see all of the picture in the layers before K, and what is kept of it from
//!   there on. With `exact` the whole prompt goes in first; with `early` the dropped tokens never do.
//! - Other rules (`--dap-tau`, `--dap-r`, `--dap-spread` with the `--dap-keep` beside it) are not read.

use serde_json::{Value, json};

use super::budget::Budget;
use super::scores::Guard;
use super::visual::{Pictures, keep_best};
use super::{
    Amount, DapMode, DapRule, EvictionPolicy, Held, Layers, Limits, Observe, Plan, PolicyOptions,
    Queries,
};
use crate::cache::Ledger;
use crate::error::Result;

/// Layer K, counted from 0.
const LAYER: u32 = 1;
/// 1 - R.
const KEEP: Amount = Amount::Share(0.5);

struct Fastv {
    keep: Option<Amount>,
    mode: DapMode,
    budget: Budget,
    layers: Vec<u32>,
    params: Value,
    pictures: Pictures,
    to_come: Option<usize>,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    options.validate(limits)?;
    let layers = match &options.layers {
        Layers::All => vec![LAYER.min(limits.n_layer.saturating_sub(1))],
        list @ Layers::List(_) => list.resolve(limits.n_layer),
    };
    let keep = match options.dap.map(|dap| dap.rule) {
        Some(DapRule::Keep(keep)) => Some(keep),
        _ => None,
    };
    let guard = Guard {
        sinks: 0,
        recent: 1,
    };
    let amount = options.kv_budget.unwrap_or(PolicyOptions::WHOLE_PROMPT);
    let keep_separators = options.keeps_separators();
    Ok(Box::new(Fastv {
        keep,
        mode: options.dap_mode,
        budget: Budget::new(amount, guard, limits)?,
        params: json!({
            "kv_budget": options.kv_budget, "keep": keep, "layers": layers,
            "dap_mode": options.dap_mode,
        }),
        layers,
        pictures: Pictures::new(guard, keep_separators),
        to_come: None,
    }))
}

impl EvictionPolicy for Fastv {
    fn name(&self) -> &'static str {
        "fastv"
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: Queries::Last,
        }
    }

    fn observes_decoding(&self) -> bool {
        false
    }

    fn dap_mode(&self) -> DapMode {
        self.mode
    }

    fn expect(&mut self, tokens: Option<usize>) {
        self.to_come = tokens;
    }

    fn prune(&mut self, cache: &Ledger, held: Held, plan: &mut Plan) -> Result<()> {
        let most = self.budget.after_prompt(held, self.to_come);
        let visual = self.pictures.judge(cache, |e| e.latest);
        let keep = self.keep.or(most.is_none().then_some(KEEP));
        if let Some(keep) = keep {
            let keep = keep.of(visual.len());
            keep_best(visual, keep, |v| v.token, plan);
        }
        self.pictures.fit(held, most, |v| v.token, plan);
        Ok(())
    }

    fn after_prefill(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}
