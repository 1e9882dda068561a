//! The policies by name: what each reads, and how it is made.

use super::registered::Registered;
use super::{EvictionPolicy, Limits, OptionKey, PolicyOptions};
use super::{context_shift, fastv, full, h2o, hae, mustdrop, random, snapkv, streaming_llm, tova};
use crate::error::{Error, Result};

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

/// The policy of this name, if there is one.
fn of(name: &str) -> Option<&'static Registered> {
    POLICIES.iter().find(|policy| policy.name == name)
}

/// The names of all policies, in the order in which help and reports list them.
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
    match of(name) {
        Some(policy) => (policy.create)(&options.only(|key| policy.reads(key)), limits),
        None => {
            let known = names().collect::<Vec<_>>().join(", ");
            Err(Error::option(
                "kv_policy",
                format!("{name:?}, expected one of {known}"),
            ))
        }
    }
}

/// Whether a policy reads an option; one that nobody knows reads none.
pub fn reads(name: &str, key: OptionKey) -> bool {
    of(name).is_some_and(|policy| policy.reads(key))
}

/// Whether the cache of the policy of this name is the full one, whatever its options: every
/// policy that evicts is bound by a budget. `false` of a name that nobody knows.
pub fn evicts_nothing(name: &str) -> bool {
    of(name).is_some_and(|policy| !policy.reads(OptionKey::KvBudget))
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
    let may_read = |name: &&str, key| of(name).is_none_or(|p| p.reads(key));
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
