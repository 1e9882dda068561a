//! The prefill and decoding loops, over any [`Engine`].
//!
//! A [`Session`] is one conversation: an engine, the controller of its cache, and the buffers
//! between them. [`Session::generate`] is one turn of it. [`Session::prefill`] and
//! [`Session::step`] are its parts, for those who feed the tokens themselves.

mod prompt;
mod utf8;

use std::time::Duration;

use crate::cache::{Cell, Modality, PerModality, Pos};
use crate::controller::{Controller, Origin};
use crate::engine::{Batch, Engine, Input, Observation, Token};
use crate::error::{Error, Result};
use crate::policy::{Observe, Queries};
use prompt::count;
use utf8::Utf8Stream;

pub use prompt::{Axes, Segment};

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
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
    /// The last token of `tokens`, when it is not in the cache (it was not needed, or there was
    /// no cell). The next turn's prompt has to begin with it.
    pub pending: Option<Token>,
    /// Positions of the prompt.
    pub prompt: PerModality,
    pub timings: Timings,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
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

/// One batch; its positions lie in [`Session::pos`].
struct Rows<'a> {
    input: Input<'a>,
    origin: Origin,
}

/// A conversation: the model, its cache's controller, and the buffers between them.
pub struct Session<E> {
    pub engine: E,
    pub controller: Controller,
    cells: Vec<Cell>,
    seen: Observation,
    queries: Vec<u32>,
    pos: Vec<Pos>,
}

impl<E: Engine> Session<E> {
    /// `engine` is empty and `controller` made for its number of cells.
    pub fn new(engine: E, controller: Controller) -> Self {
        Session {
            engine,
            controller,
            cells: Vec::new(),
            seen: Observation::default(),
            queries: Vec::new(),
            pos: Vec::new(),
        }
    }

    /// Takes a prompt in after what the cache holds, and lets the policy act. False: cancelled
    /// on the way; what had gone in was taken out again, and the policy did not act.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] when it does not fit beside what the cache holds: even a policy
    /// that evicts judges a prompt only when all of it is in. [`Error::Option`] for an empty
    /// prompt or a misshapen picture. The cache is unchanged in both cases, and after the
    /// engine's own errors if the engine can take tokens back.
    pub fn prefill(&mut self, prompt: &[Segment], cancelled: &dyn Fn() -> bool) -> Result<bool> {
        self.check(prompt)?;
        self.controller.begin_turn();
        let from = self.controller.next_pos();
        let complete = self.feed(prompt, cancelled);
        if !matches!(complete, Ok(true)) {
            let left = self.controller.rewind(from);
            let rewound = self.engine.rewind(from, left);
            // The error of the prompt says more than one that follows from it.
            if complete.is_ok() {
                rewound?;
            }
            return complete;
        }
        self.engine_remove(Controller::after_prefill)?;
        Ok(true)
    }

    /// The prompt's batches, one after the other; false: cancelled.
    fn feed(&mut self, prompt: &[Segment], cancelled: &dyn Fn() -> bool) -> Result<bool> {
        let n_batch = self.engine.n_batch().max(1);
        let last = prompt.iter().rposition(|segment| !segment.is_empty());
        for (s, segment) in prompt.iter().enumerate() {
            let mut start = 0;
            let base = self.controller.next_pos();
            while start < segment.len() {
                if cancelled() {
                    return Ok(false);
                }
                let end = segment.len().min(start + n_batch);
                let is_last = Some(s) == last && end == segment.len();
                self.select_queries(segment.modality(), end - start, is_last);
                segment.place(base, start, end, &mut self.pos);
                let axes = segment.axes(base, start, end);
                let rows = Rows {
                    input: segment.rows(start, end, axes.as_deref()),
                    origin: segment.origin(),
                };
                self.run(rows, is_last)?;
                start = end;
            }
        }
        Ok(true)
    }

    /// Takes one token in, and lets the policy act.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when no cell is left; the cache is then unchanged.
    pub fn step(&mut self, token: Token) -> Result<()> {
        self.queries.clear();
        if self.controller.observes_decoding() {
            self.queries.push(0);
        }
        let rows = Rows {
            input: Input::Tokens(&[token]),
            origin: Origin::TEXT,
        };
        self.pos.clear();
        self.pos.push(self.controller.next_pos());
        self.run(rows, true)?;
        self.engine_remove(Controller::after_step)
    }

    /// One turn: the prompt, then tokens until one ends the answer, `n_predict` are out, the
    /// cache is full, or it is cancelled.
    ///
    /// # Errors
    /// As [`Session::prefill`], and the engine's own.
    pub fn generate(
        &mut self,
        prompt: &[Segment],
        n_predict: Option<usize>,
        hooks: Hooks<'_>,
    ) -> Result<Generated> {
        let Hooks {
            on_text,
            cancelled,
            now,
        } = hooks;
        let start = now();
        let complete = self.prefill(prompt, cancelled)?;
        let mut timings = Timings {
            prefill: now().saturating_sub(start),
            ..Timings::default()
        };
        let (mut text, mut tokens, mut pending) = (String::new(), Vec::new(), None);
        let mut stream = Utf8Stream::default();
        let mut decoding = None;

        let finish = loop {
            if !complete || cancelled() {
                break Finish::Cancelled;
            }
            if n_predict == Some(tokens.len()) {
                break Finish::Length;
            }
            let token = self.engine.sample()?;
            decoding.get_or_insert_with(now);
            if self.engine.is_eog(token) {
                break Finish::Eog;
            }
            tokens.push(token);
            self.engine.piece(token, &mut stream.held)?;
            emit(&mut text, on_text, |text| stream.take(text));
            if n_predict == Some(tokens.len()) {
                pending = Some(token);
                break Finish::Length;
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
            pending,
            prompt,
            timings,
        })
    }

    fn check(&self, prompt: &[Segment]) -> Result<()> {
        for segment in prompt {
            segment.check()?;
        }
        let rows = count(prompt).total();
        if rows == 0 {
            return Err(Error::option(
                "prompt",
                "is empty, expected at least one token",
            ));
        }
        let n_ctx = self.engine.n_cells();
        let needed = self
            .controller
            .ledger()
            .counts()
            .cells()
            .saturating_add(rows);
        if needed > n_ctx {
            return Err(Error::PromptTooLong { needed, n_ctx });
        }
        self.check_positions(rows)
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

    /// The rows of the next batch whose attention the policy wants.
    fn select_queries(&mut self, modality: Modality, rows: usize, is_last: bool) {
        self.queries.clear();
        let rows = rows as u32;
        match self.controller.observe() {
            Observe::Layers {
                queries: Queries::All,
                ..
            } if modality == Modality::Text => {
                self.queries.extend(0..rows);
            }
            Observe::Layers {
                queries: Queries::Last,
                ..
            } if is_last => {
                self.queries.push(rows - 1);
            }
            _ => {}
        }
    }

    /// One batch through the engine and into the ledger.
    fn run(&mut self, rows: Rows<'_>, logits: bool) -> Result<()> {
        let Rows { input, origin } = rows;
        let batch = Batch {
            input,
            pos: &self.pos,
            queries: &self.queries,
            logits,
        };
        self.engine.decode(batch, &mut self.cells, &mut self.seen)?;
        let (rows, cells) = (input.len(), self.cells.len());
        if cells != rows {
            return Err(Error::contract(format!(
                "{cells} cells for a batch of {rows} rows"
            )));
        }
        // Missing attention would let every token look unused.
        let (wanted, seen) = (self.queries.len(), self.seen.queries.len());
        if seen != wanted {
            return Err(Error::contract(format!(
                "attention of {seen} rows, expected {wanted}"
            )));
        }
        self.controller.inserted(&self.cells, &self.pos, origin)?;
        self.controller.observed(&self.seen)
    }

    fn engine_remove(
        &mut self,
        plan: impl FnOnce(&mut Controller) -> Result<&[std::ops::Range<Pos>]>,
    ) -> Result<()> {
        let ranges = plan(&mut self.controller)?;
        if ranges.is_empty() {
            Ok(())
        } else {
            self.engine.remove(ranges)
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
