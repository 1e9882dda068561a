//! The prefill and decoding loops, over any [`Engine`].
//!
//! A [`Session`] is one conversation: an engine, the controller of its cache, and the buffers
//! between them. [`Session::generate`] is one turn of it, and [`Generation`] the same turn one step
//! at a time. [`together`] takes a step of several on one engine. [`Session::prefill`] and [`Session::step`] are its parts, for those who feed the
//! tokens themselves.

mod answer;
mod evict;
mod feed;
mod generation;
mod history;
mod order;
mod prefill;
mod prompt;
mod recall;
mod store;
mod together;
mod trial;
mod utf8;

use std::time::Duration;

use crate::attend::{Attended, Looked};
use crate::cache::{BinOptions, Cell, Pos};
use crate::controller::{Controller, Event, Origin};
use crate::engine::{
    Constraint, Engine, Observation, Sampler, SeqId, Token, TrialRuns, Vocabulary,
};
use crate::error::{Error, Result};
use feed::Feed;
use prefill::Intake;

pub use answer::{Finish, Generated, Length, Timings};
pub use generation::{Generation, Progress};
pub use history::{History, Placed};
pub use prompt::{Axes, Segment};
pub use store::{RowStore, Saved, Traffic};
pub use together::{Slot, StepHooks, together};

/// What the loops ask of their surroundings.
pub struct Hooks<'a> {
    /// Gets the text as it comes, in whole characters.
    pub on_text: &'a mut dyn FnMut(&str),
    /// Asked before every batch and every token.
    pub cancelled: &'a dyn Fn() -> bool,
    /// A clock that never runs backwards, from any starting point.
    pub now: &'a dyn Fn() -> Duration,
}

/// A conversation: the model, its cache's controller, and the buffers between them.
pub struct Session<E> {
    /// The model and its cache, or what stands in for it.
    pub engine: E,
    /// The books of the cache, and the policy.
    pub controller: Controller,
    /// Chooses the conversation's tokens.
    pub sampler: Box<dyn Sampler>,
    /// What the answer must keep to that comes next, if anything: one for each answer.
    pub constraint: Option<Box<dyn Constraint>>,
    /// The logits under it. Reused.
    masked: Vec<f32>,
    history: History,
    store: RowStore,
    feed: Feed,
    /// The prompt that is going in.
    intake: Option<Intake>,
    moves: Vec<(Cell, Cell)>,
    /// The most cells that it takes.
    most: usize,
    /// What [`Session::expect`] was told.
    expected: Option<usize>,
    /// The position that the newest answer began at.
    answer: Pos,
    /// Whether what it asked for was called back.
    has_recalled: bool,
}

impl<E> Session<E> {
    /// The conversation with another engine in the place of its own, which is given back. Between
    /// its steps a conversation can do without: `()` stands for none.
    pub fn swap<F>(self, engine: F) -> (Session<F>, E) {
        let Session {
            engine: own,
            controller,
            sampler,
            constraint,
            masked,
            history,
            store,
            feed,
            intake,
            moves,
            most,
            expected,
            answer,
            has_recalled,
        } = self;
        let session = Session {
            engine,
            controller,
            sampler,
            constraint,
            masked,
            history,
            store,
            feed,
            intake,
            moves,
            most,
            expected,
            answer,
            has_recalled,
        };
        (session, own)
    }

    /// The sequence of the engine's cache that it is.
    pub fn sequence(&self) -> SeqId {
        self.feed.seq
    }

    /// What went in since the cache was last empty, where it can be called back.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The most bytes that were ever allocated for KV at once, trial runs included.
    pub fn peak_bytes(&self) -> u64 {
        self.feed.peak_bytes
    }

    /// The attention that was seen in the last batch that asked for it.
    pub fn seen(&self) -> &Observation {
        &self.feed.seen
    }

    /// Rows of evicted tokens that wait outside of the cache.
    pub fn store(&self) -> &RowStore {
        &self.store
    }

    /// What decoding steps attended to, since the turn began or all was forgotten.
    pub fn attended(&self) -> Attended {
        self.feed.attended
    }
}

impl<E: Engine> Session<E> {
    /// `engine` is empty and `controller` made for its number of cells.
    pub fn new(engine: E, controller: Controller) -> Self {
        Session {
            sampler: engine.sampler(),
            constraint: None,
            masked: Vec::new(),
            engine,
            controller,
            history: History::default(),
            store: RowStore::default(),
            feed: Feed::default(),
            intake: None,
            moves: Vec::new(),
            most: usize::MAX,
            expected: None,
            answer: 0,
            has_recalled: false,
        }
    }

    /// Lets it be this sequence of the engine's cache, before anything goes in.
    pub fn with_sequence(mut self, seq: SeqId) -> Self {
        self.feed.seq = seq;
        self
    }

    /// Lets it take so many cells at most, as [`Error::ContextFull`] and [`Error::PromptTooLong`]
    /// then say: where the shares of all fit into the cache, none takes another's.
    pub fn with_share(mut self, cells: usize) -> Self {
        self.most = cells;
        self
    }

    /// The same at any time: how many it may take changes with what the others need.
    pub fn set_share(&mut self, cells: usize) {
        self.most = cells;
    }

    /// Takes back everything from position `from` on, for another prompt that begins with what is before.
    /// False: the cache does not hold the token before it any more, or has moved it, so that nothing can go on
    /// from there; nothing was taken back.
    ///
    /// # Errors
    /// The engine's own, for one that cannot take this back; the conversation has to be cleared then.
    pub fn take_back(&mut self, from: Pos) -> Result<bool> {
        self.abandon()?;
        let next = self.controller.next_pos();
        if from == next {
            return Ok(true);
        }
        let before = |entry: crate::cache::Entry| entry.pos + 1 == from;
        let held = from == 0 || self.controller.ledger().entries().any(before);
        if from > next || !held {
            return Ok(false);
        }
        self.follow_moves()?;
        let left = self.controller.rewind(from);
        self.engine.rewind(self.feed.seq, from, left)?;
        self.history.truncate(from);
        self.store.truncate(from);
        Ok(true)
    }

    /// Follows tokens that were moved when others made room in the cache they share. Whatever goes in
    /// does so first; who looks at the ledger's cells between may have to.
    ///
    /// # Errors
    /// As [`Controller::moved`].
    pub fn follow_moves(&mut self) -> Result<()> {
        self.engine.moved(self.feed.seq, &mut self.moves);
        match self.moves.is_empty() {
            true => Ok(()),
            false => self.controller.moved(&self.moves),
        }
    }

    /// Lets the engine make now what trial runs will need, if there will be any.
    ///
    /// # Errors
    /// The engine's own.
    pub fn prepare(&mut self) -> Result<()> {
        match self.controller.dap_mode().has_trial() {
            true => self.engine.trials().map_or(Ok(()), TrialRuns::prepare),
            false => Ok(()),
        }
    }

    /// What the engine's tokens mean.
    ///
    /// # Errors
    /// [`Error::Contract`] when they mean nothing.
    pub fn vocabulary(&self) -> Result<&(dyn Vocabulary + '_)> {
        let none = || Error::contract("words of an engine that has none");
        self.engine.vocabulary().ok_or_else(none)
    }

    /// Chooses the next token from the last logits.
    ///
    /// # Errors
    /// Those of [`Engine::logits_of`], when another sequence had a batch since, of the sampler, and of
    /// what the answer must keep to.
    pub fn sample(&mut self) -> Result<Token> {
        let logits = self.engine.logits_of(self.feed.seq)?;
        let Some(constraint) = &mut self.constraint else {
            return self.sampler.sample(logits);
        };
        self.masked.clear();
        self.masked.extend_from_slice(logits);
        constraint.mask(&mut self.masked)?;
        let token = self.sampler.sample(&self.masked)?;
        constraint.accept(token)?;
        Ok(token)
    }

    /// Tells how many tokens will go through the model after the next prompt, for policies that
    /// leave room for them. [`Session::generate`] takes [`Length::n_predict`] at its word otherwise.
    pub fn expect(&mut self, tokens: usize) {
        self.expected = Some(tokens);
    }

    /// Keeps rows of what is evicted, to be put back when it is asked for.
    pub fn with_store(mut self, options: BinOptions) -> Self {
        self.keep_rows_as(options);
        self
    }

    /// The same for a conversation that begins anew.
    pub(crate) fn keep_rows_as(&mut self, options: BinOptions) {
        self.store = RowStore::new(options);
    }

    /// Goes on with what went in earlier; the engine and the controller hold its cache.
    ///
    /// # Errors
    /// [`Error::Contract`] or [`Error::Option`] for what cannot have gone in, or left.
    pub fn resume(&mut self, history: History, saved: &[Saved]) -> Result<()> {
        let next = self.controller.next_pos();
        history.check(next)?;
        let held = self.controller.ledger().entries().map(|entry| entry.pos);
        store::check(saved, next, held.collect())?;
        self.history = history;
        saved.iter().for_each(|rows| self.store.push(rows));
        Ok(())
    }

    /// Forgets what went in: the engine and the controller were cleared.
    pub fn forget(&mut self) {
        self.sampler.reset();
        self.constraint = None;
        self.history.clear();
        self.store.clear();
        self.intake = None;
        self.feed.peak_bytes = 0;
        self.feed.waiting = 0;
        self.feed.attended = Attended::default();
    }

    /// Takes one token in, and lets the policy act.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when no cell is left; the cache is then unchanged.
    pub fn step(&mut self, token: Token) -> Result<()> {
        self.want_token(token)?;
        let decoded = self.decode(&[]);
        self.record_token(token, decoded)?;
        self.act()
    }

    /// Makes the token ready to go in.
    fn want_token(&mut self, token: Token) -> Result<()> {
        self.abandon()?;
        self.check_positions(1)?;
        self.follow_moves()?;
        self.recall_for_answer()?;
        if self.controller.ledger().counts().cells() >= self.most {
            return Err(Error::ContextFull { n_ctx: self.most });
        }
        let pos = self.controller.next_pos();
        let feed = &mut self.feed;
        feed.token(token, pos, self.controller.observes_decoding());
        let ledger = self.controller.ledger();
        feed.looks_up = self.engine.attend().is_some_and(|attend| {
            attend.plan(ledger, self.answer, &mut feed.lookup, &mut feed.attended)
        });
        Ok(())
    }

    /// Writes down what came of it.
    fn record_token(&mut self, token: Token, decoded: Result<()>) -> Result<()> {
        decoded?;
        let feed = &mut self.feed;
        let looked_up = feed.looks_up && self.controller.is_recorded();
        if looked_up {
            feed.looked.begin(&feed.lookup);
            self.engine.sets(&mut |set| feed.looked.add(set))?;
        }
        feed.check(&self.engine)?;
        let pos = self.controller.next_pos();
        self.controller
            .inserted(&feed.cells, &feed.pos, Origin::TEXT)?;
        self.controller.observed(&feed.seen)?;
        self.tell_text(pos, token)?;
        let Looked { layers, ref counts } = self.feed.looked;
        if looked_up && layers > 0 {
            self.controller.tell(Event::Looked { layers, counts });
        }
        if self.remembers() {
            self.history.push_token(pos, token);
        }
        Ok(())
    }

    /// Lets the policy act on it.
    fn act(&mut self) -> Result<()> {
        self.controller.after_step()?;
        self.remove_planned()
    }

    fn tell_text(&mut self, pos: Pos, token: Token) -> Result<()> {
        if !self.controller.is_recorded() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        if let Some(vocabulary) = self.engine.vocabulary() {
            vocabulary.piece(token, &mut bytes)?;
        }
        let bytes = &bytes;
        self.controller.tell(Event::Text { pos, bytes });
        Ok(())
    }

    /// One turn: the prompt, then tokens until one ends the answer, it has its [`Length`], the
    /// cache is full, or it is cancelled.
    ///
    /// # Errors
    /// As [`Session::prefill`], and the engine's own.
    pub fn generate(
        &mut self,
        prompt: &[Segment],
        length: impl Into<Length>,
        hooks: Hooks<'_>,
    ) -> Result<Generated> {
        let mut generation = Generation::new(prompt, length);
        while let Some(progress) = generation.next(self, hooks.cancelled, hooks.now)? {
            if !progress.text().is_empty() {
                (hooks.on_text)(progress.text());
            }
        }
        Ok(generation.into_answer())
    }

    /// Positions count up for ever, cells do not: a very long conversation runs out of numbers.
    fn check_positions(&self, rows: usize) -> Result<()> {
        let rows = Pos::try_from(rows).unwrap_or(Pos::MAX);
        match self.controller.next_pos().checked_add(rows) {
            Some(_) => Ok(()),
            None => Err(Error::ContextFull {
                n_ctx: self.engine.n_cells(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
