//! The parameters of the policies: plain data, the defaults in one place, one check.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Norm, Queries};
use crate::error::{Error, Result};

/// What a policy has to know of the model and its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub n_layer: u32,
    pub n_cells: usize,
}

/// Layers whose attention is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    All,
    List(Vec<u32>),
}

impl Layers {
    /// The layers by number, sorted and unique.
    pub fn resolve(&self, n_layer: u32) -> Vec<u32> {
        match self {
            Layers::All => (0..n_layer).collect(),
            Layers::List(list) => {
                let mut list = list.clone();
                list.sort_unstable();
                list.dedup();
                list
            }
        }
    }
}

/// As it is read: `all`, or a list with spans.
impl std::fmt::Display for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Layers::List(list) = self else {
            return f.write_str("all");
        };
        let mut list = list.clone();
        list.sort_unstable();
        list.dedup();
        let spans = list.chunk_by(|a, b| a + 1 == *b).map(|span| match span {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        });
        f.write_str(&spans.collect::<Vec<_>>().join(","))
    }
}

/// `all`, or numbers and inclusive spans: `0`, `4,7`, `0-3,30`.
impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // No model has more; the bound keeps a span from becoming a huge list.
        const MOST: u32 = 4096;
        let number = |part: &str| match part.trim().parse() {
            Ok(n) if n < MOST => Ok(n),
            _ => Err(format!(
                "{part:?} is no layer, expected all or a list such as 0,4-7"
            )),
        };
        if text.trim() == "all" {
            return Ok(Layers::All);
        }
        let mut list = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                Some((from, to)) => {
                    let (from, to) = (number(from)?, number(to)?);
                    if from > to {
                        return Err(format!("{part:?} runs backwards, expected {to}-{from}"));
                    }
                    list.extend(from..=to);
                }
                None => list.push(number(part)?),
            }
        }
        Ok(Layers::List(list))
    }
}

/// A number of cells, or a share of those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Amount {
    Cells(usize),
    /// More than 0, at most 1.
    Share(f64),
}

impl Amount {
    /// Cells out of `total`; shares are rounded to the nearest cell.
    pub fn of(self, total: usize) -> usize {
        match self {
            Amount::Cells(n) => n,
            Amount::Share(share) => (share * total as f64).round() as usize,
        }
    }

    /// # Errors
    /// [`Error::Option`] for none, or a share that is none.
    pub(crate) fn check(self, flag: &'static str) -> Result<()> {
        match self {
            Amount::Cells(0) => Err(Error::option(flag, "0 cells, expected at least 1")),
            Amount::Share(share) if !(share > 0.0 && share <= 1.0) => Err(Error::option(
                flag,
                format!("a share of {share}, expected more than 0, up to 1"),
            )),
            _ => Ok(()),
        }
    }
}

/// `512` is a number of cells, `0.4` a share, and so is `1.0`.
impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?}, expected a number of cells or a share such as 0.4");
        match text.parse() {
            Ok(cells) => Ok(Amount::Cells(cells)),
            Err(_) => text.parse().map(Amount::Share).map_err(|_| expected()),
        }
    }
}

/// Which visual tokens DAP drops.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DapRule {
    /// As many stay as a [`PolicyOptions::kv_budget`] below the whole leaves room for; without
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
    Spread { times: f64, least: Amount },
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

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DapOptions {
    pub rule: DapRule,
    /// Threshold forms only (and mustdrop's own): a token whose highest attention reaches `alpha`
    /// stays (`M[j] < alpha` to leave). None: no individual test.
    pub alpha: Option<f64>,
    pub scope: Scope,
}

/// Every parameter of every policy; a policy reads those it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyOptions {
    pub layers: Layers,
    pub queries: Queries,
    pub norm: Norm,
    /// What a score is multiplied with at each decoding step; 1 is none.
    pub decay: f64,
    /// Pruning of visual tokens. None: off.
    pub dap: Option<DapOptions>,
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
    /// Recent window of `h2o`, in cells or as a share of the budget.
    pub h2o_recent: Amount,
    pub snapkv: SnapkvOptions,
    /// Of the policies that draw by lot.
    pub seed: u64,
}

/// How `snapkv` looks at a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapkvOptions {
    /// Rows at the end of the prompt that judge the others, and stay.
    pub window: usize,
    /// Neighbours over which scores are pooled, the token itself included; odd.
    pub kernel: usize,
    pub pooling: Pooling,
}

/// How neighbours' scores become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    Avg,
    Max,
}

/// Those of the authors' program.
impl Default for SnapkvOptions {
    fn default() -> Self {
        SnapkvOptions {
            window: 32,
            kernel: 5,
            pooling: Pooling::Avg,
        }
    }
}

/// Our setting.
impl Default for PolicyOptions {
    fn default() -> Self {
        PolicyOptions {
            layers: Layers::All,
            queries: Queries::Last,
            norm: Norm::PerQuery,
            decay: 1.0,
            dap: Some(DapOptions {
                rule: DapRule::Auto,
                alpha: None,
                scope: Scope::Turn,
            }),
            dap_mode: DapMode::Exact,
            keep_separators: true,
            kv_budget: None,
            bin_size: 8,
            sinks: 4,
            recent: 16,
            hysteresis: 0.1,
            restore: true,
            recall: true,
            h2o_recent: Amount::Share(0.5),
            snapkv: SnapkvOptions::default(),
            seed: 0,
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
                    "--kv-preset",
                    format!("{name:?}, expected one of {known}"),
                ))
            }
        }
    }

    /// Everything but the budget, which each policy checks against what it protects.
    ///
    /// # Errors
    /// [`Error::Option`] that names the flag, the value and what was expected.
    pub fn validate(&self, limits: Limits) -> Result<()> {
        self.validate_layers(limits.n_layer)?;
        if !(self.decay > 0.0 && self.decay <= 1.0) {
            let reason = format!("{}, expected more than 0, up to 1", self.decay);
            return Err(Error::option("--score-decay", reason));
        }
        if self.bin_size == 0 {
            return Err(Error::option("--bin-size", "0 cells, expected at least 1"));
        }
        at_least_zero("--hysteresis", self.hysteresis)?;
        if let Some(dap) = &self.dap {
            dap.validate()?;
        }
        Ok(())
    }

    /// # Errors
    /// As [`PolicyOptions::validate`].
    pub(super) fn validate_layers(&self, n_layer: u32) -> Result<()> {
        let Layers::List(list) = &self.layers else {
            return Ok(());
        };
        if list.is_empty() {
            return Err(Error::option(
                "--score-layers",
                "no layer, expected at least one",
            ));
        }
        if let Some(layer) = list.iter().find(|&&layer| layer >= n_layer) {
            let last = n_layer.saturating_sub(1);
            let reason = format!("layer {layer}, but the model's layers are 0 to {last}");
            return Err(Error::option("--score-layers", reason));
        }
        Ok(())
    }
}

impl DapOptions {
    fn validate(&self) -> Result<()> {
        match self.rule {
            DapRule::Auto => {}
            DapRule::Tau(tau) => at_least_zero("--dap-tau", tau)?,
            DapRule::R(r) => at_least_zero("--dap-r", r)?,
            DapRule::Keep(keep) => keep.check("--dap-keep")?,
            DapRule::Spread { times, least } => {
                at_least_zero("--dap-spread", times)?;
                if least != Amount::Cells(0) {
                    least.check("--dap-keep")?;
                }
            }
        }
        let counted = match self.rule {
            DapRule::Keep(_) => Some("--dap-keep"),
            DapRule::Spread { .. } => Some("--dap-spread"),
            DapRule::Auto | DapRule::Tau(_) | DapRule::R(_) => None,
        };
        if let (Some(flag), Some(_)) = (counted, self.alpha) {
            let reason = format!("goes with --dap-tau or --dap-r, not with {flag}");
            return Err(Error::option("--dap-alpha", reason));
        }
        at_least_zero("--dap-alpha", self.alpha.unwrap_or(0.0))
    }
}

fn at_least_zero(flag: &'static str, value: f64) -> Result<()> {
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
