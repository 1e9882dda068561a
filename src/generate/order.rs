//! What of a prompt goes in, and what comes back for it: decided before anything does.

use std::collections::HashSet;

use super::Session;
use super::history::Placed;
use super::trial::Trial;
use crate::cache::Pos;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::policy::{DapMode, Observe};

/// What goes in.
#[derive(Default)]
pub(super) struct Order {
    pub trial: Option<Trial>,
    /// Positions of visual tokens, of any turn, that the new question does not need; sorted.
    pub pruned: Vec<Pos>,
    /// Evicted visual tokens that come back first; sorted.
    pub recalled: Vec<Pos>,
}

impl Order {
    /// The trial run that tokens go on from.
    pub fn goes_on(&self) -> Option<&Trial> {
        self.trial.as_ref().filter(|trial| trial.goes_on)
    }
}

impl<E: Engine> Session<E> {
    /// Cells that the conversation can have.
    pub(super) fn cells(&self) -> usize {
        self.engine.cells_for(self.feed.seq).min(self.most)
    }

    /// Whether what goes in is remembered: where a later question can do something with it.
    pub(super) fn remembers(&self) -> bool {
        self.controller.recalls()
            && *self.controller.observe() != Observe::Nothing
            && self.engine.capabilities().any_position
    }

    /// Whether a prompt, with pictures of its own or not, is judged by a trial run, so that what
    /// goes in may be less than it.
    pub fn judges_first(&self, pictures: bool) -> bool {
        let earlier = || self.history.pieces().iter().any(Placed::is_picture);
        *self.controller.observe() != Observe::Nothing
            && self.controller.dap_mode().has_trial()
            && self.engine.capabilities().any_position
            && (pictures || earlier())
    }

    /// Decides what goes in. `None`: cancelled.
    pub(super) fn decide(
        &mut self,
        prompt: &[Placed<'_>],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Option<Order>> {
        let evicted = self.evicted_pictures();
        let judges_first = self.judges_first(prompt.iter().any(Placed::is_picture));
        let Observe::Layers { queries, .. } = *self.controller.observe() else {
            return Ok(Some(Order::default()));
        };
        if judges_first {
            let mode = self.controller.dap_mode();
            let history = self.history.pieces();
            // What goes on must have seen all that is before it.
            let whole = self.history.positions() == i64::from(self.controller.next_pos());
            let continues = self.engine.capabilities().continues_trials;
            let goes_on = mode == DapMode::Midway && whole && continues;
            let rows = |all: &[Placed<'_>]| all.iter().map(|p| p.segment.len()).sum::<usize>();
            let n_cells = rows(history) + rows(prompt);
            if let Some(trials) = self.engine.trials() {
                let engine = trials.begin(n_cells, goes_on)?;
                let trial = Trial::run(engine, history, prompt, queries, cancelled);
                let ended = match goes_on {
                    true => Ok(()),
                    false => trials.end(),
                };
                // The run's own error says more than one that follows from it.
                let Some(mut trial) = trial? else {
                    return Ok(None);
                };
                ended?;
                trial.goes_on = goes_on;
                if goes_on {
                    self.feed.beside = trial.bytes;
                }
                // Both caches were there at once.
                let both = self.engine.kv_bytes().allocated + trial.bytes;
                self.feed.peak_bytes = self.feed.peak_bytes.max(both);
                let pruned = self.controller.prune(&trial.ledger)?;
                let recalled = evicted
                    .into_iter()
                    .filter(|pos| pruned.binary_search(pos).is_err())
                    .collect();
                return Ok(Some(Order {
                    trial: Some(trial),
                    pruned,
                    recalled,
                }));
            }
        }
        // All or none: a picture with arbitrary holes would be judged by chance.
        let rows = prompt.iter().map(|p| p.segment.len()).sum::<usize>();
        let held = self.controller.ledger().counts().cells();
        let fits = held + evicted.len() + rows <= self.cells();
        Ok(Some(Order {
            recalled: if fits { evicted } else { Vec::new() },
            ..Order::default()
        }))
    }

    /// Positions of visual tokens of earlier turns that are not in the cache, sorted.
    pub(super) fn evicted_pictures(&self) -> Vec<Pos> {
        let ledger = self.controller.ledger();
        if !self.remembers() || ledger.counts().evicted.vision == 0 {
            return Vec::new();
        }
        let held: HashSet<Pos> = ledger.entries().map(|entry| entry.pos).collect();
        let pictures = self.history.pieces().iter();
        pictures
            .filter(|placed| placed.is_picture())
            .flat_map(|placed| placed.base..placed.end())
            .filter(|pos| !held.contains(pos))
            .collect()
    }

    /// Whether everything that is to go in fits, before anything does; how much it is.
    pub(super) fn check_room(&self, prompt: &[Placed<'_>], order: &Order) -> Result<usize> {
        let from = prompt.first().map_or(0, |placed| placed.base);
        let split = order.pruned.partition_point(|&pos| pos < from);
        let ledger = self.controller.ledger();
        let dropped = ledger
            .entries()
            .filter(|entry| order.pruned[..split].binary_search(&entry.pos).is_ok())
            .count();
        let rows = prompt.iter().map(|p| p.segment.len()).sum::<usize>();
        let added = rows - (order.pruned.len() - split) + order.recalled.len();
        let needed = ledger.counts().cells() - dropped + added;
        let n_ctx = self.cells();
        if needed > n_ctx {
            return Err(Error::PromptTooLong { needed, n_ctx });
        }
        Ok(added)
    }
}
