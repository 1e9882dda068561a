//! Whole conversations over the real cache, at random: prompts with pictures that are pruned before
//! or after they go in, answers under eviction, recall, text that waits on the host, sessions that
//! are closed and opened again, prompts that are cancelled.
//!
//! Every call that reaches the cache goes through [`Mirrored`], which compares cells and logits.

use std::cell::RefCell;
use std::rc::Rc;

use hae::Error;
use hae::attend::Attend;
use hae::cache::{BinOptions, Pos};
use hae::controller::Controller;
use hae::engine::Token;
use hae::engine::scripted::hashed;
use hae::generate::{Segment, Session};
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, Model};
use hae::policy::{Amount, DapMode, Limits, Observe, PolicyOptions, create};
use hae::prompt::Transcript;
use hae::saved::{ModelIdentity, Saved, Storage};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRng, TestRunner};

use crate::fixture;
use crate::kv_mirror::{Mirrored, STEP, Tally};
use crate::kv_model::Cells;
use crate::kv_twin::{LlamaModel, Twin};
use crate::model::{converted, engine, exact, load};
use crate::precision;
use crate::random::options;

const N_CTX: u32 = 768;
const N_UBATCH: u32 = 48;

/// A user turn.
#[derive(Clone, Debug)]
struct Turn {
    /// Pictures and text, and how many rows each has.
    prompt: Vec<(bool, usize)>,
    answer: usize,
    /// Batches of the prompt after which it is cancelled first.
    cancel: Option<usize>,
    /// Whether the session goes through a file after the prompt, and after the answer.
    reopen: (bool, bool),
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let piece = prop_oneof![
        6 => (1..20usize).prop_map(|n| (false, n)),
        3 => (20..150usize).prop_map(|n| (true, n)),
        3 => (1..20usize).prop_map(|n| (true, n)),
        // More than the cache takes beside a few others.
        1 => (250..450usize).prop_map(|n| (true, n)),
    ];
    let turn = (
        prop::collection::vec(piece, 1..5),
        1..8usize,
        0..40usize,
        prop::option::weighted(0.15, 0..6usize),
        (prop::bool::weighted(0.2), prop::bool::weighted(0.3)),
    );
    let turn = turn.prop_map(|(mut prompt, question, answer, cancel, reopen)| {
        prompt.push((false, question));
        Turn {
            prompt,
            answer,
            cancel,
            reopen,
        }
    });
    prop::collection::vec(turn, 2..5)
}

/// Tokens, and pictures whose rows differ except for every ninth, which ends a row of it.
fn segments(turn: &[(bool, usize)], first_image: u32, n_embd: usize, seed: u64) -> Vec<Segment> {
    let uniform = |a: usize, b: usize| 1.0 + hashed(seed, a as Pos, b as Pos).ln() / 6.0;
    let numbered = turn.iter().zip(first_image..);
    let segment = |(&(picture, n), image): (&(bool, usize), u32)| {
        let place = image as usize * 1000;
        if !picture {
            let token = |i| 3 + (uniform(place + i, 1) * 900.0) as Token;
            return Segment::Tokens((0..n).map(token).collect());
        }
        let value = |i: usize| (uniform(place + i / n_embd, 2 + i % n_embd) - 0.5) as f32 * 0.2;
        Segment::Image {
            embeddings: (0..n * n_embd).map(value).collect(),
            n,
            image,
            axes: None,
            separators: (8..n as u32).step_by(9).collect(),
        }
    };
    numbered.map(segment).collect()
}

struct Run<'m> {
    model: &'m Model,
    /// Of the policy.
    name: &'m str,
    policy: PolicyOptions,
    context: ContextOptions,
    host_bytes: usize,
    tally: Rc<RefCell<Tally>>,
}

impl<'m> Run<'m> {
    fn controller(&self) -> Controller {
        let limits = Limits {
            n_layer: self.model.n_layer(),
            n_cells: N_CTX as usize,
        };
        let policy = create(self.name, &self.policy, limits).unwrap();
        Controller::new(policy, N_CTX as usize)
    }

    fn engine(&self) -> LlamaEngine {
        let mut options = self.context.clone();
        if let Observe::Layers { layers, .. } = self.controller().observe() {
            options.score_layers.clone_from(layers);
        }
        engine(self.model, options)
    }

    fn start(&self, twins: &'m LlamaModel) -> Session<Mirrored<'m>> {
        let engine = Mirrored {
            engine: self.engine(),
            twin: (self.policy.dap_mode != DapMode::Midway)
                .then(|| Twin::new(twins, &self.context)),
            cells: Cells::new(STEP),
            alike: true,
            is_exact: self.context.flash_attention == FlashAttention::Off,
            tally: Rc::clone(&self.tally),
        };
        Session::new(engine, self.controller()).with_store(BinOptions::ram(self.host_bytes as u64))
    }

    /// Through a file, into a context of its own.
    fn reopen(&self, mut session: Session<Mirrored<'m>>) -> Session<Mirrored<'m>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chat.session");
        let saved = Saved {
            model: ModelIdentity {
                arch: self.model.arch().to_owned(),
                n_layer: self.model.n_layer(),
                n_embd: self.model.n_embd(),
                n_vocab: self.model.n_vocab(),
                bytes: 0,
                fingerprint: String::new(),
            },
            rope_factors: session.engine.engine.rope_factors(),
            storage: Storage {
                type_k: self.context.type_k,
                type_v: self.context.type_v,
                flash_attention: self.context.flash_attention,
            },
            transcript: Transcript::new(None, None),
            pending: None,
            sampled: Vec::new(),
            images: 0,
            ledger: session.controller.ledger().save(),
            state: session.engine.engine.save().unwrap(),
            history: session.history().clone(),
            host_bin: session.store().texts().unwrap(),
        };
        saved.write(&path).unwrap();
        let Session { engine, .. } = session;
        let Mirrored {
            twin, cells, alike, ..
        } = engine;
        let saved = Saved::read(&path).unwrap();

        let n = saved.ledger.entries.len();
        let mut engine = Mirrored {
            engine: self.engine(),
            twin,
            cells: Cells::new(STEP),
            alike,
            is_exact: self.context.flash_attention == FlashAttention::Off,
            tally: Rc::clone(&self.tally),
        };
        engine.grow(n);
        let order: Vec<Pos> = cells.entries().map(|(_, pos)| pos).collect();
        let expected = engine.cells.insert(&order).unwrap();
        let got = engine.engine.restore_tokens(&saved.state, &order).unwrap();
        assert!(got.iter().map(|&cell| cell as usize).eq(expected));
        engine.check("opening a session");
        let mut controller = self.controller();
        controller.load(&saved.ledger, &got).unwrap();
        let mut session =
            Session::new(engine, controller).with_store(BinOptions::ram(self.host_bytes as u64));
        session.resume(saved.history, &saved.host_bin).unwrap();
        self.tally.borrow_mut().reopened += 1;
        session
    }

    /// The ledger says of each cell what the cache says.
    fn assert_in_step(&self, session: &Session<Mirrored<'m>>) {
        let entries = session.controller.ledger().entries();
        let held: Vec<(usize, Pos)> = entries.map(|e| (e.cell as usize, e.pos)).collect();
        let cells: Vec<(usize, Pos)> = session.engine.cells.entries().collect();
        assert_eq!(held, cells);
        assert!(session.store().bytes() <= self.host_bytes as u64);
    }

    fn converse(&self, twins: &'m LlamaModel, turns: &[Turn], seed: u64) {
        let mut session = self.start(twins);
        let n_embd = self.model.n_embd();
        let mut images = 0;
        for turn in turns {
            let prompt = segments(&turn.prompt, images, n_embd, seed);
            images += prompt.len() as u32;
            if let Some(after) = turn.cancel {
                let asked = std::cell::Cell::new(0);
                let cancelled = || asked.replace(asked.get() + 1) >= after;
                match session.prefill(&prompt, &cancelled) {
                    Ok(complete) => {
                        self.tally.borrow_mut().cancelled += usize::from(!complete);
                        self.assert_in_step(&session);
                        if complete {
                            continue;
                        }
                    }
                    Err(Error::PromptTooLong { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            match session.prefill(&prompt, &|| false) {
                Ok(complete) => assert!(complete),
                Err(Error::PromptTooLong { .. }) => {
                    self.tally.borrow_mut().refused += 1;
                    self.assert_in_step(&session);
                    continue;
                }
                Err(error) => panic!("{error}"),
            }
            self.assert_in_step(&session);
            if turn.reopen.0 {
                session = self.reopen(session);
            }
            for step in 0..turn.answer {
                let token = 3 + (hashed(seed, step as Pos, 7) * 1e6) as Token % 900;
                match session.step(token) {
                    Ok(()) => self.tally.borrow_mut().steps += 1,
                    Err(Error::ContextFull { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
                self.assert_in_step(&session);
            }
            if turn.reopen.1 {
                session = self.reopen(session);
            }
        }
        self.tally.borrow_mut().recalled += session.controller.report().recalled;
    }
}

/// When the conversations prune.
fn twinned() -> impl Strategy<Value = DapMode> {
    prop_oneof![Just(DapMode::Early), Just(DapMode::Exact)]
}

/// Few cells of each kind, so that most steps leave some out.
fn lookups() -> impl Strategy<Value = Attend> {
    let amount = || {
        prop_oneof![
            (0.05..0.6).prop_map(Amount::Share),
            (1..40usize).prop_map(Amount::Cells)
        ]
    };
    let drawn = (
        prop::option::weighted(0.8, amount()),
        amount(),
        0..20usize,
        0..6usize,
    );
    drawn.prop_map(|(vision, text, recent, sinks)| Attend {
        vision,
        text: Some(text),
        recent,
        sinks,
        first_layer: 0,
    })
}

/// Random conversations with a cache of this kind; what they did.
fn conversations(
    flash: bool,
    kind: CacheType,
    mode: impl Strategy<Value = DapMode>,
    cases: u32,
) -> Tally {
    conversations_with(flash, kind, mode, Just(Attend::default()), cases)
}

/// The same, whose answers look cells up.
fn conversations_with(
    flash: bool,
    kind: CacheType,
    mode: impl Strategy<Value = DapMode>,
    attend: impl Strategy<Value = Attend>,
    cases: u32,
) -> Tally {
    let (text, _) = converted("f32");
    let (model, twins) = (load(text), fixture::load(text));
    let context = ContextOptions {
        kv_size: Some(STEP as u32),
        n_batch: N_UBATCH,
        n_ubatch: N_UBATCH,
        flash_attention: match flash {
            true => FlashAttention::On,
            false => FlashAttention::Off,
        },
        type_k: kind,
        type_v: kind,
        ..exact(N_CTX)
    };
    let row_bytes = engine(&model, context.clone()).row_bytes().unwrap();
    let tally = Rc::new(RefCell::new(Tally::default()));
    let config = Config {
        cases,
        max_shrink_iters: 60,
        failure_persistence: None,
        ..Config::default()
    };
    // The same conversations every time: how far halves stray depends on them.
    let rng = TestRng::deterministic_rng(config.rng_algorithm);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let host = prop_oneof![Just(0), 1..120usize];
    let drawn = (
        options(),
        mode,
        prop::bool::weighted(0.8),
        host,
        turns(),
        any::<u64>(),
        attend,
    );
    let done = runner.run(
        &drawn,
        |(options, dap_mode, recall, host, turns, seed, attend)| {
            let run = Run {
                model: &model,
                name: "hae",
                policy: PolicyOptions {
                    dap_mode,
                    recall,
                    ..options
                },
                context: ContextOptions {
                    attend,
                    keep_sets: true,
                    ..context.clone()
                },
                host_bytes: host * row_bytes,
                tally: Rc::clone(&tally),
            };
            run.converse(&twins, &turns, seed);
            Ok(())
        },
    );
    done.unwrap_or_else(|e| panic!("{e}"));
    let tally = std::mem::take(&mut *tally.borrow_mut());
    println!("flash {flash}, {kind:?}: {tally:?}");
    tally
}

/// What `soak.rs` holds conversations with.
pub struct Models {
    model: Model,
    twins: LlamaModel,
    row_bytes: usize,
}

impl Models {
    pub fn load() -> Self {
        let (text, _) = converted("f32");
        let (model, twins) = (load(text), fixture::load(text));
        let row_bytes = engine(&model, exact(N_CTX)).row_bytes().unwrap();
        Models {
            model,
            twins,
            row_bytes,
        }
    }

    /// One random conversation under a policy, with a cache of F32 in which every step's cells and logits are
    /// compared.
    pub fn converse(&self, name: &str, seed: u64) -> Tally {
        let config = Config {
            failure_persistence: None,
            ..Config::default()
        };
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(config.rng_algorithm, &bytes);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let host = prop_oneof![Just(0), 1..120usize];
        let drawn = (options(), twinned(), any::<bool>(), host, turns());
        let (options, dap_mode, recall, host, turns) =
            drawn.new_tree(&mut runner).unwrap().current();
        let drawn = PolicyOptions {
            dap_mode,
            recall,
            ..options
        };
        let limits = Limits {
            n_layer: self.model.n_layer(),
            n_cells: N_CTX as usize,
        };
        // Drawn for `hae`; others may refuse some of it.
        let policy = match create(name, &drawn, limits) {
            Ok(_) => drawn,
            Err(_) => PolicyOptions {
                kv_budget: Some(Amount::Share(0.5)),
                ..PolicyOptions::default()
            },
        };
        let tally = Rc::new(RefCell::new(Tally::default()));
        let run = Run {
            model: &self.model,
            name,
            policy,
            context: ContextOptions {
                kv_size: Some(STEP as u32),
                n_batch: N_UBATCH,
                n_ubatch: N_UBATCH,
                flash_attention: FlashAttention::Off,
                type_k: CacheType::F32,
                type_v: CacheType::F32,
                ..exact(N_CTX)
            },
            host_bytes: host * self.row_bytes,
            tally: Rc::clone(&tally),
        };
        run.converse(&self.twins, &turns, seed);
        std::mem::take(&mut *tally.borrow_mut())
    }
}

#[test]
fn conversations_f32() {
    let tally = conversations(false, CacheType::F32, twinned(), 48);
    assert!(tally.decoded > 5000 && tally.steps > 1000);
    // Everything that may happen has happened.
    for (n, what) in [
        (tally.removed, "removed"),
        (tally.moved, "moved"),
        (tally.grown, "grown"),
        (tally.shrunk, "shrunk"),
        (tally.recalled, "recalled"),
        (tally.from_host, "from the host"),
        (tally.reopened, "reopened"),
        (tally.cancelled, "cancelled"),
        (tally.pruned_early, "pruned early"),
    ] {
        assert!(n > 0, "nothing {what}");
    }
    assert!(tally.exact > 30, "{}", tally.exact);
    // Of thousands of steps the worst may be beyond a GPU's bound: products of many rows are rounded to F16 there, those
    // of few are not, and the twin's batches are others. A wrong cell would stay, and what it does to each step after it.
    if precision::on_gpu() {
        assert!(tally.worst < 0.2, "{tally:?}");
        assert!(tally.beyond * 500 <= tally.compared, "{tally:?}");
    } else {
        assert!(tally.worst < 1e-4, "{tally:?}");
    }
}

#[test]
fn conversations_f16() {
    let tally = conversations(true, CacheType::F16, twinned(), 16);
    // Thousands of tokens: the worst of them on a GPU is beyond its usual bound.
    let bound = if precision::on_gpu() { 0.2 } else { 5e-2 };
    assert!(tally.worst < bound, "{}", tally.worst);
}

#[test]
fn conversations_q8_0() {
    let tally = conversations(true, CacheType::Q8_0, twinned(), 12);
    assert!(tally.worst < 1.0, "{}", tally.worst);
}

/// Prompts that go on behind the first layers: cells, positions and books. Their logits have numpy
/// for an oracle (tests/suite/midway.rs).
#[test]
fn conversations_midway() {
    for (flash, kind) in [(false, CacheType::F32), (true, CacheType::Q8_0)] {
        let tally = conversations(flash, kind, Just(DapMode::Midway), 16);
        for (n, what) in [
            (tally.went_on, "went on"),
            (tally.removed, "removed"),
            (tally.moved, "moved"),
            (tally.recalled, "recalled"),
            (tally.reopened, "reopened"),
            (tally.cancelled, "cancelled"),
        ] {
            assert!(n > 0, "nothing {what}");
        }
    }
}

/// Lookups from cells that were moved, resized, saved and put back choose the positions that the twin
/// chooses, by the plain operations and by the processor's own.
#[test]
fn conversations_that_look_up() {
    let run = |flash, kind, cases| conversations_with(flash, kind, twinned(), lookups(), cases);
    let tally = run(false, CacheType::F32, 16);
    for (n, what) in [
        (tally.removed, "removed"),
        (tally.moved, "moved"),
        (tally.grown, "grown"),
        (tally.shrunk, "shrunk"),
        (tally.recalled, "recalled"),
        (tally.from_host, "from the host"),
        (tally.reopened, "reopened"),
    ] {
        assert!(n > 0, "nothing {what}");
    }
    assert!(tally.looked_up > 500);
    // Sets that part by near ones make more of a difference than sums do.
    let bound = if precision::on_gpu() { 2e-1 } else { 1e-4 };
    assert!(tally.worst < bound, "{}", tally.worst);
    if !precision::on_gpu() {
        assert_eq!(tally.chosen, tally.chosen_by_both);
    }
    // Rounded products let near ones change places.
    let f16 = if precision::on_gpu() { 5e-1 } else { 1e-1 };
    for (kind, cases, bound) in [(CacheType::F16, 6, f16), (CacheType::Q8_0, 4, 1.0)] {
        let tally = run(true, kind, cases);
        let (chosen, both) = (tally.chosen, tally.chosen_by_both);
        let alike = precision::sets_alike(999);
        assert!(both * 1000 > chosen * alike, "{kind:?}: {both} of {chosen}");
        assert!(tally.worst < bound, "{kind:?}: {}", tally.worst);
    }
}
