//! The parameters of all policies in one bag, as the command line, calibrations and traces carry
//! them. Each policy says in its own file which of them it reads, what they are by default and
//! what they may be; those that several share stand here and in `scores` and `budget`.

mod amount;
mod dap;
mod key;
mod layers;

use serde::{Deserialize, Serialize};

use super::scores::Guard;
use super::{Norm, Queries, SnapkvOptions, ddes, h2o, random, scores};
use crate::error::{Error, Result};

pub use amount::Amount;
pub use dap::{DapMode, DapOptions, DapRule, Scope};
pub use key::OptionKey;
pub use layers::Layers;

/// What a policy has to know of the model and its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Layers of the model.
    pub n_layer: u32,
    /// Cells that the conversation can have at most: budgets have to fit in here.
    pub n_cells: usize,
}

impl Limits {
    /// Those of one of so many conversations that share the cells equally.
    pub fn shared_by(self, conversations: usize) -> Self {
        Limits {
            n_cells: self.n_cells / conversations.max(1),
            ..self
        }
    }
}

/// Every parameter of every policy; a policy reads those it has ([`super::reads`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyOptions {
    /// Whose attention scores the tokens, as a mean over them and their heads.
    pub layers: Layers,
    /// Whose attention it is.
    pub queries: Queries,
    /// How attention becomes a score.
    pub norm: Norm,
    /// What a score is multiplied with at each decoding step; 1 is none.
    pub decay: f64,
    /// Pruning of visual tokens. None: off.
    pub dap: Option<DapOptions>,
    /// When visual tokens are pruned.
    pub dap_mode: DapMode,
    /// Whether [`DapMode::Early`] keeps the tokens that separate parts of a picture before others,
    /// as up to half of what is kept.
    pub keep_separators: bool,
    /// The most cells that are taken at once from the end of a prompt's pruning on; a share
    /// counts the cells that the full cache would hold at the end of the prompt. `budget.rs` says
    /// it in full. None: `hae` evicts nothing while decoding, others as with a share of 1.
    pub kv_budget: Option<Amount>,
    /// Cells of the recycle bin, part of the budget. It is smaller where a budget leaves less.
    pub bin_size: usize,
    /// First positions that never leave.
    pub sinks: usize,
    /// Last positions that never leave.
    pub recent: usize,
    /// By which share a binned token must pass the lowest live one to come back.
    pub hysteresis: f64,
    /// Whether binned tokens can come back.
    pub restore: bool,
    /// Whether a new turn's question judges evicted tokens again: visual ones are decoded again
    /// from their embeddings, text comes from host memory if it was kept there.
    pub recall: bool,
    /// Tokens of an answer after which what was pruned for its question comes back.
    pub recall_after: usize,
    /// Recent window of `h2o`, in cells or as a share of the budget.
    pub h2o_recent: Amount,
    /// Read by `snapkv` alone.
    pub snapkv: SnapkvOptions,
    /// Of the policies that draw by lot.
    pub seed: u64,
}

/// Short answers end before, on the development set.
const RECALL_AFTER: usize = 12;

/// Our setting.
impl Default for PolicyOptions {
    fn default() -> Self {
        let Guard { sinks, recent } = Guard::DEFAULT;
        PolicyOptions {
            layers: Layers::All,
            queries: Queries::Last,
            norm: Norm::PerQuery,
            decay: 1.0,
            dap: Some(DapOptions::DEFAULT),
            dap_mode: DapMode::Exact,
            keep_separators: true,
            kv_budget: None,
            bin_size: ddes::BIN_SIZE,
            sinks,
            recent,
            hysteresis: ddes::HYSTERESIS,
            restore: true,
            recall: true,
            recall_after: RECALL_AFTER,
            h2o_recent: h2o::RECENT,
            snapkv: SnapkvOptions::default(),
            seed: random::SEED,
        }
    }
}

impl PolicyOptions {
    /// Whether the tokens that separate parts of a picture stay before others, whatever their score.
    pub fn keeps_separators(&self) -> bool {
        self.keep_separators && self.dap_mode == DapMode::Early
    }

    /// The names that [`PolicyOptions::preset`] takes.
    pub const PRESETS: [&str; 2] = ["default", "paper"];

    /// The budget of policies that cannot do without one: as many cells as the whole prompt.
    pub const WHOLE_PROMPT: Amount = Amount::Share(1.0);

    /// The paper's setting: attention of layer 0, every text token as a query, plain sums, and
    /// its best threshold, r = 0.0015.
    ///
    /// The paper gives no value for alpha, so the individual test is off. It speaks of one
    /// picture; here its sum runs over each picture by itself, so that r means the same however
    /// many there are. Nor does it give hysteresis (0 here), sinks or a recent window (ours).
    pub fn paper() -> Self {
        PolicyOptions {
            layers: Layers::List(vec![0]),
            queries: Queries::All,
            norm: Norm::Sum,
            keep_separators: false,
            dap: Some(DapOptions {
                rule: DapRule::R(0.0015),
                alpha: None,
                scope: Scope::Image,
            }),
            kv_budget: Some(PolicyOptions::WHOLE_PROMPT),
            hysteresis: 0.0,
            ..PolicyOptions::default()
        }
    }

    /// # Errors
    /// [`Error::Option`] that lists the presets when there is none of this name.
    pub fn preset(name: &str) -> Result<Self> {
        match name {
            "default" => Ok(PolicyOptions::default()),
            "paper" => Ok(PolicyOptions::paper()),
            _ => {
                let known = Self::PRESETS.join(", ");
                Err(Error::option(
                    "kv_preset",
                    format!("{name:?}, expected one of {known}"),
                ))
            }
        }
    }

    /// Everything that `hae` reads but the budget, which each policy checks against what it
    /// protects.
    ///
    /// # Errors
    /// [`Error::Option`] that names the flag, the value and what was expected.
    pub fn validate(&self, limits: Limits) -> Result<()> {
        self.layers.check(limits.n_layer)?;
        scores::check_decay(self.decay)?;
        ddes::check(self)?;
        self.dap.map_or(Ok(()), |dap| dap.check())
    }
}

/// # Errors
/// [`Error::Option`] for a number below 0, or none.
pub(super) fn at_least_zero(flag: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::option(
        flag,
        format!("{value}, expected a number of at least 0"),
    ))
}

#[cfg(test)]
mod tests;
