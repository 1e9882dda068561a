//! Copies of the sequence within the memory that holds it, of quantized caches too.
//!
//! llama.cpp without the patch takes the bytes of what it copies for a number of blocks and that for
//! a number of elements, so that of a quantized cache one part in 32 is copied. Cells that lie
//! together then come back with most of what has been written over them since: the first assertion
//! fails. Cells that lie apart make it lose count and read on past the end of its list.

use hae::cache::{Cell, Pos};
use hae::engine::Engine;
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine};

use crate::model::{converted, engine, exact, feed, load};

/// K and V of all cells, by position.
fn contents(engine: &mut LlamaEngine) -> Vec<(Pos, Vec<u8>)> {
    let mut map = Vec::new();
    engine.cell_map(&mut map).unwrap();
    let used: Vec<Cell> = (0..map.len())
        .filter(|&c| map[c].is_some())
        .map(|c| c as Cell)
        .collect();
    let rows = engine.rows(&used).unwrap();
    let size = engine.row_bytes().unwrap();
    let positions = map.into_iter().flatten();
    let mut out: Vec<_> = positions
        .zip(rows.chunks(size).map(|row| row[16..].to_vec()))
        .collect();
    out.sort();
    out
}

#[test]
fn a_copy_on_the_device_is_whole() {
    use CacheType::{F16, Q4_0, Q5_1, Q8_0};
    let (text, _) = converted("f32");
    let model = load(text);
    let first: Vec<i32> = (3..103).collect();
    let other: Vec<i32> = (500..600).collect();
    for (k, v) in [(F16, F16), (Q8_0, Q8_0), (Q4_0, Q4_0), (Q5_1, F16)] {
        for scattered in [false, true] {
            let flash = v != F16;
            let options = ContextOptions {
                type_k: k,
                type_v: v,
                flash_attention: if flash {
                    FlashAttention::On
                } else {
                    FlashAttention::Off
                },
                ..exact(512)
            };
            let mut engine = engine(&model, options);
            assert!(engine.restore_from_device().is_err(), "nothing saved");
            feed(&mut engine, &first, 0);
            if scattered {
                engine.remove(0, &[3..4, 10..30, 33..34, 60..61]).unwrap();
            }
            let before = contents(&mut engine);
            engine.save_on_device().unwrap();
            for _ in 0..2 {
                // Other values in the same cells, and with holes elsewhere.
                engine.rewind(0, 0, 0).unwrap();
                feed(&mut engine, &other, 0);
                assert_ne!(contents(&mut engine), before);
                if scattered {
                    engine.remove(0, &[0..1, 50..90]).unwrap();
                }
                engine.restore_from_device().unwrap();
                let after = contents(&mut engine);
                assert!(after == before, "{k:?}, {v:?}, scattered: {scattered}");
            }
        }
    }
}

/// A copy outlives another number of cells and other buffers.
#[test]
fn a_copy_on_the_device_outlives_a_resize() {
    let (text, _) = converted("f32");
    let model = load(text);
    let mut engine = engine(&model, exact(1024));
    let tokens: Vec<i32> = (3..203).collect();
    feed(&mut engine, &tokens, 0);
    engine.remove(0, std::slice::from_ref(&(20..120))).unwrap();
    let before = contents(&mut engine);
    engine.save_on_device().unwrap();
    for n in [256, 768, 512, 1024] {
        engine.compact_cells(&mut Vec::new()).unwrap();
        assert_eq!(engine.resize(n).unwrap(), n);
        // Copied from the same place as the first time, but for the buffer.
        engine.save_on_device().unwrap();
        engine.rewind(0, 0, 0).unwrap();
        feed(&mut engine, &tokens[100..], 0);
        engine.restore_from_device().unwrap();
        assert!(contents(&mut engine) == before, "{n} cells");
    }
}
