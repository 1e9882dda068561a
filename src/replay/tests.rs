use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::cache::Pos;
use crate::controller::{Controller, Event, Recorder};
use crate::engine::scripted::{Scripted, hashed};
use crate::error::Result;
use crate::generate::{Segment, Session};
use crate::policy::{self, Amount, Limits, PolicyOptions, PolicySpec};
use crate::trace::{Header, Record, SINGLE_ROWS};

use std::rc::Rc;
use std::sync::{Arc, Mutex};

const N_CELLS: usize = 256;

/// Keeps the records instead of writing them.
struct Kept(Arc<Mutex<Vec<Record>>>, Header);

impl Recorder for Kept {
    fn record(&mut self, event: Event<'_>) {
        self.0
            .lock()
            .unwrap()
            .push(Record::of(event, self.1.precision));
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

fn options() -> PolicyOptions {
    PolicyOptions {
        kv_budget: Some(Amount::Share(0.5)),
        bin_size: 6,
        recent: 4,
        ..PolicyOptions::default()
    }
}

/// A conversation of two turns under a policy, recorded.
fn recorded(policy: &str, options: &PolicyOptions) -> (Header, Vec<Record>) {
    let limits = Limits {
        n_layer: 2,
        n_cells: N_CELLS,
    };
    let header = Header::new(
        "scripted".into(),
        limits,
        &PolicySpec::new(policy, options.clone()),
        vec![0],
    );
    let kept = Arc::new(Mutex::new(Vec::new()));
    let created = policy::create(policy, options, limits).unwrap();
    let mut controller = Controller::new(created, N_CELLS);
    if header.is_full() {
        controller.observe_for_recorder(vec![0], SINGLE_ROWS);
    }
    controller.record(Box::new(Kept(Arc::clone(&kept), header.clone())));
    let attention = |query: Pos, key: Pos| hashed(1, query, key);
    let engine = Scripted::new(N_CELLS, 16)
        .patched()
        .with_attention(attention);
    let mut session = Session::new(engine, controller);
    for image in 0..2 {
        let picture = Segment::Image {
            embeddings: vec![0.0; 60],
            n: 60,
            image,
            axes: None,
            separators: (6..60).step_by(7).collect(),
        };
        let text = |n: usize| Segment::Tokens(vec![5; n]);
        session
            .prefill(&[text(3), picture, text(8)], &|| false)
            .unwrap();
        (0..30).for_each(|_| session.step(7).unwrap());
    }
    session.controller.finish_recording().unwrap();
    drop(session);
    let records = std::mem::take(&mut *kept.lock().unwrap());
    (header, records)
}

#[test]
fn a_policy_repeats_its_own_decisions() {
    use policy::DapMode::{Early, Exact, Midway};
    for mode in [Exact, Early, Midway] {
        let options = PolicyOptions {
            dap_mode: mode,
            ..options()
        };
        let (mut header, records) = recorded("hae", &options);
        let path = Path::new("a.trace");
        let verified = verify(path, &header, &records).unwrap();
        assert_eq!((verified.plans, verified.steps), (62, 60));
        assert_eq!(verified.difference, None);
        // Nothing else than the options that made them makes these plans.
        header.options.bin_size += 1;
        let verified = verify(path, &header, &records).unwrap();
        assert!(verified.difference.is_some());
    }
}

#[test]
fn a_player_does_what_was_recorded() {
    let (_, records) = recorded("hae", &options());
    let mut player = Player::new(&records);
    for record in &records {
        player.take(record).unwrap();
    }
    let report = player.controller().report();
    assert!(report.flushes > 0 && report.evicted_after_prefill > 0);
    let counts = report.cells;
    assert_eq!(
        counts.cells() + counts.evicted.total(),
        2 * (3 + 60 + 8 + 30)
    );
}

#[test]
fn only_a_trace_of_full_serves_others() {
    let path = Path::new("a.trace");
    let (header, records) = recorded("hae", &options());
    let line = tapes(path, &header, &records).unwrap_err().to_string();
    assert!(line.contains("was recorded under hae"), "{line}");

    let (header, records) = recorded("full", &PolicyOptions::default());
    let all = tapes(path, &header, &records).unwrap();
    let [tape] = &all[..] else { panic!("{all:?}") };
    assert_eq!((tape.len(), tape.steps(), tape.turns.len()), (202, 60, 2));
    // Cut off in the middle of the second prompt, the first turn is there.
    let second = records.iter().rposition(|r| *r == Record::Turn).unwrap();
    let cut = tapes(path, &header, &records[..second + 4]).unwrap();
    assert_eq!((cut[0].len(), cut[0].turns.len()), (101, 1));
    let tape = Rc::new(all[0].clone());
    let whole = replay(&header, &tape, &PolicySpec::full()).unwrap();
    assert_eq!((whole.lost.total, whole.cells.cells()), (0.0, 202));
    let less = replay(&header, &tape, &PolicySpec::new("hae", options())).unwrap();
    assert!(less.lost.total > 0.0 && less.lost.worst < 1.0);
    assert!(less.lost.mean <= less.lost.worst);
    assert_eq!(less.timeline.len(), 60);
}

#[test]
fn layers_that_are_not_in_the_trace_are_refused() {
    let (header, records) = recorded("full", &PolicyOptions::default());
    let tape = Rc::new(tapes(Path::new("a"), &header, &records).unwrap().remove(0));
    let options = PolicyOptions {
        layers: policy::Layers::List(vec![1]),
        ..options()
    };
    let line = replay(&header, &tape, &PolicySpec::new("hae", options))
        .unwrap_err()
        .to_string();
    assert!(
        line.starts_with("`score_layers`: hae scores by layers [1], but"),
        "{line}"
    );
}

#[derive(Clone, Debug)]
enum Damage {
    Remove(usize),
    Repeat(usize),
    Swap(usize, usize),
    Cell(usize, u32),
    Pos(usize, Pos),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = 0..10_000usize;
    let number = prop_oneof![0..300u32, any::<u32>()];
    prop_oneof![
        at.clone().prop_map(Damage::Remove),
        at.clone().prop_map(Damage::Repeat),
        (at.clone(), at.clone()).prop_map(|(a, b)| Damage::Swap(a, b)),
        (at.clone(), number).prop_map(|(at, n)| Damage::Cell(at, n)),
        (at, prop_oneof![0..300i32, any::<i32>()]).prop_map(|(at, n)| Damage::Pos(at, n)),
    ]
}

fn apply(records: &mut Vec<Record>, damage: Damage) {
    let n = records.len();
    match damage {
        Damage::Remove(at) => drop(records.remove(at % n)),
        Damage::Repeat(at) => records.insert(at % n, records[at % n].clone()),
        Damage::Swap(a, b) => records.swap(a % n, b % n),
        Damage::Cell(at, value) => match &mut records[at % n] {
            Record::Inserted { cells, .. }
            | Record::Recalled { cells, .. }
            | Record::Loaded { cells, .. }
            | Record::Separators(cells)
            | Record::Removed(cells) => cells.iter_mut().take(1).for_each(|cell| *cell = value),
            Record::Planned {
                bin,
                restore,
                evict,
                ..
            } => {
                let all = bin.iter_mut().chain(restore).chain(evict);
                all.take(1).for_each(|cell| *cell = value);
            }
            Record::Moved(moves) => moves.iter_mut().for_each(|(from, _)| *from = value),
            _ => {}
        },
        Damage::Pos(at, value) => match &mut records[at % n] {
            Record::Inserted { pos, .. }
            | Record::Recalled { pos, .. }
            | Record::Observed { queries: pos, .. }
            | Record::Judged { pruned: pos, .. }
            | Record::Skipped(pos) => pos.iter_mut().take(1).for_each(|pos| *pos = value),
            Record::Rewound(from) => *from = value,
            _ => {}
        },
    }
}

thread_local! {
    static TRACES: Vec<(Header, Vec<Record>)> = {
        let early = PolicyOptions { dap_mode: policy::DapMode::Early, ..options() };
        vec![
            recorded("hae", &options()),
            recorded("hae", &early),
            recorded("full", &PolicyOptions::default()),
        ]
    };
}

proptest! {
    /// Records that do not fit each other are an error of one line, whatever reads them.
    #[test]
    fn records_in_disorder(which in 0..3usize, damages in prop::collection::vec(damage(), 1..4)) {
        let (header, mut records) = TRACES.with(|all| all[which].clone());
        damages.into_iter().for_each(|damage| apply(&mut records, damage));
        let path = Path::new("a.trace");
        let one_line = |text: String| assert!(!text.contains('\n'), "{text}");
        match tapes(path, &header, &records) {
            Ok(tapes) => for tape in tapes {
                if let Err(e) = replay(&header, &Rc::new(tape), &PolicySpec::new("hae", options())) {
                    one_line(e.to_string());
                }
            },
            Err(e) => one_line(e.to_string()),
        }
        if let Err(e) = verify(path, &header, &records) {
            one_line(e.to_string());
        }
        let mut player = Player::new(&records);
        if let Some(e) = records.iter().find_map(|record| player.take(record).err()) {
            one_line(e.to_string());
        }
    }
}
