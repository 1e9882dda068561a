//! `mustdrop` (arXiv 2411.10803, "Multi-Stage Vision Token Dropping"), its prefill stage: a visual
//! token goes when both its global and its individual attention are low.
//!
//! Of the text tokens behind the picture, G\[j\] is the sum of the attention paid to token j and
//! M\[j\] its maximum. A token goes when G\[j\] < r * sum over k of G\[k\] and M\[j\] < alpha, with
//! r and alpha of 0.001, those of the authors' evaluation scripts; `--dap-r` (or `--dap-tau`) and
//! `--dap-alpha` set others. With `--dap-keep` or `--dap-spread`, or a `--kv-budget` below 1.0, as
//! many go as must: first those with M\[j\] < alpha, then the others, the lowest G first. The
//! budget leaves room for the tokens to come, where they are known.
//!
//! Deviations:
//! - The paper's vision-encoding stage (merging neighbours, and key tokens that the encoder's class
//!   token looks at and that never leave) cannot be served: the encoder's attention does not leave
//!   mtmd. So nothing is merged, and no token is exempt.
//! - The paper filters again and again, at layers 2, 6, 10 and 14, and the layers in between hold
//!   caches of different sizes. A cell here spans all layers, so the tokens are judged once, by the
//!   mean of those of these layers that the model has, and are gone from all.
//! - The paper's decoding stage drops the cached tokens that these filters drop. Here they are
//!   gone when the prompt ends, so that nothing is left for it to do.

use serde_json::{Value, json};

use super::budget::Budget;
use super::scores::{Candidate, Guard};
use super::visual::{Pictures, Visual, counted, keep_best};
use super::{
    DapMode, DapRule, EvictionPolicy, Held, Layers, Limits, Observe, Plan, PolicyOptions, Queries,
};
use crate::cache::Ledger;
use crate::error::Result;

/// Those that filter, counted from 0.
const LAYERS: [u32; 4] = [2, 6, 10, 14];
/// Both thresholds.
const THRESHOLD: f64 = 0.001;

struct Mustdrop {
    rule: DapRule,
    alpha: f64,
    mode: DapMode,
    budget: Budget,
    layers: Vec<u32>,
    params: Value,
    pictures: Pictures,
    to_come: Option<usize>,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    options.validate(limits)?;
    let last = limits.n_layer.saturating_sub(1);
    let layers = match &options.layers {
        Layers::All if LAYERS[0] > last => vec![last],
        Layers::All => LAYERS.into_iter().filter(|&il| il <= last).collect(),
        list @ Layers::List(_) => list.resolve(limits.n_layer),
    };
    let rule = options.dap.map_or(DapRule::Auto, |dap| dap.rule);
    let alpha = options.dap.and_then(|dap| dap.alpha).unwrap_or(THRESHOLD);
    let guard = Guard {
        sinks: 0,
        recent: 1,
    };
    let amount = options.kv_budget.unwrap_or(PolicyOptions::WHOLE_PROMPT);
    let keep_separators = options.keeps_separators();
    Ok(Box::new(Mustdrop {
        rule,
        alpha,
        mode: options.dap_mode,
        budget: Budget::new(amount, guard, limits)?,
        params: json!({
            "kv_budget": options.kv_budget, "rule": rule, "alpha": alpha, "layers": layers,
            "dap_mode": options.dap_mode,
        }),
        layers,
        pictures: Pictures::new(guard, keep_separators),
        to_come: None,
    }))
}

impl EvictionPolicy for Mustdrop {
    fn name(&self) -> &'static str {
        "mustdrop"
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: Queries::All,
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
        let alpha = self.alpha;
        let low = |v: &Visual| f64::from(v.max) < alpha;
        let order = |v: &Visual| -> (bool, Candidate) { (!low(v), v.token) };
        let most = self.budget.after_prompt(held, self.to_come);
        let visual = self.pictures.judge(cache, |e| e.sum);
        let sum: f64 = visual.iter().map(|v| f64::from(v.token.score)).sum();
        let limit = match self.rule {
            DapRule::Keep(_) | DapRule::Spread { .. } => None,
            DapRule::R(r) => Some(r * sum),
            DapRule::Tau(tau) => Some(tau * sum / visual.len() as f64),
            DapRule::Auto => most.is_none().then_some(THRESHOLD * sum),
        };
        if let Some(keep) = counted(self.rule, visual) {
            keep_best(visual, keep, order, plan);
        }
        if let Some(limit) = limit {
            let below = |v: &&mut Visual| f64::from(v.token.score) < limit && low(v) && v.is_open();
            visual.iter_mut().filter(below).for_each(|v| v.evict(plan));
        }
        self.pictures.fit(held, most, order, plan);
        Ok(())
    }

    fn after_prefill(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}
