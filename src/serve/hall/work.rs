//! The model's thread: a loop that takes questions into free slots, encodes a picture, and takes a step
//! of all slots together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::desk::{Asker, Errand, Errands, Shared};
use super::mind::Mind;
use super::pictures::Pictures;
use super::room::Room;
use super::units::{self, Piece, Unit};
use crate::cache::{BinOptions, Counts, PerModality};
use crate::controller::Controller;
use crate::engine::{Engine, SeqId};
use crate::error::Result;
use crate::generate::{Session, Slot};
use crate::policy::PolicySpec;
use crate::serve::ask::{Ask, SlotState, Stats, Told};

/// How long the thread sleeps at most where nothing can be done.
const SLEEP: Duration = Duration::from_millis(100);

/// How often a question that waits hears of it.
const NEWS: Duration = Duration::from_millis(200);

/// A question without a slot.
pub(super) struct Waiting<P> {
    pub ask: Ask,
    pub asker: Asker,
    /// Once it was read.
    pub prompt: Option<Prompt<P>>,
}

/// A prompt that was read, and the books of its policy.
pub(super) struct Prompt<P> {
    pub pieces: Vec<Piece<P>>,
    pub units: Vec<Unit>,
    pub policy: PolicySpec,
    pub controller: Controller,
}

pub(super) struct Worker<M: Mind> {
    pub mind: M,
    pub rooms: Vec<Room<M::Picture>>,
    /// Oldest first.
    pub waiting: VecDeque<Waiting<M::Picture>>,
    pub errands: Vec<Errands>,
    pub pictures: Pictures,
    /// Of questions that name none.
    pub policy: PolicySpec,
    pub stats: Stats,
    /// Questions that slots took.
    pub questions: u64,
    pub start: Instant,
    shared: Arc<Shared>,
    news: Instant,
}

impl<M: Mind> Worker<M> {
    /// `n_slots` idle slots, under this policy.
    ///
    /// # Errors
    /// As [`Mind::controller`].
    pub fn new(
        mut mind: M,
        n_slots: usize,
        policy: PolicySpec,
        picture_bytes: u64,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let mut rooms = Vec::with_capacity(n_slots);
        for seq in (0..).take(n_slots) {
            let controller = mind.controller(&policy)?;
            let slot = slot(&mut mind, controller, seq);
            rooms.push(Room::new(slot, seq, policy.clone()));
        }
        let now = Instant::now();
        Ok(Worker {
            mind,
            rooms,
            waiting: VecDeque::new(),
            errands: Vec::new(),
            pictures: Pictures::new(picture_bytes),
            policy,
            stats: Stats::default(),
            questions: 0,
            start: now,
            shared,
            news: now,
        })
    }

    /// Until the hall has closed.
    pub fn run(&mut self) {
        loop {
            let (arrived, errands) = self.shared.take();
            self.errands.extend(errands);
            self.waiting
                .extend(arrived.into_iter().map(|question| Waiting {
                    ask: question.ask,
                    asker: question.asker,
                    prompt: None,
                }));
            let (closes, cancelled) = self.shared.closes();
            if cancelled {
                self.cancel();
            }
            self.run_errands();
            self.tell_waiting();
            self.admit();
            self.publish();
            let encoded = self.encode_one();
            let stepped = self.step();
            if encoded || stepped {
                self.publish();
                continue;
            }
            if closes && self.waiting.is_empty() && self.rooms.iter().all(|r| r.work.is_none()) {
                self.publish();
                return;
            }
            self.shared.wait(SLEEP);
        }
    }

    /// Ends everything: answers as they are, questions without one.
    fn cancel(&mut self) {
        self.waiting.clear();
        self.errands.clear();
        for i in 0..self.rooms.len() {
            self.cut_short(i);
        }
    }

    /// Questions that nobody waits for any more leave; the others hear that they wait, and so do answers
    /// that wait for cells.
    fn tell_waiting(&mut self) {
        if self.news.elapsed() < NEWS {
            return;
        }
        self.news = Instant::now();
        for (before, waiting) in self.waiting.iter_mut().enumerate() {
            waiting.asker.tell(Told::Waits { before });
        }
        self.waiting.retain(|waiting| waiting.asker.listens());
        for i in 0..self.rooms.len() {
            let Some(work) = self.rooms[i].work.as_mut().filter(|work| work.paused) else {
                continue;
            };
            work.asker.tell(Told::Waits { before: 0 });
            if !work.asker.listens() {
                self.cut_short(i);
            }
        }
    }

    fn run_errands(&mut self) {
        let (ready, rest) = std::mem::take(&mut self.errands)
            .into_iter()
            .partition(|errand| {
                let counts = matches!(errand.errand, Errand::Count(_));
                counts || self.rooms[errand.slot].work.is_none()
            });
        self.errands = rest;
        let ready: Vec<Errands> = ready;
        if ready.is_empty() {
            return;
        }
        let run = |one: Errands| (self.errand(one.slot, &one.errand), one.reply);
        let done: Vec<_> = ready.into_iter().map(run).collect();
        self.publish();
        for (done, reply) in done {
            // Whoever asked may have gone.
            drop(reply.send(done));
        }
    }

    fn errand(&mut self, i: usize, errand: &Errand) -> Result<(usize, u64)> {
        let tokens = |room: &Room<M::Picture>| room.rows;
        match errand {
            Errand::Count(prompt) => {
                let pieces = self.mind.read(prompt)?;
                Ok((units::rows(&units::units(&pieces)), 0))
            }
            Errand::Save(file) => {
                let room = &mut self.rooms[i];
                let bytes = self.mind.save(&mut room.slot, &room.held, file)?;
                Ok((tokens(room), bytes))
            }
            Errand::Restore(file) => {
                let (saved, cells, bytes) = self.mind.open(file)?;
                self.clear(i)?;
                self.make_room(i, cells, &[]);
                self.used(i);
                let room = &mut self.rooms[i];
                let restored = self.mind.restore(&mut room.slot, saved);
                let restored = restored.and_then(|held| {
                    room.hold(held);
                    room.check()
                });
                if let Err(error) = restored {
                    self.clear(i)?;
                    return Err(error);
                }
                Ok((tokens(&self.rooms[i]), bytes))
            }
            Errand::Erase => {
                let tokens = tokens(&self.rooms[i]);
                self.clear(i)?;
                Ok((tokens, 0))
            }
        }
    }

    /// Notes that a slot is used now.
    pub fn used(&mut self, i: usize) {
        self.questions += 1;
        self.rooms[i].used = self.questions;
    }

    /// Forgets what a slot holds, under its policy, and gives memory back.
    pub fn clear(&mut self, i: usize) -> Result<()> {
        self.leave_books(i);
        self.rooms[i].clear(self.mind.engine(), true)
    }

    /// Counts what the books of a slot say before they begin anew.
    pub fn leave_books(&mut self, i: usize) {
        let counts = self.rooms[i].counts();
        self.stats.evicted += counts.evicted.total() as u64;
        self.stats.restored += counts.restored.total() as u64;
        self.stats.recalled += counts.recalled.total() as u64;
    }

    /// Cells that no slot claims.
    pub fn free(&self) -> usize {
        let claimed: usize = self.rooms.iter().map(Room::claims).sum();
        self.mind.look().n_cells().saturating_sub(claimed)
    }

    /// A slot's equal share of all cells.
    pub fn share(&self) -> usize {
        self.mind.look().n_cells() / self.rooms.len().max(1)
    }

    /// Forgets what idle slots hold, those first that were idle longest, until there are `cells` free beside
    /// what slot `own` claims. `spared`: those are the last, and not at all as long as others work, which will
    /// leave cells. False: there cannot be as many, and nothing was forgotten.
    pub fn make_room(&mut self, own: usize, cells: usize, spared: &[usize]) -> bool {
        let works = self.rooms.iter().any(|room| room.work.is_some());
        let idle = |(i, room): &(usize, &Room<M::Picture>)| {
            let spared = works && spared.contains(i);
            *i != own && room.work.is_none() && room.claims() > 0 && !spared
        };
        let idle = self.rooms.iter().enumerate().filter(idle);
        let mut idle: Vec<_> = idle
            .map(|(i, room)| (spared.contains(&i), room.used, i, room.claims()))
            .collect();
        let held: usize = idle.iter().map(|(.., cells)| cells).sum();
        if self.free() + held < cells {
            return false;
        }
        idle.sort_unstable();
        for (_, _, i, _) in idle {
            if self.free() >= cells {
                break;
            }
            if self.clear(i).is_err() {
                return false;
            }
        }
        self.free() >= cells
    }

    /// Tells how things are.
    pub fn publish(&mut self) {
        let states = self
            .rooms
            .iter()
            .enumerate()
            .map(|(id, room)| state(id, room));
        let slots: Vec<SlotState> = states.collect();
        let idle = slots.iter().filter(|slot| !slot.is_processing).count();
        let engine = self.mind.look();
        let bytes = engine.kv_bytes();
        let cells = slots
            .iter()
            .fold(Counts::default(), |all, slot| add(all, slot.cells));
        let host = |room: &Room<M::Picture>| {
            let session = room.slot.session().ok();
            session.map_or(0, |session| session.store().bytes_in_ram())
        };
        let stats = Stats {
            cells,
            n_cells: engine.n_cells(),
            bytes_in_use: bytes.per_cell * cells.cells() as u64,
            bytes_allocated: bytes.allocated,
            bytes_host: self.rooms.iter().map(host).sum(),
            evicted: self.stats.evicted + cells.evicted.total() as u64,
            restored: self.stats.restored + cells.restored.total() as u64,
            recalled: self.stats.recalled + cells.recalled.total() as u64,
            processing: slots.len() - idle,
            pictures: self.pictures.stats(),
            ..self.stats.clone()
        };
        self.shared.publish(self.waiting.len(), idle, slots, stats);
    }
}

/// A slot of the engine for books that are empty.
pub(super) fn slot<M: Mind>(mind: &mut M, controller: Controller, seq: SeqId) -> Slot<'static> {
    let bin = match controller.recalls() {
        true => mind.bin(),
        false => BinOptions::OFF,
    };
    let session = Session::new(mind.engine(), controller);
    let session = session.with_sequence(seq).with_store(bin);
    Slot::new(session.swap(()).0)
}

fn state<P>(id: usize, room: &Room<P>) -> SlotState {
    let work = room.work.as_ref();
    SlotState {
        id,
        is_processing: work.is_some(),
        n_prompt: work.map_or(0, |work| work.n_prompt),
        n_decoded: work.map_or(0, |work| work.said),
        cells: room.counts(),
        policy: room.held.policy.name.clone(),
        n_held: room.rows,
        n_reserved: room.claims(),
    }
}

fn add(a: Counts, b: Counts) -> Counts {
    let sum = |a: PerModality, b: PerModality| PerModality {
        text: a.text + b.text,
        vision: a.vision + b.vision,
    };
    Counts {
        live: sum(a.live, b.live),
        binned: sum(a.binned, b.binned),
        evicted: sum(a.evicted, b.evicted),
        restored: sum(a.restored, b.restored),
        recalled: sum(a.recalled, b.recalled),
        peak: a.peak + b.peak,
    }
}
