//! Eviction policies: one file each, one trait, one registry.
//!
//! A policy reads the [`Ledger`] (who is in the cache, how much attention each has had) and
//! writes a [`Plan`]. The direction of a score is said once, here: **higher is more worth
//! keeping**.
//!
//! A policy's file declares it: a name, the options that it reads ([`OptionKey`]), and how it is
//! made of them. No other option reaches it. Policies that evict one token for each that comes are
//! a score for the schedule in `greedy`, those that prune a prompt's pictures once a judge for the
//! one in `pruning`.

mod budget;
mod context_shift;
mod dap;
mod ddes;
mod fastv;
mod full;
mod greedy;
mod h2o;
mod hae;
mod lowest;
mod mustdrop;
mod options;
mod pruning;
mod random;
mod registered;
mod registry;
mod scores;
mod snapkv;
mod spec;
mod streaming_llm;
mod tova;
mod visual;

use std::collections::HashSet;

use crate::cache::{Cell, Ledger, Modality, Pos};
use crate::error::Result;

pub use options::{
    Amount, DapMode, DapOptions, DapRule, Layers, Limits, OptionKey, PolicyOptions, Scope,
};
pub use registry::{create, evicts_nothing, names, reads, refuse_unread};
pub use scores::Norm;
pub use snapkv::{Pooling, SnapkvOptions};
pub use spec::PolicySpec;

/// Which attention a policy wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observe {
    /// None: no attention is read at all.
    Nothing,
    /// The mean over all heads of these layers (sorted, unique), for these prompt rows at prefill
    /// and, if [`EvictionPolicy::observes_decoding`], for every decoded token after it.
    Layers {
        /// From 0, ascending, none of them twice.
        layers: Vec<u32>,
        /// Of the prompt, whose attention counts.
        queries: Queries,
    },
}

/// Which rows of the prompt judge the tokens before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Queries {
    /// Every text token (the paper).
    All,
    /// The prompt's last token only.
    Last,
    /// The last rows of the prompt, this many, text or not.
    Window(usize),
}

impl Queries {
    /// Every row of the prompt, those of pictures included.
    pub const EVERY: Queries = Queries::Window(usize::MAX);
}

/// What is to change, in cells; no cell is in it twice. The controller clears it once for a
/// prompt and once for each token: `after_prefill` finds what `prune` has planned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Live cells that go into the recycle bin.
    pub bin: Vec<Cell>,
    /// Binned cells that come back.
    pub restore: Vec<Cell>,
    /// Cells, live or binned, that are removed for good.
    pub evict: Vec<Cell>,
    /// What moves after the removals.
    pub shift: Option<Shift>,
}

/// Every token at position `from` or behind it moves down by `by` positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shift {
    /// The first position that moves.
    pub from: Pos,
    /// How far down, in positions, more than 0.
    pub by: Pos,
}

impl Plan {
    /// Empties it for the next decision; its memory stays.
    pub fn clear(&mut self) {
        self.bin.clear();
        self.restore.clear();
        self.evict.clear();
        self.shift = None;
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        let cells = [&self.bin, &self.restore, &self.evict];
        cells.iter().all(|cells| cells.is_empty()) && self.shift.is_none()
    }
}

/// What budgets are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Cells that are taken, the prompt's included, before anything of it leaves.
    pub cells: usize,
    /// Every token so far: the cells that the full cache would hold.
    pub went_in: usize,
}

impl Held {
    /// By a cache that the prompt is in.
    pub fn of(cache: &Ledger) -> Self {
        let counts = cache.counts();
        Held {
            cells: counts.cells(),
            went_in: counts.cells() + counts.evicted.total(),
        }
    }

    /// By a cache that the prompt is not in yet, which a trial run has read, after what it
    /// remembers of earlier turns. What the cache holds beside that takes cells, too; text of
    /// earlier turns that it gave up does not come back.
    pub fn with_trial(cache: &Ledger, trial: &Ledger) -> Self {
        let next = cache.newest().map_or(0, |newest| newest + 1);
        let held: HashSet<Pos> = cache.entries().map(|e| e.pos).collect();
        let (mut new, mut seen, mut gone) = (0, 0, 0);
        for entry in trial.entries() {
            match held.contains(&entry.pos) {
                true => seen += 1,
                false if entry.pos >= next => new += 1,
                false => gone += usize::from(entry.modality == Modality::Text),
            }
        }
        Held {
            cells: trial.counts().cells() - gone + (held.len() - seen),
            went_in: Held::of(cache).went_in + new,
        }
    }
}

/// Decides what leaves the cache.
pub trait EvictionPolicy: Send {
    /// The name that `--kv-policy` takes.
    fn name(&self) -> &'static str;

    /// Every parameter with its value, for reports.
    fn params(&self) -> serde_json::Value;

    /// The attention this policy needs.
    fn observe(&self) -> Observe;

    /// Whether decoded tokens are observed too, or the prompt alone. Reading attention costs time
    /// at every step, so a policy that decides nothing while decoding says no.
    fn observes_decoding(&self) -> bool {
        self.observe() != Observe::Nothing
    }

    /// Whether it removes tokens at all: a model whose memory cannot spare single ones is refused
    /// then.
    fn evicts(&self) -> bool {
        self.observe() != Observe::Nothing
    }

    /// Whether it moves tokens to other positions, which not every cache can.
    fn shifts(&self) -> bool {
        false
    }

    /// Called before each prompt: how many tokens will be decoded after it, if that is known. A
    /// policy that only prunes prompts leaves room for them.
    fn expect(&mut self, _tokens: Option<usize>) {}

    /// What the scores so far are multiplied with at each decoding step; 1 is plain accumulation.
    /// The batches of a prompt count as one observation, whatever their size, and are not decayed.
    fn decay(&self) -> f32 {
        1.0
    }

    /// When a prompt's visual tokens are pruned.
    fn prune_when(&self) -> DapMode {
        DapMode::Exact
    }

    /// Whether a new turn may call evicted tokens back, to be judged by its question.
    fn recalls(&self) -> bool {
        false
    }

    /// Whether an answer of which `said` tokens are in needs what the pruning for its question took. Asked
    /// before each token.
    fn asks_back(&self, _said: usize) -> bool {
        false
    }

    /// Makes room for a prompt of `rows` that goes in next, where it does not fit otherwise.
    /// Called if it [`EvictionPolicy::shifts`].
    ///
    /// # Errors
    /// As [`EvictionPolicy::prune`].
    fn before_prefill(&mut self, _cache: &Ledger, _rows: usize, _plan: &mut Plan) -> Result<()> {
        Ok(())
    }

    /// Which visual tokens of a prompt leave. Called once for each prompt (each user turn), with
    /// its scores in the ledger: that of the cache after the prefill, or that of a trial run of
    /// the first layers before it, whose tokens then never go in. `held` is what the cache holds
    /// with the prompt, whichever ledger it is.
    ///
    /// # Errors
    /// [`crate::Error::NanScore`] when a score is not a number.
    fn prune(&mut self, _cache: &Ledger, _held: Held, _plan: &mut Plan) -> Result<()> {
        Ok(())
    }

    /// Called once after each prompt; `plan` holds what [`EvictionPolicy::prune`] has just given
    /// up of this very cache.
    ///
    /// # Errors
    /// As [`EvictionPolicy::prune`].
    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()>;

    /// Called after every decoded token, with its attention added to the ledger.
    ///
    /// # Errors
    /// As [`EvictionPolicy::prune`].
    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()>;
}

#[cfg(test)]
mod tests;
