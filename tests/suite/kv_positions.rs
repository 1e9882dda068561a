//! Positions far beyond the cells, and rows that go from one cache to another.

use hae::cache::{Cell, Pos};
use hae::engine::Engine;
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, RopeFactors};

use crate::model::{converted, engine, exact, feed, load, takes};
use crate::npz::max_abs_diff;
use crate::precision;
use crate::remake::Remake;

/// Positions go on where the few cells are taken again, past position 4096, where longrope's other
/// factors begin to count: with either set, as in a cache of all positions.
///
/// The twin knows nothing of chosen factors. Its file says another original context, by which
/// llama.cpp's own rule takes the set.
#[test]
fn a_small_cache_reaches_as_far_as_a_large_one() {
    let (text, _) = converted("f32");
    let dir = tempfile::tempdir().unwrap();
    let mut last = Vec::new();
    for (rope_factors, original) in [(RopeFactors::Short, 1 << 20), (RopeFactors::Long, 1)] {
        let path = dir.path().join(format!("{original}.gguf"));
        let mut file = Remake::read(text);
        file.set_u32("phi3.rope.scaling.original_context_length", original);
        file.write(&path);
        let (model, twins) = (load(text), load(&path));
        let small = ContextOptions {
            kv_size: Some(256),
            rope_factors,
            ..exact(512)
        };
        let large = ContextOptions {
            rope_factors: RopeFactors::Context,
            ..exact(8192)
        };
        last.push(cross(
            &mut engine(&model, small),
            &mut engine(&twins, large),
        ));
    }
    let apart = max_abs_diff(&last[0], &last[1]);
    assert!(apart > 0.1, "the sets differ by {apart}");
}

/// Fills `ours` up to position 4299 beside its twin; the last logits.
fn cross(ours: &mut LlamaEngine, twin: &mut LlamaEngine) -> Vec<f32> {
    ours.resize_by_hand();
    let mut worst = 0.0f32;
    let mut moved = 0;
    for pos in (0..4300).step_by(50) {
        let tokens: Vec<i32> = (pos..pos + 50).map(|p| 3 + p * 7 % 900).collect();
        for engine in [&mut *ours, &mut *twin] {
            feed(engine, &tokens, pos);
            // Of every 50 the last 7 stay for a while, the first 50 always.
            if pos > 0 {
                engine
                    .remove(0, std::slice::from_ref(&(pos..pos + 43)))
                    .unwrap();
            }
            if pos > 500 {
                engine
                    .remove(0, std::slice::from_ref(&(pos - 457..pos - 450)))
                    .unwrap();
            }
        }
        let mut moves = Vec::new();
        ours.compact_cells(&mut moves).unwrap();
        moved += moves.len();
        let error = max_abs_diff(ours.logits().unwrap(), twin.logits().unwrap());
        worst = worst.max(error);
    }
    println!("up to position 4299 in 256 cells, {moved} moves: {worst:.1e}");
    assert_eq!(ours.cells_now().unwrap(), 256);
    assert!(moved > 300);
    assert!(worst < precision::logits(1e-4), "{worst}");
    ours.logits().unwrap().to_vec()
}

/// K and V of the first layer do not depend on how attention is computed, only their place in
/// memory does; and a cache takes the rows of the other kind.
#[test]
fn rows_do_not_know_how_v_is_stored() {
    const PLACE: usize = 16;
    let (text, _) = converted("f32");
    let model = load(text);
    let kinds = [CacheType::F32, CacheType::F16, CacheType::Bf16];
    for kind in kinds.into_iter().filter(|&kind| takes(kind)) {
        let options = |flash_attention| ContextOptions {
            flash_attention,
            type_k: kind,
            type_v: kind,
            ..exact(512)
        };
        let mut across = engine(&model, options(FlashAttention::Off));
        let mut along = engine(&model, options(FlashAttention::On));
        let tokens: Vec<i32> = (3..43).collect();
        feed(&mut across, &tokens, 0);
        feed(&mut along, &tokens, 0);
        let cells: Vec<Cell> = (0..40).collect();
        let (a, b) = (across.rows(&cells).unwrap(), along.rows(&cells).unwrap());
        let size = across.row_bytes().unwrap();
        assert_eq!(size, along.row_bytes().unwrap());
        let layer = (size - PLACE) / 6;
        for (pos, (a, b)) in (0..).zip(a.chunks(size).zip(b.chunks(size))) {
            assert_eq!(a[..4], i32::to_le_bytes(pos));
            assert!(a[..PLACE + layer] == b[..PLACE + layer], "{kind:?}, {pos}");
        }
        // The rows of `along`, some of them in other cells, are then the rows of `across`.
        across.rewind(0, 0, 0).unwrap();
        let mut order: Vec<usize> = (0..40).collect();
        order.rotate_left(13);
        let shuffled: Vec<u8> = order
            .iter()
            .flat_map(|&i| b[i * size..][..size].to_vec())
            .collect();
        let positions: Vec<Pos> = order.iter().map(|&i| i as Pos).collect();
        let mut taken = Vec::new();
        across
            .put_rows(0, &positions, &shuffled, &mut taken)
            .unwrap();
        assert_eq!(taken, cells);
        assert!(across.rows(&cells).unwrap() == shuffled, "{kind:?}");
    }
}
