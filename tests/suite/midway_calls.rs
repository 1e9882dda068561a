//! What a context of the first layers keeps for another: llama.cpp driven by hand, beside a context
//! that goes through all layers itself. Moves, sizes, kept graphs, lifetimes, and what is refused.

use std::num::NonZeroU32;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use crate::fixture::{backend, decode, load};
use crate::npz::max_abs_diff;
use crate::precision;
use crate::random_llama::{Shape, llama};

/// The first layer that goes on.
const LAYER: u32 = 2;

#[derive(Clone, Copy, Debug)]
struct Kind {
    flash: bool,
    of: KvCacheType,
    /// Of a head: rows of 96 values in q8_0 are no whole number of F32.
    width: u32,
}

const KINDS: [Kind; 4] = [
    Kind {
        flash: false,
        of: KvCacheType::F32,
        width: 64,
    },
    F16,
    Kind {
        flash: true,
        of: KvCacheType::Q8_0,
        width: 64,
    },
    Kind {
        flash: true,
        of: KvCacheType::Q8_0,
        width: 96,
    },
];
const F16: Kind = Kind {
    flash: true,
    of: KvCacheType::F16,
    width: 64,
};

fn model(kind: Kind) -> LlamaModel {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    let shape = Shape {
        n_layer: 4,
        n_head: 2,
        n_head_kv: 1,
        width: kind.width,
    };
    llama(&path, shape);
    load(&path)
}

/// `n_first`: of so many first layers, which begins with a small cache; 0: of all.
fn context(model: &LlamaModel, kind: Kind, n_first: u32) -> LlamaContext<'_> {
    let mut params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(1024))
        .with_n_batch(64)
        .with_n_ubatch(16)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(kind.of)
        .with_type_v(kind.of)
        .with_flash_attention_policy(i32::from(kind.flash));
    params.as_raw_mut().kv_size = 256;
    params.as_raw_mut().n_layer_first = n_first;
    model.new_context(backend(), params).unwrap()
}

/// One that keeps what enters `LAYER`, of these tokens.
fn first<'m>(model: &'m LlamaModel, kind: Kind, tokens: &[i32]) -> LlamaContext<'m> {
    let mut ctx = context(model, kind, LAYER + 1);
    assert_eq!(keep(&mut ctx, LAYER), 0);
    for (chunk, pos) in tokens.chunks(16).zip((0..).step_by(16)) {
        assert_eq!(decode(&mut ctx, chunk, &range(pos, chunk.len()), false), 0);
    }
    ctx
}

fn keep(ctx: &mut LlamaContext<'_>, il: u32) -> i32 {
    // SAFETY: the context is alive.
    unsafe { sys::llama_hae_layers_set(ctx.as_mut_ptr(), il) }
}

fn from(ctx: &mut LlamaContext<'_>, first: &mut LlamaContext<'_>, cells: &[u32]) -> i32 {
    let n = cells.len() as u32;
    // SAFETY: both contexts are alive, and there are n cells.
    unsafe { sys::llama_hae_layers_from(ctx.as_mut_ptr(), first.as_mut_ptr(), cells.as_ptr(), n) }
}

fn range(start: i32, n: usize) -> Vec<i32> {
    (start..).take(n).collect()
}

fn cells(pos: &[i32]) -> Vec<u32> {
    pos.iter().map(|&p| p as u32).collect()
}

fn prompt(seed: i32, n: i32) -> Vec<i32> {
    (0..n).map(|i| 3 + (i * 7919 + seed * 131) % 900).collect()
}

/// Takes what these cells of `first` hold, at these positions; the last one's logits.
fn go_on(
    ctx: &mut LlamaContext<'_>,
    first: &mut LlamaContext<'_>,
    cells: &[u32],
    pos: &[i32],
) -> Vec<f32> {
    assert_eq!(from(ctx, first, cells), cells.len() as i32);
    // Which tokens they are is known already.
    assert_eq!(decode(ctx, &vec![0; pos.len()], pos, true), 0);
    ctx.get_logits_ith(-1).to_vec()
}

/// K and V of the first cells, and what they say of their tokens.
fn rows(ctx: &mut LlamaContext<'_>, n: u32) -> Vec<u8> {
    let cells: Vec<u32> = (0..n).collect();
    // SAFETY: the cells and the room for their rows are as many as is said.
    unsafe {
        let size = sys::llama_hae_kv_rows_size(ctx.as_mut_ptr()) as usize;
        let mut out = vec![0u8; size * cells.len()];
        let (rows, len) = (out.as_mut_ptr().cast(), out.len());
        let got = sys::llama_hae_kv_rows_get(ctx.as_mut_ptr(), cells.as_ptr(), n, rows, len);
        assert_eq!(got, n as i32);
        out
    }
}

fn remove(ctx: &mut LlamaContext<'_>, p0: i32, p1: i32) {
    // SAFETY: the context is alive.
    unsafe { sys::llama_memory_seq_rm(sys::llama_get_memory(ctx.as_mut_ptr()), 0, p0, p1) };
}

fn resize(ctx: &mut LlamaContext<'_>, n: u32) {
    // SAFETY: the context is alive.
    assert_eq!(
        unsafe { sys::llama_hae_kv_resize(ctx.as_mut_ptr(), n) },
        n as i32
    );
}

/// Where each cell went, by the cell that it was.
fn compact(ctx: &mut LlamaContext<'_>) -> Vec<(u32, u32)> {
    let (mut from, mut to) = (vec![0; 64], vec![0; 64]);
    // SAFETY: both arrays have room for 64 moves.
    let n = unsafe {
        sys::llama_hae_kv_compact(ctx.as_mut_ptr(), from.as_mut_ptr(), to.as_mut_ptr(), 64)
    };
    let moves = from.into_iter().zip(to);
    moves.take(usize::try_from(n).unwrap()).collect()
}

fn n_reused(ctx: &mut LlamaContext<'_>) -> i32 {
    // SAFETY: the context is alive.
    unsafe { sys::llama_perf_context(ctx.as_mut_ptr()).n_reused }
}

/// The same bits on a CPU.
fn assert_same(a: &[f32], b: &[f32], what: &str) {
    if precision::on_gpu() {
        let error = max_abs_diff(a, b);
        assert!(error < precision::logits(0.0), "{what}: {error}");
    } else {
        let apart = a.iter().zip(b).position(|(a, b)| a != b);
        assert_eq!((apart, a.len()), (None, b.len()), "{what}");
    }
}

/// One decode of four micro-batches, and one for each of them: logits, K and V of every layer, and
/// what the cells know of their tokens are those of a context that took the tokens itself.
#[test]
fn what_goes_on_leaves_what_a_whole_prefill_leaves() {
    for kind in KINDS {
        let model = model(kind);
        let tokens = prompt(1, 64);
        let mut whole = context(&model, kind, 0);
        assert_eq!(decode(&mut whole, &tokens, &range(0, 64), true), 0);
        let expected = whole.get_logits_ith(-1).to_vec();
        for n in [64, 16] {
            let mut first = first(&model, kind, &tokens);
            let mut ctx = context(&model, kind, 0);
            let mut logits = Vec::new();
            for pos in range(0, 64).chunks(n) {
                logits = go_on(&mut ctx, &mut first, &cells(pos), pos);
            }
            assert_same(&logits, &expected, &format!("{kind:?}, {n} at once"));
            if !precision::on_gpu() {
                assert!(rows(&mut ctx, 64) == rows(&mut whole, 64), "{kind:?}");
            }
        }
    }
}

/// Cells that moved, in a cache that grew and shrank, take their hidden states with them.
#[test]
fn what_is_kept_follows_its_cells() {
    for kind in KINDS {
        let model = model(kind);
        let tokens = prompt(2, 64);
        let kept: Vec<i32> = (0..64).filter(|p| !(8..24).contains(p)).collect();
        let logits = |moves: bool| {
            let mut first = first(&model, kind, &tokens);
            let mut at = cells(&kept);
            if moves {
                remove(&mut first, 8, 24);
                resize(&mut first, 512);
                for (from, to) in compact(&mut first) {
                    *at.iter_mut().find(|cell| **cell == from).unwrap() = to;
                }
                resize(&mut first, 256);
                assert_ne!(at, cells(&kept));
            }
            let mut ctx = context(&model, kind, 0);
            let mut out = Vec::new();
            for (at, pos) in at.chunks(16).zip(kept.chunks(16)) {
                out.extend(go_on(&mut ctx, &mut first, at, pos));
            }
            out
        };
        assert_same(&logits(true), &logits(false), &format!("{kind:?}"));
    }
}

/// A second micro-batch of the same shape finds the graph of the first. What reads other memory is
/// another graph: a cache that was resized, a context that took the place of one that is gone.
#[test]
fn graphs_are_kept_while_they_read_the_same() {
    let model = model(F16);
    let tokens = [prompt(3, 64), prompt(4, 64)];
    let fresh = |tokens: &[i32], n: usize| {
        let (mut first, mut ctx) = (first(&model, F16, tokens), context(&model, F16, 0));
        let mut logits = Vec::new();
        for pos in range(0, n).chunks(16) {
            logits = go_on(&mut ctx, &mut first, &cells(pos), pos);
        }
        logits
    };
    let mut one = first(&model, F16, &tokens[0]);
    let mut ctx = context(&model, F16, 0);
    let step = |ctx: &mut LlamaContext<'_>, one: &mut LlamaContext<'_>, start: i32| {
        let before = n_reused(ctx);
        let pos = range(start, 16);
        let logits = go_on(ctx, one, &cells(&pos), &pos);
        (logits, n_reused(ctx) - before)
    };
    assert_eq!(step(&mut ctx, &mut one, 0).1, 0);
    assert_eq!(step(&mut ctx, &mut one, 16).1, 1);
    resize(&mut one, 512);
    let (logits, reused) = step(&mut ctx, &mut one, 32);
    assert_eq!(reused, 0);
    assert_same(&logits, &fresh(&tokens[0], 48), "resized");
    drop(one);
    remove(&mut ctx, -1, -1);
    for round in 0..3 {
        // Its memory may be where that of the last one was.
        let mut other = first(&model, F16, &tokens[1 - round % 2]);
        assert_eq!(step(&mut ctx, &mut other, 0).1, 0, "{round}");
        let (logits, reused) = step(&mut ctx, &mut other, 16);
        assert_eq!(reused, 1, "{round}");
        assert_same(&logits, &fresh(&tokens[1 - round % 2], 32), "another");
        drop(other);
        // An ordinary batch of the same shape computes all layers.
        let before = n_reused(&mut ctx);
        assert_eq!(decode(&mut ctx, &tokens[0][..16], &range(32, 16), true), 0);
        assert_eq!(n_reused(&mut ctx), before);
        remove(&mut ctx, -1, -1);
    }
}

/// What is gone when the batch comes is refused; nothing of the batch is in the cache then, and the
/// next one is as usual.
#[test]
fn a_batch_whose_source_is_gone_is_refused() {
    let model = model(F16);
    let tokens = prompt(5, 32);
    let pos = range(0, 16);
    let mut whole = context(&model, F16, 0);
    assert_eq!(decode(&mut whole, &tokens[..16], &pos, true), 0);
    let expected = whole.get_logits_ith(-1).to_vec();
    type Change = fn(LlamaContext<'_>) -> Option<LlamaContext<'_>>;
    let changes: [(&str, Change); 7] = [
        ("freed", |_| None),
        ("keeps no more", |mut ctx| {
            assert_eq!(keep(&mut ctx, 0), 0);
            Some(ctx)
        }),
        ("keeps anew", |mut ctx| {
            assert_eq!(keep(&mut ctx, LAYER), 0);
            Some(ctx)
        }),
        ("another size", |mut ctx| {
            resize(&mut ctx, 512);
            Some(ctx)
        }),
        ("without one of the cells", |mut ctx| {
            remove(&mut ctx, 3, 4);
            Some(ctx)
        }),
        ("moved", |mut ctx| {
            remove(&mut ctx, 3, 4);
            assert_eq!(compact(&mut ctx), [(31, 3)]);
            Some(ctx)
        }),
        ("decoded meanwhile", |mut ctx| {
            remove(&mut ctx, 3, 4);
            assert_eq!(decode(&mut ctx, &[7], &[3], false), 0);
            Some(ctx)
        }),
    ];
    for (what, change) in changes {
        let one = &mut first(&model, F16, &tokens);
        let mut ctx = context(&model, F16, 0);
        let gone = first(&model, F16, &tokens);
        let mut gone = Some(gone);
        let n = from(&mut ctx, gone.as_mut().unwrap(), &cells(&pos));
        assert_eq!(n, 16, "{what}");
        let _left = change(gone.take().unwrap());
        assert_eq!(decode(&mut ctx, &[0; 16], &pos, true), -1, "{what}");
        // What was refused is forgotten.
        assert_eq!(decode(&mut ctx, &tokens[..16], &pos, true), 0, "{what}");
        assert_same(ctx.get_logits_ith(-1), &expected, what);
        remove(&mut ctx, -1, -1);
        assert_same(&go_on(&mut ctx, one, &cells(&pos), &pos), &expected, what);
    }
    // Either may go first.
    let (mut one, mut ctx) = (first(&model, F16, &tokens), context(&model, F16, 0));
    go_on(&mut ctx, &mut one, &cells(&pos), &pos);
    drop(ctx);
    assert_eq!(decode(&mut one, &[7], &[40], false), 0);
    let mut ctx = context(&model, F16, 0);
    go_on(&mut ctx, &mut one, &cells(&pos), &pos);
    drop(one);
    assert_eq!(decode(&mut ctx, &tokens[..16], &range(16, 16), true), 0);
}

/// Contexts, layers and cells that cannot be, and batches of another size.
#[test]
fn mistakes_are_refused() {
    use sys::LLAMA_HAE_LAYERS_ERR_ARGUMENT as ARGUMENT;
    use sys::LLAMA_HAE_LAYERS_ERR_NOTHING as NOTHING;
    let model = model(F16);
    let tokens = prompt(6, 32);
    let mut one = first(&model, F16, &tokens);
    let mut ctx = context(&model, F16, 0);
    assert_eq!(keep(&mut ctx, LAYER), ARGUMENT);
    assert_eq!(keep(&mut one, LAYER + 1), ARGUMENT);
    assert_eq!(keep(&mut one, u32::MAX), ARGUMENT);
    let null = std::ptr::null_mut();
    // SAFETY: all are null, or alive and not read further than is said.
    unsafe {
        let (a, b, cells) = (ctx.as_mut_ptr(), one.as_mut_ptr(), [0u32; 4]);
        let cells = cells.as_ptr();
        assert_eq!(sys::llama_hae_layers_set(null, 1), ARGUMENT);
        assert_eq!(sys::llama_hae_layers_from(null, b, cells, 1), ARGUMENT);
        assert_eq!(sys::llama_hae_layers_from(a, null, cells, 1), ARGUMENT);
        assert_eq!(sys::llama_hae_layers_from(a, b, null.cast(), 1), ARGUMENT);
        assert_eq!(sys::llama_hae_layers_from(a, b, cells, 0), ARGUMENT);
        // Neither from itself nor the other way round.
        assert_eq!(sys::llama_hae_layers_from(a, a, cells, 1), NOTHING);
        assert_eq!(sys::llama_hae_layers_from(b, b, cells, 1), ARGUMENT);
        assert_eq!(sys::llama_hae_layers_from(b, a, cells, 1), ARGUMENT);
    }
    // Other types, the same model once more.
    let mut other = context(&model, KINDS[2], 0);
    assert_eq!(from(&mut other, &mut one, &[0]), ARGUMENT);
    let again = self::model(F16);
    let mut other = context(&again, F16, 0);
    assert_eq!(from(&mut other, &mut one, &[0]), ARGUMENT);

    for at in [&[32][..], &[0, 255], &[0, 256], &[u32::MAX]] {
        assert_eq!(from(&mut ctx, &mut one, at), NOTHING, "{at:?}");
    }
    // SAFETY: the context is alive.
    unsafe {
        let memory = sys::llama_get_memory(one.as_mut_ptr());
        sys::llama_memory_seq_rm(memory, 0, 30, 31);
        sys::llama_memory_seq_add(memory, 0, 31, 32, 5);
    }
    assert_eq!(from(&mut ctx, &mut one, &[30]), NOTHING, "removed");
    assert_eq!(from(&mut ctx, &mut one, &[31]), NOTHING, "at another place");
    let pos = range(0, 16);
    for n in [1, 15, 17, 30] {
        assert_eq!(from(&mut ctx, &mut one, &cells(&range(0, n))), n as i32);
        assert_eq!(decode(&mut ctx, &tokens[..16], &pos, true), -1, "{n}");
    }
    // Rows come without what entered the layers.
    let saved = rows(&mut one, 1);
    remove(&mut one, 0, 1);
    let (mut cell, len) = (0, saved.len());
    // SAFETY: there is one row, one position, and room for one cell.
    let got = unsafe {
        let (raw, data) = (one.as_mut_ptr(), saved.as_ptr().cast());
        sys::llama_hae_kv_rows_set(raw, 0, [0].as_ptr(), 1, data, len, &raw mut cell)
    };
    assert_eq!((got, cell), (1, 0));
    assert_eq!(from(&mut ctx, &mut one, &[0]), NOTHING, "from rows");
    // Nothing of these was left in the cache.
    assert_eq!(decode(&mut ctx, &tokens[..16], &pos, true), 0);
    let mut never = context(&model, F16, LAYER + 1);
    assert_eq!(decode(&mut never, &tokens[..16], &pos, false), 0);
    assert_eq!(from(&mut ctx, &mut never, &[0]), NOTHING, "never asked");
    assert_eq!(keep(&mut never, LAYER), 0);
    assert_eq!(from(&mut ctx, &mut never, &[0]), NOTHING, "asked too late");
}

/// What is kept counts among what the cache takes.
#[test]
fn hidden_states_count() {
    let model = model(F16);
    let allocated = |ctx: &mut LlamaContext<'_>| {
        let mut bytes = 0;
        // SAFETY: the context is alive, and `bytes` is a live variable.
        let per_cell = unsafe { sys::llama_hae_kv_bytes(ctx.as_mut_ptr(), &raw mut bytes) };
        (per_cell, bytes)
    };
    let mut ctx = context(&model, F16, LAYER + 1);
    let without = allocated(&mut ctx);
    for (n, most) in [(256, 1), (512, 2)] {
        resize(&mut ctx, n);
        assert_eq!(keep(&mut ctx, LAYER), 0);
        let row = 4 * crate::random_llama::EMBD as usize;
        let expected = most * without.1 + n as usize * row;
        assert_eq!(allocated(&mut ctx), (without.0, expected));
        assert_eq!(keep(&mut ctx, 0), 0);
        assert_eq!(allocated(&mut ctx).1, most * without.1);
    }
}
