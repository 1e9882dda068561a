//! Prompts that go on behind the first layers (`--dap-mode midway`), against numpy's decoder with
//! positions masked from a layer on (tests/golden/masked), and against llama.cpp's own prefill.

use hae::cache::{Cell, Pos};
use hae::engine::{Batch, Engine, Input, Observation};
use hae::generate::Segment;
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, Model};

use crate::holes::step;
use crate::kv_graphs::{by_graph, graphs, in_by_graph};
use crate::masked::scenarios;
use crate::model::{converted, engine, exact, goldens, load, load_vision, prefill};
use crate::npz::max_abs_diff;
use crate::precision;

/// F32 without flash attention, where V is transposed, and with it.
fn settings(layer: u32) -> [ContextOptions; 2] {
    [FlashAttention::Off, FlashAttention::On].map(|flash_attention| ContextOptions {
        flash_attention,
        score_layers: vec![layer],
        ..exact(1024)
    })
}

/// What goes in at once.
#[derive(Clone, Copy, Debug)]
enum Pieces {
    /// As the prefill does it, so that the same kernels run.
    Segments,
    /// Across segments, so many.
    Of(usize),
}

/// Puts the prompt through the trial run of `engine`, and the positions that `keep` wants through
/// the rest of it. The length of the prompt.
fn go_on(
    engine: &mut LlamaEngine,
    segments: &[Segment],
    pieces: Pieces,
    keep: impl Fn(Pos) -> bool,
) -> Pos {
    let most = match pieces {
        Pieces::Segments => usize::MAX,
        Pieces::Of(most) => most,
    };
    let n: usize = segments.iter().map(Segment::len).sum();
    let before = if by_graph() { graphs() } else { 0 };
    assert!(engine.capabilities().continues_trials);
    let trial = engine.trials().unwrap().begin(n, true).unwrap();
    let (mut at, mut cells, mut seen) = (Vec::<Cell>::new(), Vec::new(), Observation::default());
    for segment in segments {
        let rows = segment.len();
        for start in (0..rows).step_by(most.min(rows)) {
            let end = (start + most.min(rows)).min(rows);
            let from = at.len() as Pos;
            let pos: Vec<Pos> = (from..).take(end - start).collect();
            let batch = Batch::new(segment.rows(start, end, None), &pos);
            trial.decode(batch, &mut cells, &mut seen).unwrap();
            at.extend(&cells);
        }
    }
    let kept: Vec<Pos> = (0..n as Pos).filter(|&pos| keep(pos)).collect();
    let mut ends = Vec::new();
    for segment in segments {
        ends.push(ends.last().copied().unwrap_or(0) + segment.len() as Pos);
    }
    let together = |a: &Pos, b: &Pos| {
        let of = |pos: &Pos| ends.partition_point(|end| end <= pos);
        matches!(pieces, Pieces::Of(_)) || of(a) == of(b)
    };
    let batches = kept.chunk_by(together);
    for pos in batches.flat_map(|batch| batch.chunks(most.min(n))) {
        let from: Vec<Cell> = pos.iter().map(|&pos| at[pos as usize]).collect();
        let batch = Batch {
            logits: true,
            ..Batch::new(Input::Trial(&from), pos)
        };
        engine.decode(batch, &mut cells, &mut seen).unwrap();
    }
    engine.trials().unwrap().end().unwrap();
    // The batch's own graph copies rows, but not what is transposed.
    let transposed = engine.options().flash_attention == FlashAttention::Off;
    assert!(
        !by_graph() || (graphs() > before) == transposed,
        "{} graphs copied cells",
        graphs() - before
    );
    n as Pos
}

/// What the first layers alone have seen is what numpy masks from a layer on: F32 cache, 1e-3,
/// and 5e-2 with flash attention, which rounds to F16 on the way; a wrong set differs by 0.5.
#[test]
fn a_prompt_that_goes_on_without_some_is_one_with_these_masked_from_a_layer_on() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let goldens = goldens();
    let mut compared = 0;
    for (s, expected) in scenarios().into_iter().filter(|(s, _)| s.behind > 0) {
        let golden = goldens.iter().find(|g| g.id() == s.prompt).unwrap();
        let segments = golden.segments(&model, &mut vision);
        let wanted = expected.prefill.as_ref().unwrap();
        for options in settings(s.behind) {
            let bound = precision::logits(match options.flash_attention {
                FlashAttention::On => 5e-2,
                _ => 1e-3,
            });
            // Whole segments, and pieces that end inside of a hole or a picture.
            for most in [512, 37] {
                let mut engine = engine(&model, options.clone());
                let what = format!(
                    "{} in pieces of {most}, {:?}",
                    s.name, options.flash_attention
                );
                let start = go_on(&mut engine, &segments, Pieces::Of(most), |pos| {
                    !s.holes.contains(&pos)
                });
                let error = max_abs_diff(engine.logits().unwrap(), &wanted.data);
                assert!(error < bound, "{what}: {error}");
                for (i, (&id, pos)) in s.ids.iter().zip(start..).enumerate() {
                    step(&mut engine, id, pos).unwrap();
                    let error = max_abs_diff(engine.logits().unwrap(), expected.logits.row(i));
                    assert!(error < bound, "{what}, step {i}: {error}");
                }
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 24);
}

/// A question about a picture.
fn question(model: &Model) -> Vec<Segment> {
    let mut vision = load_vision(converted("f32").1, model);
    let goldens = goldens();
    let golden = goldens.iter().find(|g| g.id() == "qa0").unwrap();
    golden.segments(model, &mut vision)
}

/// With nothing left out, it is the prefill that llama.cpp does in one go: the same bits on a CPU.
#[test]
fn going_on_with_everything_changes_nothing() {
    let model = load(converted("f32").0);
    let segments = question(&model);
    let caches = [
        (CacheType::F32, FlashAttention::Off),
        (CacheType::F16, FlashAttention::Off),
        (CacheType::F16, FlashAttention::On),
        (CacheType::Q8_0, FlashAttention::On),
    ];
    for (kind, flash_attention) in caches {
        let logits = |whole: bool| {
            let mut engine = engine(
                &model,
                ContextOptions {
                    flash_attention,
                    type_k: kind,
                    type_v: kind,
                    score_layers: vec![2],
                    ..exact(1024)
                },
            );
            let n: usize = segments.iter().map(Segment::len).sum();
            if whole {
                let mut seen = Observation::default();
                prefill(&mut engine, &segments, &mut seen, |_| false);
            } else {
                go_on(&mut engine, &segments, Pieces::Segments, |_| true);
            }
            let first = engine.logits().unwrap().to_vec();
            step(&mut engine, 13, n as Pos).unwrap();
            (first, engine.logits().unwrap().to_vec())
        };
        let (whole, on) = (logits(true), logits(false));
        if precision::on_gpu() {
            assert!(
                max_abs_diff(&whole.0, &on.0) < precision::logits(0.0),
                "{kind:?}"
            );
            assert!(
                max_abs_diff(&whole.1, &on.1) < precision::logits(0.0),
                "{kind:?}"
            );
        } else {
            assert_eq!(whole, on, "{kind:?} {flash_attention:?}");
        }
    }
}

/// Into cells that others have left between them: the same but for the order of sums, and the others
/// keep their bits.
#[test]
fn going_on_into_scattered_cells_changes_nothing() {
    let model = load(converted("f32").0);
    let segments = question(&model);
    let n: usize = segments.iter().map(Segment::len).sum();
    for options in settings(2) {
        let logits = |scattered: bool| {
            let mut engine = engine(&model, options.clone());
            let mut kept: Vec<Cell> = Vec::new();
            if scattered {
                // Behind the prompt, so that nothing of it sees them.
                let after: Vec<Pos> = (n as Pos..).skip(1).take(60).collect();
                let batch = Batch::new(Input::Tokens(&[13; 60]), &after);
                let (mut cells, mut seen) = (Vec::new(), Observation::default());
                engine.decode(batch, &mut cells, &mut seen).unwrap();
                let gone = after.chunks(3).map(|three| three[0]..three[0] + 2);
                engine.remove(0, &gone.collect::<Vec<_>>()).unwrap();
                kept.extend(cells.iter().skip(2).step_by(3));
            }
            let rows = engine.rows(&kept).unwrap();
            go_on(&mut engine, &segments, Pieces::Segments, |_| true);
            assert!(engine.rows(&kept).unwrap() == rows);
            engine.logits().unwrap().to_vec()
        };
        let error = max_abs_diff(&logits(false), &logits(true));
        let bound = precision::logits(match options.flash_attention {
            FlashAttention::On => 5e-2,
            _ => 1e-4,
        });
        assert!(error < bound, "{:?}: {error}", options.flash_attention);
    }
}

/// The same where K and V are copied as between devices.
#[test]
fn the_first_layers_come_over_from_a_device() {
    in_by_graph(&[
        "midway::a_prompt_that_goes_on_without_some_is_one_with_these_masked_from_a_layer_on",
        "midway::going_on_with_everything_changes_nothing",
        "midway::going_on_into_scattered_cells_changes_nothing",
        "midway_calls::what_goes_on_leaves_what_a_whole_prefill_leaves",
        "midway_calls::what_is_kept_follows_its_cells",
    ]);
}

/// Rows of no trial run, of cells that it has not filled, and of one that was not told to keep
/// them are refused, and the next batch is as usual.
#[test]
fn rows_that_no_trial_run_has_are_refused() {
    let model = load(converted("f32").0);
    let mut engine = engine(&model, settings(2)[0].clone());
    let refused = |engine: &mut LlamaEngine, cells: &[Cell]| {
        let pos: Vec<Pos> = (0..cells.len() as Pos).collect();
        let batch = Batch {
            logits: true,
            ..Batch::new(Input::Trial(cells), &pos)
        };
        let error = engine
            .decode(batch, &mut Vec::new(), &mut Observation::default())
            .unwrap_err();
        assert!(error.to_string().contains("trial run"), "{error}");
    };
    refused(&mut engine, &[0]);
    for goes_on in [false, true] {
        let trial = engine.trials().unwrap().begin(8, goes_on).unwrap();
        let batch = Batch::new(Input::Tokens(&[1, 20, 37]), &[0, 1, 2]);
        trial
            .decode(batch, &mut Vec::new(), &mut Observation::default())
            .unwrap();
        refused(&mut engine, &[0, 1, if goes_on { 3 } else { 2 }]);
        engine.trials().unwrap().end().unwrap();
    }
    refused(&mut engine, &[0]);
    step(&mut engine, 1, 0).unwrap();
}
