//! A policy as its file declares it to the registry.

use serde_json::Value;

use super::{EvictionPolicy, Limits, OptionKey, PolicyOptions};
use crate::error::Result;

/// A policy as its file declares it.
pub(super) struct Registered {
    /// The name that `--kv-policy` takes.
    pub name: &'static str,
    /// The options that it reads, in groups; none of the others reaches it.
    pub reads: &'static [&'static [OptionKey]],
    /// Makes it, of options that are the defaults but for those that it reads.
    pub create: fn(&PolicyOptions, Limits) -> Result<Box<dyn EvictionPolicy>>,
}

impl Registered {
    /// Whether it reads an option.
    pub fn reads(&self, key: OptionKey) -> bool {
        self.reads.iter().any(|group| group.contains(&key))
    }

    /// The options that it reads with their values, for reports.
    pub fn params(&self, options: &PolicyOptions) -> Value {
        options.shown(|key| self.reads(key))
    }
}
