//! Eviction policies: one file each, one trait, one registry.
//!
//! A policy reads the [`Ledger`] (who is in the cache, how much attention each has had) and
//! writes a [`Plan`]. The direction of a score is said once, here: **higher is more worth
//! keeping**.

pub mod full;
pub mod hae;

use crate::cache::{Cell, Ledger};
use crate::error::Result;

/// Which attention a policy wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observe {
    /// None: no attention is read at all.
    Nothing,
    /// The mean over all heads of these layers (sorted, unique), for these prompt rows at prefill
    /// and for every decoded token after it.
    Layers { layers: Vec<u32>, queries: Queries },
}

/// Which rows of the prompt judge the tokens before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Queries {
    /// Every text token (the paper).
    All,
    /// The prompt's last token only.
    Last,
}

/// What is to change, in cells. Cleared and reused between calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Live cells that go into the recycle bin.
    pub bin: Vec<Cell>,
    /// Binned cells that come back.
    pub restore: Vec<Cell>,
    /// Cells, live or binned, that are removed for good.
    pub evict: Vec<Cell>,
}

impl Plan {
    pub fn clear(&mut self) {
        self.bin.clear();
        self.restore.clear();
        self.evict.clear();
    }

    pub fn is_empty(&self) -> bool {
        self.bin.is_empty() && self.restore.is_empty() && self.evict.is_empty()
    }
}

/// Decides what leaves the cache.
pub trait EvictionPolicy {
    /// The name that `--kv-policy` takes.
    fn name(&self) -> &'static str;

    /// Every parameter with its value, for reports.
    fn params(&self) -> serde_json::Value;

    /// The attention this policy needs.
    fn observe(&self) -> Observe;

    /// Called once after each prompt (each user turn), with the prompt's scores in the ledger.
    ///
    /// # Errors
    /// [`crate::Error::NanScore`] when a score is not a number.
    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()>;

    /// Called after every decoded token, with its attention added to the ledger.
    ///
    /// # Errors
    /// As [`EvictionPolicy::after_prefill`].
    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()>;
}
