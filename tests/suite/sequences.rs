//! Several conversations in the cache of one context: each says what it says alone.
//!
//! Their cells lie in one cache, masked for each other. A masked cell adds an exact zero to every
//! sum, so what the others say can never be seen, bit for bit. But a conversation's own cells lie
//! elsewhere than if it were alone, and sums over cells are taken in the order of the cells, several
//! at a time: alone and together agree to rounding, and bit for bit only where the cells are the
//! same.

use std::cell::Cell as Slot;
use std::time::Duration;

use hae::Error;
use hae::cache::{BinOptions, Pos};
use hae::controller::Controller;
use hae::engine::scripted::hashed;
use hae::engine::{Batch, Engine, Input, Observation, SeqId, Token};
use hae::generate::{Finish, Generation, Progress, Segment, Session};
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, SamplerOptions};
use hae::policy::{self, Amount, Limits, PolicyOptions};

use crate::model::{converted, engine, exact, load};
use crate::npz::max_abs_diff;
use crate::precision;

/// One user turn: its prompt, the tokens asked for, and at which look at it it is cancelled.
#[derive(Clone)]
struct Turn {
    prompt: Vec<Token>,
    n_predict: usize,
    cancelled: Option<usize>,
}

/// A conversation on its way.
struct Talk {
    session: Option<Session<()>>,
    turns: Vec<Turn>,
    generation: Option<Generation<'static>>,
    looks: Slot<usize>,
    said: Vec<Token>,
    finished: Vec<Finish>,
    /// What each of `said` was chosen from.
    logits: Vec<Vec<f32>>,
}

impl Talk {
    fn new(
        seq: SeqId,
        turns: &[Turn],
        (policy, options): (&str, &PolicyOptions),
        engine: &mut LlamaEngine,
    ) -> Self {
        let n_cells = engine.n_cells();
        let limits = Limits {
            n_layer: engine.model().n_layer(),
            n_cells,
        };
        let policy = policy::create(policy, options, limits).unwrap();
        let session = Session::new(engine, Controller::new(policy, n_cells))
            .with_sequence(seq)
            .with_store(BinOptions::ram(1 << 20));
        Talk {
            session: Some(session.swap(()).0),
            turns: turns.iter().rev().cloned().collect(),
            generation: None,
            looks: Slot::new(0),
            said: Vec::new(),
            finished: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// One step on the engine, which is given back; false: nothing is left to do.
    fn step(&mut self, engine: &mut LlamaEngine) -> bool {
        let Some(turn) = self.turns.last() else {
            return false;
        };
        let generation = self.generation.get_or_insert_with(|| {
            self.looks.set(0);
            let prompt = vec![Segment::Tokens(turn.prompt.clone())];
            Generation::new(prompt, Some(turn.n_predict))
        });
        let (mut session, ()) = self.session.take().unwrap().swap(engine);
        let looks = &self.looks;
        let cancelled = || turn.cancelled == Some(looks.replace(looks.get() + 1));
        let progress = generation.next(&mut session, &cancelled, &|| Duration::ZERO);
        match progress.unwrap() {
            Some(Progress::Prompt { .. }) => {}
            Some(Progress::Token { token, .. }) => {
                self.said.push(token);
                self.logits.push(session.engine.logits().unwrap().to_vec());
            }
            Some(Progress::End { finish, .. }) => self.finished.push(finish),
            None => {
                self.generation = None;
                self.turns.pop();
            }
        }
        session.follow_moves().unwrap();
        let seq = session.sequence();
        let held = session.controller.ledger().entries();
        let held: Vec<_> = held.map(|e| (e.cell, e.pos)).collect();
        let (session, engine) = session.swap(());
        assert_eq!(held, engine.cells_of_seq(seq).unwrap());
        self.session = Some(session);
        true
    }

    /// Positions in the cache, and on the host.
    fn held(&self) -> (Vec<Pos>, Vec<Pos>) {
        let session = self.session.as_ref().unwrap();
        let held = session.controller.ledger().entries();
        let mut held: Vec<Pos> = held.map(|e| e.pos).collect();
        held.sort_unstable();
        let texts = session.store().texts().unwrap();
        let texts = texts.into_iter().flat_map(|rows| rows.pos);
        (held, texts.collect())
    }

    fn recalled(&self) -> usize {
        let session = self.session.as_ref().unwrap();
        session.controller.report().recalled
    }
}

/// A number below `n`.
fn draw(seed: u64, i: Pos, n: usize) -> usize {
    let share = 1.0 + hashed(seed, i, 0).ln() / 6.0;
    ((share * n as f64) as usize).min(n - 1)
}

/// Three turns, one in three of them cancelled.
fn turns(seed: u64) -> Vec<Turn> {
    let turn = |i: Pos| {
        let n = 20 + draw(seed, 10 * i, 60);
        Turn {
            prompt: (0..n as Pos)
                .map(|j| 3 + draw(seed ^ 99, 100 * i + j, 900) as Token)
                .collect(),
            n_predict: 10 + draw(seed, 10 * i + 3, 30),
            cancelled: (draw(seed, 10 * i + 4, 3) == 0).then(|| draw(seed, 10 * i + 5, 12)),
        }
    };
    (0..3).map(turn).collect()
}

fn several(options: &ContextOptions, n_seq_max: u32) -> ContextOptions {
    ContextOptions {
        n_seq_max,
        ..options.clone()
    }
}

fn make(model: &Model, options: ContextOptions) -> LlamaEngine {
    LlamaEngine::new(model, options, &SamplerOptions::GREEDY).unwrap()
}

/// Each alone in a context of its own, then all in one, step by step in any order.
fn alone_and_together(
    model: &Model,
    options: &ContextOptions,
    policy: (&str, &PolicyOptions),
    seed: u64,
) -> (Vec<Talk>, Vec<Talk>) {
    let talks: Vec<_> = (0..3).map(|i| turns(10 * seed + i)).collect();
    let alone = talks.iter().map(|turns| {
        let mut engine = make(model, options.clone());
        let mut talk = Talk::new(0, turns, policy, &mut engine);
        while talk.step(&mut engine) {}
        talk
    });
    let alone: Vec<_> = alone.collect();
    let mut engine = make(model, several(options, 3));
    let talk = |(seq, turns): (SeqId, &Vec<Turn>)| Talk::new(seq, turns, policy, &mut engine);
    let mut together: Vec<_> = (0..).zip(&talks).map(talk).collect();
    let mut draws = 0;
    while together.iter().any(|talk| !talk.turns.is_empty()) {
        draws += 1;
        let which = hashed(seed, draws, 1).to_bits() % 3;
        together[which as usize].step(&mut engine);
    }
    (alone, together)
}

/// The largest difference of logits. Everything else is the same.
fn compare(alone: &[Talk], together: &[Talk]) -> f32 {
    let mut worst = 0.0f32;
    for (i, (alone, together)) in alone.iter().zip(together).enumerate() {
        for (ours, theirs) in together.logits.iter().zip(&alone.logits) {
            worst = worst.max(max_abs_diff(ours, theirs));
        }
        assert_eq!(together.said, alone.said, "conversation {i}, {worst}");
        assert_eq!(together.finished, alone.finished);
        assert_eq!(together.held(), alone.held());
    }
    worst
}

fn budget(cells: usize) -> PolicyOptions {
    PolicyOptions {
        kv_budget: Some(Amount::Cells(cells)),
        bin_size: 8,
        sinks: 2,
        recent: 8,
        ..PolicyOptions::default()
    }
}

#[test]
fn conversations_in_one_cache_are_each_as_if_alone() {
    let model = load(converted("f32").0);
    let (mut cancelled, mut recalled) = (0, 0);
    for seed in 0..2 {
        for (policy, policy_options) in [
            ("full", PolicyOptions::default()),
            ("h2o", budget(48)),
            ("hae", budget(48)),
        ] {
            // A cache that grows and shrinks moves tokens of all conversations.
            for kv_size in [None, Some(256)] {
                let score_layers = match policy {
                    "full" => Vec::new(),
                    _ => vec![0, 1],
                };
                let options = ContextOptions {
                    kv_size,
                    score_layers,
                    ..exact(1024)
                };
                let policy = (policy, &policy_options);
                let (alone, together) = alone_and_together(&model, &options, policy, seed);
                let worst = compare(&alone, &together);
                println!("{policy:?} {kv_size:?}: {worst}", policy = policy.0);
                assert!(worst < precision::logits(2e-5), "{worst}");
                let ends = together.iter().flat_map(|talk| &talk.finished);
                cancelled += ends.filter(|&&end| end == Finish::Cancelled).count();
                recalled += together.iter().map(Talk::recalled).sum::<usize>();
            }
        }
    }
    assert!(cancelled > 0 && recalled > 0, "{cancelled} {recalled}");
}

#[test]
fn flash_attention_and_other_types_agree_to_their_rounding() {
    let model = load(converted("f32").0);
    // Of these a CPU takes quantized cells one by one and passes over masked ones: no difference at
    // all. Others go in tiles, in which they have other places.
    for (kind, bound) in [(CacheType::F16, 3e-2), (CacheType::Q8_0, 3e-2)] {
        let options = ContextOptions {
            flash_attention: FlashAttention::On,
            type_k: kind,
            type_v: kind,
            ..exact(1024)
        };
        let none = PolicyOptions::default();
        let (alone, together) = alone_and_together(&model, &options, ("full", &none), 5);
        let worst = compare(&alone, &together);
        println!("{kind:?}: {worst}");
        // Quantized keys double what a GPU rounds.
        let bound = 2.0 * precision::logits(bound / 2.0);
        assert!(worst < bound, "{kind:?}: {worst}");
    }
}

fn decode(engine: &mut LlamaEngine, seq: SeqId, tokens: &[Token], first: Pos) -> Vec<f32> {
    let pos: Vec<Pos> = (first..).take(tokens.len()).collect();
    let batch = Batch {
        seq,
        input: Input::Tokens(tokens),
        pos: &pos,
        queries: &[],
        logits: true,
        lookup: None,
    };
    let (mut cells, mut seen) = (Vec::new(), Observation::default());
    engine.decode(batch, &mut cells, &mut seen).unwrap();
    engine.logits().unwrap().to_vec()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

fn words(seed: u64, n: Pos) -> Vec<Token> {
    (0..n).map(|i| 3 + draw(seed, i, 900) as Token).collect()
}

/// The first conversation's cells are those that it has alone, and the other's behind them: the
/// masked ones add exact zeros, however many they are.
#[test]
fn in_the_same_cells_it_is_the_same_bit_for_bit() {
    let model = load(converted("f32").0);
    let first = words(1, 40);
    let mut alone = engine(&model, exact(1024));
    let expected = decode(&mut alone, 0, &first, 0);
    let mut together = engine(&model, several(&exact(1024), 2));
    assert!(bits(&decode(&mut together, 0, &first, 0)) == bits(&expected));
    let last = &first[39..];
    alone.rewind(0, 39, 39).unwrap();
    let expected = decode(&mut alone, 0, last, 39);
    // One more tile of cells in view each time.
    for at in 0..3 {
        decode(&mut together, 1, &words(2 + at, 256), 256 * at as Pos);
        together.rewind(0, 39, 39).unwrap();
        let again = decode(&mut together, 0, last, 39);
        assert_eq!(together.cells_of_seq(0).unwrap().last(), Some(&(39, 39)));
        assert!(bits(&again) == bits(&expected), "beside {}", 256 * (at + 1));
    }
}

/// Whatever the others say, as long as they say as much of it, not a bit changes.
#[test]
fn what_others_say_is_never_seen() {
    let model = load(converted("f32").0);
    for flash in [FlashAttention::Off, FlashAttention::On] {
        let options = ContextOptions {
            flash_attention: flash,
            ..several(&exact(1024), 2)
        };
        let beside = |seed: u64| {
            let mut engine = engine(&model, options.clone());
            let (own, others) = (words(1, 60), words(seed, 120));
            let mut logits = Vec::new();
            for i in 0..12 {
                let at = i as usize;
                decode(&mut engine, 1, &others[10 * at..10 * at + 10], 10 * i);
                let row = decode(&mut engine, 0, &own[5 * at..5 * at + 5], 5 * i);
                logits.push(bits(&row));
            }
            logits
        };
        assert!(beside(2) == beside(3), "{flash:?}");
    }
}

#[test]
fn sequences_that_there_are_not_are_refused() {
    let model = load(converted("f32").0);
    let mut engine = engine(&model, several(&exact(256), 2));
    decode(&mut engine, 1, &words(1, 4), 0);
    let tokens = words(1, 2);
    for seq in [-1, 2, SeqId::MIN, SeqId::MAX] {
        let batch = Batch {
            seq,
            input: Input::Tokens(&tokens),
            pos: &[4, 5],
            queries: &[],
            logits: false,
            lookup: None,
        };
        let (mut cells, mut seen) = (Vec::new(), Observation::default());
        assert!(engine.decode(batch, &mut cells, &mut seen).is_err());
        assert!(engine.remove(seq, std::slice::from_ref(&(0..1))).is_err());
        assert!(engine.rewind(seq, 0, 0).is_err());
        assert!(engine.shift(seq, 2, 1).is_err());
        assert!(engine.restore_rows(seq, &[9], &[0], &mut cells).is_err());
    }
    assert_eq!(engine.cells_of_seq(1).unwrap().len(), 4);
    // A shift of one would change the keys of the others.
    assert!(!engine.capabilities().shifts);
    assert!(engine.shift(1, 2, 1).is_err());
    for n in [0, 257] {
        let error = LlamaEngine::new(&model, several(&exact(256), n), &SamplerOptions::GREEDY);
        assert!(error.is_err_and(|e| e.to_string().contains("expected 1 to 256")));
    }
}

#[test]
fn a_sequence_comes_back_as_any_other() {
    let model = load(converted("f32").0);
    for kv_size in [None, Some(256)] {
        let options = ContextOptions {
            kv_size,
            ..several(&exact(512), 3)
        };
        let mut engine = engine(&model, options);
        decode(&mut engine, 0, &words(2, 30), 0);
        decode(&mut engine, 1, &words(1, 60), 0);
        decode(&mut engine, 2, &words(3, 30), 0);
        // What comes behind it lies in its holes.
        engine.remove(1, std::slice::from_ref(&(5..20))).unwrap();
        let next = words(4, 1);
        let expected = decode(&mut engine, 1, &next, 60);
        engine.rewind(1, 60, 45).unwrap();
        let held = engine.cells_of_seq(1).unwrap();
        let pos: Vec<Pos> = held.iter().map(|&(_, pos)| pos).collect();
        let state = engine.save_of(1).unwrap();
        let others = |engine: &LlamaEngine| [0, 2].map(|seq| engine.cells_of_seq(seq).unwrap());
        let beside = others(&engine);
        for bad in [
            &pos[1..],
            &[&pos[1..], &[60]].concat(),
            &[&pos[..], &[60]].concat(),
        ] {
            assert!(engine.restore_tokens_of(1, &state, bad).is_err());
            assert!(engine.cells_of_seq(1).unwrap().is_empty());
            assert_eq!(others(&engine), beside);
        }
        // Once in its own place, once in that of another.
        for seq in [1, 2] {
            let cells = engine.restore_tokens_of(seq, &state, &pos).unwrap();
            let mut restored: Vec<_> = cells.into_iter().zip(pos.iter().copied()).collect();
            restored.sort_unstable();
            assert_eq!(engine.cells_of_seq(seq).unwrap(), restored);
            let again = decode(&mut engine, seq, &next, 60);
            let worst = max_abs_diff(&again, &expected);
            println!("{kv_size:?}, sequence {seq}: {worst}");
            assert!(worst < precision::logits(2e-5), "{worst}");
            engine.rewind(seq, 60, 45).unwrap();
        }
        engine.rewind(2, 0, 0).unwrap();
        decode(&mut engine, 0, &words(5, 400), 30);
        let full = engine.restore_tokens_of(2, &state, &pos);
        assert!(matches!(full, Err(Error::ContextFull { .. })), "{full:?}");
        assert!(engine.cells_of_seq(2).unwrap().is_empty());
        assert_eq!(engine.cells_of_seq(1).unwrap().len(), 45);
        for seq in [-1, 3] {
            assert!(engine.save_of(seq).is_err());
            assert!(engine.restore_tokens_of(seq, &state, &pos).is_err());
        }
    }
}
