//! Taking a prompt in: all of it, or what a trial run left of it, after calling back what the
//! new question may need.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::Duration;

use super::feed::{Feed, Part};
use super::history::Placed;
use super::prompt::{Segment, count};
use super::trial::Trial;
use super::{HostBin, Session};
use crate::cache::{Cell, Modality, Pos};
use crate::controller::Origin;
use crate::engine::{Engine, TrialRuns};
use crate::error::{Error, Result};
use crate::policy::{DapMode, Observe, Shift};

/// How a prefill went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Prefilled {
    /// False: cancelled on the way; what had gone in was taken out again.
    pub complete: bool,
    /// Time of the trial run.
    pub probe: Duration,
}

/// What goes in, decided before anything does.
#[derive(Default)]
struct Order {
    trial: Option<Trial>,
    /// Positions of visual tokens, of any turn, that the new question does not need; sorted.
    pruned: Vec<Pos>,
    /// Evicted visual tokens that come back first; sorted.
    recalled: Vec<Pos>,
}

impl Order {
    /// The trial run that tokens go on from.
    fn goes_on(&self) -> Option<&Trial> {
        self.trial.as_ref().filter(|trial| trial.goes_on)
    }
}

impl<E: Engine> Session<E> {
    /// Takes a prompt in after what the cache holds, and lets the policy act. False: cancelled
    /// on the way; what had gone in was taken out again, and the policy did not act.
    ///
    /// With [`DapMode::Early`] and [`DapMode::Midway`] a trial run of the first layers decides
    /// which visual tokens go in at all. Where evicted tokens can come back, those of earlier turns are called back first:
    /// all of them, to be judged anew with the prompt, or those that the trial run asks for.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] when what goes in does not fit beside what the cache holds.
    /// [`Error::Option`] for an empty prompt or a misshapen picture, [`Error::Unsupported`] for a
    /// policy that the engine cannot serve. The cache is unchanged in these cases, and after the
    /// engine's own errors if the engine can take tokens back.
    pub fn prefill(&mut self, prompt: &[Segment], cancelled: &dyn Fn() -> bool) -> Result<bool> {
        let done = self.prefill_timed(prompt, cancelled, &|| Duration::ZERO)?;
        Ok(done.complete)
    }

    pub(super) fn prefill_timed(
        &mut self,
        prompt: &[Segment],
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Prefilled> {
        let done = self.decide_and_take_in(prompt, cancelled, now);
        self.answer = self.controller.next_pos();
        if self.controller.dap_mode() != DapMode::Midway {
            return done;
        }
        // A trial run that the prompt goes on from lasts as long as the prompt.
        self.feed.beside = 0;
        let ended = self.engine.trials().map_or(Ok(()), TrialRuns::end);
        done.and_then(|done| ended.map(|()| done))
    }

    fn decide_and_take_in(
        &mut self,
        prompt: &[Segment],
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Prefilled> {
        let expected = self.expected.take();
        self.follow_moves()?;
        self.check(prompt)?;
        self.controller.expect(expected);
        if self.controller.shifts() {
            let rows = prompt.iter().map(Segment::len).sum();
            self.controller.before_prefill(rows)?;
            self.remove_planned()?;
        }
        let from = self.controller.next_pos();
        let prompt = placed(prompt, from);
        let start = self.controller.dap_mode().has_trial().then(now);
        let Some(order) = self.decide(&prompt, cancelled)? else {
            return Ok(Prefilled::default());
        };
        let probe = start.map_or(Duration::ZERO, |start| now().saturating_sub(start));
        let added = self.check_room(&prompt, &order)?;

        self.controller.begin_turn();
        let complete = self.take_in(&prompt, &order, added, cancelled);
        if !matches!(complete, Ok(true)) {
            let left = self.controller.rewind(from);
            let rewound = self.engine.rewind(self.feed.seq, from, left);
            // The error of the prompt says more than one that follows from it.
            if complete.is_ok() {
                rewound?;
            }
            return complete.map(|complete| Prefilled { complete, probe });
        }
        if self.remembers() {
            for placed in &prompt {
                self.history.push(placed);
            }
        }
        let judged = order.trial.is_some();
        if let Some(trial) = &order.trial {
            let new = order.pruned.partition_point(|&pos| pos < from);
            self.controller.skipped(&order.pruned[new..]);
            let seen = trial.seen_by(self.controller.ledger());
            self.controller.observed(&seen)?;
        }
        self.controller.after_prefill(judged)?;
        self.remove_planned()?;
        Ok(Prefilled {
            complete: true,
            probe,
        })
    }

    /// Cells that the conversation can have.
    fn cells(&self) -> usize {
        self.engine.cells_for(self.feed.seq)
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
    fn decide(
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
    fn evicted_pictures(&self) -> Vec<Pos> {
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

    fn check(&self, prompt: &[Segment]) -> Result<()> {
        for segment in prompt {
            segment.check()?;
        }
        if self.controller.shifts() && !self.engine.capabilities().shifts {
            return Err(Error::Unsupported {
                policy: self.controller.policy(),
                reason: "its cached keys cannot be moved to other positions".into(),
            });
        }
        let rows = count(prompt).total();
        if rows == 0 {
            return Err(Error::option(
                "the prompt",
                "is empty, expected at least one token",
            ));
        }
        self.check_positions(rows)
    }

    /// Whether everything that is to go in fits, before anything does; how much it is.
    fn check_room(&self, prompt: &[Placed<'_>], order: &Order) -> Result<usize> {
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

    /// Out with what the question does not need, in with what it does, then the prompt itself.
    /// False: cancelled.
    fn take_in(
        &mut self,
        prompt: &[Placed<'_>],
        order: &Order,
        added: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool> {
        let observe = match (self.controller.observe(), &order.trial) {
            (Observe::Layers { queries, .. }, None) => Some(*queries),
            _ => None,
        };
        if self.remembers() && !self.history.pieces().is_empty() {
            self.controller.reopen_pictures();
        }
        self.drop_pruned(order)?;
        let text = self.returning_text(added);
        self.engine.make_room(added + text)?;
        if !self.recall(order, cancelled)? {
            return Ok(false);
        }
        self.recall_text(text)?;
        self.tell_texts(prompt)?;
        let last = prompt.iter().rposition(|p| !p.segment.is_empty());
        let single_rows = self.controller.single_rows();
        let mut behind: usize = prompt.iter().map(|p| p.segment.len()).sum();
        for (i, Placed { base, segment }) in prompt.iter().enumerate() {
            behind -= segment.len();
            let part = Part {
                segment,
                behind,
                base: *base,
                keep: &|pos| order.pruned.binary_search(&pos).is_err(),
                queries: observe,
                trial: order.goes_on(),
                single_rows: single_rows.saturating_sub(behind),
                is_last: Some(i) == last,
            };
            let controller = &mut self.controller;
            let mut sink = |feed: &Feed, origin: Origin| {
                controller.inserted(&feed.cells, &feed.pos, origin)?;
                controller.mark_separators(&feed.cells, &feed.separators)?;
                controller.observed(&feed.seen)
            };
            if !self
                .feed
                .part(&mut self.engine, &part, cancelled, &mut sink)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells a recorder what the prompt's tokens say.
    fn tell_texts(&mut self, prompt: &[Placed<'_>]) -> Result<()> {
        for placed in prompt {
            if let Segment::Tokens(tokens) = placed.segment.as_ref() {
                for (pos, &token) in (placed.base..).zip(tokens) {
                    self.tell_text(pos, token)?;
                }
            }
        }
        Ok(())
    }

    /// Removes visual tokens of earlier turns that a trial run found useless for this one.
    fn drop_pruned(&mut self, order: &Order) -> Result<()> {
        let newest = self.controller.ledger().newest();
        let cells: Vec<Cell> = self
            .controller
            .ledger()
            .entries()
            .filter(|entry| order.pruned.binary_search(&entry.pos).is_ok())
            .filter(|entry| Some(entry.pos) != newest)
            .map(|entry| entry.cell)
            .collect();
        if cells.is_empty() {
            return Ok(());
        }
        self.controller.remove(&cells)?;
        self.remove_planned()
    }

    /// Decodes evicted visual tokens again, at their old positions. False: cancelled.
    fn recall(&mut self, order: &Order, cancelled: &dyn Fn() -> bool) -> Result<bool> {
        let recalled = &order.recalled;
        if recalled.is_empty() {
            return Ok(true);
        }
        for Placed { base, segment } in self.history.pieces() {
            if segment.origin().modality == Modality::Text {
                continue;
            }
            let part = Part {
                segment,
                base: *base,
                keep: &|pos| recalled.binary_search(&pos).is_ok(),
                queries: None,
                trial: order.goes_on(),
                single_rows: 0,
                behind: 0,
                is_last: false,
            };
            let controller = &mut self.controller;
            let mut sink = |feed: &Feed, origin: Origin| {
                controller.recalled(&feed.cells, &feed.pos, origin)?;
                controller.mark_separators(&feed.cells, &feed.separators)
            };
            if !self
                .feed
                .part(&mut self.engine, &part, cancelled, &mut sink)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Rows of evicted text, the latest first, that the host has and that fit beside `added`
    /// others.
    fn returning_text(&self, added: usize) -> usize {
        if !self.controller.recalls() {
            return 0;
        }
        let taken = self.controller.ledger().counts().cells() + added;
        let free = self.cells().saturating_sub(taken);
        let mut rows = 0;
        for saved in self.host_bin.saved().rev() {
            if rows + saved.pos.len() > free {
                break;
            }
            rows += saved.pos.len();
        }
        rows
    }

    /// Puts so many rows of evicted text back.
    fn recall_text(&mut self, mut rows: usize) -> Result<()> {
        while rows > 0
            && let Some(saved) = self.host_bin.pop()
        {
            rows = rows.saturating_sub(saved.pos.len());
            let restored = self.engine.restore_rows(
                self.feed.seq,
                &saved.pos,
                &saved.rows,
                &mut self.feed.cells,
            );
            match restored {
                Ok(()) => {
                    self.controller
                        .recalled(&self.feed.cells, &saved.pos, Origin::TEXT)?;
                }
                Err(Error::ContextFull { .. }) => {
                    self.host_bin.push(saved);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes what the controller's last plan removed out of the engine, after saving what the
    /// host keeps, and lets the engine move the rest together.
    pub(super) fn remove_planned(&mut self) -> Result<()> {
        let shift = self.controller.shift();
        if self.controller.planned().is_empty() && shift.is_none() {
            return Ok(());
        }
        if self.controller.recalls() {
            keep_text(
                &mut self.host_bin,
                &mut self.engine,
                self.controller.evicted(),
            )?;
        }
        self.engine
            .remove(self.feed.seq, self.controller.planned())?;
        if let Some(Shift { from, by }) = shift {
            self.engine.shift(self.feed.seq, from, by)?;
        }
        self.engine.compact(self.feed.seq, &mut self.moves)?;
        self.controller.moved(&self.moves)
    }
}

fn keep_text(
    bin: &mut HostBin,
    engine: &mut dyn Engine,
    evicted: &[crate::controller::Evicted],
) -> Result<()> {
    if bin.is_off() {
        return Ok(());
    }
    let text = evicted.iter().filter(|e| e.modality == Modality::Text);
    let (cells, pos): (Vec<Cell>, Vec<Pos>) = text.map(|e| (e.cell, e.pos)).unzip();
    bin.keep(engine, &cells, &pos)
}

/// The prompt's segments with their positions.
fn placed(prompt: &[Segment], from: Pos) -> Vec<Placed<'_>> {
    let mut base = from;
    let mut all = Vec::with_capacity(prompt.len());
    for segment in prompt {
        let placed = Placed {
            base,
            segment: Cow::Borrowed(segment),
        };
        base = placed.end();
        all.push(placed);
    }
    all
}
