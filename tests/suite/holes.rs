//! Positions with holes, and tokens that come back to their old places, against numpy's decoder
//! with positions masked (tests/golden/masked).

use hae::cache::Pos;
use hae::cache::ranges::coalesce;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::generate::Segment;
use hae::llama::LlamaEngine;

use crate::masked::{Expected, Scenario, scenarios};
use crate::model::{converted, engine, exact, golden_prompt, goldens, load, load_vision, prefill};
use crate::npz::max_abs_diff;
use crate::precision;

/// Feeds the rows of a prompt whose positions `keep` wants, at most `most` at once, and gives the
/// length of the prompt. The logits are those of its last row.
fn feed(
    engine: &mut LlamaEngine,
    segments: &[Segment],
    most: usize,
    keep: impl Fn(Pos) -> bool,
) -> Pos {
    let (mut cells, mut seen) = (Vec::new(), Observation::default());
    let mut start = 0;
    for segment in segments {
        let end = start + segment.len() as Pos;
        let kept: Vec<Pos> = (start..end).filter(|&pos| keep(pos)).collect();
        for pos in kept.chunks(most) {
            let rows: Vec<usize> = pos.iter().map(|p| (p - start) as usize).collect();
            let (tokens, data): (Vec<i32>, Vec<f32>);
            let input = match segment {
                Segment::Tokens(all) => {
                    tokens = rows.iter().map(|&row| all[row]).collect();
                    Input::Tokens(&tokens)
                }
                Segment::Image { embeddings, n, .. } => {
                    let width = embeddings.len() / n;
                    let row = |row: &usize| &embeddings[row * width..][..width];
                    data = rows.iter().flat_map(row).copied().collect();
                    Input::Embeddings {
                        data: &data,
                        n: rows.len(),
                        mrope: None,
                    }
                }
            };
            let batch = Batch {
                logits: true,
                ..Batch::new(input, pos)
            };
            engine.decode(batch, &mut cells, &mut seen).unwrap();
            assert_eq!(cells.len(), rows.len());
        }
        start = end;
    }
    start
}

pub fn step(engine: &mut LlamaEngine, token: i32, pos: Pos) -> hae::Result<()> {
    let (tokens, places) = ([token], [pos]);
    let batch = Batch {
        logits: true,
        ..Batch::new(Input::Tokens(&tokens), &places)
    };
    engine.decode(batch, &mut Vec::new(), &mut Observation::default())
}

fn evict(engine: &mut LlamaEngine, positions: &[Pos]) {
    let (mut positions, mut ranges) = (positions.to_vec(), Vec::new());
    coalesce(&mut positions, &mut ranges);
    engine.remove(0, &ranges).unwrap();
}

fn scenario(name: &str) -> (Scenario, Expected) {
    let mut all = scenarios().into_iter();
    all.find(|(s, _)| s.name == name).unwrap()
}

/// A prompt with holes equals the whole one with those positions masked: F32 cache, 1e-3.
#[test]
fn a_prompt_with_holes_is_one_with_these_positions_masked() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let goldens = goldens();
    let mut compared = 0;
    let never_prefilled = |s: &Scenario| !s.holes.is_empty() && s.behind == 0;
    for (s, expected) in scenarios().into_iter().filter(|(s, _)| never_prefilled(s)) {
        let golden = goldens.iter().find(|g| g.id() == s.prompt).unwrap();
        let segments = golden.segments(&model, &mut vision);
        // Whole segments, and pieces that end inside of a hole or a picture.
        for most in [512, 37] {
            let mut engine = engine(&model, exact(1024));
            let start = feed(&mut engine, &segments, most, |pos| !s.holes.contains(&pos));
            let prefill = expected.prefill.as_ref().unwrap();
            let error = max_abs_diff(engine.logits().unwrap(), &prefill.data);
            assert!(
                error < precision::logits(1e-3),
                "{} in pieces of {most}: {error}",
                s.name
            );
            for (i, (&id, pos)) in s.ids.iter().zip(start..).enumerate() {
                step(&mut engine, id, pos).unwrap();
                let error = max_abs_diff(engine.logits().unwrap(), expected.logits.row(i));
                assert!(
                    error < precision::logits(1e-3),
                    "{} step {i}: {error}",
                    s.name
                );
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 6);
}

/// Evicted tokens that are decoded again see what they saw at first, once all that were before
/// them are back: the answer is that of the whole prompt.
#[test]
fn evicted_tokens_come_back_to_their_old_places() {
    let (model, segments) = golden_prompt("story0");
    let (whole, expected) = scenario("story0_full");
    for (name, most) in [
        ("story0_thirds", 512),
        ("story0_thirds", 20),
        ("story0_text", 512),
    ] {
        let gone = &scenario(name).0.evictions[0].positions;
        let mut engine = engine(&model, exact(1024));
        let start = prefill(&mut engine, &segments, &mut Observation::default(), |_| {
            false
        });
        evict(&mut engine, gone);
        // Without them the answer is another one.
        step(&mut engine, whole.ids[0], start).unwrap();
        let error = max_abs_diff(engine.logits().unwrap(), expected.logits.row(0));
        assert!(error > 0.1, "{name}: {error}");
        evict(&mut engine, &[start]);

        feed(&mut engine, &segments, most, |pos| gone.contains(&pos));
        for (i, (&id, pos)) in whole.ids.iter().zip(start..).enumerate() {
            step(&mut engine, id, pos).unwrap();
            let error = max_abs_diff(engine.logits().unwrap(), expected.logits.row(i));
            assert!(
                error < precision::logits(1e-3),
                "{name} by {most}, step {i}: {error}"
            );
        }
    }
}

/// What cannot be is refused, and leaves the memory as it was.
#[test]
fn taken_decreasing_and_negative_positions_are_refused() {
    let (model, segments) = golden_prompt("story0");
    let (whole, expected) = scenario("story0_full");
    let mut engine = engine(&model, exact(1024));
    let start = prefill(&mut engine, &segments, &mut Observation::default(), |_| {
        false
    });
    let mut refuse = |pos: &[Pos]| {
        let tokens = vec![7; pos.len()];
        let batch = Batch::new(Input::Tokens(&tokens), pos);
        let error = engine
            .decode(batch, &mut Vec::new(), &mut Observation::default())
            .unwrap_err();
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    };
    // The reason is in llama.cpp's log, which all tests share.
    for pos in [&[3][..], &[start - 1, start]] {
        assert!(refuse(pos).starts_with("llama.cpp: llama_decode failed"));
    }
    refuse(&[start + 1, start]);
    refuse(&[-1, start]);
    for (i, (&id, pos)) in whole.ids.iter().zip(start..).take(4).enumerate() {
        step(&mut engine, id, pos).unwrap();
        let error = max_abs_diff(engine.logits().unwrap(), expected.logits.row(i));
        assert!(error < precision::logits(1e-3), "step {i}: {error}");
    }
}

/// A memory whose cells follow a window keeps llama.cpp's own rule.
#[test]
fn a_sliding_window_wants_positions_in_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    crate::others::gemma3_text().write(&path);
    let model = load(&path);
    let mut engine = engine(&model, exact(512));
    let decode = |engine: &mut LlamaEngine, pos: &[Pos]| {
        let tokens = vec![7; pos.len()];
        let batch = Batch::new(Input::Tokens(&tokens), pos);
        engine.decode(batch, &mut Vec::new(), &mut Observation::default())
    };
    decode(&mut engine, &[0, 1, 2]).unwrap();
    for pos in [&[4][..], &[3, 5], &[1]] {
        decode(&mut engine, pos).unwrap_err();
    }
    decode(&mut engine, &[3, 4]).unwrap();
}
