//! Which parameters of `hae` keep the most quality of a model at a given memory.
//!
//! A [`Setting`] is what is looked for. [`search`] tries those of a small [`grid`], one parameter
//! after the other, on questions that its caller asks, and gets a [`Score`] for each. [`mod@file`] is
//! what comes of it: the parameters with the evidence for them, beside the model. Nothing here
//! knows a model: [`crate::asker`] has one.

pub mod file;
pub mod grid;
mod score;
pub mod search;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::policy::{Amount, DapRule, Layers, Limits, PolicyOptions, Queries};

pub use score::{Score, Tally};

/// The parameters that are looked for; all others are the defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Spelled", into = "Spelled")]
pub struct Setting {
    /// Layers whose attention is read.
    pub layers: Layers,
    /// Tokens of the prompt whose attention is read.
    pub queries: Queries,
    /// Visual tokens below so many times the mean attention go, beside those that the budget
    /// takes. `None`: those that the budget takes.
    pub tau: Option<f64>,
    /// Cells of the recycle bin.
    pub bin_size: usize,
}

/// As files have it: in the words of the flags.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spelled {
    score_layers: String,
    score_queries: String,
    dap_tau: Option<f64>,
    bin_size: usize,
}

/// What `hae` does without a word about it.
impl Default for Setting {
    fn default() -> Self {
        let PolicyOptions {
            layers,
            queries,
            bin_size,
            ..
        } = PolicyOptions::default();
        Setting {
            layers,
            queries,
            tau: None,
            bin_size,
        }
    }
}

impl From<Setting> for Spelled {
    fn from(setting: Setting) -> Self {
        Spelled {
            score_layers: setting.layers.to_string(),
            score_queries: setting.queries_name().into(),
            dap_tau: setting.tau,
            bin_size: setting.bin_size,
        }
    }
}

impl TryFrom<Spelled> for Setting {
    type Error = String;

    fn try_from(spelled: Spelled) -> Result<Self, String> {
        let setting = Setting {
            layers: spelled
                .score_layers
                .parse()
                .map_err(|e| format!("score_layers: {e}"))?,
            queries: match spelled.score_queries.as_str() {
                "all" => Queries::All,
                "last" => Queries::Last,
                other => return Err(format!("score_queries: {other:?}, expected all or last")),
            },
            tau: spelled.dap_tau,
            bin_size: spelled.bin_size,
        };
        // Which layers a model has is not known here.
        let limits = Limits {
            n_layer: u32::MAX,
            n_cells: usize::MAX,
        };
        let valid = setting.options(None).validate(limits);
        valid.map(|()| setting).map_err(|e| e.to_string())
    }
}

impl Setting {
    /// The policy's parameters at this budget; those that are not searched are the defaults.
    pub fn options(&self, budget: Option<Amount>) -> PolicyOptions {
        let mut options = PolicyOptions {
            layers: self.layers.clone(),
            queries: self.queries,
            bin_size: self.bin_size,
            kv_budget: budget,
            ..PolicyOptions::default()
        };
        if let (Some(tau), Some(dap)) = (self.tau, &mut options.dap) {
            dap.rule = DapRule::Tau(tau);
        }
        options
    }

    /// The queries as `--score-queries` spells them.
    pub fn queries_name(&self) -> &'static str {
        match self.queries {
            Queries::All => "all",
            Queries::Last | Queries::Window(_) => "last",
        }
    }

    /// What reading its attention costs, to be compared: how many layers are read, how deep a
    /// trial run would have to go, for how many queries.
    fn cost(&self, n_layer: u32) -> (usize, u32, bool) {
        let layers = self.layers.resolve(n_layer);
        let deepest = layers.last().copied().unwrap_or_default();
        (layers.len(), deepest, self.queries == Queries::All)
    }
}

/// The flags that give it.
impl std::fmt::Display for Setting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (layers, queries) = (&self.layers, self.queries_name());
        write!(f, "--score-layers {layers} --score-queries {queries}")?;
        if let Some(tau) = self.tau {
            write!(f, " --dap-tau {tau}")?;
        }
        write!(f, " --bin-size {}", self.bin_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(json: &str) -> Result<Setting, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    #[test]
    fn settings_are_spelled_as_flags() {
        let setting = Setting {
            layers: Layers::List(vec![9, 0, 4, 5, 6]),
            queries: Queries::All,
            tau: Some(0.5),
            bin_size: 8,
        };
        let json = serde_json::to_string(&setting).unwrap();
        assert_eq!(
            json,
            r#"{"score_layers":"0,4-6,9","score_queries":"all","dap_tau":0.5,"bin_size":8}"#
        );
        let again = spelled(&json).unwrap();
        assert_eq!(again.layers.resolve(32), setting.layers.resolve(32));
        assert_eq!(again.to_string(), setting.to_string());
        assert_eq!(
            Setting::default().to_string(),
            "--score-layers all --score-queries last --bin-size 8"
        );
        assert_eq!(
            Setting::default().options(None),
            PolicyOptions::default(),
            "the defaults are those of the policy"
        );
    }

    #[test]
    fn values_pass_the_checks_of_the_flags() {
        let of = |field: &str, value: &str| {
            let good = r#"{"score_layers":"1","score_queries":"last","dap_tau":1.0,"bin_size":8}"#;
            let mut json: serde_json::Value = serde_json::from_str(good).unwrap();
            json[field] = serde_json::from_str(value).unwrap();
            spelled(&json.to_string()).unwrap_err()
        };
        for (field, value, expected) in [
            ("score_layers", r#""x""#, "expected all or a list"),
            ("score_layers", r#""0-9999""#, "is no layer"),
            ("score_layers", r#""""#, "is no layer"),
            ("score_queries", r#""first""#, "expected all or last"),
            ("dap_tau", "-1", "`dap_tau`: -1, expected a number"),
            ("bin_size", "0", "`bin_size`: 0 cells"),
            ("bin_size", "-1", "invalid value"),
            ("layer", "0", "unknown field"),
        ] {
            let error = of(field, value);
            assert!(error.contains(expected), "{field} {value}: {error}");
        }
    }
}
