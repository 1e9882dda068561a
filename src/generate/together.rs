//! Several conversations on one engine: a step of each, their batches in as few passes over the
//! model's weights as can be.

use std::borrow::BorrowMut;
use std::time::Duration;

use super::Session;
use super::answer::Generated;
use super::generation::{Generation, Progress, Step, Want};
use crate::engine::{Engine, Part, Pass};
use crate::error::{Error, Result};

/// A conversation that shares an engine with others, and its turn (what llama.cpp's server calls a
/// slot). It has the engine for parts of a step; between them it does without.
pub struct Slot<'p> {
    /// Lost only if a call of it ended in a panic.
    session: Option<Session<()>>,
    generation: Option<Generation<'p>>,
}

impl<'p> Slot<'p> {
    /// A conversation that says nothing yet.
    pub fn new(session: Session<()>) -> Self {
        Slot {
            session: Some(session),
            generation: None,
        }
    }

    /// Begins a turn, in the place of one that is not over: what that one said is given back.
    pub fn begin(&mut self, generation: Generation<'p>) -> Option<Generated> {
        let left = self.generation.replace(generation);
        left.map(Generation::into_answer)
    }

    /// Ends the turn, over or not, and gives what was said.
    pub fn end(&mut self) -> Option<Generated> {
        self.generation.take().map(Generation::into_answer)
    }

    /// Whether there is nothing to do for it: no turn, or one that is over.
    pub fn is_over(&self) -> bool {
        self.generation.as_ref().is_none_or(Generation::is_over)
    }

    /// The conversation by itself.
    ///
    /// # Errors
    /// [`Error::Contract`] when an earlier call ended in a panic.
    pub fn session(&self) -> Result<&Session<()>> {
        self.session.as_ref().ok_or_else(lost)
    }

    /// Lends it the engine, for what is not a step of a turn.
    ///
    /// # Errors
    /// Those of `act`, and as [`Slot::session`].
    pub fn with<'e, E: Engine, R>(
        &mut self,
        engine: &'e mut E,
        act: impl FnOnce(&mut Session<&'e mut E>) -> Result<R>,
    ) -> Result<R> {
        let (mut session, ()) = self.session.take().ok_or_else(lost)?.swap(engine);
        let done = act(&mut session);
        self.session = Some(session.swap(()).0);
        done
    }

    /// A part of its turn's step, if it has a turn.
    fn on<'e, E: Engine, R>(
        &mut self,
        engine: &'e mut E,
        act: impl FnOnce(&mut Generation<'p>, &mut Session<&'e mut E>) -> Result<R>,
    ) -> Result<Option<R>> {
        let Some(mut generation) = self.generation.take() else {
            return Ok(None);
        };
        let done = self.with(engine, |session| act(&mut generation, session));
        self.generation = self.session.is_some().then_some(generation);
        done.map(Some)
    }

    /// The batch that is wanted.
    fn part(&mut self) -> Result<Part<'_>> {
        let session = self.session.as_mut().ok_or_else(lost)?;
        let generation = self.generation.as_ref();
        session.part(generation.map_or(&[], Generation::prompt))
    }
}

fn lost() -> Error {
    Error::contract("a conversation that was lost in a panic")
}

/// What the steps ask of their surroundings. Conversations are known by their places.
pub struct StepHooks<'a> {
    /// Gets what the step of a conversation did. Behind an error its turn is over.
    pub on_step: &'a mut dyn FnMut(usize, Result<Progress<'_>>),
    /// Asked as in [`Generation::next`].
    pub cancelled: &'a dyn Fn(usize) -> bool,
    /// A clock that never runs backwards, from any starting point.
    pub now: &'a dyn Fn() -> Duration,
}

/// A step of every conversation whose turn is not over, each as [`Generation::next`] would take it.
/// Batches that can go through the model together do ([`Pass`]); where these find no room or fail,
/// each goes by itself. Gives how many conversations had a step: none when all turns are over.
pub fn together<'p, E: Engine>(
    engine: &mut E,
    slots: &mut [impl BorrowMut<Slot<'p>>],
    mut hooks: StepHooks<'_>,
) -> usize {
    let mut slots: Vec<&mut Slot<'p>> = slots.iter_mut().map(BorrowMut::borrow_mut).collect();
    let slots = slots.as_mut_slice();
    let empty = Pass::new(engine.n_batch(), engine.capabilities().scores_by_part);
    let mut waiting = Vec::new();
    let mut steps = 0;
    for (i, slot) in slots.iter_mut().enumerate() {
        let cancelled = || (hooks.cancelled)(i);
        let wanted = slot.on(engine, |turn, session| {
            turn.want(session, &cancelled, hooks.now)
        });
        match wanted {
            Ok(None | Some(Want::Nothing)) => continue,
            Ok(Some(Want::Batch)) => waiting.push(i),
            Ok(Some(Want::Told(step))) => hooks.tell(i, slot, Ok(Some(step))),
            Err(error) => hooks.tell(i, slot, Err(error)),
        }
        steps += 1;
    }
    while !waiting.is_empty() {
        let mut pass = empty;
        let joins = |&i: &usize| {
            let part = slots[i].part();
            part.map_or(true, |part| pass.takes(&part.batch))
        };
        let (group, rest): (Vec<usize>, Vec<usize>) = waiting.into_iter().partition(joins);
        take_pass(engine, slots, &group, &mut hooks);
        waiting = rest;
    }
    steps
}

/// One pass of the batches of these conversations, which are ascending.
fn take_pass<E: Engine>(
    engine: &mut E,
    slots: &mut [&mut Slot<'_>],
    group: &[usize],
    hooks: &mut StepHooks<'_>,
) {
    let decoded = decode(engine, slots, group);
    if decoded.is_ok() || group.len() == 1 {
        return settle(engine, slots, group, decoded, hooks);
    }
    for one in group.chunks(1) {
        let decoded = decode(engine, slots, one);
        settle(engine, slots, one, decoded, hooks);
    }
}

fn decode<E: Engine>(engine: &mut E, slots: &mut [&mut Slot<'_>], group: &[usize]) -> Result<()> {
    let each = slots.iter_mut().enumerate();
    let own = each.filter(|(i, _)| group.binary_search(i).is_ok());
    let parts = own.map(|(_, slot)| slot.part());
    engine.decode_parts(&mut parts.collect::<Result<Vec<_>>>()?)
}

/// After a pass: all write down what came of it before any of them acts, since that may move the
/// others' tokens. An error is that of a single one.
fn settle<E: Engine>(
    engine: &mut E,
    slots: &mut [&mut Slot<'_>],
    group: &[usize],
    mut decoded: Result<()>,
    hooks: &mut StepHooks<'_>,
) {
    let mut recorded = Vec::with_capacity(group.len());
    for &i in group {
        let decoded = std::mem::replace(&mut decoded, Ok(()));
        let done = slots[i].on(engine, |turn, session| turn.record(session, decoded));
        match done {
            Ok(_) => recorded.push(i),
            Err(error) => hooks.tell(i, slots[i], Err(error)),
        }
    }
    for i in recorded {
        let cancelled = || (hooks.cancelled)(i);
        let step = slots[i].on(engine, |turn, session| {
            turn.act(session, &cancelled, hooks.now)
        });
        hooks.tell(i, slots[i], step);
    }
}

impl StepHooks<'_> {
    fn tell(&mut self, i: usize, slot: &mut Slot<'_>, step: Result<Option<Step>>) {
        match (step, &mut slot.generation) {
            (Err(error), _) => (self.on_step)(i, Err(error)),
            (Ok(Some(step)), Some(turn)) => (self.on_step)(i, Ok(turn.progress(step))),
            _ => {}
        }
    }
}
