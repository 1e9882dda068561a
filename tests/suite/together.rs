//! Conversations with pictures whose steps go through the model together, in any order, with all
//! that can happen to them beside: each says what it says alone.
//!
//! Two things are otherwise than alone: its tokens lie in other cells, and its rows are multiplied
//! by the weights beside others. Both change the order of sums, and nothing else.

use std::cell::Cell as Looks;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hae::Result;
use hae::cache::{Cell, Pos};
use hae::controller::Controller;
use hae::engine::scripted::hashed;
use hae::engine::{Engine, Greedy, Sampler, SeqId, Token};
use hae::generate::together;
use hae::generate::{Finish, Generated, Generation, Saved, Segment, Session, Slot, StepHooks};
use hae::llama::{ContextOptions, LlamaEngine, Model};
use hae::policy::{self, Amount, DapMode, Limits, PolicyOptions};

use crate::model::{converted, engine, exact, load};
use crate::npz::max_abs_diff;

const TURNS: Pos = 3;

/// Keeps what it chose from.
#[derive(Clone, Default)]
struct Listening(Arc<Mutex<Vec<Vec<f32>>>>);

impl Sampler for Listening {
    fn sample(&mut self, logits: &[f32]) -> Result<Token> {
        self.0.lock().unwrap().push(logits.to_vec());
        Greedy.sample(logits)
    }
}

/// A conversation that draws its turns, and what becomes of them, by its seed.
struct Life {
    seed: u64,
    seq: SeqId,
    steps: Pos,
    turns: Pos,
    /// At which look the turn is cancelled, and looks so far.
    cancelled: Option<usize>,
    looks: Looks<usize>,
    said: Vec<Generated>,
    heard: Listening,
    /// Turns that were left, and how often it was saved and cleared.
    fates: [usize; 3],
}

impl Life {
    fn new(seed: u64, seq: SeqId) -> Self {
        Life {
            seed,
            seq,
            steps: 0,
            turns: 0,
            cancelled: None,
            looks: Looks::new(0),
            said: Vec::new(),
            heard: Listening::default(),
            fates: [0; 3],
        }
    }

    fn talk(
        &self,
        engine: &mut LlamaEngine,
        (policy, options): (&str, &PolicyOptions),
    ) -> Slot<'static> {
        let limits = Limits {
            n_layer: engine.model().n_layer(),
            n_cells: engine.n_cells(),
        };
        let policy = policy::create(policy, options, limits).unwrap();
        let controller = Controller::new(policy, limits.n_cells);
        let mut session = Session::new(engine, controller)
            .with_sequence(self.seq)
            .with_host_bin(1 << 20);
        session.sampler = Box::new(self.heard.clone());
        Slot::new(session.swap(()).0)
    }

    fn draw(&self, i: Pos, what: Pos, n: usize) -> usize {
        (hashed(self.seed, i, what).to_bits() % n as u64) as usize
    }

    fn is_over(&self) -> bool {
        self.turns > TURNS
    }

    fn prompt(&self, n_embd: usize) -> Vec<Segment> {
        let i = 1000 * self.turns;
        let words = |n: usize, of: Pos| {
            let token = |j| 3 + self.draw(i + j, of, 900) as Token;
            Segment::Tokens((1..).take(n).map(token).collect())
        };
        let mut prompt = vec![words(10 + self.draw(i, 1, 40), 2)];
        if self.draw(i, 3, 3) > 0 {
            let n = 8 + self.draw(i, 4, 30);
            let value = |j: usize| hashed(self.seed ^ 5, i, j as Pos) as f32 - 0.2;
            prompt.push(Segment::Image {
                embeddings: (0..n * n_embd).map(value).collect(),
                n,
                image: self.turns as u32,
                axes: None,
                separators: Vec::new(),
            });
            prompt.push(words(3, 5));
        }
        prompt
    }

    /// Before a step: the next turn, if none is going on, or something else.
    fn prepare(&mut self, talk: &mut Slot<'static>, engine: &mut LlamaEngine) {
        self.steps += 1;
        let fate = self.draw(self.steps, 0, 30);
        if fate < 3 {
            self.fates[fate] += 1;
            self.said.extend(talk.end());
        }
        let done = match fate {
            1 => talk.with(engine, |session| put_back(session, true)),
            2 => talk.with(engine, |session| put_back(session, false)),
            _ => Ok(()),
        };
        done.unwrap();
        if talk.is_over() {
            self.said.extend(talk.end());
            self.turns += 1;
            if self.is_over() {
                return;
            }
            let i = 1000 * self.turns;
            self.looks.set(0);
            self.cancelled = (self.draw(i, 6, 4) == 0).then(|| self.draw(i, 7, 12));
            let length = Some(8 + self.draw(i, 8, 20));
            let prompt = self.prompt(engine.model().n_embd());
            talk.begin(Generation::new(prompt, length));
        }
    }

    /// Positions in the cache, and on the host.
    fn held(&self, talk: &Slot<'_>) -> (Vec<Pos>, Vec<Pos>) {
        let session = talk.session().unwrap();
        let held = session.controller.ledger().entries();
        let mut held: Vec<Pos> = held.map(|e| e.pos).collect();
        held.sort_unstable();
        let host = session.host_bin().saved();
        (held, host.flat_map(|rows| rows.pos.clone()).collect())
    }
}

/// Empties the sequence; `again`: what it held comes back, as out of a file.
fn put_back(session: &mut Session<&mut LlamaEngine>, again: bool) -> Result<()> {
    session.abandon()?;
    session.follow_moves()?;
    let seq = session.sequence();
    let ledger = session.controller.ledger().save();
    let pos: Vec<Pos> = ledger.entries.iter().map(|e| e.pos).collect();
    let state = session.engine.save_of(seq)?;
    let history = session.history().clone();
    let host: Vec<Saved> = session.host_bin().saved().cloned().collect();
    session.engine.rewind(seq, 0, 0)?;
    session.controller.clear();
    session.forget();
    if again && !pos.is_empty() {
        let cells = session.engine.restore_tokens_of(seq, &state, &pos)?;
        session.controller.load(&ledger, &cells)?;
        session.resume(history, host)?;
    }
    Ok(())
}

/// A step of these, and a look at whether the books of all are right.
fn live(lives: &mut [Life], talks: &mut [Slot<'static>], engine: &mut LlamaEngine) {
    for (life, talk) in lives.iter_mut().zip(talks.iter_mut()) {
        if !life.is_over() {
            life.prepare(talk, engine);
        }
    }
    let lives: &[Life] = lives;
    let cancelled = |i: usize| {
        let Life {
            looks, cancelled, ..
        } = &lives[i];
        *cancelled == Some(looks.replace(looks.get() + 1))
    };
    let hooks = StepHooks {
        on_step: &mut |_, step| _ = step.unwrap(),
        cancelled: &cancelled,
        now: &|| Duration::ZERO,
    };
    together(engine, talks, hooks);
}

fn check_books(talks: &mut [Slot<'_>], engine: &mut LlamaEngine) {
    for talk in talks {
        let checked = talk.with(engine, |session| {
            session.follow_moves()?;
            let held = session.controller.ledger().entries();
            let held: Vec<(Cell, Pos)> = held.map(|e| (e.cell, e.pos)).collect();
            assert_eq!(held, session.engine.cells_of_seq(session.sequence())?);
            Ok(())
        });
        checked.unwrap();
    }
}

/// What came of it all, over several runs.
#[derive(Debug, Default)]
struct Tally {
    worst: f32,
    tokens: usize,
    cancelled: usize,
    recalled: usize,
    evicted: usize,
    fates: [usize; 3],
}

fn compare(
    model: &Model,
    options: &ContextOptions,
    policy: (&str, &PolicyOptions),
    seed: u64,
    tally: &mut Tally,
) {
    let life = |seq: SeqId| Life::new(10 * seed + seq as u64, seq);
    let alone = (0..3).map(|i| {
        let mut engine = engine(model, options.clone());
        let mut lives = [Life { seq: 0, ..life(i) }];
        let mut talks = [lives[0].talk(&mut engine, policy)];
        while !lives[0].is_over() {
            live(&mut lives, &mut talks, &mut engine);
        }
        let ([life], [talk]) = (lives, talks);
        (life, talk)
    });
    let alone: Vec<_> = alone.collect();
    let several = ContextOptions {
        n_seq_max: 3,
        ..options.clone()
    };
    let mut engine = engine(model, several);
    let mut lives: Vec<_> = (0..3).map(life).collect();
    let mut talks: Vec<_> = lives
        .iter()
        .map(|life| life.talk(&mut engine, policy))
        .collect();
    let mut draws = 0;
    while !lives.iter().all(Life::is_over) {
        draws += 1;
        let draw = |i| (hashed(seed, draws, i).to_bits() % 3) as usize;
        let (a, b) = (draw(1), draw(2));
        let some = a.min(b)..a.max(b) + 1;
        live(&mut lives[some.clone()], &mut talks[some], &mut engine);
        check_books(&mut talks, &mut engine);
    }
    for ((life, talk), (single, by_itself)) in lives.iter().zip(&talks).zip(&alone) {
        let (ours, theirs) = (life.heard.0.lock().unwrap(), single.heard.0.lock().unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs.iter()) {
            tally.worst = tally.worst.max(max_abs_diff(ours, theirs));
        }
        assert_eq!(life.said, single.said, "{policy:?} {seed}, {tally:?}");
        assert_eq!(life.held(talk), single.held(by_itself));
        let report = talk.session().unwrap().controller.report();
        tally.tokens += ours.len();
        tally.recalled += report.recalled;
        tally.evicted += report.cells.evicted.total();
        let ends = life.said.iter().map(|said| said.finish);
        tally.cancelled += ends.filter(|&end| end == Finish::Cancelled).count();
        (0..3).for_each(|i| tally.fates[i] += life.fates[i]);
    }
}

fn budget(dap_mode: DapMode) -> PolicyOptions {
    PolicyOptions {
        kv_budget: Some(Amount::Cells(48)),
        bin_size: 8,
        sinks: 2,
        recent: 8,
        dap_mode,
        ..PolicyOptions::default()
    }
}

#[test]
fn conversations_decoded_together_are_each_as_if_alone() {
    let model = load(converted("f32").0);
    let mut all = Tally::default();
    for (policy, policy_options) in [
        ("full", PolicyOptions::default()),
        ("h2o", budget(DapMode::Exact)),
        ("hae", budget(DapMode::Exact)),
        ("hae", budget(DapMode::Early)),
        ("hae", budget(DapMode::Midway)),
    ] {
        let score_layers = match policy {
            "full" => Vec::new(),
            _ => vec![0, 1],
        };
        // A cache that grows and shrinks moves tokens of all conversations.
        let options = ContextOptions {
            n_ubatch: 32,
            kv_size: Some(256),
            score_layers,
            ..exact(1024)
        };
        let before = all.worst;
        all.worst = 0.0;
        for seed in 0..2 {
            compare(&model, &options, (policy, &policy_options), seed, &mut all);
        }
        println!("{policy} {:?}: {}", policy_options.dap_mode, all.worst);
        all.worst = all.worst.max(before);
    }
    println!("{all:?}");
    assert!(all.worst < 5e-5, "{all:?}");
    assert!(all.fates.iter().all(|&n| n > 0) && all.cancelled > 0);
    assert!(all.evicted > 100 && all.recalled > 10);
}
