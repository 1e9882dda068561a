//! Conversations that prune before the prefill, call evicted tokens back and move cells together:
//! on the scripted engine, whose attention is known.

use std::collections::BTreeSet;

use hae::cache::{BinOptions, Modality, Pos};
use hae::controller::Controller;
use hae::engine::scripted::{Call, Scripted, hashed};
use hae::generate::{Segment, Session};
use hae::policy::{
    Amount, DapMode, DapOptions, DapRule, Limits, PolicyOptions, Queries, Scope, create,
};
use proptest::prelude::*;

use crate::random::{N_LAYER, Turn, assert_in_step, options, prompt, row, turns};

fn session(options: &PolicyOptions, seed: u64, n_cells: usize, host: usize) -> Session<Scripted> {
    session_of("hae", options, seed, n_cells, host)
}

fn session_of(
    name: &str,
    options: &PolicyOptions,
    seed: u64,
    n_cells: usize,
    host: usize,
) -> Session<Scripted> {
    let limits = Limits {
        n_layer: N_LAYER,
        n_cells,
    };
    let policy = create(name, options, limits).unwrap();
    let engine = Scripted::new(n_cells, 7)
        .with_attention(move |q, k| hashed(seed, q, k))
        .patched();
    Session::new(engine, Controller::new(policy, n_cells)).with_store(BinOptions::ram(host as u64))
}

fn rows(turns: &[Turn]) -> usize {
    let prompts = turns.iter().flat_map(|(prompt, _)| prompt);
    prompts.map(|segment| segment.1).sum::<usize>() + turns.iter().map(|t| t.1).sum::<usize>()
}

fn held(session: &Session<Scripted>, modality: Modality) -> BTreeSet<Pos> {
    let entries = session.controller.ledger().entries();
    let kept = entries.filter(|entry| entry.modality == modality);
    kept.map(|entry| entry.pos).collect()
}

/// DAP alone, judged by the last prompt token, with nothing protected but the newest.
fn dap(mode: DapMode, keep: Amount) -> PolicyOptions {
    PolicyOptions {
        dap: Some(DapOptions {
            rule: DapRule::Keep(keep),
            alpha: None,
            scope: Scope::Turn,
        }),
        dap_mode: mode,
        queries: Queries::Last,
        sinks: 0,
        recent: 0,
        ..PolicyOptions::default()
    }
}

fn modes() -> impl Strategy<Value = DapMode> {
    prop_oneof![
        Just(DapMode::Exact),
        Just(DapMode::Early),
        Just(DapMode::Midway)
    ]
}

proptest! {
    #[test]
    fn nobody_is_lost_whoever_leaves_and_returns(
        options in options(),
        dap_mode in modes(),
        recall in any::<bool>(),
        host in prop_oneof![Just(0), 1..400usize],
        turns in turns(),
        seed in any::<u64>(),
    ) {
        let options = PolicyOptions { dap_mode, recall, ..options };
        let n_cells = rows(&turns) + options.sinks + options.recent + 60;
        let mut session = session(&options, seed, n_cells, host);
        let mut gone_in = 0;
        for (turn, (segments, answer)) in turns.iter().enumerate() {
            prop_assert!(session.prefill(&prompt(segments, 10 * turn as u32), &|| false).unwrap());
            gone_in += segments.iter().map(|s| s.1).sum::<usize>();
            for step in 0..=*answer {
                if step > 0 {
                    session.step(3).unwrap();
                    gone_in += 1;
                }
                assert_in_step(&session);
                let counts = session.controller.ledger().counts();
                prop_assert_eq!(counts.cells() + counts.evicted.total(), gone_in);
                prop_assert_eq!(session.controller.next_pos() as usize, gone_in);
                prop_assert!(session.store().bytes() <= host as u64);
                let all: BTreeSet<Pos> = [Modality::Text, Modality::Vision]
                    .into_iter()
                    .flat_map(|modality| held(&session, modality))
                    .collect();
                prop_assert!(session.store().positions().all(|pos| !all.contains(&pos)));
            }
        }
    }

    /// What a trial run says of the first prompt is what the whole prefill says.
    #[test]
    fn all_modes_keep_the_same_tokens(
        options in options(),
        turns in turns(),
        seed in any::<u64>(),
    ) {
        let prompt = prompt(&turns[0].0, 0);
        let kept = |dap_mode| {
            let options = PolicyOptions { dap_mode, ..options.clone() };
            let mut session = session(&options, seed, 400, 0);
            prop_assert!(session.prefill(&prompt, &|| false).unwrap());
            let ledger = session.controller.ledger();
            let mut kept: Vec<_> = ledger.entries().map(|e| (e.pos, e.state, e.sum)).collect();
            kept.sort_by_key(|entry| entry.0);
            Ok((kept, ledger.counts().evicted, session.engine.n_decoded()))
        };
        let exact = kept(DapMode::Exact)?;
        for mode in [DapMode::Early, DapMode::Midway] {
            let early = kept(mode)?;
            prop_assert_eq!(&exact.0, &early.0);
            prop_assert_eq!(exact.1, early.1);
            if options.dap.is_some() && options.kv_budget.is_none() {
                prop_assert_eq!(early.2, early.0.len(), "what was pruned never went in");
            }
        }
    }

    /// A second question judges the pictures of both turns by itself, whatever the first left.
    #[test]
    fn a_new_question_judges_all_pictures_anew(
        turns in turns(),
        seed in any::<u64>(),
        keep in 1..12usize,
        mode in modes(),
    ) {
        let mut session = session(&dap(mode, Amount::Cells(keep)), seed, 400, 0);
        let mut visual = BTreeSet::new();
        let mut next: Pos = 0;
        for (turn, (segments, answer)) in turns.iter().enumerate() {
            for &(picture, n) in segments {
                if picture {
                    visual.extend(next..next + n as Pos);
                }
                next += n as Pos;
            }
            prop_assert!(session.prefill(&prompt(segments, 10 * turn as u32), &|| false).unwrap());
            let keys: Vec<Pos> = visual.iter().copied().collect();
            let scores = row(seed, next - 1, &keys);
            let mut order: Vec<usize> = (0..keys.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let best: BTreeSet<Pos> = order.into_iter().take(keep).map(|i| keys[i]).collect();
            // The newest token of the prompt is text, so that every picture is open.
            prop_assert_eq!(&held(&session, Modality::Vision), &best);
            for _ in 0..*answer {
                session.step(3).unwrap();
                next += 1;
            }
        }
    }

    #[test]
    fn cells_are_moved_together(options in options(), turns in turns(), seed in any::<u64>()) {
        let n_cells = rows(&turns) + options.sinks + options.recent + 60;
        let mut session = session(&options, seed, n_cells, 0);
        for (segments, answer) in &turns {
            prop_assert!(session.prefill(&prompt(segments, 0), &|| false).unwrap());
            for _ in 0..*answer {
                session.step(3).unwrap();
                let cells = session.engine.occupied().into_iter().map(|(cell, _)| cell);
                prop_assert!(cells.eq(0..session.controller.ledger().span() as u32));
            }
        }
    }
}

#[test]
fn without_recall_what_is_gone_stays_gone() {
    let options = PolicyOptions {
        recall: false,
        ..dap(DapMode::Exact, Amount::Cells(3))
    };
    let mut session = session(&options, 1, 100, 0);
    let ask = |session: &mut Session<Scripted>, segments: &[(bool, usize)]| {
        assert!(session.prefill(&prompt(segments, 0), &|| false).unwrap());
        held(session, Modality::Vision)
    };
    let first = ask(&mut session, &[(true, 20), (false, 3)]);
    assert_eq!(first.len(), 3);
    assert_eq!(ask(&mut session, &[(false, 5)]), first);
    assert!(session.history().pieces().is_empty());
}

/// With room for a part of what was evicted, nothing comes back: a picture with holes where room
/// ended would be judged by chance.
#[test]
fn pictures_come_back_whole_or_not_at_all() {
    let options = dap(DapMode::Exact, Amount::Cells(3));
    let calls = |n_cells: usize| {
        let mut session = session(&options, 1, n_cells, 0);
        for segments in [&[(true, 20), (false, 3)][..], &[(false, 5)]] {
            assert!(session.prefill(&prompt(segments, 0), &|| false).unwrap());
        }
        let decoded = session.engine.calls.iter().filter(|call| {
            matches!(
                call,
                Call::Decode {
                    embeddings: true,
                    ..
                }
            )
        });
        (decoded.count(), session.controller.report().recalled)
    };
    assert_eq!(calls(28), (6, 17));
    assert_eq!(calls(27), (3, 0));
}

#[test]
fn a_prompt_that_early_pruning_makes_fit_goes_in() {
    let prompt = prompt(&[(false, 2), (true, 90), (false, 4)], 0);
    let small = |mode| session(&dap(mode, Amount::Cells(10)), 3, 20, 0);
    let error = small(DapMode::Exact).prefill(&prompt, &|| false);
    let refused = matches!(
        error,
        Err(hae::Error::PromptTooLong {
            needed: 96,
            n_ctx: 20
        })
    );
    assert!(refused, "{error:?}");
    for mode in [DapMode::Early, DapMode::Midway] {
        let mut early = small(mode);
        assert!(early.prefill(&prompt, &|| false).unwrap());
        assert_eq!(early.controller.ledger().counts().cells(), 16);
        assert_eq!(early.controller.ledger().counts().peak, 16);
        let continued = |call: &&Call| {
            matches!(
                call,
                Call::Decode {
                    continued: true,
                    ..
                }
            )
        };
        let n = early.engine.calls.iter().filter(continued).count();
        assert_eq!(n > 0, mode == DapMode::Midway);
    }
}

/// DDES alone, in few cells.
fn ddes() -> PolicyOptions {
    PolicyOptions {
        dap: None,
        kv_budget: Some(Amount::Cells(16)),
        bin_size: 4,
        sinks: 1,
        recent: 4,
        ..PolicyOptions::default()
    }
}

/// After an answer about a text of 30 tokens, with a host bin for all of it.
fn answered(options: &PolicyOptions, n_cells: usize) -> Session<Scripted> {
    let mut session = session(options, 5, n_cells, 1 << 20);
    let prompt = prompt(&[(false, 30)], 0);
    assert!(session.prefill(&prompt, &|| false).unwrap());
    for _ in 0..20 {
        session.step(3).unwrap();
    }
    session
}

#[test]
fn returning_text_leaves_the_prompt_its_room() {
    let n_cells = 50;
    let ask = |spare: usize| {
        let mut session = answered(&ddes(), n_cells);
        let waiting = session.store().rows();
        let held = session.controller.ledger().counts().cells();
        let rows = n_cells - held - spare;
        let prompt = prompt(&[(false, rows)], 0);
        assert!(session.prefill(&prompt, &|| false).unwrap());
        (waiting, session.controller.report().recalled)
    };
    let (waiting, recalled) = ask(0);
    assert!(waiting > 20);
    assert_eq!(recalled, 0);
    let (_, recalled) = ask(10);
    assert!((1..=10).contains(&recalled), "{recalled}");
}

#[test]
fn text_waits_for_policies_that_call_it_back_alone() {
    let options = PolicyOptions {
        recall: false,
        ..ddes()
    };
    let session = answered(&options, 200);
    assert!(session.controller.ledger().counts().evicted.text > 20);
    assert_eq!(session.store().rows(), 0);
}

#[test]
fn evicted_text_waits_on_the_host() {
    let options = ddes();
    // A row of the scripted engine takes 4 bytes.
    let kept = |host: usize| {
        let mut session = session(&options, 5, 200, host);
        assert!(
            session
                .prefill(&prompt(&[(false, 30)], 0), &|| false)
                .unwrap()
        );
        for _ in 0..20 {
            session.step(3).unwrap();
        }
        let gone = session.controller.ledger().counts().evicted.text;
        let waiting = session.store().rows();
        assert!(
            session
                .prefill(&prompt(&[(false, 2)], 0), &|| false)
                .unwrap()
        );
        (gone, waiting, session.controller.report().recalled)
    };
    let (gone, waiting, recalled) = kept(1 << 20);
    assert!(gone > 20);
    assert_eq!((waiting, recalled), (gone, gone));
    assert_eq!(kept(0), (gone, 0, 0));
    let (_, waiting, recalled) = kept(40);
    assert!((6..=10).contains(&waiting));
    assert_eq!(recalled, waiting);
}

/// A picture of three rows with their ends, as Phi-3.5-vision's crops have them. All its rows have
/// the same embeddings: what looks alike is no separator for that.
fn rows_of_five() -> [Segment; 2] {
    let picture = Segment::Image {
        embeddings: vec![1.0; 15],
        n: 15,
        image: 0,
        axes: None,
        separators: vec![4, 9, 14],
    };
    [picture, Segment::Tokens(vec![3; 3])]
}

fn is_row_end(pos: &Pos) -> bool {
    pos % 5 == 4
}

#[test]
fn row_ends_stay_with_what_is_kept() {
    let kept = |keep_separators, mode| {
        let options = PolicyOptions {
            keep_separators,
            ..dap(mode, Amount::Cells(7))
        };
        let mut session = session(&options, 11, 64, 0);
        assert!(session.prefill(&rows_of_five(), &|| false).unwrap());
        held(&session, Modality::Vision)
    };
    assert_eq!(kept(true, DapMode::Exact), kept(false, DapMode::Early));
    assert_eq!(kept(true, DapMode::Midway), kept(false, DapMode::Early));
    assert_eq!(kept(false, DapMode::Early).len(), 7);
    let with = kept(true, DapMode::Early);
    // The best others fill what the ends leave.
    let mut others: Vec<Pos> = (0..15).filter(|pos| !is_row_end(pos)).collect();
    let scores = row(11, 17, &(0..18).collect::<Vec<_>>());
    others.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    let best = others.into_iter().take(4).chain([4, 9, 14]);
    assert_eq!(with, best.collect());
}

/// A number below twice that of the row ends: of these the best stay, at most half of it.
#[test]
fn row_ends_are_at_most_half_of_what_is_kept() {
    for (keep, ends) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (7, 3)] {
        let options = dap(DapMode::Early, Amount::Cells(keep));
        let mut session = session(&options, 11, 64, 0);
        assert!(session.prefill(&rows_of_five(), &|| false).unwrap());
        let held = held(&session, Modality::Vision);
        let kept_ends = held.iter().filter(|pos| is_row_end(pos)).count();
        assert_eq!((held.len(), kept_ends), (keep, ends));
    }
}

#[test]
fn no_threshold_takes_row_ends() {
    let options = PolicyOptions {
        dap: Some(DapOptions {
            rule: DapRule::Tau(100.0),
            alpha: None,
            scope: Scope::Turn,
        }),
        ..dap(DapMode::Early, Amount::Cells(1))
    };
    let mut session = session(&options, 11, 64, 0);
    assert!(session.prefill(&rows_of_five(), &|| false).unwrap());
    assert_eq!(held(&session, Modality::Vision), [4, 9, 14].into());
}

proptest! {
    /// Budgets hold where a trial run judges, whether earlier turns are remembered or not, and
    /// row ends do not stand in their way.
    #[test]
    fn what_is_pruned_before_it_goes_in_fits_the_budget(
        turns in prop::collection::vec((1..8usize, 1..40usize, 1..10usize), 1..4),
        budget in 8..80usize,
        seed in any::<u64>(),
        recall in any::<bool>(),
        midway in any::<bool>(),
    ) {
        for name in ["hae", "dap", "fastv", "mustdrop"] {
            let options = PolicyOptions {
                dap_mode: if midway { DapMode::Midway } else { DapMode::Early },
                kv_budget: Some(Amount::Cells(budget)),
                sinks: 0,
                recent: 0,
                bin_size: 2,
                recall,
                ..PolicyOptions::default()
            };
            let mut session = session_of(name, &options, seed, 400, 0);
            let remembers = recall && ["hae", "dap"].contains(&name);
            for &(n_text, n_picture, answer) in &turns {
                let earlier = match remembers {
                    true => 0,
                    false => held(&session, Modality::Vision).len(),
                };
                let picture = Segment::Image {
                    embeddings: vec![1.0; n_picture],
                    n: n_picture,
                    image: 0,
                    axes: None,
                    separators: (1..n_picture as u32).step_by(2).collect(),
                };
                session.expect(answer);
                let prompt = [picture, Segment::Tokens(vec![3; n_text])];
                prop_assert!(session.prefill(&prompt, &|| false).unwrap());
                let text = held(&session, Modality::Text).len();
                let cells = session.controller.ledger().counts().cells();
                // Text is not theirs to prune, and something of the pictures stays.
                let least = match name {
                    "hae" => 0,
                    _ => text + earlier + 1,
                };
                let room = match name {
                    "hae" => budget,
                    _ => budget.saturating_sub(answer),
                };
                prop_assert!(cells <= room.max(least), "{name}: {cells} of {room}");
                // And no more leave than must, where nothing but the budget says so.
                if name == "fastv" {
                    let all = text + earlier + n_picture;
                    prop_assert_eq!(cells, all.min(room.max(least)), "{}", name);
                }
                for _ in 0..answer {
                    session.step(3).unwrap();
                    assert_in_step(&session);
                }
            }
            if name == "hae" {
                prop_assert!(session.controller.report().peak_decoding <= budget);
            }
        }
    }
}
