//! One slot: the conversation that it holds, and the question that it answers.

use std::collections::VecDeque;
use std::time::Duration;

use super::chooser::Notes;
use super::desk::Asker;
use super::stops::Stops;
use super::units::{self, Held, Piece, Unit};
use crate::cache::{Counts, Pos};
use crate::engine::{Engine, SeqId};
use crate::error::{Error, Result};
use crate::generate::{Segment, Session, Slot};
use crate::image::hd::Layout;
use crate::policy::{PolicySpec, evicts_nothing};

/// A question in a slot.
pub(super) struct Work<P> {
    pub asker: Asker,
    pub stage: Stage<P>,
    /// What goes in, behind what the slot holds.
    pub new: Vec<Unit>,
    pub n_predict: Option<usize>,
    /// Tokens of the answer that cells are reserved for; `None`: as many as there is room for.
    pub limit: Option<usize>,
    /// Cells that the conversation may take.
    pub reserved: usize,
    /// Its turn of the answer has to wait for cells.
    pub paused: bool,
    /// Tokens of the prompt in all.
    pub n_prompt: usize,
    /// Tokens of the answer.
    pub said: usize,
    /// Tokens of the answer when the patches were told last.
    pub seen: Option<usize>,
    pub watch: Option<Watch>,
    pub stops: Stops,
    pub notes: Notes,
    pub n_probs: usize,
    /// What was told of the answer.
    pub text: String,
    pub encode: Duration,
    /// Visual tokens of each picture that goes in.
    pub images: Vec<usize>,
}

/// Pictures that are watched.
pub(super) struct Watch {
    /// How the patches lie, by the picture's number in the prompt.
    pub layouts: Vec<Option<Layout>>,
}

/// How far a question is.
pub(super) enum Stage<P> {
    /// Pictures are encoded: pieces that are to come, and segments that are ready.
    Pictures(VecDeque<Piece<P>>, Vec<Segment>),
    /// The prompt goes in.
    Prompt,
    /// The answer comes.
    Answer,
}

/// A slot.
pub(super) struct Room<P> {
    pub slot: Slot<'static>,
    pub seq: SeqId,
    pub held: Held,
    /// Rows of what it holds.
    pub rows: usize,
    /// When it was last used, in questions; 0: never.
    pub used: u64,
    pub work: Option<Work<P>>,
}

impl<P> Room<P> {
    /// An idle one.
    pub fn new(slot: Slot<'static>, seq: SeqId, policy: PolicySpec) -> Self {
        Room {
            slot,
            seq,
            held: Held::nothing(policy),
            rows: 0,
            used: 0,
            work: None,
        }
    }

    /// Lets it hold this.
    pub fn hold(&mut self, held: Held) {
        self.rows = units::rows(&held.units);
        self.held = held;
    }

    /// Cells of its conversation.
    pub fn counts(&self) -> Counts {
        let counts = |session: &Session<()>| session.controller.ledger().counts();
        self.slot.session().map(counts).unwrap_or_default()
    }

    /// Cells that nobody else can have: those that it holds, and those that it was promised.
    pub fn claims(&self) -> usize {
        let promised = self.work.as_ref().map_or(0, |work| work.reserved);
        promised.max(self.counts().cells())
    }

    /// How many units of the prompt can stay in the cache. The last one always goes in: its logits are
    /// what an answer begins with. Where tokens were evicted, or may be, nothing but the end of the newest
    /// answer can be taken back, and where they move to other positions, nothing.
    pub fn usable(&self, prompt: &[Unit], policy: &PolicySpec) -> usize {
        let Held {
            policy: own,
            units,
            before_answer,
        } = &self.held;
        let Ok(session) = self.slot.session() else {
            return 0;
        };
        let common = units::common(units, prompt).min(prompt.len().saturating_sub(1));
        let enough = match evicts_nothing(&own.name) {
            true => 0,
            false if session.controller.shifts() => units.len(),
            false => (*before_answer).max(1),
        };
        match own == policy && common >= enough {
            true => common,
            false => 0,
        }
    }

    /// Lets it hold the first `kept` units and nothing else, if it can. False: it has to be cleared.
    ///
    /// # Errors
    /// As [`crate::generate::Session::take_back`].
    pub fn keep<E: Engine>(&mut self, engine: &mut E, kept: usize) -> Result<bool> {
        let whole = kept == self.held.units.len();
        let from = units::end(&self.held.units[..kept]);
        let done = self.slot.with(engine, |session| {
            if whole && session.controller.shifts() {
                return session.abandon().map(|()| true);
            }
            session.take_back(from)
        })?;
        if done {
            self.held.units.truncate(kept);
            self.held.before_answer = self.held.before_answer.min(kept);
            self.rows = units::rows(&self.held.units);
        }
        Ok(done)
    }

    /// Forgets the conversation. `tidy`: its memory is given back, too.
    ///
    /// # Errors
    /// The engine's own.
    pub fn clear<E: Engine>(&mut self, engine: &mut E, tidy: bool) -> Result<()> {
        self.hold(Held::nothing(self.held.policy.clone()));
        let seq = self.seq;
        self.slot.with(engine, |session| {
            // A trial run that a prompt was to go on from ends with it.
            let left = session.abandon();
            session.controller.clear();
            session.forget();
            session.engine.rewind(seq, 0, 0)?;
            if tidy {
                let mut moves = Vec::new();
                session.engine.compact(seq, &mut moves)?;
            }
            left
        })
    }

    /// Whether the books and the list say the same; where not, nothing could go on from there.
    pub fn check(&self) -> Result<()> {
        let session = self.slot.session()?;
        let (next, end) = (session.controller.next_pos(), units::end(&self.held.units));
        match next == end || session.controller.shifts() {
            true => Ok(()),
            false => Err(apart(next, end)),
        }
    }

    /// Cells that the answer may still take: what it holds, what may come back for it, and its tokens to
    /// come. `None` for an answer that has no limit.
    pub fn needs(&self) -> Option<Needs> {
        let (work, session) = (self.work.as_ref()?, self.slot.session().ok()?);
        let counts = session.controller.ledger().counts();
        let to_come = work.limit.map(|limit| limit.saturating_sub(work.said));
        let last = match to_come {
            Some(n) => Pos::try_from(work.said + n).unwrap_or(Pos::MAX),
            None => Pos::MAX,
        };
        let asks = session.controller.recalls() && session.controller.asks_back(last);
        let back = if asks { counts.evicted.vision } else { 0 };
        Some(Needs {
            held: counts.cells(),
            back,
            to_come,
        })
    }
}

/// See [`Room::needs`].
pub(super) struct Needs {
    pub held: usize,
    pub back: usize,
    pub to_come: Option<usize>,
}

fn apart(next: Pos, end: Pos) -> Error {
    Error::contract(format!(
        "a slot of {end} positions whose next one is {next}"
    ))
}
