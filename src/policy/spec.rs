//! A policy before it is made: its name and its parameters.

use serde::{Deserialize, Serialize};

use super::{EvictionPolicy, Limits, PolicyOptions, create};
use crate::error::Result;

/// Which policy, with which parameters. Whether they can be is known once there are [`Limits`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySpec {
    /// The name that `--kv-policy` takes.
    pub name: String,
    pub options: PolicyOptions,
}

impl PolicySpec {
    pub fn new(name: &str, options: PolicyOptions) -> Self {
        PolicySpec {
            name: name.to_owned(),
            options,
        }
    }

    /// Everything stays, as in llama.cpp.
    pub fn full() -> Self {
        PolicySpec::new("full", PolicyOptions::default())
    }

    /// Hierarchical Adaptive Eviction with our setting.
    pub fn hae() -> Self {
        PolicySpec::new("hae", PolicyOptions::default())
    }

    /// The policy in its first state.
    ///
    /// # Errors
    /// As [`create`].
    pub fn create(&self, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
        create(&self.name, &self.options, limits)
    }
}

/// As in llama.cpp.
impl Default for PolicySpec {
    fn default() -> Self {
        PolicySpec::full()
    }
}
