//! Conversations whose steps go through the model together, each as if it were alone.

use super::*;
use crate::engine::SeqId;
use crate::generate::Slot as Talk;

const N_CELLS: usize = 900;

fn limits(n_cells: usize) -> Limits {
    Limits {
        n_layer: 2,
        n_cells,
    }
}

fn talk(
    engine: &mut Scripted,
    seq: SeqId,
    (policy, options): (&str, &PolicyOptions),
) -> Talk<'static> {
    let n_cells = engine.n_cells();
    let policy = policy::create(policy, options, limits(n_cells)).unwrap();
    let session = Session::new(engine, Controller::new(policy, n_cells));
    let session = session
        .with_sequence(seq)
        .with_store(BinOptions::ram(1 << 10));
    Talk::new(session.swap(()).0)
}

/// A step of each, and what each of them did.
fn step(engine: &mut Scripted, talks: &mut [Talk<'_>]) -> Vec<(usize, String)> {
    let mut did = Vec::new();
    let hooks = StepHooks {
        on_step: &mut |i, step| did.push((i, step.map_or_else(|e| e.to_string(), described))),
        cancelled: &|_| false,
        now: &|| Duration::ZERO,
    };
    assert_eq!(together(engine, talks, hooks), did.len());
    did.sort();
    did
}

fn described(progress: Progress<'_>) -> String {
    match progress {
        Progress::Prompt { done, rows } => format!("{done}/{rows}"),
        Progress::Token { token, .. } => format!("token {token}"),
        Progress::End { finish, .. } => format!("{finish:?}"),
    }
}

fn saying() -> Scripted {
    plain().patched()
}

/// Without what the patches add: attention is one sum over a pass.
fn plain() -> Scripted {
    let says = |pos: Pos| if pos % 37 == 36 { 0 } else { 1 + pos % 7 };
    Scripted::new(N_CELLS, 8).with_says(says)
}

#[test]
fn a_step_of_all_is_one_pass_unless_attention_would_be_mixed_up() {
    let steps = |mut engine: Scripted, policy: &str| {
        let options = PolicyOptions::default();
        let make = |seq| talk(&mut engine, seq, (policy, &options));
        let mut talks: Vec<_> = (0..3).map(make).collect();
        for talk in &mut talks {
            talk.begin(Generation::new(vec![tokens(2)], Some(5)));
        }
        let mut passes = Vec::new();
        for _ in 0..4 {
            let before = engine.passes;
            assert_eq!(step(&mut engine, &mut talks).len(), 3);
            passes.push(engine.passes - before);
        }
        passes
    };
    for policy in ["full", "hae", "h2o"] {
        assert_eq!(steps(saying(), policy), [1, 1, 1, 1]);
    }
    assert_eq!(steps(plain(), "full"), [1, 1, 1, 1]);
    // Only the prompt's last row is looked at.
    assert_eq!(steps(plain(), "hae"), [3, 1, 1, 1]);
    assert_eq!(steps(plain(), "h2o"), [3, 3, 3, 3]);
}

#[test]
fn a_long_prompt_lets_others_go_on() {
    let mut engine = saying();
    let options = PolicyOptions::default();
    let make = |seq| talk(&mut engine, seq, ("full", &options));
    let mut talks: Vec<_> = (0..2).map(make).collect();
    talks[0].begin(Generation::new(vec![tokens(2)], None));
    step(&mut engine, &mut talks);
    talks[1].begin(Generation::new(vec![tokens(9), picture(12)], None));
    let mut did = Vec::new();
    for _ in 0..5 {
        did.push(
            step(&mut engine, &mut talks)
                .into_iter()
                .map(|(_, did)| did),
        );
    }
    let did: Vec<Vec<String>> = did.into_iter().map(Iterator::collect).collect();
    assert_eq!(
        did,
        [
            ["token 3", "8/21"],
            ["token 4", "9/21"],
            ["token 5", "17/21"],
            ["token 6", "token 7"],
            ["token 7", "token 1"],
        ]
    );
}

#[test]
fn where_not_all_fit_those_that_do_go_on() {
    let mut engine = Scripted::new(9, 8);
    let options = PolicyOptions::default();
    let make = |seq| talk(&mut engine, seq, ("full", &options));
    let mut talks: Vec<_> = (0..3).map(make).collect();
    for (i, talk) in talks.iter_mut().enumerate() {
        talk.begin(Generation::new(vec![tokens(1 + i)], Some(4)));
    }
    let names = |did: Vec<(usize, String)>| did.into_iter().map(|(_, d)| d).collect::<Vec<_>>();
    // Six cells for the prompts, three for a token of each.
    for _ in 0..2 {
        let did = names(step(&mut engine, &mut talks));
        assert_eq!(did, ["token 1", "token 1", "token 1"]);
    }
    // The second gives its cells back.
    let said = talks[1].end().unwrap();
    assert_eq!((said.finish, said.pending), (Finish::Cancelled, Some(1)));
    let gone = talks[1].with(&mut engine, |session| {
        let left = session.controller.rewind(2);
        session.engine.rewind(1, 2, left)
    });
    gone.unwrap();
    let before = engine.passes;
    let did = names(step(&mut engine, &mut talks));
    assert_eq!(did, ["token 1", "Context"]);
    assert_eq!(engine.passes - before, 1);
    assert_eq!(talks[2].end().unwrap().pending, Some(1));
    let held = |seq| engine.occupied_by(seq).len();
    assert_eq!([0, 1, 2].map(held), [3, 2, 4]);
}

#[test]
fn a_share_is_its_own() {
    let mut engine = saying();
    let shared = limits(60).shared_by(3);
    assert_eq!(shared.n_cells, 20);
    let budget = |cells| PolicyOptions {
        kv_budget: Some(Amount::Cells(cells)),
        sinks: 2,
        ..PolicyOptions::default()
    };
    let error = policy::create("streaming_llm", &budget(21), shared).err();
    let error = error.map(|e| e.to_string()).unwrap_or_default();
    assert!(
        error.contains("21 cells, but the context holds 20"),
        "{error}"
    );
    let mut share = |seq, policy: &str, options: &PolicyOptions| {
        let policy = policy::create(policy, options, shared).unwrap();
        let session = Session::new(&mut engine, Controller::new(policy, N_CELLS));
        let session = session.with_sequence(seq).with_share(shared.n_cells);
        Talk::new(session.swap(()).0)
    };
    let full = PolicyOptions::default();
    let mut talks = [
        share(0, "full", &full),
        share(1, "streaming_llm", &budget(20)),
        share(2, "full", &full),
    ];
    for (talk, n) in talks.iter_mut().zip([12, 12, 21]) {
        talk.begin(Generation::new(vec![tokens(n)], Some(20)));
    }
    let mut ends = Vec::new();
    while let did = step(&mut engine, &mut talks)
        && !did.is_empty()
    {
        let others = |(_, did): &(usize, String)| !did.starts_with("token") && !did.contains('/');
        ends.extend(did.into_iter().filter(others));
    }
    let too_long = Error::PromptTooLong {
        needed: 21,
        n_ctx: 20,
    };
    let end = |i: usize, what: &str| (i, what.to_owned());
    assert_eq!(
        ends,
        [
            end(2, &too_long.to_string()),
            end(0, "Context"),
            end(1, "Length"),
        ]
    );
    assert_eq!(engine.occupied_by(0).len(), 20);
}

#[test]
fn a_prompt_that_is_left_on_its_way_leaves_the_cache() {
    let mut engine = saying();
    let options = PolicyOptions::default();
    let mut talks = [talk(&mut engine, 0, ("full", &options))];
    talks[0].begin(Generation::new(vec![tokens(3)], Some(2)));
    while !step(&mut engine, &mut talks).is_empty() {}
    let before = engine.occupied();
    for again in [false, true] {
        talks[0].begin(Generation::new(vec![tokens(30)], Some(2)));
        step(&mut engine, &mut talks);
        step(&mut engine, &mut talks);
        assert_eq!(engine.occupied().len(), before.len() + 16);
        let left = talks[0].end().unwrap();
        assert!(left.taken_back && left.finish == Finish::Cancelled);
        if !again {
            talks[0].with(&mut engine, Session::abandon).unwrap();
            assert_eq!(engine.occupied(), before);
        }
    }
    // What comes next takes it out, too.
    talks[0].begin(Generation::new(vec![tokens(5)], Some(1)));
    step(&mut engine, &mut talks);
    assert_eq!(engine.occupied().len(), before.len() + 5);
    let next = talks[0].session().unwrap().controller.next_pos();
    assert_eq!(next as usize, before.len() + 5);
}
