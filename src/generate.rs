//! The prefill and decoding loops, over any [`Engine`].
//!
//! A [`Session`] is one conversation: an engine, the controller of its cache, and the buffers
//! between them. [`Session::generate`] is one turn of it. [`Session::prefill`] and
//! [`Session::step`] are its parts, for those who feed the tokens themselves.

mod feed;
mod history;
mod hostbin;
mod prefill;
mod prompt;
mod trial;
mod utf8;

use std::time::Duration;

use crate::attend::Attended;
use crate::cache::{Cell, PerModality, Pos};
use crate::controller::{Controller, Event, Origin};
use crate::engine::{Engine, Input, Observation, Token};
use crate::error::{Error, Result};
use feed::Feed;
use prefill::Prefilled;
use prompt::count;
use utf8::Utf8Stream;

pub use history::{History, Placed};
pub use hostbin::{HostBin, Saved};
pub use prompt::{Axes, Segment};

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model said so.
    Eog,
    /// `n_predict` tokens are out.
    Length,
    /// No cell is left for another token.
    Context,
    /// No position is left that the model's rope factors reach.
    Positions,
    Cancelled,
}

/// How long an answer may become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Length {
    /// Tokens that were asked for; policies leave room for them. `None`: until the model ends.
    pub n_predict: Option<usize>,
    /// Tokens that the model's rope factors reach behind the prompt, where they end somewhere.
    /// Nobody expects an answer of that length, so no room is left for it.
    pub reach: Option<usize>,
}

impl Length {
    /// What ends an answer of so many tokens, if anything does.
    fn ends(self, tokens: usize) -> Option<Finish> {
        if self.n_predict == Some(tokens) {
            return Some(Finish::Length);
        }
        (self.reach == Some(tokens)).then_some(Finish::Positions)
    }

    /// Tokens to come, if that is known.
    fn expected(self) -> Option<usize> {
        let n = self.n_predict?;
        Some(self.reach.map_or(n, |reach| n.min(reach)))
    }
}

impl From<Option<usize>> for Length {
    fn from(n_predict: Option<usize>) -> Self {
        Length {
            n_predict,
            reach: None,
        }
    }
}

/// What the loops ask of their surroundings.
pub struct Hooks<'a> {
    /// Gets the text as it comes, in whole characters.
    pub on_text: &'a mut dyn FnMut(&str),
    /// Asked before every batch and every token.
    pub cancelled: &'a dyn Fn() -> bool,
    /// A clock that never runs backwards, from any starting point.
    pub now: &'a dyn Fn() -> Duration,
}

/// One turn's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    pub text: String,
    /// The answer's tokens, without the one that ended it.
    pub tokens: Vec<Token>,
    pub finish: Finish,
    /// Cancelled before all of the prompt was in: what had gone in was taken out again.
    pub taken_back: bool,
    /// The last token of `tokens`, when it is not in the cache (it was not needed, or there was
    /// no cell). The next turn's prompt has to begin with it.
    pub pending: Option<Token>,
    /// Rows of the prompt.
    pub prompt: PerModality,
    /// What decoding steps attended to, where they looked cells up.
    pub attended: Attended,
    pub timings: Timings,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// The trial run that judges a prompt before it goes in.
    pub probe: Duration,
    /// The prompt through the model, and the eviction after it.
    pub prefill: Duration,
    /// From the start of the prefill to the first token (TTFT without what came before it).
    pub first_token: Option<Duration>,
    /// From the first token to the end.
    pub decode: Duration,
    /// Tokens that went through the model in that time.
    pub steps: usize,
}

impl Timings {
    /// TPOT: the mean time of a token after the first.
    pub fn per_token(&self) -> Option<Duration> {
        let steps = u32::try_from(self.steps).ok().filter(|&steps| steps > 0)?;
        Some(self.decode / steps)
    }
}

/// A conversation: the model, its cache's controller, and the buffers between them.
pub struct Session<E> {
    pub engine: E,
    pub controller: Controller,
    history: History,
    host_bin: HostBin,
    feed: Feed,
    moves: Vec<(Cell, Cell)>,
    /// What [`Session::expect`] was told.
    expected: Option<usize>,
    /// The position that the newest answer began at.
    answer: Pos,
}

impl<E: Engine> Session<E> {
    /// `engine` is empty and `controller` made for its number of cells.
    pub fn new(engine: E, controller: Controller) -> Self {
        Session {
            engine,
            controller,
            history: History::default(),
            host_bin: HostBin::default(),
            feed: Feed::default(),
            moves: Vec::new(),
            expected: None,
            answer: 0,
        }
    }

    /// Lets the engine make now what trial runs will need, if there will be any.
    ///
    /// # Errors
    /// The engine's own.
    pub fn prepare(&mut self) -> Result<()> {
        match self.controller.dap_mode().has_trial() {
            true => self.engine.expect_trials(),
            false => Ok(()),
        }
    }

    /// Tells how many tokens will go through the model after the next prompt, for policies that
    /// leave room for them. [`Session::generate`] takes [`Length::n_predict`] at its word otherwise.
    pub fn expect(&mut self, tokens: usize) {
        self.expected = Some(tokens);
    }

    /// Keeps evicted text in this much host memory, to be put back for a later question.
    pub fn with_host_bin(mut self, max_bytes: usize) -> Self {
        self.host_bin = HostBin::new(max_bytes);
        self
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

    pub fn host_bin(&self) -> &HostBin {
        &self.host_bin
    }

    /// Goes on with what went in earlier; the engine and the controller hold its cache.
    ///
    /// # Errors
    /// [`Error::Contract`] or [`Error::Option`] for what cannot have gone in, or left.
    pub fn resume(&mut self, history: History, saved: Vec<Saved>) -> Result<()> {
        let next = self.controller.next_pos();
        history.check(next)?;
        let held = self.controller.ledger().entries().map(|entry| entry.pos);
        hostbin::check(&saved, next, held.collect())?;
        self.history = history;
        saved.into_iter().for_each(|rows| self.host_bin.push(rows));
        Ok(())
    }

    /// Forgets what went in: the engine and the controller were cleared.
    pub fn forget(&mut self) {
        self.history.clear();
        self.host_bin.clear();
        self.feed.peak_bytes = 0;
    }

    /// Takes one token in, and lets the policy act.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when no cell is left; the cache is then unchanged.
    pub fn step(&mut self, token: Token) -> Result<()> {
        self.check_positions(1)?;
        let pos = self.controller.next_pos();
        let feed = &mut self.feed;
        feed.queries.clear();
        if self.controller.observes_decoding() {
            feed.queries.push(0);
        }
        feed.pos.clear();
        feed.pos.push(pos);
        let ledger = self.controller.ledger();
        feed.looks_up = self.engine.attend().is_some_and(|attend| {
            attend.plan(ledger, self.answer, &mut feed.lookup, &mut feed.attended)
        });
        let done = feed.run(&mut self.engine, Input::Tokens(&[token]), true);
        feed.looks_up = false;
        done?;
        self.controller
            .inserted(&feed.cells, &feed.pos, Origin::TEXT)?;
        self.controller.observed(&feed.seen)?;
        self.tell_text(pos, token)?;
        if self.remembers() {
            self.history.push_token(pos, token);
        }
        self.controller.after_step()?;
        self.remove_planned()
    }

    fn tell_text(&mut self, pos: Pos, token: Token) -> Result<()> {
        if !self.controller.is_recorded() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        self.engine.piece(token, &mut bytes)?;
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
        let length = length.into();
        let Hooks {
            on_text,
            cancelled,
            now,
        } = hooks;
        let start = now();
        // The last token of an answer does not go in.
        let to_come = length.expected().map(|n| n.saturating_sub(1));
        self.expected = self.expected.or(to_come);
        self.feed.attended = Attended::default();
        let Prefilled { complete, probe } = self.prefill_timed(prompt, cancelled, now)?;
        let mut timings = Timings {
            probe,
            prefill: now().saturating_sub(start).saturating_sub(probe),
            ..Timings::default()
        };
        let (mut text, mut tokens, mut pending) = (String::new(), Vec::new(), None);
        let mut stream = Utf8Stream::default();
        let mut decoding = None;

        let finish = loop {
            if !complete || cancelled() {
                break Finish::Cancelled;
            }
            if let Some(end) = length.ends(tokens.len()) {
                break end;
            }
            let token = self.engine.sample()?;
            decoding.get_or_insert_with(now);
            if self.engine.is_eog(token) {
                break Finish::Eog;
            }
            tokens.push(token);
            self.engine.piece(token, &mut stream.held)?;
            emit(&mut text, on_text, |text| stream.take(text));
            if let Some(end) = length.ends(tokens.len()) {
                pending = Some(token);
                break end;
            }
            match self.step(token) {
                Ok(()) => timings.steps += 1,
                Err(Error::ContextFull { .. }) => {
                    pending = Some(token);
                    break Finish::Context;
                }
                Err(error) => return Err(error),
            }
        };
        emit(&mut text, on_text, |text| stream.finish(text));
        if let Some(first) = decoding {
            timings.first_token = Some(first.saturating_sub(start));
            timings.decode = now().saturating_sub(first);
        }
        let prompt = count(prompt);
        Ok(Generated {
            text,
            tokens,
            finish,
            taken_back: !complete,
            pending,
            prompt,
            attended: self.feed.attended,
            timings,
        })
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

/// Hands on what `write` appends to the text.
fn emit(text: &mut String, on_text: &mut dyn FnMut(&str), write: impl FnOnce(&mut String)) {
    let start = text.len();
    write(text);
    if text.len() > start {
        on_text(&text[start..]);
    }
}

#[cfg(test)]
mod tests;
