use std::cell::Cell as Slot;

mod sequences;
mod take_back;
mod together;

use super::*;
use crate::cache::PerModality;
use crate::engine::scripted::{Call, Scripted};
use crate::engine::{Batch, Observation};
use crate::policy::{self, Amount, DapOptions, DapRule, Limits, PolicyOptions, Scope};

fn session(engine: Scripted, policy: &str, options: &PolicyOptions) -> Session<Scripted> {
    let n_cells = engine.n_cells();
    let policy = policy::create(
        policy,
        options,
        Limits {
            n_layer: 2,
            n_cells,
        },
    )
    .unwrap();
    Session::new(engine, Controller::new(policy, n_cells))
}

fn tokens(n: usize) -> Segment {
    Segment::Tokens(vec![1; n])
}

fn picture(n: usize) -> Segment {
    Segment::Image {
        embeddings: (0..3 * n).map(|x| x as f32).collect(),
        n,
        image: 0,
        axes: None,
        separators: Vec::new(),
    }
}

/// One turn; the clock advances by a second at each look.
fn turn(
    session: &mut Session<Scripted>,
    prompt: &[Segment],
    n_predict: Option<usize>,
    cancelled: &dyn Fn() -> bool,
) -> (Result<Generated>, Vec<String>) {
    let seconds = Slot::new(0);
    let now = || {
        seconds.set(seconds.get() + 1);
        Duration::from_secs(seconds.get())
    };
    let mut parts = Vec::new();
    let mut on_text = |text: &str| parts.push(text.to_owned());
    let hooks = Hooks {
        on_text: &mut on_text,
        cancelled,
        now: &now,
    };
    (session.generate(prompt, n_predict, hooks), parts)
}

fn quiet<R>(f: impl FnOnce(Hooks<'_>) -> R) -> R {
    f(Hooks {
        on_text: &mut |_| {},
        cancelled: &|| false,
        now: &|| Duration::ZERO,
    })
}

/// The prompt's batches: position, rows, embeddings or not, query rows, logits.
fn batches(session: &Session<Scripted>) -> Vec<(Pos, usize, bool, Vec<u32>, bool)> {
    let batches = session
        .engine
        .calls
        .iter()
        .filter_map(|call| match call.clone() {
            Call::Decode {
                pos,
                n,
                embeddings,
                queries,
                logits,
                ..
            } => Some((pos, n, embeddings, queries, logits)),
            _ => None,
        });
    batches.collect()
}

#[test]
fn a_prompt_is_cut_and_queried() {
    let prompt = [tokens(3), picture(5), tokens(0), tokens(2)];
    let cuts = |policy, options: &PolicyOptions| {
        let mut session = session(Scripted::new(32, 2), policy, options);
        turn(&mut session, &prompt, Some(0), &|| false).0.unwrap();
        batches(&session)
    };
    let cells = [
        (0, 2, false),
        (2, 1, false),
        (3, 2, true),
        (5, 2, true),
        (7, 1, true),
    ];
    let full = cuts("full", &PolicyOptions::default());
    assert_eq!(
        full[..5],
        cells.map(|(pos, n, image)| (pos, n, image, vec![], false))
    );
    assert_eq!(full[5..], [(8, 2, false, vec![], true)]);
    let last = cuts("hae", &PolicyOptions::default());
    assert!(last[..5].iter().all(|batch| batch.3.is_empty()));
    assert_eq!(last[5], (8, 2, false, vec![1], true));
    let all: Vec<_> = cuts(
        "hae",
        &PolicyOptions {
            kv_budget: None,
            ..PolicyOptions::paper()
        },
    )
    .into_iter()
    .map(|b| b.3)
    .collect();
    assert_eq!(
        all,
        [vec![0, 1], vec![0], vec![], vec![], vec![], vec![0, 1]]
    );
}

#[test]
fn the_last_rows_of_a_prompt_are_queried_wherever_they_lie() {
    let prompt = [tokens(3), picture(5), tokens(0), tokens(2)];
    let queried = |window, n_batch| {
        let mut options = PolicyOptions::default();
        options.snapkv.window = window;
        let mut session = session(Scripted::new(32, n_batch), "snapkv", &options);
        turn(&mut session, &prompt, Some(2), &|| false).0.unwrap();
        let rows = batches(&session).into_iter();
        let rows = rows
            .flat_map(|(pos, .., queries, _)| queries.into_iter().map(move |row| pos + row as Pos));
        rows.collect::<Vec<_>>()
    };
    for n_batch in [1, 2, 4, 16] {
        assert_eq!(queried(1, n_batch), [9]);
        assert_eq!(queried(4, n_batch), [6, 7, 8, 9]);
        assert_eq!(queried(8, n_batch), [2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(queried(99, n_batch), (0..10).collect::<Vec<_>>());
    }
    // h2o looks at all of it, and at what is decoded.
    let mut session = session(Scripted::new(32, 4), "h2o", &PolicyOptions::default());
    turn(&mut session, &prompt, Some(2), &|| false).0.unwrap();
    let rows = batches(&session);
    assert!(rows.iter().all(|(_, n, _, queries, _)| queries.len() == *n));
}

#[test]
fn a_shift_frees_room_and_positions() {
    let options = PolicyOptions {
        sinks: 2,
        ..PolicyOptions::default()
    };
    let mut session = session(Scripted::new(16, 8), "context_shift", &options);
    let generated = turn(&mut session, &[tokens(10)], Some(20), &|| false).0;
    assert_eq!(generated.unwrap().finish, Finish::Length);
    let moves = |session: &Session<Scripted>| {
        let calls = session
            .engine
            .calls
            .iter()
            .filter(|call| matches!(call, Call::Remove(_) | Call::Shift { .. }));
        calls.cloned().collect::<Vec<_>>()
    };
    // Removals and moves behind the 2 that stay.
    let shift = |by: Pos| {
        let (gone, from) = (2..2 + by, 2 + by);
        [Call::Remove(Vec::from([gone])), Call::Shift { from, by }]
    };
    // At 15 of 16 cells there are 13 beside them: 6 go.
    assert_eq!(moves(&session), [shift(6), shift(6), shift(6)].concat());
    assert_eq!(session.controller.next_pos(), 11);
    // A prompt that does not fit behind 11 tokens: 4 of the 9 go. It fills the context: 7 of 14 go.
    session.prefill(&[tokens(9)], &|| false).unwrap();
    assert_eq!(moves(&session)[6..], [shift(4), shift(7)].concat());
    let held = session.controller.ledger().entries();
    let held: Vec<_> = held.map(|e| (e.cell, e.pos)).collect();
    assert_eq!(held, session.engine.occupied());
    // One that never fits changes nothing.
    let before = (session.engine.occupied(), session.engine.calls.len());
    let error = session.prefill(&[tokens(15)], &|| false).unwrap_err();
    assert!(matches!(error, Error::PromptTooLong { n_ctx: 16, .. }));
    assert_eq!(
        before,
        (session.engine.occupied(), session.engine.calls.len())
    );
}

#[test]
fn an_engine_that_cannot_shift_is_refused_by_name() {
    let engine = Scripted::new(16, 8).without_shift();
    let mut session = session(engine, "context_shift", &PolicyOptions::default());
    let error = session.prefill(&[tokens(3)], &|| false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "kv policy context_shift cannot serve this model: its cached keys cannot be moved to other positions"
    );
    assert!(session.engine.calls.is_empty());
}

#[test]
fn decoding_is_observed_only_for_those_who_decide_in_it() {
    let observed = |options: &PolicyOptions| {
        let mut session = session(Scripted::new(64, 8), "hae", options);
        turn(&mut session, &[tokens(4)], Some(3), &|| false)
            .0
            .unwrap();
        batches(&session)[1..]
            .iter()
            .map(|batch| batch.3.len())
            .collect::<Vec<_>>()
    };
    assert_eq!(observed(&PolicyOptions::default()), [0, 0]);
    let kv_budget = Some(Amount::Cells(30));
    assert_eq!(
        observed(&PolicyOptions {
            kv_budget,
            ..PolicyOptions::default()
        }),
        [1, 1]
    );
}

/// A decay counts decoding steps: how a prompt was cut must not show in its scores.
#[test]
fn a_prompt_is_not_decayed() {
    let scores = |n_batch| {
        let options = PolicyOptions {
            decay: 0.5,
            ..PolicyOptions::paper()
        };
        let mut session = session(Scripted::new(64, n_batch), "hae", &options);
        let prompt = [tokens(5), picture(3), tokens(9)];
        session.prefill(&prompt, &|| false).unwrap();
        let entries = session.controller.ledger().entries();
        entries.map(|e| (e.pos, e.seen)).collect::<Vec<_>>()
    };
    assert_eq!(scores(1)[..2], [(0, 14.0), (1, 13.0)]);
    assert_eq!(scores(1), scores(64));
}

#[test]
fn an_answer_ends_at_eog_or_at_its_length() {
    let engine = || Scripted::new(32, 8).with_says(|pos| if pos == 5 { 0 } else { 7 });
    let mut session = session(engine(), "full", &PolicyOptions::default());
    let (result, parts) = turn(&mut session, &[tokens(3)], None, &|| false);
    let generated = result.unwrap();
    assert_eq!(
        (generated.text.as_str(), generated.finish),
        (" 7 7 7", Finish::Eog)
    );
    assert_eq!((generated.tokens, generated.pending), (vec![7, 7, 7], None));
    assert_eq!((parts.len(), generated.prompt.text), (3, 3));
    // One look at the clock at the start, after the prefill, at the first token, at the end.
    let seconds = Duration::from_secs;
    let timings = generated.timings;
    assert_eq!(
        (timings.prefill, timings.first_token),
        (seconds(1), Some(seconds(2)))
    );
    assert_eq!((timings.decode, timings.steps), (seconds(1), 3));
    assert_eq!(timings.per_token(), Some(seconds(1) / 3));

    session.controller.clear();
    session.engine.clear();
    let generated = turn(&mut session, &[tokens(3)], Some(2), &|| false)
        .0
        .unwrap();
    assert_eq!(
        (generated.finish, generated.tokens.len()),
        (Finish::Length, 2)
    );
    assert_eq!(generated.pending, Some(7));
    // The pending token begins the next turn, at the position after the one before it.
    let next = [Segment::Tokens(vec![7, 9])];
    let generated = turn(&mut session, &next, Some(0), &|| false).0.unwrap();
    assert_eq!(batches(&session).last().map(|batch| batch.0), Some(4));
    assert_eq!(
        (generated.finish, generated.timings.first_token),
        (Finish::Length, None)
    );
    assert_eq!(generated.timings.per_token(), None);
}

#[test]
fn a_full_context_keeps_the_text() {
    let mut session = session(Scripted::new(6, 8), "full", &PolicyOptions::default());
    let generated = turn(&mut session, &[tokens(4)], None, &|| false).0.unwrap();
    assert_eq!(
        (generated.text.as_str(), generated.finish),
        (" 1 1 1", Finish::Context)
    );
    assert_eq!((generated.pending, generated.timings.steps), (Some(1), 2));
    assert_eq!(session.controller.report().cells.live.text, 6);
}

#[test]
fn cancelling() {
    let mut session = session(Scripted::new(64, 2), "full", &PolicyOptions::default());
    let looks = Slot::new(0);
    let at = |n| {
        looks.set(0);
        let looks = &looks;
        move || {
            looks.set(looks.get() + 1);
            looks.get() > n
        }
    };
    // Two batches and two tokens.
    let generated = turn(&mut session, &[tokens(4)], None, &at(4)).0.unwrap();
    assert_eq!(
        (generated.text.as_str(), generated.finish),
        (" 1 1", Finish::Cancelled)
    );
    assert_eq!(generated.pending, None);
    // In the middle of a prompt, all of it is taken back.
    let generated = turn(&mut session, &[tokens(4)], None, &at(1)).0.unwrap();
    assert_eq!(
        (generated.tokens.len(), generated.finish),
        (0, Finish::Cancelled)
    );
    assert_eq!(session.controller.next_pos(), 6);
    assert_eq!(session.controller.ledger().counts().cells(), 6);
    assert_eq!(session.engine.calls.last(), Some(&Call::Rewind(6)));
    // The chat goes on.
    let generated = turn(&mut session, &[tokens(4)], Some(1), &|| false)
        .0
        .unwrap();
    assert_eq!(generated.finish, Finish::Length);
}

/// Positions tell nothing of it where older tokens move down to make room.
#[test]
fn a_question_that_is_taken_back_says_so() {
    let options = PolicyOptions {
        sinks: 2,
        ..PolicyOptions::default()
    };
    let mut session = session(Scripted::new(16, 4), "context_shift", &options);
    let generated = turn(&mut session, &[tokens(10)], Some(4), &|| false).0;
    assert!(!generated.unwrap().taken_back);
    let before = session.controller.next_pos();
    let looks = Slot::new(0);
    let second = || looks.replace(looks.get() + 1) == 1;
    let generated = turn(&mut session, &[tokens(8)], None, &second).0.unwrap();
    assert_eq!(generated.finish, Finish::Cancelled);
    assert!(generated.taken_back && session.controller.next_pos() < before);
    // Stopped in the answer, the question stays.
    let looks = Slot::new(0);
    let later = || looks.replace(looks.get() + 1) == 4;
    let generated = turn(&mut session, &[tokens(4)], None, &later).0.unwrap();
    assert_eq!(generated.finish, Finish::Cancelled);
    assert!(!generated.taken_back);
}

#[test]
fn room_is_left_for_answers_that_are_asked_for_not_for_all_that_could_be() {
    let options = PolicyOptions {
        kv_budget: Some(Amount::Cells(30)),
        ..PolicyOptions::default()
    };
    let left = |n_predict, reach| {
        let mut session = session(Scripted::new(200, 64), "snapkv", &options);
        let length = Length { n_predict, reach };
        let generated = quiet(|hooks| session.generate(&[tokens(50)], length, hooks)).unwrap();
        let held = session.controller.ledger().counts().cells();
        let said = generated.tokens.len();
        // The last token does not go in.
        (held + 1 - said, said, generated.finish)
    };
    assert_eq!(left(Some(5), None), (26, 5, Finish::Length));
    assert_eq!(left(None, Some(20)), (30, 20, Finish::Positions));
    assert_eq!(left(Some(5), Some(20)), (26, 5, Finish::Length));
    assert_eq!(left(Some(20), Some(5)), (26, 5, Finish::Positions));
    assert_eq!(left(Some(5), Some(5)), (26, 5, Finish::Length));
    assert_eq!(left(None, Some(0)), (31, 0, Finish::Positions));
}

#[test]
fn characters_come_whole() {
    let pieces: [&[u8]; 3] = [b"\xe2\x82", b"\xac", b"\xe2"];
    let engine = Scripted::new(32, 8)
        .with_pieces(7, &pieces)
        .with_says(|pos| pos % 3 + 7);
    let mut session = session(engine, "full", &PolicyOptions::default());
    let (result, parts) = turn(&mut session, &[tokens(1)], Some(3), &|| false);
    assert_eq!(result.unwrap().text, "\u{20ac}\u{fffd}");
    assert_eq!(parts, ["\u{20ac}", "\u{fffd}"]);
}

#[test]
fn prompts_that_cannot_be() {
    let mut session = session(Scripted::new(8, 4), "hae", &PolicyOptions::default());
    let mut refused = |prompt: &[Segment]| {
        let error = turn(&mut session, prompt, None, &|| false).0.unwrap_err();
        assert_eq!(
            (session.controller.next_pos(), session.engine.calls.len()),
            (0, 0)
        );
        error.to_string()
    };
    assert_eq!(
        refused(&[tokens(4), picture(5)]),
        "prompt needs 9 cells but the context holds 8: give a larger `n_ctx`"
    );
    assert!(refused(&[]).contains("is empty"));
    assert!(refused(&[tokens(0), picture(0)]).contains("is empty"));
    let misshapen = |values, n| Segment::Image {
        embeddings: vec![0.0; values],
        n,
        image: 4,
        axes: None,
        separators: Vec::new(),
    };
    assert_eq!(
        refused(&[misshapen(5, 2)]),
        "the prompt: picture 4 has 5 values for 2 rows"
    );
    assert!(refused(&[tokens(1), misshapen(5, 0)]).contains("5 values for 0 rows"));
    assert!(refused(&[tokens(1), misshapen(0, 2)]).contains("0 values for 2 rows"));
    for separators in [vec![1, 0], vec![2], vec![0, 0]] {
        let mut bad = misshapen(2, 2);
        if let Segment::Image { separators: of, .. } = &mut bad {
            *of = separators;
        }
        assert!(refused(&[bad]).contains("picture 4 has separators"));
    }
}

#[test]
fn positions_pass_the_number_of_cells() {
    let options = PolicyOptions {
        kv_budget: Some(Amount::Cells(16)),
        bin_size: 4,
        sinks: 2,
        recent: 3,
        ..PolicyOptions::default()
    };
    let mut session = session(Scripted::new(16, 8), "hae", &options);
    let generated = turn(&mut session, &[tokens(10)], Some(200), &|| false)
        .0
        .unwrap();
    assert_eq!(
        (generated.finish, generated.tokens.len()),
        (Finish::Length, 200)
    );
    assert_eq!(session.controller.next_pos(), 209);
    let report = session.controller.report();
    assert_eq!((report.cells.peak, report.evicted_after_prefill), (16, 0));
    assert_eq!(report.flushes * 4, report.evicted_in_decoding);
    assert_eq!(report.cells.cells() + report.evicted_in_decoding, 209);
}

#[test]
fn a_picture_is_pruned_after_the_prompt() {
    let dap = DapOptions {
        rule: DapRule::Tau(1.0),
        alpha: None,
        scope: Scope::Turn,
    };
    let options = PolicyOptions {
        dap: Some(dap),
        recent: 1,
        ..PolicyOptions::default()
    };
    // Only position 5 of the picture matters.
    let attention = |_, key| if key == 5 { 8.0 } else { 1.0 };
    let engine = Scripted::new(16, 8).with_attention(attention);
    let mut session = session(engine, "hae", &options);
    let prompt = [tokens(1), picture(7), tokens(2)];
    let generated = turn(&mut session, &prompt, Some(2), &|| false).0.unwrap();
    assert_eq!(generated.prompt, PerModality { text: 3, vision: 7 });
    // Positions 1 to 3 are sinks.
    let removals = session.engine.calls.iter().filter_map(|call| match call {
        Call::Remove(ranges) => Some(ranges.clone()),
        _ => None,
    });
    assert_eq!(removals.collect::<Vec<_>>(), [vec![4..5, 6..8]]);
    assert_eq!(
        batches(&session).last().map(|batch| batch.0),
        Some(10),
        "positions stay"
    );
}

#[test]
fn an_engine_that_shows_no_attention_is_found_out() {
    struct Blind(Scripted);
    impl Engine for Blind {
        fn decode(
            &mut self,
            batch: Batch<'_>,
            cells: &mut Vec<Cell>,
            seen: &mut Observation,
        ) -> Result<()> {
            self.0.decode(
                Batch {
                    queries: &[],
                    ..batch
                },
                cells,
                seen,
            )
        }
        fn remove(&mut self, seq: SeqId, ranges: &[std::ops::Range<Pos>]) -> Result<()> {
            self.0.remove(seq, ranges)
        }
        fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
            self.0.rewind(seq, from, left)
        }
        fn n_cells(&self) -> usize {
            self.0.n_cells()
        }
        fn n_batch(&self) -> usize {
            self.0.n_batch()
        }
        fn kv_bytes(&self) -> crate::engine::KvBytes {
            self.0.kv_bytes()
        }
    }
    let scripted = session(Scripted::new(8, 8), "hae", &PolicyOptions::default());
    let mut blind = Session::new(Blind(scripted.engine), scripted.controller);
    let error = blind.prefill(&[tokens(2)], &|| false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "broken contract: attention of 0 rows, expected 1"
    );
}

/// A 2x2 picture of a model with two axes: four cells, two positions.
fn square(rows: usize, n_pos: Pos) -> Segment {
    let rows = (0..rows as Pos).map(|i| [0, i / 2, i % 2, 0]).collect();
    Segment::Image {
        embeddings: vec![0.0; 12],
        n: 4,
        image: 0,
        axes: Some(Axes {
            rows,
            moves: [true, true, true, false],
            n_pos,
        }),
        separators: Vec::new(),
    }
}

#[test]
fn rows_of_a_picture_may_share_positions() {
    let mut session = session(Scripted::new(64, 16), "full", &PolicyOptions::default());
    let prompt = [tokens(3), square(4, 2), tokens(2)];
    assert!(session.prefill(&prompt, &|| false).unwrap());
    assert_eq!(session.controller.next_pos(), 3 + 2 + 2);
    assert_eq!(session.controller.ledger().counts().cells(), 3 + 4 + 2);

    for bad in [square(3, 2), square(4, 0), square(4, 5)] {
        let error = session.prefill(&[bad], &|| false).unwrap_err().to_string();
        assert!(error.contains("for 4 rows"), "{error}");
    }
}

#[test]
fn only_the_axes_that_move_follow_the_picture() {
    let rows = square(4, 2).axes(10, 1, 3);
    assert_eq!(rows.unwrap(), [[10, 10, 11, 0], [10, 11, 10, 0]]);
}

/// Two turns, one step of each at a time, say what each says by itself; `generate` is the same
/// steps in a row.
#[test]
fn generations_can_take_turns() {
    let make = |says: Token| {
        let engine = Scripted::new(32, 4).with_says(move |pos| if pos == 12 { 0 } else { says });
        session(engine, "h2o", &PolicyOptions::default())
    };
    let prompts = [vec![tokens(6)], vec![tokens(2), picture(5)]];
    let alone = |i: usize| {
        let mut session = make(7 + i as Token);
        let generated = quiet(|hooks| session.generate(&prompts[i], None, hooks)).unwrap();
        (generated, session.engine.calls)
    };
    let mut both: Vec<_> = (0..2)
        .map(|i| {
            let generation = Generation::new(prompts[i].as_slice(), None);
            (generation, make(7 + i as Token), String::new())
        })
        .collect();
    let mut going = 2;
    while going > 0 {
        going = 0;
        for (generation, session, text) in &mut both {
            let progress = generation.next(session, &|| false, &|| Duration::ZERO);
            if let Some(progress) = progress.unwrap() {
                text.push_str(progress.text());
                going += 1;
            }
        }
    }
    for (i, (generation, session, text)) in both.into_iter().enumerate() {
        let generated = generation.into_answer();
        assert_eq!(generated.text, text);
        assert_eq!((generated, session.engine.calls), alone(i));
    }
}

#[test]
fn a_generation_can_be_left_at_any_step() {
    let left_after = |steps| {
        let mut session = session(Scripted::new(32, 4), "full", &PolicyOptions::default());
        let mut generation = Generation::new(vec![tokens(3)], Some(2));
        for _ in 0..steps {
            let progress = generation.next(&mut session, &|| false, &|| Duration::ZERO);
            assert!(progress.unwrap().is_some());
        }
        let held = session.controller.ledger().counts().cells();
        let generated = generation.into_answer();
        let Generated { tokens, finish, .. } = generated;
        (held, tokens.len(), generated.pending, finish)
    };
    assert_eq!(left_after(0), (0, 0, None, Finish::Cancelled));
    assert_eq!(left_after(1), (3, 1, Some(1), Finish::Cancelled));
    assert_eq!(left_after(2), (4, 2, Some(1), Finish::Length));
    assert_eq!(left_after(3), (4, 2, Some(1), Finish::Length));
}

#[test]
fn a_generation_is_over_after_an_error() {
    let mut session = session(Scripted::new(8, 4), "full", &PolicyOptions::default());
    let mut generation = Generation::new(vec![tokens(9)], None);
    let mut next = || {
        let progress = generation.next(&mut session, &|| false, &|| Duration::ZERO)?;
        Ok::<bool, Error>(progress.is_some())
    };
    assert!(matches!(next(), Err(Error::PromptTooLong { .. })));
    assert!(!next().unwrap());
}
