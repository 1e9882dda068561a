//! `streaming_llm`: attention sinks and a window of the most recent tokens (arXiv 2309.17453,
//! "Efficient Streaming Language Models with Attention Sinks").
//!
//! The first `--sinks` tokens stay, the window is what the budget leaves beside them, and for each
//! token that comes the oldest behind the sinks goes. No attention is read.
//!
//! Deviation: the paper numbers positions within the cache, so that the window follows right
//! behind the sinks; here tokens keep their positions, and the gap between the sinks and the
//! window grows. `context_shift` is the policy that moves positions.

use super::budget::BUDGET;
use super::greedy::Greedy;
use super::registered::Registered;
use super::scores::Guard;
use super::{EvictionPolicy, Limits, OptionKey, PolicyOptions};
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "streaming_llm",
    reads: &[BUDGET, &[OptionKey::Sinks]],
    create,
};

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    let guard = Guard {
        sinks: options.sinks,
        ..Guard::NEWEST
    };
    // Of equal scores the older token goes first.
    Ok(Greedy::new(&POLICY, options, guard, limits)?.boxed(|_| 0.0))
}
