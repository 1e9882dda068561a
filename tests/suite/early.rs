//! Early pruning and recall on the real model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use hae::cache::{Modality, Pos};
use hae::controller::{Controller, Event, Recorder};
use hae::engine::Engine;
use hae::generate::{Segment, Session};
use hae::llama::{ContextOptions, LlamaEngine, Model};
use hae::policy::{
    Amount, DapMode, DapOptions, DapRule, Layers, Limits, PolicyOptions, Queries, Scope, create,
};

use crate::model::{converted, engine, exact, goldens, load, load_vision};
use crate::npz::max_abs_diff;
use crate::precision;

const N_CTX: u32 = 1024;

fn session(model: &Model, options: &PolicyOptions) -> Session<LlamaEngine> {
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: N_CTX as usize,
    };
    let context = ContextOptions {
        score_layers: options.layers.resolve(model.n_layer()),
        ..exact(N_CTX)
    };
    let policy = create("hae", options, limits).unwrap();
    let engine = engine(model, context);
    Session::new(engine, Controller::new(policy, N_CTX as usize))
}

fn dap(dap_mode: DapMode, layers: &[u32], queries: Queries, rule: DapRule) -> PolicyOptions {
    PolicyOptions {
        layers: Layers::List(layers.to_vec()),
        queries,
        dap: Some(DapOptions {
            rule,
            alpha: None,
            scope: Scope::Turn,
        }),
        dap_mode,
        keep_separators: false,
        ..PolicyOptions::default()
    }
}

fn held(session: &Session<LlamaEngine>) -> BTreeSet<Pos> {
    let entries = session.controller.ledger().entries();
    entries.map(|entry| entry.pos).collect()
}

/// The prompts with one picture, with two, and with a large one that takes several batches.
fn prompts(model: &Model) -> Vec<Vec<Segment>> {
    let (_, vision) = converted("f32");
    let mut vision = load_vision(vision, model);
    let all: Vec<Vec<Segment>> = goldens()
        .iter()
        .map(|golden| golden.segments(model, &mut vision))
        .collect();
    let rows = |prompt: &Vec<Segment>| prompt.iter().map(Segment::len).sum::<usize>();
    let pictures = |prompt: &Vec<Segment>| {
        let is_picture = |segment: &&Segment| matches!(segment, Segment::Image { .. });
        prompt.iter().filter(is_picture).count()
    };
    let one = all.iter().find(|prompt| pictures(prompt) == 1).unwrap();
    let most = all.iter().max_by_key(|prompt| pictures(prompt)).unwrap();
    let longest = all.iter().max_by_key(|prompt| rows(prompt)).unwrap();
    assert!(pictures(most) > 1);
    vec![one.clone(), most.clone(), longest.clone()]
}

/// Takes down by which scores a trial run judged the pictures' tokens.
#[derive(Clone, Default)]
struct Judged(Arc<Mutex<BTreeMap<Pos, f32>>>);

impl Recorder for Judged {
    fn record(&mut self, event: Event<'_>) {
        if let Event::Judged { trial, .. } = event {
            let visual = trial.entries().filter(|e| e.modality == Modality::Vision);
            *self.0.lock().unwrap() = visual.map(|e| (e.pos, e.sum / e.seen)).collect();
        }
    }

    fn finish(&mut self) -> hae::Result<()> {
        Ok(())
    }
}

/// A trial run has other batches than the whole prefill. Vulkan's products of a few rows round nothing, those of many
/// round to F16, so two scores that are nearly the same may change places there, and no others.
fn assert_same(whole: &BTreeSet<Pos>, trial: &BTreeSet<Pos>, scores: &BTreeMap<Pos, f32>) {
    if !precision::on_gpu() {
        assert_eq!(whole, trial);
        return;
    }
    let gone = scores.iter().filter(|(pos, _)| !trial.contains(pos));
    let cut = gone.map(|(_, &score)| score).fold(0.0, f32::max);
    for pos in whole.symmetric_difference(trial) {
        let off = (scores[pos] - cut).abs() / cut;
        println!("{pos}: {off} from the cut");
        assert!(off < precision::attention(0.0), "{pos}: {off}");
    }
}

#[test]
fn a_trial_run_keeps_what_the_whole_prefill_keeps() {
    let model = load(converted("f32").0);
    let keep = DapRule::Keep(Amount::Share(0.4));
    let last = model.n_layer() - 1;
    let settings = [
        (vec![0], Queries::All, DapRule::Tau(1.0)),
        (vec![0], Queries::Last, keep),
        (vec![1, 2], Queries::Last, keep),
        (
            vec![2, 3],
            Queries::Last,
            DapRule::Spread {
                times: 1.0,
                least: Amount::Cells(0),
            },
        ),
        (vec![last], Queries::Last, keep),
    ];
    for prompt in prompts(&model) {
        let rows: usize = prompt.iter().map(Segment::len).sum();
        for (layers, queries, rule) in &settings {
            let judged = Judged::default();
            let run = |mode| {
                let mut session = session(&model, &dap(mode, layers, *queries, *rule));
                session.controller.record(Box::new(judged.clone()));
                assert!(session.prefill(&prompt, &|| false).unwrap());
                session
            };
            let exact = run(DapMode::Exact);
            let peak = |session: &Session<_>| session.controller.ledger().counts().peak;
            assert_eq!(peak(&exact), rows);
            for mode in [DapMode::Early, DapMode::Midway] {
                let early = run(mode);
                println!("{mode:?}, layers {layers:?}");
                let scores = std::mem::take(&mut *judged.0.lock().unwrap());
                assert!(scores.len() > 100, "{}", scores.len());
                assert_same(&held(&exact), &held(&early), &scores);
                assert!(held(&early).len() < rows);
                assert_eq!(
                    peak(&early),
                    held(&early).len(),
                    "the rest never took a cell"
                );
            }
        }
    }
}

/// A second question after pruning: the picture is there again as if it had never been away, so
/// its logits are those of a conversation in which nothing was pruned. What the first question's
/// own tokens hold was computed before the pruning in both.
#[test]
fn a_recalled_picture_is_the_same_picture() {
    let model = load(converted("f32").0);
    let prompt = prompts(&model).swap_remove(0);
    let question = [Segment::Tokens(vec![13, 29, 21, 3, 5, 8])];
    let keep_all = DapRule::Keep(Amount::Share(1.0));
    let logits = |rule, recall| {
        let options = PolicyOptions {
            recall,
            ..dap(DapMode::Exact, &[1], Queries::Last, rule)
        };
        let mut session = session(&model, &options);
        assert!(session.prefill(&prompt, &|| false).unwrap());
        let held = held(&session).len();
        assert!(session.prefill(&question, &|| false).unwrap());
        (held, session.engine.logits().unwrap().to_vec())
    };
    let (all, unpruned) = logits(keep_all, true);
    let (few, recalled) = logits(DapRule::Keep(Amount::Share(0.2)), true);
    let (_, forgotten) = logits(DapRule::Keep(Amount::Share(0.2)), false);
    assert!(few < all);
    let error = max_abs_diff(&unpruned, &recalled);
    assert!(error < precision::logits(1e-3), "{error}");
    assert!(max_abs_diff(&unpruned, &forgotten) > 0.1, "pruning shows");
}

/// A second picture in a later turn, with nothing pruned: `midway` is `exact`, whether the turns
/// before are remembered, so that the trial run has seen them, or not.
#[test]
fn a_later_turn_goes_on_from_all_that_was_before_it() {
    let model = load(converted("f32").0);
    let prompts = prompts(&model);
    let logits = |dap_mode, recall| {
        let options = PolicyOptions {
            recall,
            ..dap(
                dap_mode,
                &[2],
                Queries::Last,
                DapRule::Keep(Amount::Share(1.0)),
            )
        };
        let mut session = session(&model, &options);
        assert!(session.prefill(&prompts[0], &|| false).unwrap());
        // One that is cancelled on the way, wherever that is, leaves nothing behind.
        let mut cancellations = 0;
        loop {
            let asked = std::cell::Cell::new(0);
            let cancelled = || asked.replace(asked.get() + 1) == cancellations;
            if session.prefill(&prompts[0], &cancelled).unwrap() {
                break;
            }
            cancellations += 1;
        }
        assert!(cancellations >= 3);
        session.engine.logits().unwrap().to_vec()
    };
    let expected = logits(DapMode::Exact, true);
    for recall in [true, false] {
        let error = max_abs_diff(&expected, &logits(DapMode::Midway, recall));
        assert!(error < precision::logits(1e-3), "recall {recall}: {error}");
    }
}
