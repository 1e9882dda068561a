//! What the policies share that prune the pictures of a prompt: which tokens, and when.

use serde::{Deserialize, Serialize};

use super::{Amount, at_least_zero};
use crate::error::{Error, Result};

/// Which visual tokens DAP drops.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DapRule {
    /// As many stay as a [`super::PolicyOptions::kv_budget`] below the whole leaves room for; without
    /// one, what the policy thinks best.
    Auto,
    /// Those below `tau` times the mean global score: `G[j] < tau * mean G`.
    Tau(f64),
    /// The paper's form: `G[j] < r * sum G`. The same as `tau = r * |V|`.
    R(f64),
    /// All but the best by global score.
    Keep(Amount),
    /// All but the best, this many times the number of tokens that the scores are spread over:
    /// `(sum G)^2 / sum G^2`, which is 1 where one token has it all, and all where they are alike.
    /// At least `least`, which may be none.
    Spread {
        /// How many times the number that scores are spread over, 0 or more.
        times: f64,
        /// What stays whatever the scores say.
        least: Amount,
    },
}

/// Over which visual tokens the sum, the mean, or the kept amount is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// All pictures of the turn together.
    Turn,
    /// Each picture by itself.
    Image,
}

/// When DAP acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DapMode {
    /// The whole prompt goes in, is judged, and what is pruned is removed (the paper).
    #[default]
    Exact,
    /// A trial run of the first layers, up to the last scoring layer, judges the prompt; what is
    /// pruned never goes in.
    Early,
    /// The same trial run judges, and what is kept goes on from where the run came to: what is
    /// pruned was seen by the layers before the last scoring layer, and by no other. Where nothing
    /// can go on (layer 0 is the last one, or earlier turns were not remembered) what is pruned was
    /// seen by none, as with [`DapMode::Early`].
    Midway,
}

impl DapRule {
    /// What stays without a budget and a rule. Found on the small model's development set
    /// (docs/quality.md).
    pub const SPREAD: DapRule = DapRule::spread(2.0);

    /// With at least a quarter, so that a few tokens that draw all attention, as some models have
    /// in every picture, do not leave it dark.
    pub const fn spread(times: f64) -> DapRule {
        DapRule::Spread {
            times,
            least: Amount::Share(0.25),
        }
    }
}

impl DapMode {
    /// Whether a trial run judges the prompt before it goes in.
    pub fn has_trial(self) -> bool {
        self != DapMode::Exact
    }
}

/// How visual tokens are pruned (Dual-Attention Pruning, arXiv 2602.02197).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DapOptions {
    /// Which of them go.
    pub rule: DapRule,
    /// Threshold forms only (and mustdrop's own): a token whose highest attention reaches `alpha`
    /// stays (`M[j] < alpha` to leave). None: no individual test.
    pub alpha: Option<f64>,
    /// Over which of them the rule counts.
    pub scope: Scope,
}

impl DapOptions {
    /// Ours.
    pub(super) const DEFAULT: DapOptions = DapOptions {
        rule: DapRule::Auto,
        alpha: None,
        scope: Scope::Turn,
    };

    /// # Errors
    /// [`Error::Option`] for a rule that cannot be, or an individual test beside one that goes by
    /// number.
    pub(in crate::policy) fn check(&self) -> Result<()> {
        match self.rule {
            DapRule::Auto => {}
            DapRule::Tau(tau) => at_least_zero("dap_tau", tau)?,
            DapRule::R(r) => at_least_zero("dap_r", r)?,
            DapRule::Keep(keep) => keep.check("dap_keep")?,
            DapRule::Spread { times, least } => {
                at_least_zero("dap_spread", times)?;
                if least != Amount::Cells(0) {
                    least.check("dap_keep")?;
                }
            }
        }
        let counted = match self.rule {
            DapRule::Keep(_) => Some("dap_keep"),
            DapRule::Spread { .. } => Some("dap_spread"),
            DapRule::Auto | DapRule::Tau(_) | DapRule::R(_) => None,
        };
        if let (Some(flag), Some(_)) = (counted, self.alpha) {
            let reason = format!("goes with `dap_tau` or `dap_r`, not with `{flag}`");
            return Err(Error::option("dap_alpha", reason));
        }
        at_least_zero("dap_alpha", self.alpha.unwrap_or(0.0))
    }
}
