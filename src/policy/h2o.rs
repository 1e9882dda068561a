//! `h2o`, the Heavy-Hitter Oracle (arXiv 2306.14048): greedy eviction of the token with the lowest
//! attention so far.
//!
//! A token's score is the plain sum of the attention that every query so far has paid to it, those
//! of the prompt included. For each token that comes, the lowest one outside the recent window
//! goes, for good. The window is half of the budget, as in the paper's experiments, and heavy
//! hitters have the other half; `--h2o-recent` sets another.
//!
//! Deviations:
//! - The paper keeps a set for each layer and head. A cell here spans all layers and heads, so the
//!   mean over heads and scoring layers decides for all.
//! - `--sinks` first positions stay (ours; 0 is the paper).
//! - The paper evicts within the prompt as it comes; here the whole prompt goes in first and is
//!   brought down at its end, by the scores that it has then.

use super::budget::BUDGET;
use super::greedy::Greedy;
use super::registered::Registered;
use super::scores::Guard;
use super::{Amount, EvictionPolicy, Limits, OptionKey, PolicyOptions, Queries};
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "h2o",
    reads: &[
        BUDGET,
        &[OptionKey::Layers, OptionKey::Sinks, OptionKey::H2oRecent],
    ],
    create,
};

/// The paper's.
pub(super) const RECENT: Amount = Amount::Share(0.5);

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    options.h2o_recent.check("h2o_recent")?;
    let guard = Guard {
        sinks: options.sinks,
        // What the window may take depends on the budget, and leaves it a choice.
        ..Guard::NEWEST
    };
    let greedy = Greedy::new(&POLICY, options, guard, limits)?
        .judged_by(Queries::EVERY)
        .with_window(options.h2o_recent);
    Ok(greedy.boxed(|token| token.sum))
}
