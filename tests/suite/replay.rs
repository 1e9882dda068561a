//! A policy replayed on what a full cache saw does what it does on the engine itself, where
//! attention is one softmax: then what is left of a full row, scaled to 1, is the row.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use hae::cache::Pos;
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::generate::Session;
use hae::policy::{Layers, Limits, PolicyOptions, PolicySpec, create};
use hae::replay::{Moment, Tape, replay, tapes, verify};
use hae::trace::{self, Cut, Header, Precision, Writer};
use proptest::prelude::*;

use crate::random::{N_LAYER, Turn, options, prompt, row, turns};

const N_CELLS: usize = 600;

const LIMITS: Limits = Limits {
    n_layer: N_LAYER,
    n_cells: N_CELLS,
};

/// A conversation; `after` sees the session after each decoded token.
fn converse(
    session: &mut Session<Scripted>,
    turns: &[Turn],
    mut after: impl FnMut(&Session<Scripted>, Pos),
) {
    for (i, (segments, steps)) in turns.iter().enumerate() {
        let segments = prompt(segments, 100 * i as u32);
        assert!(session.prefill(&segments, &|| false).unwrap());
        for _ in 0..*steps {
            let pos = session.controller.next_pos();
            session.step(3).unwrap();
            after(session, pos);
        }
    }
}

fn session(policy: &str, options: &PolicyOptions, seed: u64) -> Session<Scripted> {
    let engine = Scripted::new(N_CELLS, 7)
        .patched()
        .with_attention(move |q, k| hashed(seed, q, k));
    let policy = create(policy, options, LIMITS).unwrap();
    Session::new(engine, Controller::new(policy, N_CELLS))
}

fn all_layers() -> Vec<u32> {
    (0..N_LAYER).collect()
}

/// The conversation as a full cache sees it, through a file.
fn full(turns: &[Turn], seed: u64) -> (Header, Rc<Tape>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full.trace");
    let options = PolicyOptions::default();
    let mut header = Header::new("x".into(), LIMITS, &PolicySpec::full(), all_layers());
    // Two attentions that are nearly alike would change places by rounding.
    header.precision = Precision::Exact;
    let mut session = session("full", &options, seed);
    // Every row by itself: of rows that are seen together each would lose another share.
    session
        .controller
        .observe_for_recorder(all_layers(), usize::MAX);
    let writer = Writer::create(&path, header.clone()).unwrap();
    session.controller.record(Box::new(writer));
    converse(&mut session, turns, |_, _| {});
    session.controller.finish_recording().unwrap();
    let (read, records) = trace::read(&path, Cut::Refuse).unwrap();
    assert_eq!(read, header);
    let tape = tapes(&path, &header, &records).unwrap().remove(0);
    (header, Rc::new(tape))
}

/// The same conversation under the policy itself: what the cache held after each token, and the
/// attention that this token, in a full cache, pays to what was evicted before it.
fn real(policy: &str, options: &PolicyOptions, turns: &[Turn], seed: u64) -> Vec<Moment> {
    let mut session = session(policy, options, seed);
    let moments = RefCell::new(Vec::new());
    let mut held: BTreeSet<Pos> = BTreeSet::new();
    for (i, (segments, steps)) in turns.iter().enumerate() {
        let segments = prompt(segments, 100 * i as u32);
        assert!(session.prefill(&segments, &|| false).unwrap());
        for _ in 0..*steps {
            let entries = session.controller.ledger().entries();
            held.clear();
            held.extend(entries.map(|e| e.pos));
            let pos = session.controller.next_pos();
            held.insert(pos);
            session.step(3).unwrap();
            let keys: Vec<Pos> = (0..=pos).collect();
            // What came back before it was there, too.
            let entries = session.controller.ledger().entries();
            held.extend(entries.map(|e| e.pos));
            let lost = row(seed, pos, &keys)
                .into_iter()
                .zip(&keys)
                .filter(|(_, key)| !held.contains(key))
                .map(|(a, _)| a)
                .sum();
            let counts = session.controller.ledger().counts();
            moments.borrow_mut().push(Moment {
                live: counts.live.total(),
                binned: counts.binned.total(),
                evicted: counts.evicted.total(),
                restored: counts.restored.total(),
                lost,
            });
        }
    }
    moments.into_inner()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_replay_is_the_run(turns in turns(), options in options(), seed in 0..1000u64) {
        let (header, tape) = full(&turns, seed);
        let expected = real("hae", &options, &turns, seed);
        let replayed = replay(&header, &tape, &PolicySpec::new("hae", options)).unwrap();
        prop_assert_eq!(replayed.timeline.len(), expected.len());
        for (step, (found, expected)) in replayed.timeline.iter().zip(&expected).enumerate() {
            prop_assert!((found.lost - expected.lost).abs() < 1e-5, "{step}: {found:?} {expected:?}");
            let counts = |m: &Moment| (m.live, m.binned, m.evicted, m.restored);
            prop_assert_eq!(counts(found), counts(expected), "step {}", step);
        }
    }

    /// The same after a detour through a file, by the policy's own records.
    #[test]
    fn a_policy_repeats_its_decisions(turns in turns(), options in options(), seed in 0..1000u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hae.trace");
        let mut session = session("hae", &options, seed);
        let header = Header::new("x".into(), LIMITS, &PolicySpec::new("hae", options.clone()), all_layers());
        trace::record(&mut session.controller, &path, header).unwrap();
        converse(&mut session, &turns, |_, _| {});
        session.controller.finish_recording().unwrap();
        let (header, records) = trace::read(&path, Cut::Refuse).unwrap();
        prop_assert_eq!(&header.options, &options);
        let verified = verify(Path::new("hae.trace"), &header, &records).unwrap();
        prop_assert_eq!(verified.difference, None);
        let steps: usize = turns.iter().map(|(_, steps)| steps).sum();
        prop_assert_eq!((verified.plans, verified.steps), (turns.len() + steps, steps));
    }
}

/// The recording changes nothing of what is recorded.
#[test]
fn a_recorded_run_decides_the_same() {
    let turns = vec![(vec![(true, 60), (false, 9)], 50)];
    let options = PolicyOptions {
        layers: Layers::All,
        ..PolicyOptions::default()
    };
    let held = |record: bool| {
        let folder = tempfile::tempdir().unwrap();
        let mut session = session("hae", &options, 5);
        if record {
            let header = Header::new(
                "x".into(),
                LIMITS,
                &PolicySpec::new("hae", options.clone()),
                all_layers(),
            );
            let path = folder.path().join("a.trace");
            trace::record(&mut session.controller, &path, header).unwrap();
        }
        let mut steps = Vec::new();
        converse(&mut session, &turns, |session, _| {
            steps.push(session.engine.occupied());
        });
        (steps, session.engine.calls)
    };
    assert_eq!(held(true), held(false));
}
