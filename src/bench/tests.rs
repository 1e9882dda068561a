use std::cell::Cell;

use super::*;
use crate::controller::Controller;
use crate::engine::scripted::{Call, Scripted};
use crate::policy::{self, Amount, DapMode, Limits, PolicyOptions};

/// A clock that moves on by a millisecond each time somebody looks.
fn ticking() -> impl Fn() -> Duration {
    let ticks = Cell::new(0);
    move || {
        ticks.set(ticks.get() + 1);
        Duration::from_millis(ticks.get())
    }
}

fn session(policy: &str, options: &PolicyOptions, n_cells: usize) -> Session<Scripted> {
    let limits = Limits {
        n_layer: 1,
        n_cells,
    };
    let policy = policy::create(policy, options, limits).unwrap();
    Session::new(Scripted::new(n_cells, 16), Controller::new(policy, n_cells))
}

fn run(session: &mut Session<Scripted>, test: &Test, images: usize) -> Option<Sample> {
    let now = ticking();
    let watch = Pulse {
        now: &now,
        cancelled: &|| false,
    };
    let picture = |image| Segment::Image {
        embeddings: vec![0.0; 8],
        n: 8,
        image,
        axes: None,
        separators: Vec::new(),
    };
    let mut pictures = |n| {
        assert_eq!(n, images);
        Ok((0..images as u32).map(picture).collect())
    };
    measure(session, test, &mut || 7, &mut pictures, watch).unwrap()
}

fn test(n_depth: usize, n_prompt: usize, n_gen: usize, n_images: usize) -> Test {
    Test {
        workload: None,
        n_depth,
        depth_copies: false,
        turns: vec![Turn {
            n_images,
            n_prompt,
            n_gen,
        }],
    }
}

/// Rows of each decode call.
fn rows(session: &Session<Scripted>) -> Vec<usize> {
    let calls = session.engine.calls.iter();
    let rows = calls.filter_map(|call| match call {
        Call::Decode { n, .. } => Some(*n),
        _ => None,
    });
    rows.collect()
}

#[test]
fn a_test_feeds_what_its_name_says() {
    let full = PolicyOptions::default();
    for (test, images, expected) in [
        (test(0, 20, 0, 0), 0, vec![16, 4]),
        (test(0, 0, 3, 0), 0, vec![1, 1, 1, 1]),
        (test(5, 0, 2, 0), 0, vec![5, 1, 1]),
        (test(5, 3, 2, 1), 1, vec![5, 8, 3, 1, 1]),
    ] {
        let mut session = session("full", &full, 64);
        let sample = run(&mut session, &test, images).unwrap();
        assert_eq!(rows(&session), expected, "{}", test.name());
        assert_eq!(sample.steps, test.n_gen());
        assert_eq!(sample.prompt.text, test.n_prompt());
        assert_eq!(sample.prompt.vision, 8 * images);
        // Nothing is evicted, so every row is a cell, and there is just enough room.
        assert_eq!(sample.cells.cells(), test.cells(8));
        assert_eq!(sample.cells.cells(), rows(&session).iter().sum::<usize>());
        assert_eq!(sample.ttft().is_some(), test.n_prompt() > 0);
        assert_eq!(sample.tpot().is_some(), test.n_gen() > 0);
    }
}

#[test]
fn a_deep_cache_can_hold_copies() {
    let deep = Test {
        depth_copies: true,
        ..test(1200, 0, 2, 0)
    };
    let mut session = session("full", &PolicyOptions::default(), 1300);
    session.engine = session.engine.patched();
    let sample = run(&mut session, &deep, 0).unwrap();
    assert_eq!(rows(&session).iter().sum::<usize>(), 64 + 2);
    assert_eq!(sample.cells.cells(), 1202);
    let held: Vec<_> = session.engine.occupied().iter().map(|o| o.1).collect();
    assert_eq!(held, (0..1202).collect::<Vec<_>>());
}

#[test]
fn turns_follow_one_another_in_one_conversation() {
    let chat = Test {
        turns: vec![
            Turn {
                n_images: 1,
                n_prompt: 3,
                n_gen: 2,
            };
            3
        ],
        ..test(0, 0, 0, 0)
    };
    let mut session = session("full", &PolicyOptions::default(), 64);
    let sample = run(&mut session, &chat, 1).unwrap();
    assert_eq!(rows(&session), [8, 3, 1, 1].repeat(3));
    assert_eq!((sample.prompt.vision, sample.prompt.text), (24, 9));
    assert_eq!((sample.steps, sample.cells.cells()), (6, chat.cells(8)));
    assert_eq!(sample.total(), sample.prefill + sample.decode);
}

#[test]
fn the_parts_of_the_first_tokens_time_add_up() {
    let options = PolicyOptions {
        dap_mode: DapMode::Early,
        sinks: 0,
        recent: 3,
        ..PolicyOptions::default()
    };
    let mut session = session("hae", &options, 64);
    session.engine = Scripted::new(64, 16).patched();
    let sample = run(&mut session, &test(4, 3, 2, 2), 2).unwrap();
    let parts = [sample.encode, sample.probe, sample.prefill];
    assert!(parts.iter().all(|part| !part.is_zero()), "{sample:?}");
    assert_eq!(sample.ttft().unwrap(), parts.iter().sum());
    assert_eq!(sample.tpot().unwrap(), sample.decode / 2);
    // 40 % of 16 stay.
    assert_eq!(sample.cells.evicted.vision, 10);
}

#[test]
fn the_policy_works_while_it_is_measured() {
    let options = PolicyOptions {
        kv_budget: Some(Amount::Cells(34)),
        bin_size: 4,
        dap: None,
        ..PolicyOptions::default()
    };
    let mut session = session("hae", &options, 64);
    let sample = run(&mut session, &test(0, 24, 40, 0), 0).unwrap();
    assert!(sample.cells.evicted.text > 0);
    assert!(sample.cells.peak <= 34);
}

#[test]
fn a_cancelled_test_gives_nothing() {
    for stop_at in [0, 1, 2, 4] {
        let mut session = session("full", &PolicyOptions::default(), 64);
        let asked = Cell::new(0);
        let now = ticking();
        let watch = Pulse {
            now: &now,
            cancelled: &|| {
                asked.set(asked.get() + 1);
                asked.get() > stop_at
            },
        };
        let sample = measure(
            &mut session,
            &test(4, 4, 4, 0),
            &mut || 7,
            &mut |_| Ok(Vec::new()),
            watch,
        );
        assert_eq!(sample.unwrap(), None, "{stop_at}");
    }
}

#[test]
fn names_are_llama_benchs() {
    let name = |test: Test| test.name();
    assert_eq!(name(test(0, 512, 0, 0)), "pp512");
    assert_eq!(name(test(4096, 0, 128, 0)), "tg128 @ d4096");
    assert_eq!(name(test(0, 16, 8, 2)), "2img+pp16+tg8");
}

#[test]
fn each_policy_begins_as_often_as_the_others() {
    let order = |round| turns(3, round).collect::<Vec<_>>();
    assert_eq!(order(0), [0, 1, 2]);
    assert_eq!(order(1), [1, 2, 0]);
    assert_eq!(order(5), [2, 0, 1]);
}
