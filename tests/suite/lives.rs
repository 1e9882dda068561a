//! Conversations that draw their turns, and what becomes of them, by a seed: in one engine beside
//! others as each by itself. For the scripted engine, where all is equal, and for llama.cpp.

use std::cell::Cell as Looks;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hae::Result;
use hae::cache::{BinOptions, Cell, Pos};
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::engine::{Engine, Greedy, Sampler, SeqId, Token};
use hae::generate::together;
use hae::generate::{Generated, Generation, Saved, Segment, Session, Slot, StepHooks};
use hae::llama::{LlamaEngine, SequenceState};
use hae::policy::{self, Amount, DapMode, Limits, PolicyOptions};

const TURNS: Pos = 3;

/// An engine that several conversations live in.
pub trait World: Engine {
    /// What a file would keep of a sequence.
    type Kept;
    fn n_layer(&self) -> u32;
    fn n_embd(&self) -> usize;
    /// By cell.
    fn held_by(&self, seq: SeqId) -> Vec<(Cell, Pos)>;
    fn keep(&mut self, seq: SeqId, cells: &[Cell]) -> Result<Self::Kept>;
    /// Gives the cells of these positions.
    fn bring_back(&mut self, seq: SeqId, kept: &Self::Kept, pos: &[Pos]) -> Result<Vec<Cell>>;
}

impl World for Scripted {
    type Kept = Vec<u8>;

    fn n_layer(&self) -> u32 {
        2
    }

    fn n_embd(&self) -> usize {
        3
    }

    fn held_by(&self, seq: SeqId) -> Vec<(Cell, Pos)> {
        self.occupied_by(seq)
    }

    fn keep(&mut self, _: SeqId, cells: &[Cell]) -> Result<Vec<u8>> {
        let mut rows = Vec::new();
        self.save_rows(cells, &mut rows)?;
        Ok(rows)
    }

    fn bring_back(&mut self, seq: SeqId, kept: &Vec<u8>, pos: &[Pos]) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        self.restore_rows(seq, pos, kept, &mut cells)?;
        Ok(cells)
    }
}

impl World for LlamaEngine {
    type Kept = SequenceState;

    fn n_layer(&self) -> u32 {
        self.model().n_layer()
    }

    fn n_embd(&self) -> usize {
        self.model().n_embd()
    }

    fn held_by(&self, seq: SeqId) -> Vec<(Cell, Pos)> {
        self.cells_of_seq(seq).unwrap()
    }

    fn keep(&mut self, seq: SeqId, _: &[Cell]) -> Result<SequenceState> {
        self.save_of(seq)
    }

    fn bring_back(&mut self, seq: SeqId, kept: &SequenceState, pos: &[Pos]) -> Result<Vec<Cell>> {
        match pos {
            [] => Ok(Vec::new()),
            pos => self.restore_tokens_of(seq, kept, pos),
        }
    }
}

/// Keeps what it chose from.
#[derive(Clone, Default)]
struct Listening(Arc<Mutex<Vec<Vec<f32>>>>);

impl Sampler for Listening {
    fn sample(&mut self, logits: &[f32]) -> Result<Token> {
        self.0.lock().unwrap().push(logits.to_vec());
        Greedy.sample(logits)
    }
}

/// One conversation.
pub struct Life {
    seed: u64,
    seq: SeqId,
    steps: Pos,
    turns: Pos,
    /// At which look the turn is cancelled, and looks so far.
    cancelled: Option<usize>,
    looks: Looks<usize>,
    said: Vec<Generated>,
    heard: Listening,
    /// How often a turn was left where it was, and the conversation saved and cleared.
    pub fates: [usize; 3],
    slot: Slot<'static>,
}

impl Life {
    fn new<W: World>(engine: &mut W, seed: u64, seq: SeqId, policy: &Policy) -> Self {
        let limits = Limits {
            n_layer: engine.n_layer(),
            n_cells: engine.n_cells(),
        };
        let heard = Listening::default();
        let policy = policy::create(policy.name, &policy.options, limits).unwrap();
        let controller = Controller::new(policy, limits.n_cells);
        let mut session = Session::new(engine, controller)
            .with_sequence(seq)
            .with_store(BinOptions::ram(1 << 20));
        session.sampler = Box::new(heard.clone());
        Life {
            seed,
            seq,
            steps: 0,
            turns: 0,
            cancelled: None,
            looks: Looks::new(0),
            said: Vec::new(),
            heard,
            fates: [0; 3],
            slot: Slot::new(session.swap(()).0),
        }
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
    fn prepare<W: World>(&mut self, engine: &mut W) {
        self.steps += 1;
        let fate = self.draw(self.steps, 0, 40);
        if fate < 3 {
            self.fates[fate] += 1;
            self.said.extend(self.slot.end());
        }
        let done = match fate {
            1 => self.slot.with(engine, |session| put_back(session, true)),
            2 => self.slot.with(engine, |session| put_back(session, false)),
            _ => Ok(()),
        };
        done.unwrap();
        if self.slot.is_over() {
            self.said.extend(self.slot.end());
            self.turns += 1;
            if self.is_over() {
                return;
            }
            let i = 1000 * self.turns;
            self.looks.set(0);
            self.cancelled = (self.draw(i, 6, 3) == 0).then(|| self.draw(i, 7, 12));
            let length = Some(5 + self.draw(i, 8, 25));
            let prompt = self.prompt(engine.n_embd());
            self.slot.begin(Generation::new(prompt, length));
        }
        assert_eq!(self.session().sequence(), self.seq);
    }

    pub fn session(&self) -> &Session<()> {
        self.slot.session().unwrap()
    }

    /// All that it said.
    pub fn said(&self) -> &[Generated] {
        &self.said
    }

    /// What each token was chosen from, `[tokens][vocab]`.
    pub fn heard(&self) -> Vec<Vec<f32>> {
        self.heard.0.lock().unwrap().clone()
    }

    /// Positions in the cache, and on the host.
    pub fn held(&self) -> (Vec<Pos>, Vec<Pos>) {
        let session = self.session();
        let held = session.controller.ledger().entries();
        let mut held: Vec<Pos> = held.map(|e| e.pos).collect();
        held.sort_unstable();
        let texts = session.store().texts().unwrap();
        let texts = texts.into_iter().flat_map(|rows| rows.pos);
        (held, texts.collect())
    }
}

/// Empties the sequence; `again`: what it held comes back, as out of a file.
fn put_back<W: World>(session: &mut Session<&mut W>, again: bool) -> Result<()> {
    session.abandon()?;
    session.follow_moves()?;
    let seq = session.sequence();
    let ledger = session.controller.ledger().save();
    let (cells, pos): (Vec<Cell>, Vec<Pos>) =
        ledger.entries.iter().map(|e| (e.cell, e.pos)).unzip();
    let kept = session.engine.keep(seq, &cells)?;
    let history = session.history().clone();
    let host: Vec<Saved> = session.store().texts()?;
    session.engine.rewind(seq, 0, 0)?;
    session.controller.clear();
    session.forget();
    if again {
        let cells = session.engine.bring_back(seq, &kept, &pos)?;
        session.controller.load(&ledger, &cells)?;
        session.resume(history, &host)?;
    }
    Ok(())
}

/// A step of these.
fn live<W: World>(lives: &mut [Life], engine: &mut W) {
    for life in lives.iter_mut() {
        if !life.is_over() {
            life.prepare(engine);
        }
    }
    let mut slots = Vec::new();
    let mut looks: Vec<(&Looks<usize>, _)> = Vec::new();
    for life in lives {
        looks.push((&life.looks, life.cancelled));
        slots.push(&mut life.slot);
    }
    let cancelled = |i: usize| {
        let (looks, at) = looks[i];
        at == Some(looks.replace(looks.get() + 1))
    };
    let hooks = StepHooks {
        on_step: &mut |_, step| _ = step.unwrap(),
        cancelled: &cancelled,
        now: &|| Duration::ZERO,
    };
    together(engine, &mut slots, hooks);
}

/// What is said under.
pub struct Policy {
    pub name: &'static str,
    pub options: PolicyOptions,
}

/// `full`, and policies that evict and recall in every mode.
pub fn policies() -> Vec<Policy> {
    let budget = |name, dap_mode| Policy {
        name,
        options: PolicyOptions {
            kv_budget: Some(Amount::Cells(48)),
            bin_size: 8,
            sinks: 2,
            recent: 8,
            dap_mode,
            ..PolicyOptions::default()
        },
    };
    vec![
        Policy {
            name: "full",
            options: PolicyOptions::default(),
        },
        budget("h2o", DapMode::Exact),
        budget("hae", DapMode::Exact),
        budget("hae", DapMode::Early),
        budget("hae", DapMode::Midway),
    ]
}

/// One conversation from its beginning to its end, alone in the engine.
pub fn alone<W: World>(engine: &mut W, seed: u64, policy: &Policy) -> Life {
    let mut lives = [Life::new(engine, seed, 0, policy)];
    while !lives[0].is_over() {
        live(&mut lives, engine);
    }
    let [life] = lives;
    life
}

/// As many as there are seeds, some of them at each step. After each the books of all are right.
pub fn beside_others<W: World>(engine: &mut W, seeds: &[u64], policy: &Policy) -> Vec<Life> {
    let seqs = seeds.iter().zip(0..);
    let mut lives: Vec<Life> = seqs
        .map(|(&seed, seq)| Life::new(engine, seed, seq, policy))
        .collect();
    let n = lives.len() as u64;
    let mut draws = 0;
    while !lives.iter().all(Life::is_over) {
        draws += 1;
        let draw = |i| (hashed(seeds[0], draws, i).to_bits() % n) as usize;
        let (a, b) = (draw(1), draw(2));
        live(&mut lives[a.min(b)..=a.max(b)], engine);
        for life in &mut lives {
            let checked = life.slot.with(engine, |session| {
                session.follow_moves()?;
                let held = session.controller.ledger().entries();
                let held: Vec<(Cell, Pos)> = held.map(|e| (e.cell, e.pos)).collect();
                assert_eq!(held, session.engine.held_by(session.sequence()));
                Ok(())
            });
            checked.unwrap();
        }
    }
    lives
}
