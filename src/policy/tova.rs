//! `tova`, Token Omission Via Attention (arXiv 2401.06104, "Transformers are Multi-State RNNs"):
//! at each step the token that the newest query looks at least goes.
//!
//! Nothing is remembered: only the last query's attention counts, after a prompt that of its last
//! token. Neither sinks nor recent tokens are protected, as in the paper; `--sinks` and `--recent`
//! are not read.
//!
//! Deviations:
//! - The paper drops a token in each layer by that layer's attention. A cell here spans all
//!   layers, so the mean over heads and scoring layers decides for all.
//! - The newest token stays whatever attention it pays itself: llama.cpp counts on from it.
//! - The paper brings a long prompt down as it comes; here at its end, all of it at once by the
//!   attention of its last token.

use super::budget::BUDGET;
use super::greedy::Greedy;
use super::registered::Registered;
use super::scores::Guard;
use super::{EvictionPolicy, Limits, OptionKey, PolicyOptions, Queries};
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "tova",
    reads: &[BUDGET, &[OptionKey::Layers]],
    create,
};

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    let greedy = Greedy::new(&POLICY, options, Guard::NEWEST, limits)?;
    Ok(greedy.judged_by(Queries::Last).boxed(|token| token.latest))
}
