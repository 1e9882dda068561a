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

use serde_json::json;

use super::pruning::{self, Judge, PromptPruner};
use super::registered::Registered;
use super::scores::Candidate;
use super::visual::{Visual, counted, keep_best};
use super::{DapRule, EvictionPolicy, Limits, OptionKey, Plan, PolicyOptions, Queries};
use crate::cache::Entry;
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "mustdrop",
    reads: &[
        pruning::READS,
        &[
            OptionKey::DapKeep,
            OptionKey::DapTau,
            OptionKey::DapR,
            OptionKey::DapSpread,
            OptionKey::DapAlpha,
        ],
    ],
    create,
};

/// Those that filter, counted from 0.
const LAYERS: [u32; 4] = [2, 6, 10, 14];
/// Both thresholds.
const THRESHOLD: f64 = 0.001;

struct Mustdrop {
    rule: DapRule,
    alpha: f64,
}

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    let rule = options.dap.map_or(DapRule::Auto, |dap| dap.rule);
    let alpha = options.dap.and_then(|dap| dap.alpha).unwrap_or(THRESHOLD);
    let judge = Mustdrop { rule, alpha };
    let mut pruner = PromptPruner::new(&POLICY, judge, options, limits)?;
    pruner.params["dap"]["alpha"] = json!(alpha);
    Ok(Box::new(pruner))
}

impl Mustdrop {
    /// Whether no single query paid the token much.
    fn is_low(&self, token: &Visual) -> bool {
        f64::from(token.max) < self.alpha
    }
}

impl Judge for Mustdrop {
    type Order = (bool, Candidate);

    const QUERIES: Queries = Queries::All;

    fn layers(n_layer: u32) -> Vec<u32> {
        let last = n_layer.saturating_sub(1);
        match LAYERS[0] > last {
            true => vec![last],
            false => LAYERS.into_iter().filter(|&il| il <= last).collect(),
        }
    }

    fn score(token: &Entry) -> f32 {
        token.sum
    }

    fn order(&self, token: &Visual) -> (bool, Candidate) {
        (!self.is_low(token), token.token)
    }

    fn prune(&self, visual: &mut [Visual], bounded: bool, plan: &mut Plan) {
        let sum: f64 = visual.iter().map(|v| f64::from(v.token.score)).sum();
        let limit = match self.rule {
            DapRule::Keep(_) | DapRule::Spread { .. } => None,
            DapRule::R(r) => Some(r * sum),
            DapRule::Tau(tau) => Some(tau * sum / visual.len() as f64),
            DapRule::Auto => (!bounded).then_some(THRESHOLD * sum),
        };
        if let Some(keep) = counted(self.rule, visual) {
            keep_best(visual, keep, |v| self.order(v), plan);
        }
        if let Some(limit) = limit {
            let below =
                |v: &&mut Visual| f64::from(v.token.score) < limit && self.is_low(v) && v.is_open();
            visual.iter_mut().filter(below).for_each(|v| v.evict(plan));
        }
    }
}
