//! Answers that go on for long: what their question's pruning took comes back while they are told.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use hae::cache::{BinOptions, BinStore, Modality};
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::engine::{Batch, Engine, Input, Observation, Token};
use hae::generate::{Segment, Session};
use hae::llama::{ContextOptions, LlamaEngine};
use hae::policy::{Amount, DapMode, DapOptions, DapRule, Limits, PolicyOptions, Scope, create};
use serde_json::Value;

use crate::bin::{self, hae};
use crate::model::{PICTURE, STORY, TEXT, VISION, engine, exact, golden_prompt, repository};
use crate::precision;
use crate::random::{N_LAYER, assert_in_step, prompt};

/// Keeps 40 % of the visual tokens, and gives the others back for the ninth token.
fn options() -> PolicyOptions {
    PolicyOptions {
        dap: Some(DapOptions {
            rule: DapRule::Keep(Amount::Share(0.4)),
            alpha: None,
            scope: Scope::Turn,
        }),
        recall_after: 8,
        ..PolicyOptions::default()
    }
}

fn session<E: Engine>(
    engine: E,
    options: &PolicyOptions,
    n_layer: u32,
    bin: BinOptions,
) -> Session<E> {
    let n_cells = engine.n_cells();
    let limits = Limits { n_layer, n_cells };
    let policy = create("hae", options, limits).unwrap();
    Session::new(engine, Controller::new(policy, n_cells)).with_store(bin)
}

fn vision<E: Engine>(session: &Session<E>) -> usize {
    let entries = session.controller.ledger().entries();
    entries.filter(|e| e.modality == Modality::Vision).count()
}

fn scripted(options: &PolicyOptions, n_cells: usize) -> Session<Scripted> {
    let engine = Scripted::new(n_cells, 7)
        .with_attention(move |q, k| hashed(3, q, k))
        .patched();
    session(engine, options, N_LAYER, BinOptions::ram(1 << 20))
}

/// Visual tokens in the cache after each of so many tokens of an answer, the first number that
/// after the prompt.
fn told(session: &mut Session<Scripted>, steps: usize) -> Vec<usize> {
    let prompt = prompt(&[(false, 3), (true, 50), (false, 4)], 0);
    assert!(session.prefill(&prompt, &|| false).unwrap());
    let mut seen = vec![vision(session)];
    for _ in 0..steps {
        session.step(3).unwrap();
        assert_in_step(session);
        seen.push(vision(session));
    }
    seen
}

#[test]
fn what_was_pruned_comes_back_at_its_token() {
    let mut session = scripted(&options(), 200);
    let seen = told(&mut session, 12);
    assert_eq!(seen, [[20; 9].as_slice(), &[50; 4]].concat());
    assert_eq!(session.store().rows(), 0);
    let traffic = session.store().traffic();
    assert_eq!((traffic.rows_out, traffic.rows_back), (30, 30));
    assert_eq!(traffic.rows_decoded, 0);

    // Another question prunes anew, and its answer asks anew.
    let next = prompt(&[(false, 4)], 1);
    assert!(session.prefill(&next, &|| false).unwrap());
    assert_eq!(vision(&session), 20);
    for _ in 0..9 {
        session.step(3).unwrap();
    }
    assert_eq!(vision(&session), 50);
}

#[test]
fn it_stays_away_where_it_was_not_asked_for_or_has_no_room() {
    for (options, n_cells) in [
        (
            PolicyOptions {
                recall: false,
                ..options()
            },
            200,
        ),
        // A budget leaves no room, nor do cells.
        (
            PolicyOptions {
                kv_budget: Some(Amount::Share(0.9)),
                ..options()
            },
            200,
        ),
        (options(), 62),
    ] {
        let mut session = scripted(&options, n_cells);
        let seen = told(&mut session, 12);
        assert!(seen.iter().all(|&n| n <= 20), "{n_cells}: {seen:?}");
    }
    // A policy of a part of it prunes and no more.
    let limits = Limits {
        n_layer: N_LAYER,
        n_cells: 200,
    };
    let policy = create("dap", &options(), limits).unwrap();
    let mut session = scripted(&options(), 200);
    session.controller = Controller::new(policy, 200);
    assert_eq!(told(&mut session, 12), [20; 13]);
}

/// Without a place to wait, and under a mode that lets nothing in before it is judged, visual tokens
/// go through the model.
#[test]
fn what_has_no_rows_is_decoded() {
    for (dap_mode, bin) in [
        (DapMode::Exact, BinOptions::OFF),
        (DapMode::Early, BinOptions::ram(1 << 20)),
        (DapMode::Midway, BinOptions::ram(1 << 20)),
        // Ten rows have a place, those that were looked at most.
        (DapMode::Exact, BinOptions::ram(40)),
    ] {
        let options = PolicyOptions {
            dap_mode,
            ..options()
        };
        let mut session = scripted(&options, 200).with_store(bin);
        let seen = told(&mut session, 12);
        assert_eq!(
            seen,
            [[20; 9].as_slice(), &[50; 4]].concat(),
            "{dap_mode:?}"
        );
        let traffic = session.store().traffic();
        let kept = match bin.max_bytes {
            40 => 10,
            _ => 0,
        };
        assert_eq!((traffic.rows_back, traffic.rows_decoded), (kept, 30 - kept));
    }
}

/// A full cache that has read the prompt and these tokens, the tokens in one batch behind it, then
/// more of them one by one: the logits behind each.
fn in_full(
    model: &hae::llama::Model,
    segments: &[Segment],
    said: &[Token],
    more: &[Token],
) -> Vec<Vec<f32>> {
    let mut whole = engine(model, exact(512));
    let from = crate::model::prefill(&mut whole, segments, &mut Observation::default(), |_| false);
    let mut pos = from;
    let mut logits = Vec::new();
    let batches = std::iter::once(said).chain(more.chunks(1));
    for tokens in batches {
        let places: Vec<_> = (pos..).take(tokens.len()).collect();
        let batch = Batch {
            logits: true,
            ..Batch::new(Input::Tokens(tokens), &places)
        };
        whole
            .decode(batch, &mut Vec::new(), &mut Observation::default())
            .unwrap();
        pos += tokens.len() as i32;
        logits.push(whole.logits().unwrap().to_vec());
    }
    logits.remove(0);
    logits
}

/// From the moment on that all is back, the answer is that of a cache that never lost anything.
#[test]
fn an_answer_goes_on_as_if_nothing_had_left() {
    let (model, segments) = golden_prompt("two0");
    let n_layer = model.n_layer();
    let said: Vec<Token> = (0..8).map(|i| 40 + i).collect();
    let more: Vec<Token> = (0..6).map(|i| 90 + i).collect();
    let expected = in_full(&model, &segments, &said, &more);
    let run = |dap_mode, bin| {
        let options = PolicyOptions {
            dap_mode,
            ..options()
        };
        let context = ContextOptions {
            score_layers: (0..n_layer).collect(),
            ..exact(512)
        };
        let engine: LlamaEngine = engine(&model, context);
        let mut session = session(engine, &options, n_layer, bin);
        assert!(session.prefill(&segments, &|| false).unwrap());
        let pruned = vision(&session);
        said.iter().for_each(|&token| session.step(token).unwrap());
        assert_eq!(vision(&session), pruned);
        let logits: Vec<Vec<f32>> = more
            .iter()
            .map(|&token| {
                session.step(token).unwrap();
                session.engine.logits().unwrap().to_vec()
            })
            .collect();
        assert!(vision(&session) > pruned);
        (logits, session.store().traffic())
    };
    let furthest = |logits: &[Vec<f32>]| {
        let pairs = logits.iter().flatten().zip(expected.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    for store in [BinStore::File, BinStore::Ram] {
        let bin = BinOptions {
            store,
            ..BinOptions::default()
        };
        let (logits, traffic) = run(DapMode::Exact, bin);
        assert!(traffic.rows_back > 0 && traffic.rows_decoded == 0);
        match precision::on_gpu() {
            true => assert!(furthest(&logits) < precision::logits(1e-4)),
            false => assert!(logits == expected, "{store:?}: {}", furthest(&logits)),
        }
    }
    let (logits, traffic) = run(DapMode::Exact, BinOptions::OFF);
    assert!(traffic.rows_back == 0 && traffic.rows_decoded > 0);
    let off = furthest(&logits);
    assert!(off < precision::logits(1e-4), "{off}");
    // What was pruned before the prefill was not seen by the prompt, so this is another answer.
    let (logits, traffic) = run(DapMode::Early, BinOptions::default());
    assert!(traffic.rows_decoded > 0);
    let off = furthest(&logits);
    assert!(off.is_finite() && off > 1e-4, "{off}");
}

fn number(report: &Value, pointer: &str) -> f64 {
    report.pointer(pointer).and_then(Value::as_f64).unwrap()
}

fn answer(args: &[&str]) -> Value {
    let printed = bin::answer(&[&["run", "-o", "json"], args].concat());
    serde_json::from_str(&printed).unwrap()
}

const TELL: [&str; 12] = [
    "--image",
    PICTURE,
    "-p",
    STORY,
    "-n",
    "40",
    "--temp",
    "0",
    "-t",
    "1",
    "--kv-policy",
    "hae",
];

/// The defaults: a quantized cache, lookups, a file that has no name.
#[test]
fn a_story_under_the_defaults() {
    let report = answer(&TELL);
    assert_eq!(report["context"]["type_k"], "q8_0");
    // On a GPU attention to everything is as fast.
    let share = &report["context"]["attend"]["vision"]["share"];
    match bin::on_gpu() {
        true => assert!(share.is_null(), "{share}"),
        false => assert_eq!(share, 0.15),
    }
    let out = number(&report, "/bin/rows_out");
    assert!(out > 0.0, "{report}");
    assert_eq!(number(&report, "/bin/rows_back"), out);
    assert_eq!(number(&report, "/bin/rows_decoded"), 0.0);
    assert_eq!(number(&report, "/bin/rows"), 0.0);
    assert_eq!(number(&report, "/kv/cells/live/vision"), 199.0);
    assert_eq!(report["bin"]["store"], "file");
    assert!(report["bin"].get("trouble").is_none());

    let short = answer(&[&TELL[..5], &["8"], &TELL[6..]].concat());
    assert_eq!(number(&short, "/bin/rows"), out);
    assert!(number(&short, "/bin/bytes") > out);
    assert_eq!(number(&short, "/kv/bytes_host"), 0.0);
    let ram = answer(&[&TELL[..5], &["8"], &TELL[6..], &["--bin-store", "ram"]].concat());
    assert_eq!(number(&ram, "/kv/bytes_host"), number(&short, "/bin/bytes"));
    let more =
        number(&ram, "/kv/bytes_allocated_peak") - number(&short, "/kv/bytes_allocated_peak");
    assert!(more > 0.0);
    assert_eq!(ram["text"], short["text"]);
}

/// The trace tells what came back, decision by decision, and the page when.
#[test]
fn a_story_is_traced() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (trace, page) = (path("story.trace"), path("story.html"));
    let report = answer(&[&TELL[..], &["--trace", &trace]].concat());
    assert_eq!(report["text"], answer(&TELL)["text"]);
    let replayed = bin::answer(&["replay", &trace]);
    let steps = number(&report, "/tokens/generated");
    assert!(
        replayed.contains(&format!("the same {steps} plans")),
        "{replayed}"
    );
    bin::answer(&["report", "--trace", &trace, "-o", &page]);
    let page = std::fs::read_to_string(page).unwrap();
    let back = page
        .matches("pruned, and back before token 13 of the answer")
        .count();
    // Each patch that came back, and the separator between the two views in a sentence.
    assert_eq!(back as f64, number(&report, "/bin/rows_back"), "{back}");
}

/// What goes wrong with the file is one line, and the story is told all the same.
#[cfg(unix)]
#[test]
fn a_story_without_a_place_for_rows() {
    let folder = tempfile::tempdir().unwrap();
    let expected = answer(&TELL);
    let command = |prefix: &str, tmpdir: &Path| {
        let mut command = std::process::Command::new("bash");
        command
            .args(["-c", format!("{prefix} exec \"$0\" \"$@\"").trim()])
            .arg(hae().get_program())
            .arg("run")
            .args(TELL)
            // The built-in model would be unpacked there.
            .args(["-m", TEXT, "--mmproj", VISION])
            .current_dir(repository(""))
            .env("TMPDIR", tmpdir);
        command
    };
    let run = |prefix: &str, tmpdir: &Path| {
        let output = command(prefix, tmpdir).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{err}");
        (String::from_utf8(output.stdout).unwrap(), err)
    };
    let same = |said: &str| said.trim() == expected["text"].as_str().unwrap().trim();
    let (said, err) = run("", &folder.path().join("absent"));
    assert!(same(&said), "{said}");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(
        err.starts_with("hae: --bin-store: ") && err.contains("absent"),
        "{err}"
    );
    // A disk that is full after 64 KiB.
    let (said, err) = run("trap '' XFSZ; ulimit -f 64;", folder.path());
    assert!(same(&said), "{said}");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.contains("--bin-store: "), "{err}");
    // A place that is well leaves nothing behind, and says nothing.
    let (said, err) = run("", folder.path());
    assert!(same(&said) && err.is_empty(), "{said} {err}");
    let left = || std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left(), 0);
    // Nor does one that is killed while its rows wait, before the 13th token.
    let mut killed = command("", folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    killed
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(left(), 0);
}
