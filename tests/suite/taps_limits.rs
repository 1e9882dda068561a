//! How large tapped graphs may get, and what cannot be tapped.

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use crate::fixture::{backend, load};
use crate::random_llama::{Shape, llama};

const N_UBATCH: u32 = 512;

fn context(
    model: &LlamaModel,
    n_ctx: u32,
    flash: bool,
    change: impl FnOnce(&mut sys::llama_context_params),
) -> LlamaContext<'_> {
    let mut params = LlamaContextParams::default()
        .with_n_ctx(std::num::NonZeroU32::new(n_ctx))
        .with_n_batch(N_UBATCH)
        .with_n_ubatch(N_UBATCH)
        .with_n_threads(2)
        .with_n_threads_batch(2)
        .with_flash_attention_policy(i32::from(flash));
    change(params.as_raw_mut());
    model.new_context(backend(), params).unwrap()
}

fn tap(ctx: &mut LlamaContext<'_>, layers: &[i32]) -> i32 {
    tap_rows(ctx, layers, N_UBATCH)
}

fn tap_rows(ctx: &mut LlamaContext<'_>, layers: &[i32], max_rows: u32) -> i32 {
    // SAFETY: the context is alive, the pointer is to as many values as said.
    unsafe { sys::llama_hae_taps_set(ctx.as_mut_ptr(), layers.as_ptr(), layers.len(), max_rows) }
}

fn tap_by_layer(ctx: &mut LlamaContext<'_>, on: bool) -> i32 {
    // SAFETY: as above.
    unsafe { sys::llama_hae_taps_by_layer(ctx.as_mut_ptr(), on) }
}

fn ask(ctx: &mut LlamaContext<'_>, rows: &[i32]) -> i32 {
    // SAFETY: as above.
    unsafe { sys::llama_hae_taps_rows(ctx.as_mut_ptr(), rows.as_ptr(), rows.len()) }
}

/// How many cells the last batch's scores are of.
fn in_view(ctx: &mut LlamaContext<'_>) -> i32 {
    let none = std::ptr::null_mut();
    // SAFETY: the context is alive; nothing is written.
    unsafe { sys::llama_hae_taps_read(ctx.as_mut_ptr(), none, none, 0) }
}

fn small(dir: &tempfile::TempDir) -> LlamaModel {
    let path = dir.path().join("model.gguf");
    let shape = Shape {
        n_layer: 6,
        n_head: 4,
        n_head_kv: 4,
        width: 16,
    };
    llama(&path, shape);
    load(&path)
}

/// Decodes a micro-batch and gives the sum of its rows' scores.
fn scores(ctx: &mut LlamaContext<'_>, start: i32, rows: &[i32]) -> f64 {
    let mut batch = LlamaBatch::new(N_UBATCH as usize, 1);
    for pos in start..start + N_UBATCH as i32 {
        batch
            .add(LlamaToken(3 + pos * 7919 % 900), pos, &[0], false)
            .unwrap();
    }
    assert_eq!(ask(ctx, rows), 0);
    ctx.decode(&mut batch).unwrap();
    if rows.is_empty() {
        return 0.0;
    }
    let (mut sum, mut max) = (vec![0.0f32; 8192], vec![0.0f32; 8192]);
    // SAFETY: as above.
    let n = unsafe {
        sys::llama_hae_taps_read(ctx.as_mut_ptr(), sum.as_mut_ptr(), max.as_mut_ptr(), 8192)
    };
    assert!(n > start, "{n}");
    sum.iter().map(|&a| f64::from(a)).sum()
}

/// ggml ends the process when a graph has more nodes than were reserved. What is reserved counts
/// pieces of rows in layers, of which the most there can be are here: every layer of 32, and all
/// rows of a micro-batch but one, so that they are gathered.
#[test]
fn the_largest_graphs_fit_what_is_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep.gguf");
    let shape = Shape {
        n_layer: 32,
        n_head: 32,
        n_head_kv: 8,
        width: 16,
    };
    llama(&path, shape);
    let model = load(&path);
    let spread = |n: i32| -> Vec<i32> { (0..n).map(|i| i * 32 / n).collect() };
    // Nodes are counted: no thread need wait for another.
    let alone = |params: &mut sys::llama_context_params| {
        (params.n_threads, params.n_threads_batch) = (1, 1);
    };
    for (n_ctx, flash, by_layer) in [
        (8192, true, false),
        (8192, true, true),
        (512, true, true),
        (2048, false, false),
    ] {
        let mut ctx = context(&model, n_ctx, flash, alone);
        assert_eq!(tap_by_layer(&mut ctx, by_layer), 0);
        // Each reserves its worst graph.
        for n in [1, 2, 3, 5, 9, 16, 17, 31, 32] {
            assert_eq!(tap(&mut ctx, &spread(n)), 0, "{n} layers, {n_ctx} cells");
        }
    }
    let rows: Vec<i32> = (0..511).collect();
    let mut ctx = context(&model, 8192, true, alone);
    let mut start = 0;
    for (by_layer, n, times) in [(false, 32, 1), (true, 32, 2), (true, 3, 1), (false, 1, 1)] {
        assert_eq!(tap(&mut ctx, &[]), 0);
        assert_eq!(tap_by_layer(&mut ctx, by_layer), 0);
        assert_eq!(tap(&mut ctx, &spread(n)), 0);
        // The graph is built, and used again.
        for _ in 0..times {
            let total = scores(&mut ctx, start, &rows);
            start += N_UBATCH as i32;
            // The scores of a row add up to one.
            let what = format!("{n} layers at {start}, by layer: {by_layer}");
            assert!((total - 511.0).abs() < 0.05, "{what}: {total}");
            let mut sums = vec![0.0f32; 32 * 8192];
            // SAFETY: the context is alive, the buffer holds as many values as said.
            let n_kv = unsafe {
                sys::llama_hae_taps_read_layers(ctx.as_mut_ptr(), sums.as_mut_ptr(), sums.len())
            };
            if !by_layer {
                assert_eq!(n_kv, sys::LLAMA_HAE_TAPS_ERR_NOTHING, "{what}");
                continue;
            }
            let layers = sums.chunks_exact(n_kv as usize);
            for layer in layers.take(n as usize) {
                let total: f64 = layer.iter().map(|&a| f64::from(a)).sum();
                assert!((total - 511.0).abs() < 0.05, "{what}: {total}");
            }
        }
    }
}

#[test]
fn sums_by_layer_are_asked_for_before_anything_is_tapped() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(&dir);
    let mut ctx = context(&model, 1024, true, |_| {});
    assert_eq!(tap(&mut ctx, &[0, 2]), 0);
    let refused = sys::LLAMA_HAE_TAPS_ERR_ARGUMENT;
    assert_eq!(tap_by_layer(&mut ctx, true), refused);
    assert_eq!(tap_by_layer(&mut ctx, false), 0);
    assert_eq!(tap(&mut ctx, &[]), 0);
    assert_eq!(tap_by_layer(&mut ctx, true), 0);
    assert_eq!(tap(&mut ctx, &[0, 2]), 0);
    let rows: Vec<i32> = (0..7).collect();
    scores(&mut ctx, 0, &rows);
    let mut sums = vec![0.0f32; 2 * 512];
    let n = sums.len();
    // SAFETY: the context is alive, the buffers hold as many values as said, or nothing is written.
    let [none, few, all] = unsafe {
        let ctx = ctx.as_mut_ptr();
        let values = sums.as_mut_ptr();
        let few = sys::llama_hae_taps_read_layers(ctx, values, n - 1);
        let none = sys::llama_hae_taps_read_layers(ctx, std::ptr::null_mut(), n);
        [none, few, sys::llama_hae_taps_read_layers(ctx, values, n)]
    };
    assert_eq!(none, refused);
    assert_eq!(few, sys::LLAMA_HAE_TAPS_ERR_CAPACITY);
    assert_eq!(all, 512);
}

/// A context of the first layers builds no others: asking for their scores is a mistake, not a
/// failure of each batch.
#[test]
fn a_context_of_the_first_layers_taps_only_these() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(&dir);
    let mut whole = context(&model, 1024, true, |_| {});
    assert_eq!(tap(&mut whole, &[0, 5]), 0);
    assert_eq!(tap(&mut whole, &[6]), sys::LLAMA_HAE_TAPS_ERR_ARGUMENT);
    assert_eq!(tap(&mut whole, &[-1, 0]), sys::LLAMA_HAE_TAPS_ERR_ARGUMENT);
    let mut first = context(&model, 1024, true, |params| {
        params.n_layer_first = 2;
        params.n_outputs_max = 1;
    });
    for layers in [&[2][..], &[0, 5], &[1, 2]] {
        assert_eq!(
            tap(&mut first, layers),
            sys::LLAMA_HAE_TAPS_ERR_ARGUMENT,
            "{layers:?}"
        );
    }
    assert_eq!(tap(&mut first, &[0, 1]), 0);
    let rows: Vec<i32> = (0..511).collect();
    let total = scores(&mut first, 0, &rows);
    assert!((total - 511.0).abs() < 0.05, "{total}");
}

/// More of the first layers than there are would be a whole context that nobody asked for.
#[test]
fn a_context_of_more_layers_than_there_are_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(&dir);
    for (n, possible) in [(6, true), (7, false), (u32::MAX, false)] {
        let mut params = LlamaContextParams::default()
            .with_n_ctx(std::num::NonZeroU32::new(256))
            .with_n_batch(64)
            .with_n_ubatch(64);
        params.as_raw_mut().n_layer_first = n;
        params.as_raw_mut().n_outputs_max = 1;
        assert_eq!(
            model.new_context(backend(), params).is_ok(),
            possible,
            "{n}"
        );
    }
}

/// Buffers are for as many query rows as were announced: more are refused, not computed in what
/// was not reserved for them.
#[test]
fn more_query_rows_than_announced_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(&dir);
    let mut ctx = context(&model, 1024, true, |_| {});
    assert_eq!(
        tap_rows(&mut ctx, &[0], 0),
        sys::LLAMA_HAE_TAPS_ERR_ARGUMENT
    );
    assert_eq!(tap_rows(&mut ctx, &[0, 5], 3), 0);
    assert_eq!(
        ask(&mut ctx, &[1, 2, 3, 4]),
        sys::LLAMA_HAE_TAPS_ERR_ARGUMENT
    );
    let total = scores(&mut ctx, 0, &[7, 300, 511]);
    assert!((total - 3.0).abs() < 1e-3, "{total}");
    // The next batch is not asked: what is refused leaves no rows behind.
    assert_eq!(
        ask(&mut ctx, &[1, 2, 3, 4]),
        sys::LLAMA_HAE_TAPS_ERR_ARGUMENT
    );
    scores(&mut ctx, 512, &[]);
    assert_eq!(in_view(&mut ctx), sys::LLAMA_HAE_TAPS_ERR_NOTHING);
    // And more can be announced.
    let rows: Vec<i32> = (0..512).collect();
    assert_eq!(tap(&mut ctx, &[0, 5]), 0);
    ctx.clear_kv_cache();
    let total = scores(&mut ctx, 0, &rows);
    assert!((total - 512.0).abs() < 0.05, "{total}");
    assert_eq!(in_view(&mut ctx), 512);
}

/// Query rows are those of one batch, also of one that is refused.
#[test]
fn a_refused_batch_leaves_no_query_rows_behind() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(&dir);
    let mut ctx = context(&model, 1024, true, |_| {});
    assert_eq!(tap(&mut ctx, &[0]), 0);
    let total = scores(&mut ctx, 0, &[3]);
    assert!((total - 1.0).abs() < 1e-3, "{total}");
    // At a position that the cache has; larger than any; no tokens at all.
    for pos in [0, i32::MAX - 1] {
        let mut batch = LlamaBatch::new(1, 1);
        batch.add(LlamaToken(3), pos, &[0], false).unwrap();
        assert_eq!(ask(&mut ctx, &[0]), 0);
        assert!(ctx.decode(&mut batch).is_err(), "{pos}");
        // Nor the scores of the batch before it.
        assert_eq!(in_view(&mut ctx), sys::LLAMA_HAE_TAPS_ERR_NOTHING, "{pos}");
        ctx.clear_kv_cache();
        scores(&mut ctx, 0, &[]);
        assert_eq!(in_view(&mut ctx), sys::LLAMA_HAE_TAPS_ERR_NOTHING, "{pos}");
    }
}

/// The scores have left the graph with the logits: they stay what they are until the next batch, whatever
/// is asked of them, and whether or not they are read.
#[test]
fn scores_are_kept_until_the_next_batch() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(&dir);
    let mut ctx = context(&model, 2048, true, |_| {});
    assert_eq!(tap(&mut ctx, &[0, 5]), 0);
    let read = |ctx: &mut LlamaContext<'_>| {
        let n = in_view(ctx);
        let (mut sum, mut max) = (vec![0.0f32; 2048], vec![0.0f32; 2048]);
        // SAFETY: the context is alive, both buffers hold as many values as said.
        let read = unsafe {
            sys::llama_hae_taps_read(ctx.as_mut_ptr(), sum.as_mut_ptr(), max.as_mut_ptr(), 2048)
        };
        assert_eq!(read, n);
        (n, sum, max)
    };
    let mut before = None;
    // One row and several, so that the buffer's parts move.
    for (start, rows) in [(0, vec![511]), (512, vec![1, 300]), (1024, vec![0, 7, 9])] {
        let total = scores(&mut ctx, start, &rows);
        assert!(
            (total - rows.len() as f64).abs() < 1e-3,
            "{rows:?}: {total}"
        );
        let seen = read(&mut ctx);
        assert_eq!(seen, read(&mut ctx));
        assert_eq!(seen.0, start + 512);
        assert_eq!(seen.1 == seen.2, rows.len() == 1, "{rows:?}");
        assert_ne!(before.replace(seen.clone()), Some(seen));
    }
    // One that is not read, and one of no rows.
    assert_eq!(ask(&mut ctx, &[5]), 0);
    scores(&mut ctx, 1536, &[5]);
    ctx.clear_kv_cache();
    scores(&mut ctx, 0, &[]);
    assert_eq!(in_view(&mut ctx), sys::LLAMA_HAE_TAPS_ERR_NOTHING);
}
