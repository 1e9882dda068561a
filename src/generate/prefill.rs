//! Taking a prompt in, one batch at a time: all of it, or what a trial run left of it, after
//! calling back what the new question may need.

use std::borrow::Cow;
use std::time::Duration;

use super::Session;
use super::feed::{Cut, Wish};
use super::history::{History, Placed};
use super::order::Order;
use super::prompt::{Segment, count};
use crate::cache::Pos;
use crate::engine::{Engine, Part, TrialRuns};
use crate::error::{Error, Result};
use crate::policy::{DapMode, Observe};

/// A prompt on its way in.
pub(super) struct Intake {
    order: Order,
    /// What begins here is taken back if the prompt does not get in whole.
    from: Pos,
    /// Batches, in order: first those of evicted pictures, then the prompt's.
    cuts: Vec<(Piece, Cut)>,
    next: usize,
    /// Rows of evicted text that the host puts back before the prompt; `None`: done.
    text: Option<usize>,
}

/// What a batch is cut of: a segment of the history, or of the prompt.
#[derive(Clone, Copy)]
enum Piece {
    Past(usize),
    New(usize),
}

impl Intake {
    /// Rows that went in so far, and that will have.
    pub fn rows(&self) -> (usize, usize) {
        let rows = |cuts: &[(Piece, Cut)]| cuts.iter().map(|(_, cut)| cut.len()).sum();
        (rows(&self.cuts[..self.next]), rows(&self.cuts))
    }

    /// Whether batches of it are to come.
    pub fn goes_on(&self) -> bool {
        self.next < self.cuts.len()
    }

    /// Whether it needs a trial run until it is in. An engine has one at a time.
    pub fn holds_trial(&self) -> bool {
        self.order.goes_on().is_some()
    }

    /// What the next batch is cut of.
    fn segment<'a>(&self, history: &'a History, prompt: &'a [Segment]) -> Option<&'a Segment> {
        match self.cuts.get(self.next)?.0 {
            Piece::Past(i) => history.pieces().get(i).map(|p| p.segment.as_ref()),
            Piece::New(i) => prompt.get(i),
        }
    }
}

fn absent() -> Error {
    Error::contract("rows of a prompt that was not begun")
}

impl<E> Session<E> {
    /// The batch that is wanted: of the prompt that is on its way, or a token.
    ///
    /// # Errors
    /// [`Error::Contract`] for another prompt.
    pub(super) fn part<'a>(&'a mut self, prompt: &'a [Segment]) -> Result<Part<'a>> {
        let intake = self.intake.as_ref();
        let segment = intake.and_then(|intake| intake.segment(&self.history, prompt));
        self.feed.part(segment)
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
        match self.begin_prompt(prompt, cancelled, &|| Duration::ZERO)? {
            Some(_) => self.rest_of_prompt(prompt, cancelled),
            None => Ok(false),
        }
    }

    /// All batches that are left of a prompt that was begun, and its end. False: cancelled, as in
    /// [`Session::prefill`].
    pub(super) fn rest_of_prompt(
        &mut self,
        prompt: &[Segment],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool> {
        while self.intake.as_ref().is_some_and(Intake::goes_on) {
            if cancelled() {
                self.abandon()?;
                return Ok(false);
            }
            self.want_rows(prompt)?;
            let decoded = self.decode(prompt);
            self.record_rows(prompt, decoded)?;
        }
        self.end_prompt(prompt)?;
        Ok(true)
    }

    /// Decides what goes in and makes room for it. Gives the time that a trial run took; `None`:
    /// cancelled.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub(super) fn begin_prompt(
        &mut self,
        prompt: &[Segment],
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Option<Duration>> {
        self.abandon()?;
        let begun = self.try_begin(prompt, cancelled, now);
        if matches!(begun, Ok(Some(_))) {
            return begun;
        }
        let ended = match self.intake {
            Some(_) => self.abandon(),
            None => self.leave_prompt(),
        };
        // The error of the prompt says more than one that follows from it.
        begun.and_then(|begun| ended.map(|()| begun))
    }

    fn try_begin(
        &mut self,
        prompt: &[Segment],
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Option<Duration>> {
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
            return Ok(None);
        };
        let probe = start.map_or(Duration::ZERO, |start| now().saturating_sub(start));
        let added = self.check_room(&prompt, &order)?;

        self.controller.begin_turn();
        let text = self.make_ready(&order, added);
        let decoded = match text {
            Ok(_) => self.restore_pictures(&order.recalled)?,
            Err(_) => Vec::new(),
        };
        let cuts = self.cuts(&prompt, &order, &decoded);
        self.intake = Some(Intake {
            order,
            from,
            cuts,
            next: 0,
            text: text.as_ref().ok().copied(),
        });
        text.map(|_| Some(probe))
    }

    /// Out with what the question does not need, and room for what it does. Gives the rows of
    /// evicted text that come back.
    fn make_ready(&mut self, order: &Order, added: usize) -> Result<usize> {
        if self.remembers() && !self.history.pieces().is_empty() {
            self.controller.reopen_pictures();
        }
        self.drop_pruned(order)?;
        let text = self.returning_text(added);
        self.engine.make_room(added + text)?;
        Ok(text)
    }

    /// The batches: evicted visual tokens that are decoded again, then the prompt itself.
    fn cuts(&self, prompt: &[Placed<'_>], order: &Order, decoded: &[Pos]) -> Vec<(Piece, Cut)> {
        let n_batch = self.engine.n_batch();
        let past = self.past_cuts(decoded).into_iter();
        let mut cuts: Vec<_> = past.map(|(i, cut)| (Piece::Past(i), cut)).collect();
        let queries = match (self.controller.observe(), &order.trial) {
            (Observe::Layers { queries, .. }, None) => Some(*queries),
            _ => None,
        };
        let last = prompt.iter().rposition(|p| !p.segment.is_empty());
        let single_rows = self.controller.single_rows();
        let mut behind: usize = prompt.iter().map(|p| p.segment.len()).sum();
        for (i, Placed { base, segment }) in prompt.iter().enumerate() {
            behind -= segment.len();
            let wish = Wish {
                base: *base,
                keep: &|pos| order.pruned.binary_search(&pos).is_err(),
                queries,
                single_rows: single_rows.saturating_sub(behind),
                behind,
                is_last: Some(i) == last,
            };
            let own = Cut::all(segment, &wish, n_batch).into_iter();
            cuts.extend(own.map(|cut| (Piece::New(i), cut)));
        }
        cuts
    }

    /// Makes the prompt's next batch ready to go in.
    ///
    /// # Errors
    /// As [`Session::prefill`]; the prompt is taken back then.
    pub(super) fn want_rows(&mut self, prompt: &[Segment]) -> Result<()> {
        let wanted = self.try_want_rows(prompt);
        self.or_abandon(wanted)
    }

    fn try_want_rows(&mut self, prompt: &[Segment]) -> Result<()> {
        self.follow_moves()?;
        let intake = self.intake.as_ref().ok_or_else(absent)?;
        if let Some((Piece::New(_), _)) = intake.cuts.get(intake.next) {
            self.recall_texts(prompt)?;
        }
        let intake = self.intake.as_ref().ok_or_else(absent)?;
        let segment = intake.segment(&self.history, prompt).ok_or_else(absent)?;
        let cut = &intake.cuts[intake.next].1;
        self.feed.cut(segment, cut, intake.order.goes_on())
    }

    /// Puts evicted text back from the host before the prompt begins.
    fn recall_texts(&mut self, prompt: &[Segment]) -> Result<()> {
        let intake = self.intake.as_mut().ok_or_else(absent)?;
        let from = intake.from;
        if let Some(text) = intake.text.take() {
            self.recall_text(text)?;
            self.tell_texts(&placed(prompt, from))?;
        }
        Ok(())
    }

    /// The batch that is wanted through the model.
    pub(super) fn decode(&mut self, prompt: &[Segment]) -> Result<()> {
        let intake = self.intake.as_ref();
        let segment = intake.and_then(|intake| intake.segment(&self.history, prompt));
        self.feed.run(&mut self.engine, segment)
    }

    /// Writes down what came of a batch of the prompt.
    ///
    /// # Errors
    /// The batch's own, and as [`Session::prefill`]; the prompt is taken back then.
    pub(super) fn record_rows(&mut self, prompt: &[Segment], decoded: Result<()>) -> Result<()> {
        let recorded = decoded.and_then(|()| self.try_record_rows(prompt));
        self.or_abandon(recorded)
    }

    fn try_record_rows(&mut self, prompt: &[Segment]) -> Result<()> {
        let (feed, controller) = (&mut self.feed, &mut self.controller);
        feed.check(&self.engine)?;
        let intake = self.intake.as_mut().ok_or_else(absent)?;
        let segment = intake.segment(&self.history, prompt).ok_or_else(absent)?;
        let origin = segment.origin();
        match intake.cuts[intake.next].0 {
            Piece::Past(_) => {
                self.store.decoded(feed.pos.len());
                controller.recalled(&feed.cells, &feed.pos, origin)?;
                controller.mark_separators(&feed.cells, &feed.separators)?;
            }
            Piece::New(_) => {
                controller.inserted(&feed.cells, &feed.pos, origin)?;
                controller.mark_separators(&feed.cells, &feed.separators)?;
                controller.observed(&feed.seen)?;
            }
        }
        intake.next += 1;
        Ok(())
    }

    /// After the prompt's last batch: lets the policy act.
    ///
    /// # Errors
    /// The policy's own and the engine's.
    pub(super) fn end_prompt(&mut self, prompt: &[Segment]) -> Result<()> {
        let recalled = self.recall_texts(prompt);
        self.or_abandon(recalled)?;
        let intake = self.intake.take().ok_or_else(absent)?;
        let done = self.try_end(&placed(prompt, intake.from), &intake);
        let ended = self.leave_prompt();
        done.and(ended)
    }

    fn try_end(&mut self, prompt: &[Placed<'_>], intake: &Intake) -> Result<()> {
        if self.remembers() {
            for placed in prompt {
                self.history.push(placed);
            }
        }
        let Order { trial, pruned, .. } = &intake.order;
        if let Some(trial) = trial {
            let new = pruned.partition_point(|&pos| pos < intake.from);
            self.controller.skipped(&pruned[new..]);
            let seen = trial.seen_by(self.controller.ledger());
            self.controller.observed(&seen)?;
        }
        self.controller.after_prefill(trial.is_some())?;
        self.remove_planned()
    }

    /// Takes out what is in of a prompt that was left before its end, if there is one. Whatever
    /// goes in next does so first; who looks at the cache between may have to.
    ///
    /// # Errors
    /// The engine's own.
    pub fn abandon(&mut self) -> Result<()> {
        let Some(Intake { from, .. }) = self.intake.take() else {
            return Ok(());
        };
        let followed = self.follow_moves();
        let left = self.controller.rewind(from);
        let rewound = self.engine.rewind(self.feed.seq, from, left);
        let ended = self.leave_prompt();
        followed.and(rewound).and(ended)
    }

    fn or_abandon<T>(&mut self, done: Result<T>) -> Result<T> {
        if done.is_err() {
            // The error of the prompt says more than one that follows from it.
            drop(self.abandon());
        }
        done
    }

    /// No prompt is on its way any more: a trial run that it goes on from lasts as long as it.
    fn leave_prompt(&mut self) -> Result<()> {
        self.answer = self.controller.next_pos();
        self.has_recalled = false;
        if self.controller.dap_mode() != DapMode::Midway {
            return Ok(());
        }
        self.feed.beside = 0;
        self.engine.trials().map_or(Ok(()), TrialRuns::end)
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
