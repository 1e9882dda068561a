//! One turn as a machine of steps: who drives it decides what happens between them.

use std::borrow::Cow;
use std::time::Duration;

use super::Session;
use super::answer::{Finish, Generated, Length, Timings};
use super::prompt::{Segment, count};
use super::utf8::Utf8Stream;
use crate::attend::Attended;
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress<'a> {
    /// A batch of the prompt went in, and more are to come. `done` of `rows` rows are in, those of
    /// evicted pictures that come back included.
    Prompt {
        /// Rows that are in.
        done: usize,
        /// Rows in all.
        rows: usize,
    },
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
            Progress::Prompt { .. } => "",
            Progress::Token { text, .. } | Progress::End { text, .. } => text,
        }
    }
}

/// What the next step begins with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// The prompt is to come.
    Begin,
    /// It is on its way.
    Prompt,
    /// This token was said and is to go in.
    Feed(Token),
    /// Ends as soon as it is asked.
    Ending(Finish),
    Over(Finish),
}

/// What the first part of a step came to.
pub(super) enum Want {
    /// It is over already.
    Nothing,
    /// The step is done, without a batch of its own.
    Told(Step),
    /// A batch is to go in.
    Batch,
}

/// [`Progress`], without the text.
pub(super) enum Step {
    Prompt {
        /// Rows that are in.
        done: usize,
        /// Rows in all.
        rows: usize,
    },
    Token(Token),
    End(Finish),
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
    /// 1. The first steps take the prompt in, as [`Session::prefill`] does, a batch each; trial runs
    ///    are part of the first. A prompt that goes on from its trial run goes in as a whole, since
    ///    an engine has one such run. Cancelled on the way, it ends.
    /// 2. Each other one takes the token in that the step before has chosen, and lets the policy
    ///    act. Without a cell for it the answer ends.
    /// 3. It ends where `cancelled` says so, or where the answer has its length.
    /// 4. Behind the prompt it chooses the next token from the logits. One that ends the answer is not
    ///    part of it.
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
        let step = match self.want(session, cancelled, now)? {
            Want::Nothing => return Ok(None),
            Want::Told(step) => step,
            Want::Batch => {
                let decoded = session.decode(&self.prompt);
                self.record(session, decoded)?;
                self.act(session, cancelled, now)?
            }
        };
        Ok(Some(self.progress(step)))
    }

    /// The first part of a step: until its batch is ready to go in ([`Session::part`]).
    pub(super) fn want<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Want> {
        // Behind an error nothing can go on.
        let state = std::mem::replace(&mut self.state, State::Over(Finish::Cancelled));
        match state {
            State::Over(finish) => {
                self.state = State::Over(finish);
                Ok(Want::Nothing)
            }
            State::Begin => {
                if !self.begin(session, cancelled, now)? {
                    return Ok(self.take_back(session, now));
                }
                let intake = session.intake.as_ref();
                if intake.is_none_or(|intake| intake.holds_trial() || !intake.goes_on()) {
                    if !session.rest_of_prompt(&self.prompt, cancelled)? {
                        return Ok(self.take_back(session, now));
                    }
                    self.prompt_is_in(now);
                    return Ok(Want::Told(self.choose(session, cancelled, now)?));
                }
                self.want_rows(session, cancelled, now)
            }
            State::Prompt => self.want_rows(session, cancelled, now),
            State::Ending(finish) => Ok(Want::Told(self.end(session, finish, now))),
            State::Feed(token) => match session.want_token(token) {
                Ok(()) => {
                    self.state = State::Feed(token);
                    Ok(Want::Batch)
                }
                Err(error) => Ok(Want::Told(self.no_room(session, token, error, now)?)),
            },
        }
    }

    fn want_rows<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Want> {
        if cancelled() {
            session.abandon()?;
            return Ok(self.take_back(session, now));
        }
        session.want_rows(&self.prompt)?;
        self.state = State::Prompt;
        Ok(Want::Batch)
    }

    /// The second part of a step: writes down what came of its batch. Others that had theirs in
    /// the same pass do so before any of them acts.
    pub(super) fn record<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        decoded: Result<()>,
    ) -> Result<()> {
        let state = std::mem::replace(&mut self.state, State::Over(Finish::Cancelled));
        // Of before the pass, when another made room for its own batch.
        let decoded = session.follow_moves().and(decoded);
        match state {
            State::Prompt => session.record_rows(&self.prompt, decoded)?,
            State::Feed(token) => match decoded {
                Err(Error::ContextFull { .. }) => {
                    self.pending = Some(token);
                    self.state = State::Ending(Finish::Context);
                    return Ok(());
                }
                decoded => session.record_token(token, decoded)?,
            },
            _ => return Err(Error::contract("a batch that was not wanted")),
        }
        self.state = state;
        Ok(())
    }

    /// The last part of a step: lets the policy act, and chooses the next token.
    pub(super) fn act<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Step> {
        let state = std::mem::replace(&mut self.state, State::Over(Finish::Cancelled));
        // Of others that were in the pass and have acted.
        session.follow_moves()?;
        match state {
            State::Prompt => {
                if let Some(intake) = session.intake.as_ref().filter(|intake| intake.goes_on()) {
                    let (done, rows) = intake.rows();
                    self.state = State::Prompt;
                    return Ok(Step::Prompt { done, rows });
                }
                session.end_prompt(&self.prompt)?;
                self.prompt_is_in(now);
            }
            State::Feed(_) => {
                session.act()?;
                self.timings.steps += 1;
            }
            State::Ending(finish) => return Ok(self.end(session, finish, now)),
            _ => return Err(Error::contract("a batch that was not wanted")),
        }
        self.choose(session, cancelled, now)
    }

    fn choose<E: Engine>(
        &mut self,
        session: &mut Session<E>,
        cancelled: &dyn Fn() -> bool,
        now: &dyn Fn() -> Duration,
    ) -> Result<Step> {
        if cancelled() {
            return Ok(self.end(session, Finish::Cancelled, now));
        }
        if let Some(finish) = self.length.ends(self.tokens.len()) {
            return Ok(self.end(session, finish, now));
        }
        let token = session.sample()?;
        self.decoding.get_or_insert_with(now);
        if session.vocabulary()?.is_eog(token) {
            return Ok(self.end(session, Finish::Eog, now));
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
        Ok(Step::Token(token))
    }

    /// Decides what of the prompt goes in. False: cancelled.
    fn begin<E: Engine>(
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
        let probe = session.begin_prompt(&self.prompt, cancelled, now)?;
        self.timings.probe = probe.unwrap_or_default();
        Ok(probe.is_some())
    }

    fn prompt_is_in(&mut self, now: &dyn Fn() -> Duration) {
        let taken = now().saturating_sub(self.start);
        self.timings.prefill = taken.saturating_sub(self.timings.probe);
    }

    /// Cancelled before all of the prompt was in.
    fn take_back<E>(&mut self, session: &Session<E>, now: &dyn Fn() -> Duration) -> Want {
        self.prompt_is_in(now);
        self.taken_back = true;
        Want::Told(self.end(session, Finish::Cancelled, now))
    }

    /// Ends where there is no place for the token.
    fn no_room<E>(
        &mut self,
        session: &Session<E>,
        token: Token,
        error: Error,
        now: &dyn Fn() -> Duration,
    ) -> Result<Step> {
        let Error::ContextFull { .. } = error else {
            return Err(error);
        };
        self.pending = Some(token);
        Ok(self.end(session, Finish::Context, now))
    }

    fn end<E>(&mut self, session: &Session<E>, finish: Finish, now: &dyn Fn() -> Duration) -> Step {
        self.state = State::Over(finish);
        self.stream.finish(&mut self.text);
        self.attended = session.feed.attended;
        if let Some(first) = self.decoding {
            self.timings.first_token = Some(first.saturating_sub(self.start));
            self.timings.decode = now().saturating_sub(first);
        }
        Step::End(finish)
    }

    /// What a step did, with the text that is new.
    pub(super) fn progress(&mut self, step: Step) -> Progress<'_> {
        match step {
            Step::Prompt { done, rows } => Progress::Prompt { done, rows },
            Step::Token(token) => Progress::Token {
                token,
                text: self.untold(),
            },
            Step::End(finish) => Progress::End {
                finish,
                text: self.untold(),
            },
        }
    }

    pub(super) fn prompt(&self) -> &[Segment] {
        &self.prompt
    }

    fn untold(&mut self) -> &str {
        let from = std::mem::replace(&mut self.told, self.text.len());
        &self.text[from..]
    }

    /// Whether no step is left.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over(_))
    }

    /// What was said. Stopped before its end it counts as cancelled, and its last token is pending
    /// if it had not gone in. What is in of an unfinished prompt leaves with
    /// [`Session::abandon`], or when the session gets something else.
    pub fn into_answer(self) -> Generated {
        let (finish, pending) = match self.state {
            State::Over(finish) | State::Ending(finish) => (finish, self.pending),
            State::Feed(token) => (Finish::Cancelled, Some(token)),
            State::Begin | State::Prompt => (Finish::Cancelled, None),
        };
        let is_in = !matches!(self.state, State::Begin | State::Prompt);
        Generated {
            text: self.text,
            tokens: self.tokens,
            finish,
            taken_back: self.taken_back || !is_in,
            pending,
            prompt: count(&self.prompt),
            attended: self.attended,
            timings: self.timings,
        }
    }
}
