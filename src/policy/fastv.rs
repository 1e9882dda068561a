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

use super::pruning::{self, Judge, PromptPruner};
use super::registered::Registered;
use super::scores::Candidate;
use super::visual::{Visual, keep_best};
use super::{Amount, DapRule, EvictionPolicy, Limits, OptionKey, Plan, PolicyOptions, Queries};
use crate::cache::Entry;
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "fastv",
    reads: &[pruning::READS, &[OptionKey::DapKeep]],
    create,
};

/// Layer K, counted from 0.
const LAYER: u32 = 1;
/// 1 - R.
const KEEP: Amount = Amount::Share(0.5);

struct Fastv {
    keep: Option<Amount>,
}

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    let keep = match options.dap.map(|dap| dap.rule) {
        Some(DapRule::Keep(keep)) => Some(keep),
        _ => None,
    };
    let pruner = PromptPruner::new(&POLICY, Fastv { keep }, options, limits)?;
    Ok(Box::new(pruner))
}

impl Judge for Fastv {
    type Order = Candidate;

    const QUERIES: Queries = Queries::Last;

    fn layers(n_layer: u32) -> Vec<u32> {
        vec![LAYER.min(n_layer.saturating_sub(1))]
    }

    fn score(token: &Entry) -> f32 {
        token.latest
    }

    fn order(&self, token: &Visual) -> Candidate {
        token.token
    }

    fn prune(&self, visual: &mut [Visual], bounded: bool, plan: &mut Plan) {
        if let Some(keep) = self.keep.or((!bounded).then_some(KEEP)) {
            let keep = keep.of(visual.len());
            keep_best(visual, keep, |v| v.token, plan);
        }
    }
}
