//! What the loop does between questions: a picture is encoded, all slots take a step, and who asked
//! hears of it.

use std::time::Duration;

use super::chooser::Noted;
use super::desk::Asker;
use super::mind::Mind;
use super::room::{Needs, Room, Stage, Work};
use super::units::{self, Piece, Unit};
use super::work::Worker;
use crate::answer::{Answer, Bin, Evicted, Kv, PolicyReport, Timings, Tokens};
use crate::engine::{Engine, Token, Vocabulary};
use crate::error::{Error, Result};
use crate::generate::{
    Finish, Generated, Generation, Length, Progress, Segment, StepHooks, together,
};
use crate::serve::ask::{Choice, End, Told};
use crate::turn::numbered;

/// What a step of a slot did.
enum Did {
    Prompt { done: usize, rows: usize },
    Token(Token, String),
    End(Finish, String),
    Failed(Error),
}

impl Did {
    fn of(step: Result<Progress<'_>>) -> Self {
        match step {
            Ok(Progress::Prompt { done, rows }) => Did::Prompt { done, rows },
            Ok(Progress::Token { token, text }) => Did::Token(token, text.to_owned()),
            Ok(Progress::End { finish, text }) => Did::End(finish, text.to_owned()),
            Err(error) => Did::Failed(error),
        }
    }
}

impl<M: Mind> Worker<M> {
    /// Makes prompts ready to go in. One picture is encoded at most: the other slots have their step
    /// before the next one. False: there was nothing to do.
    pub fn encode_one(&mut self) -> bool {
        let mut encoded = false;
        let mut any = false;
        for i in 0..self.rooms.len() {
            let Some(work) = self.rooms[i].work.as_ref() else {
                continue;
            };
            if !matches!(work.stage, Stage::Pictures(..)) {
                continue;
            }
            any = true;
            if !work.asker.listens() {
                self.cut_short(i);
                continue;
            }
            if let Err(error) = self.make_ready(i, &mut encoded) {
                self.fail(i, error);
            }
        }
        any
    }

    /// The same of one slot, as far as that goes without a second picture.
    fn make_ready(&mut self, i: usize, encoded: &mut bool) -> Result<()> {
        let room = &mut self.rooms[i];
        let before = units::pictures(&room.held.units);
        let Some(work) = &mut room.work else {
            return Ok(());
        };
        let rows = units::rows(&work.new);
        let Stage::Pictures(pieces, segments) = &mut work.stage else {
            return Ok(());
        };
        while let Some(piece) = pieces.pop_front() {
            let (unit, picture) = match piece {
                Piece::Tokens(tokens) => {
                    segments.push(Segment::Tokens(tokens));
                    continue;
                }
                Piece::Picture(unit, picture) => (unit, picture),
            };
            let number = before + work.images.len();
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let Unit::Picture { content, .. } = &unit else {
                return Err(Error::contract("a picture that is a token"));
            };
            if let Some(known) = self.pictures.get(content) {
                segments.push(numbered(known, number));
                work.images.push(unit.rows());
                continue;
            }
            if *encoded {
                pieces.push_front(Piece::Picture(unit, picture));
                // Who went away is noticed.
                work.asker.tell(Told::Prompt { done: 0, rows });
                return Ok(());
            }
            *encoded = true;
            let start = self.start.elapsed();
            let segment = self.mind.encode(&picture)?;
            let took = self.start.elapsed().saturating_sub(start);
            work.encode += took;
            self.pictures.add(*content, &segment, took);
            segments.push(numbered(&segment, number));
            work.images.push(unit.rows());
        }
        let segments = std::mem::take(segments);
        work.stage = Stage::Prompt;
        let all = units::end(&room.held.units) as usize + units::end(&work.new) as usize;
        let length = Length {
            n_predict: work.n_predict,
            reach: self.mind.reach().map(|reach| reach.saturating_sub(all)),
        };
        room.slot.begin(Generation::new(segments, length));
        Ok(())
    }

    /// A step of every slot that may take one. False: none had one.
    pub fn step(&mut self) -> bool {
        self.promise();
        let start = self.start;
        let mut did = Vec::new();
        let mut who = Vec::new();
        let mut slots = Vec::new();
        let mut listens = Vec::new();
        for (i, room) in self.rooms.iter_mut().enumerate() {
            let Some(work) = room.work.as_ref() else {
                continue;
            };
            if work.paused || matches!(work.stage, Stage::Pictures(..)) {
                continue;
            }
            who.push(i);
            listens.push(work.asker.listens());
            slots.push(&mut room.slot);
        }
        if who.is_empty() {
            return false;
        }
        let hooks = StepHooks {
            on_step: &mut |at, step| did.push((at, Did::of(step))),
            cancelled: &|at| !listens[at],
            now: &|| -> Duration { start.elapsed() },
        };
        together(self.mind.engine(), &mut slots, hooks);
        self.stats.steps += 1;
        self.stats.slot_steps += who.len() as u64;
        for (at, did) in did {
            self.heard(who[at], did);
        }
        for i in who {
            let work = self.rooms[i].work.as_ref();
            if work.is_some_and(|work| !work.asker.listens()) {
                self.cut_short(i);
            }
        }
        true
    }

    /// Promises cells to the answers that go on: what they hold, what may come back for them, and the
    /// tokens that they were asked for; one more token to those without a limit. One that finds no cell waits.
    /// Where all do, the largest takes its step nevertheless, which is its last.
    fn promise(&mut self) {
        let mut waits = Vec::new();
        let mut goes_on = false;
        for i in 0..self.rooms.len() {
            let room = &self.rooms[i];
            let Some(work) = &room.work else {
                continue;
            };
            if !matches!(work.stage, Stage::Answer) {
                goes_on = true;
                continue;
            }
            let Some(needs) = room.needs() else {
                continue;
            };
            match self.promised(i, &needs, work.reserved) {
                Some(cells) => {
                    goes_on = true;
                    self.set(i, cells, false);
                }
                None => waits.push((needs.held, i)),
            }
        }
        waits.sort_unstable();
        let last = waits.last().map(|&(_, i)| i).filter(|_| !goes_on);
        for (held, i) in waits {
            self.set(i, held, Some(i) != last);
        }
    }

    /// `None`: not even one more.
    fn promised(&mut self, i: usize, needs: &Needs, before: usize) -> Option<usize> {
        let Needs { held, back, .. } = *needs;
        if let Some(to_come) = needs.to_come {
            return Some(before.min(held + back + to_come.max(1)));
        }
        for wanted in [held + back + 1, held + 1] {
            if wanted <= before {
                return Some(before.min(self.share().max(wanted)));
            }
            if self.make_room(i, wanted - before, &[]) {
                return Some(wanted);
            }
        }
        None
    }

    fn set(&mut self, i: usize, cells: usize, paused: bool) {
        let room = &mut self.rooms[i];
        if let Some(work) = &mut room.work {
            work.reserved = cells;
            work.paused = paused;
        }
        // A slot without its conversation says so at its next step.
        let shared = room.slot.with(self.mind.engine(), |session| {
            session.set_share(cells);
            Ok(())
        });
        drop(shared);
    }

    /// Its prompt is in and pruned: whoever waits for cells finds those that it left.
    fn answers(&mut self, i: usize) {
        let room = &mut self.rooms[i];
        let Some(work) = &mut room.work else {
            return;
        };
        if matches!(work.stage, Stage::Answer) {
            return;
        }
        work.stage = Stage::Answer;
        let before = work.reserved;
        let needs = room.needs();
        if let Some(cells) = needs.and_then(|needs| self.promised(i, &needs, before)) {
            self.set(i, cells, false);
        }
    }

    fn heard(&mut self, i: usize, did: Did) {
        let (text, token) = match did {
            Did::Failed(error) => return self.fail(i, error),
            Did::Prompt { done, rows } => {
                if let Some(work) = &mut self.rooms[i].work {
                    work.asker.tell(Told::Prompt { done, rows });
                }
                return;
            }
            Did::Token(token, text) => (text, Ok(token)),
            Did::End(finish, text) => (text, Err(finish)),
        };
        self.answers(i);
        let Some(work) = &mut self.rooms[i].work else {
            return;
        };
        let (told, stop) = work.stops.add(&text);
        work.text.push_str(&told);
        let finish = match token {
            Ok(token) => {
                work.said += 1;
                let noted = work.notes.take();
                let words = self.mind.look().vocabulary();
                let (chosen, likeliest) = choices(words, noted, work.n_probs);
                work.asker.tell(Told::Said {
                    token,
                    text: told,
                    chosen,
                    likeliest,
                });
                match stop {
                    Some(stop) => return self.finish(i, Some(End::Stop(stop)), String::new()),
                    None => return self.tell_seen(i),
                }
            }
            Err(finish) => finish,
        };
        let mut rest = told;
        let end = match stop {
            Some(stop) => End::Stop(stop),
            None => {
                let held = work.stops.rest();
                work.text.push_str(&held);
                rest.push_str(&held);
                End::Finish(finish)
            }
        };
        self.finish(i, Some(end), rest);
    }

    /// Ends what a slot does, as if it had been cancelled just now.
    pub fn cut_short(&mut self, i: usize) {
        let Some(work) = &mut self.rooms[i].work else {
            return;
        };
        let rest = work.stops.rest();
        work.text.push_str(&rest);
        self.finish(i, None, rest);
    }

    /// The end of an answer; without one, it was cancelled.
    fn finish(&mut self, i: usize, end: Option<End>, rest: String) {
        self.tell_seen_last(i);
        let Some(work) = self.rooms[i].work.take() else {
            return;
        };
        let Work {
            mut asker,
            new,
            text,
            encode,
            images,
            ..
        } = work;
        let answer = self.conclude(i, &new, encode, images);
        let checked = answer.and_then(|answer| self.rooms[i].check().map(|()| answer));
        match checked {
            Ok(answer) => {
                let finish = match end {
                    Some(End::Finish(finish)) => finish,
                    Some(End::Stop(_)) => Finish::Eog,
                    None => Finish::Cancelled,
                };
                let end = end.unwrap_or(End::Finish(Finish::Cancelled));
                let answer = Box::new(Answer {
                    text,
                    finish,
                    ..answer
                });
                // Who hears of the end can ask again, and finds it counted.
                self.publish();
                asker.tell(Told::Ended { end, rest, answer });
            }
            Err(error) => self.give_up(i, asker, error),
        }
    }

    /// Notes what a slot holds after its turn, which is over now, and gives the answer and what it cost.
    fn conclude(
        &mut self,
        i: usize,
        new: &[Unit],
        encode: Duration,
        images: Vec<usize>,
    ) -> Result<Answer> {
        let room = &mut self.rooms[i];
        let generated = room.slot.end().unwrap_or_else(not_begun);
        let engine = self.mind.engine();
        let (kv, report, bin) = room.slot.with(engine, |session| {
            session.abandon()?;
            session.set_share(usize::MAX);
            let report = session.controller.report();
            let kv = Kv::of(session, &report);
            Ok((kv, report, Bin::of(session.store())))
        })?;
        if !generated.taken_back {
            note(room, new, &generated);
            self.stats.prompt_tokens += generated.prompt.total() as u64;
        }
        let times = &generated.timings;
        self.stats.predicted_tokens += generated.tokens.len() as u64;
        self.stats.prompt_seconds += (times.probe + times.prefill).as_secs_f64();
        self.stats.predicted_seconds += times.decode.as_secs_f64();
        Ok(Answer {
            text: String::new(),
            finish: generated.finish,
            taken_back: generated.taken_back,
            tokens: Tokens {
                prompt: generated.prompt,
                images,
                generated: generated.tokens.len(),
            },
            kv,
            attended: generated.attended.shares(),
            timings: Timings::of(&generated.timings, encode),
            evicted: Evicted::of(&report),
            bin,
            policy: PolicyReport::of(report),
        })
    }

    /// A question that went wrong: the slot is empty then.
    pub fn fail(&mut self, i: usize, error: Error) {
        if let Some(work) = self.rooms[i].work.take() {
            self.give_up(i, work.asker, error);
        }
    }

    fn give_up(&mut self, i: usize, mut asker: Asker, error: Error) {
        drop(self.rooms[i].slot.end());
        // The error that led here says more than one that follows from it.
        drop(self.clear(i));
        self.publish();
        asker.tell(Told::Failed(error));
    }
}

/// Adds what went in to what a slot holds.
fn note<P>(room: &mut Room<P>, new: &[Unit], generated: &Generated) {
    let held = &mut room.held;
    held.units.extend_from_slice(new);
    held.before_answer = held.units.len();
    let fed = generated.tokens.len() - usize::from(generated.pending.is_some());
    let tokens = generated.tokens[..fed].iter().copied();
    held.units.extend(tokens.map(Unit::Token));
    room.rows += units::rows(new) + fed;
}

/// A turn that ended before its prompt began.
fn not_begun() -> Generated {
    Generation::new(Vec::new(), None).into_answer()
}

fn choices(
    words: Option<&dyn Vocabulary>,
    noted: Noted,
    n_probs: usize,
) -> (Option<Choice>, Vec<Choice>) {
    if n_probs == 0 {
        return (None, Vec::new());
    }
    let choice = |(token, logprob)| {
        let mut bytes = Vec::new();
        // It is one of the vocabulary, since it has a logit; one without a text says nothing.
        if words.is_none_or(|words| words.piece(token, &mut bytes).is_err()) {
            bytes.clear();
        }
        Choice {
            token,
            bytes,
            logprob,
        }
    };
    (
        noted.chosen.map(choice),
        noted.likeliest.into_iter().map(choice).collect(),
    )
}
