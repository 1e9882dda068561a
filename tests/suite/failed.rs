//! Batches that fail: the cache is what it was, and what comes after is what it would have been.

use std::ffi::c_void;
use std::sync::atomic::{AtomicI64, Ordering};

use hae::Error;
use hae::cache::Pos;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::llama::{ContextOptions, LlamaEngine};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use crate::fixture::{self, backend};
use crate::model::{converted, engine, exact, load};
use crate::npz::max_abs_diff;

/// Counts down with every graph node group that asks; below zero it stops the graph.
unsafe extern "C" fn stop(left: *mut c_void) -> bool {
    // SAFETY: the context was made with a pointer to a counter that outlives it.
    let left = unsafe { &*left.cast::<AtomicI64>() };
    left.fetch_sub(1, Ordering::Relaxed) <= 0
}

const GO_ON: i64 = i64::MAX / 2;

fn context<'m>(model: &'m LlamaModel, left: &AtomicI64) -> LlamaContext<'m> {
    let mut params = LlamaContextParams::default()
        .with_n_ctx(std::num::NonZeroU32::new(512))
        .with_n_batch(128)
        .with_n_ubatch(16)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(KvCacheType::F32)
        .with_type_v(KvCacheType::F32)
        .with_flash_attention_policy(sys::LLAMA_FLASH_ATTN_TYPE_DISABLED);
    params.as_raw_mut().abort_callback = Some(stop);
    params.as_raw_mut().abort_callback_data = std::ptr::from_ref(left).cast_mut().cast();
    model.new_context(backend(), params).unwrap()
}

/// Decodes tokens at these positions: llama.cpp's status, and the last one's logits if it is 0.
fn decode(ctx: &mut LlamaContext<'_>, pos: &[Pos]) -> (i32, Vec<f32>) {
    let tokens: Vec<i32> = pos.iter().map(|p| 3 + p * 31 % 900).collect();
    let status = fixture::decode(ctx, &tokens, pos, true);
    let out = match status {
        0 => ctx.get_logits_ith(-1).to_vec(),
        _ => Vec::new(),
    };
    (status, out)
}

fn positions(ctx: &mut LlamaContext<'_>) -> Vec<i32> {
    let empty = sys::llama_hae_cell {
        pos: -1,
        n_seq: 0,
        seq: -1,
    };
    let mut cells = vec![empty; 512];
    // SAFETY: the array has room for as many cells as is said.
    let n = unsafe { sys::llama_hae_kv_cells(ctx.as_mut_ptr(), cells.as_mut_ptr(), 512) };
    assert_eq!(n, 512);
    cells.iter().map(|cell| cell.pos).collect()
}

/// A graph that is stopped takes its micro-batch back and no more: not the newer positions that a
/// batch between older ones has behind it.
#[test]
fn a_stopped_batch_leaves_the_cells_as_they_were() {
    // llama.cpp asks the callback that stops a batch on the processor alone.
    let model = fixture::load_on_host(converted("f32").0);
    let (left, free) = (AtomicI64::new(GO_ON), AtomicI64::new(GO_ON));
    let mut ours = context(&model, &left);
    let mut twin = context(&model, &free);
    for ctx in [&mut ours, &mut twin] {
        let all: Vec<Pos> = (0..100).collect();
        assert_eq!(decode(ctx, &all).0, 0);
        // SAFETY: a range of positions of a live context's memory.
        unsafe {
            sys::llama_memory_seq_rm(sys::llama_get_memory(ctx.as_mut_ptr()), 0, 20, 60);
        }
    }
    let before = positions(&mut ours);
    let again: Vec<Pos> = (25..37).collect();
    let next: Vec<Pos> = (100..112).collect();
    // At the start of a graph and in the middle of it.
    for nodes in [0, 1, 40, 100] {
        for batch in [&again, &next] {
            left.store(nodes, Ordering::Relaxed);
            let (status, _) = decode(&mut ours, batch);
            assert_eq!(status, 2, "after {nodes} nodes");
            assert_eq!(positions(&mut ours), before, "after {nodes} nodes");
        }
    }
    // Micro-batches before the one that was stopped are done: llama.cpp says so of a larger batch.
    left.store(GO_ON, Ordering::Relaxed);
    let spent = {
        let before = left.load(Ordering::Relaxed);
        decode(&mut ours, &(100..116).collect::<Vec<Pos>>());
        before - left.load(Ordering::Relaxed)
    };
    // SAFETY: as above.
    unsafe {
        sys::llama_memory_seq_rm(sys::llama_get_memory(ours.as_mut_ptr()), 0, 100, -1);
    }
    assert_eq!(positions(&mut ours), before);
    left.store(spent + spent / 2, Ordering::Relaxed);
    let (status, _) = decode(&mut ours, &(100..148).collect::<Vec<Pos>>());
    assert_eq!(status, 2);
    let done = positions(&mut ours)
        .iter()
        .filter(|&&pos| pos >= 100)
        .count();
    assert_eq!(done, 16, "the first of three");
    // SAFETY: as above.
    unsafe {
        sys::llama_memory_seq_rm(sys::llama_get_memory(ours.as_mut_ptr()), 0, 100, -1);
    }
    assert_eq!(positions(&mut ours), before);

    left.store(GO_ON, Ordering::Relaxed);
    for batch in [&again, &next] {
        let (ours_done, ours_out) = decode(&mut ours, batch);
        let (twin_done, twin_out) = decode(&mut twin, batch);
        assert_eq!((ours_done, twin_done), (0, 0));
        assert_eq!(positions(&mut ours), positions(&mut twin));
        let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&ours_out) == bits(&twin_out), "{batch:?}");
    }
}

fn feed(engine: &mut LlamaEngine, input: Input<'_>, pos: Pos) -> hae::Result<()> {
    let places: Vec<Pos> = (pos..).take(input.len()).collect();
    let batch = Batch {
        logits: true,
        ..Batch::new(input, &places)
    };
    engine.decode(batch, &mut Vec::new(), &mut Observation::default())
}

/// A picture whose tokens attend to all of it, and no room for it: text after it attends backwards
/// again, as if nobody had tried. With a cache that grows, and one that has its size.
#[test]
fn a_full_cache_leaves_the_context_causal() {
    let model = load(converted("f32").0);
    let picture: Vec<f32> = (0..100 * model.n_embd())
        .map(|i| ((i * 7919 % 1000) as f32 / 1000.0 - 0.5) * 0.1)
        .collect();
    let picture = Input::Embeddings {
        data: &picture,
        n: 100,
        mrope: None,
    };
    let tokens: Vec<i32> = (3..203).collect();
    let more: Vec<i32> = (300..330).collect();
    for kv_size in [None, Some(256)] {
        let options = ContextOptions {
            non_causal_images: true,
            kv_size,
            ..exact(256)
        };
        let mut ours = engine(&model, options.clone());
        let mut twin = engine(&model, options);
        for engine in [&mut ours, &mut twin] {
            feed(engine, Input::Tokens(&tokens), 0).unwrap();
        }
        let map = |engine: &LlamaEngine| {
            let mut map = Vec::new();
            engine.cell_map(&mut map).unwrap();
            map
        };
        let before = map(&ours);
        for _ in 0..3 {
            let refused = feed(&mut ours, picture, 200);
            assert!(
                matches!(refused, Err(Error::ContextFull { .. })),
                "{refused:?}"
            );
            assert_eq!(map(&ours), before);
        }
        for engine in [&mut ours, &mut twin] {
            feed(engine, Input::Tokens(&more), 200).unwrap();
        }
        assert_eq!(map(&ours), map(&twin));
        assert!(ours.logits().unwrap() == twin.logits().unwrap());

        // It can be told: the same tokens in the same cells, as a picture they see one another.
        let mut rows: Vec<f32> = vec![0.0; 30 * model.n_embd()];
        rows.iter_mut()
            .zip(0i32..)
            .for_each(|(x, i)| *x = ((i * 31 % 997) as f32 / 997.0 - 0.5) * 0.1);
        let shown = Input::Embeddings {
            data: &rows,
            n: 30,
            mrope: None,
        };
        let causal = ContextOptions {
            non_causal_images: false,
            ..exact(256)
        };
        let mut other = engine(&model, causal);
        for engine in [&mut twin, &mut other] {
            engine.clear();
            feed(engine, shown, 0).unwrap();
        }
        assert!(max_abs_diff(twin.logits().unwrap(), other.logits().unwrap()) > 1e-3);
    }
}
