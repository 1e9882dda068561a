//! The policies by name: what each reads, and how it is made.

use serde_json::Value;

use super::{EvictionPolicy, Limits, OptionKey, PolicyOptions};
use super::{context_shift, fastv, full, h2o, hae, mustdrop, random, snapkv, streaming_llm, tova};
use crate::error::{Error, Result};

/// A policy as its file declares it.
pub(super) struct Registered {
    /// The name that `--kv-policy` takes.
    pub name: &'static str,
    /// The options that it reads, in groups; none of the others reaches it.
    pub reads: &'static [&'static [OptionKey]],
    /// Makes it, of options that are the defaults but for those that it reads.
    pub create: fn(&PolicyOptions, Limits) -> Result<Box<dyn EvictionPolicy>>,
}

/// The one place to add one.
const POLICIES: &[Registered] = &[
    full::POLICY,
    hae::POLICY,
    hae::DAP,
    hae::DDES,
    random::POLICY,
    random::VISUAL,
    streaming_llm::POLICY,
    context_shift::POLICY,
    h2o::POLICY,
    tova::POLICY,
    snapkv::POLICY,
    fastv::POLICY,
    mustdrop::POLICY,
];

impl Registered {
    fn of(name: &str) -> Option<&'static Registered> {
        POLICIES.iter().find(|policy| policy.name == name)
    }

    fn reads(&self, key: OptionKey) -> bool {
        self.reads.iter().any(|group| group.contains(&key))
    }

    /// The options that it reads with their values, for reports.
    pub fn params(&self, options: &PolicyOptions) -> Value {
        options.shown(|key| self.reads(key))
    }
}

pub fn names() -> impl Iterator<Item = &'static str> {
    POLICIES.iter().map(|policy| policy.name)
}

/// The policy of this name. Options that it does not read change nothing;
/// [`super::PolicySpec::check`] refuses them.
///
/// # Errors
/// [`Error::Option`] when there is none of this name (it lists those there are), or when an
/// option of the policy cannot be.
pub fn create(
    name: &str,
    options: &PolicyOptions,
    limits: Limits,
) -> Result<Box<dyn EvictionPolicy>> {
    match Registered::of(name) {
        Some(policy) => (policy.create)(&options.only(|key| policy.reads(key)), limits),
        None => {
            let known = names().collect::<Vec<_>>().join(", ");
            Err(Error::option(
                "--kv-policy",
                format!("{name:?}, expected one of {known}"),
            ))
        }
    }
}

/// Whether a policy reads an option; one that nobody knows reads none.
pub fn reads(name: &str, key: OptionKey) -> bool {
    Registered::of(name).is_some_and(|policy| policy.reads(key))
}

/// Whether the cache of the policy of this name is the full one, whatever its options: every
/// policy that evicts is bound by a budget. `false` of a name that nobody knows.
pub fn evicts_nothing(name: &str) -> bool {
    Registered::of(name).is_some_and(|policy| !policy.reads(OptionKey::KvBudget))
}

/// Refuses what none of these policies reads. `given` are flags, each with the options that it
/// sets. Names that nobody knows are left to [`create`].
///
/// # Errors
/// [`Error::Option`] that names the first such flag.
pub fn refuse_unread(
    policies: &[&str],
    given: impl IntoIterator<Item = (&'static str, Vec<OptionKey>)>,
) -> Result<()> {
    let may_read = |name: &&str, key| Registered::of(name).is_none_or(|p| p.reads(key));
    let read = |key: &OptionKey| policies.iter().any(|name| may_read(name, *key));
    for (flag, sets) in given {
        if sets.is_empty() || sets.iter().any(read) {
            continue;
        }
        let reason = match policies {
            [policy] => format!("the policy {policy} does not read it"),
            _ => format!("none of the policies {} reads it", policies.join(", ")),
        };
        return Err(Error::option(flag, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
