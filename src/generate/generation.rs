//! One turn as a machine of steps: who drives it decides what happens between them.

use std::borrow::Cow;
use std::time::Duration;

use super::Session;
use super::answer::{Finish, Generated, Length, Timings};
use super::prefill::Prefilled;
use super::prompt::{Segment, count};
use super::utf8::Utf8Stream;
use crate::attend::Attended;
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress<'a> {
    /// A token was chosen. `text`: the characters that are whole with it, maybe none.
    Token {
        /// The token's id.
        token: Token,
        /// May be empty.
        text: &'a str,
    },
    /// It is over. `text`: what was held back of a character that never became whole.
    End {
        /// Why it is over.
        finish: Finish,
        /// May be empty.
        text: &'a str,
    },
}

impl<'a> Progress<'a> {
    /// Text that is new.
    pub fn text(&self) -> &'a str {
        match self {
            Progress::Token { text, .. } | Progress::End { text, .. } => text,
        }
    }
}

/// What the next step begins with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// The prompt is to come.
    Begin,
    /// This token was said and is to go in.
    Feed(Token),
    /// Ends as soon as it is asked.
    Ending(Finish),
    Over(Finish),
}

/// One turn of a [`Session`]: a prompt, then tokens until one ends the answer, it has its
/// [`Length`], the cache is full, or it is cancelled. Each call of [`Generation::next`] is a step,
/// between which other sessions may have theirs.
pub struct Generation<'p> {
    prompt: Cow<'p, [Segment]>,
    length: Length,
    state: State,
    text: String,
    /// Bytes of `text` that were handed out.
    told: usize,
    stream: Utf8Stream,
    tokens: Vec<Token>,
    pending: Option<Token>,
    taken_back: bool,
    attended: Attended,
    timings: Timings,
    start: Duration,
    /// When the first token was there.
    decoding: Option<Duration>,
}

impl<'p> Generation<'p> {
    /// A turn that has not begun. `prompt` is what the cache does not hold yet.
    pub fn new(prompt: impl Into<Cow<'p, [Segment]>>, length: impl Into<Length>) -> Self {
        Generation {
            prompt: prompt.into(),
            length: length.into(),
            state: State::Begin,
            text: String::new(),
            told: 0,
            stream: Utf8Stream::default(),
            tokens: Vec::new(),
            pending: None,
            taken_back: false,
            attended: Attended::default(),
            timings: Timings::default(),
            start: Duration::ZERO,
            decoding: None,
        }
    }

    /// The next step; `None` when it is over. The same session each time, which gets nothing else
    /// meanwhile.
    ///
    /// 1. The first step takes the prompt in, as [`Session::prefill`] does, all of it at once: another
    ///    session's batch would take the place of its logits. Cancelled on the way, it ends.
    /// 2. Each other one takes the token in that the step before has chosen, and lets the policy
    ///    act. Without a cell for it the answer ends.
    /// 3. It ends where `cancelled` says so, or where the answer has its length.
    /// 4. It chooses the next token from the logits. One that ends the answer is not part of it.
    /// 5. It hands out the token with the text that is whole now. If the answer has its length with
    ///    it, the token does not go in: the next step is the last.
    ///
    /// # Errors
    /// As [`Session::prefill`], and the engine's own. It is over then.
    pub fn next<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Option<Progress<'_>>> {
        // Behind an error nothing can go on.
        let state = std::mem::replace(&mut self.state, State::Over(Finish::Cancelled));
        match state {
            State::Over(finish) => {
                self.state = State::Over(finish);
                return Ok(None);
            }
            State::Begin => {
                if !self.take_in(session, cancelled, now)? {
                    return Ok(Some(self.end(session, Finish::Cancelled, now)));
                }
            }
            State::Ending(finish) => return Ok(Some(self.end(session, finish, now))),
            State::Feed(token) => match session.step(token) {
                Ok(()) => self.timings.steps += 1,
                Err(Error::ContextFull { .. }) => {
                    self.pending = Some(token);
                    return Ok(Some(self.end(session, Finish::Context, now)));
                }
                Err(error) => return Err(error),
            },
        }
        if cancelled() {
            return Ok(Some(self.end(session, Finish::Cancelled, now)));
        }
        if let Some(finish) = self.length.ends(self.tokens.len()) {
            return Ok(Some(self.end(session, finish, now)));
        }
        let token = session.sample()?;
        self.decoding.get_or_insert_with(now);
        if session.vocabulary()?.is_eog(token) {
            return Ok(Some(self.end(session, Finish::Eog, now)));
        }
        self.tokens.push(token);
        session.vocabulary()?.piece(token, &mut self.stream.held)?;
        self.stream.take(&mut self.text);
        self.state = match self.length.ends(self.tokens.len()) {
            Some(finish) => {
                self.pending = Some(token);
                State::Ending(finish)
            }
            None => State::Feed(token),
        };
        let text = self.untold();
        Ok(Some(Progress::Token { token, text }))
    }

    fn take_in<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<bool> {
        self.start = now();
        // The last token of an answer does not go in.
        let to_come = self.length.expected().map(|n| n.saturating_sub(1));
        session.expected = session.expected.or(to_come);
        session.feed.attended = Attended::default();
        let Prefilled { complete, probe } = session.prefill_timed(&self.prompt, cancelled, now)?;
        self.timings.probe = probe;
        self.timings.prefill = now().saturating_sub(self.start).saturating_sub(probe);
        self.taken_back = !complete;
        Ok(complete)
    }

    fn end<E>(
        &mut self,
        session: &Session<E>,
        finish: Finish,
        now: &dyn Fn() -> Duration,
    ) -> Progress<'_> {
        self.state = State::Over(finish);
        self.stream.finish(&mut self.text);
        self.attended = session.feed.attended;
        if let Some(first) = self.decoding {
            self.timings.first_token = Some(first.saturating_sub(self.start));
            self.timings.decode = now().saturating_sub(first);
        }
        let text = self.untold();
        Progress::End { finish, text }
    }

    fn untold(&mut self) -> &str {
        let from = std::mem::replace(&mut self.told, self.text.len());
        &self.text[from..]
    }

    /// What was said. Stopped before its end it counts as cancelled, and its last token is pending
    /// if it had not gone in.
    pub fn into_answer(self) -> Generated {
        let (finish, pending) = match self.state {
            State::Over(finish) | State::Ending(finish) => (finish, self.pending),
            State::Feed(token) => (Finish::Cancelled, Some(token)),
            State::Begin => (Finish::Cancelled, None),
        };
        Generated {
            text: self.text,
            tokens: self.tokens,
            finish,
            taken_back: self.taken_back || self.state == State::Begin,
            pending,
            prompt: count(&self.prompt),
            attended: self.attended,
            timings: self.timings,
        }
    }
}
