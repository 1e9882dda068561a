//! A policy before it is made: its name and its parameters.

use serde::{Deserialize, Serialize};

use super::{EvictionPolicy, Limits, PolicyOptions, create, reads, refuse_unread};
use crate::error::Result;

/// Which policy, with which parameters. Whether they can be is known once there are [`Limits`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySpec {
    /// The name that `--kv-policy` takes.
    pub name: String,
    /// Every parameter; the policy reads its own.
    pub options: PolicyOptions,
}

impl PolicySpec {
    /// With all of `options`; those that the policy does not read are for [`PolicySpec::check`] to
    /// find.
    pub fn new(name: &str, options: PolicyOptions) -> Self {
        PolicySpec {
            name: name.to_owned(),
            options,
        }
    }

    /// With those of the options that the policy reads, and the defaults for the others: its share
    /// of what was said to several policies.
    pub fn of(name: &str, options: &PolicyOptions) -> Self {
        PolicySpec::new(name, options.only(|key| reads(name, key)))
    }

    /// Everything stays, as in llama.cpp.
    pub fn full() -> Self {
        PolicySpec::new("full", PolicyOptions::default())
    }

    /// Hierarchical Adaptive Eviction with our setting.
    pub fn hae() -> Self {
        PolicySpec::new("hae", PolicyOptions::default())
    }

    /// Refuses options that the policy does not read, where they are not the defaults.
    ///
    /// # Errors
    /// [`crate::Error::Option`] that names the first of them by its flag.
    pub fn check(&self) -> Result<()> {
        let given = self.options.set().map(|key| (key.flag(), vec![key]));
        refuse_unread(&[&self.name], given)
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
