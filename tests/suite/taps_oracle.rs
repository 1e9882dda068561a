//! Tapped scores against a plain softmax over what the attention node of the same graph got: its
//! queries, its keys as they lie in the cache, its mask. So nothing that came before can differ,
//! whatever the cache's types are, in the deepest layer as in the first.
//!
//! The processor rounds a query as it multiplies it: to F16 beside F16 keys, in blocks of eight-bit integers beside
//! quantized ones. A GPU does so or not, kernel by kernel, so its scores have to be near one of the ways that there are.

use std::ffi::c_void;

use hae::llama::CacheType;
use half::f16;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use crate::fixture::{backend, load};
use crate::model::{TEXT, repository};
use crate::precision;
use crate::random_llama::{Shape, bloom, llama};

/// How a query is multiplied with keys.
#[derive(Clone, Copy, PartialEq)]
enum Query {
    /// Rounded, as by the processor.
    Rounded,
    Exact,
    /// By CUDA's kernel for a single one (`vec_dot_q4_0_q8_1` in vecdotq.cuh): rounded, but that q4_0's offset of 8 is
    /// multiplied with the sum of what was not.
    OffsetApart,
}

/// What a device may do.
fn ways() -> &'static [Query] {
    match precision::on_gpu() {
        true => &[Query::Rounded, Query::Exact, Query::OffsetApart],
        false => &[Query::Rounded],
    }
}

/// The mean over heads of each wanted row's weights.
type Rows = Vec<Vec<f64>>;

/// What the callback gathers.
#[derive(Default)]
struct Seen {
    /// Rows of the micro-batch that comes; none: nothing is gathered.
    rows: Vec<usize>,
    /// For each layer, for each of [`ways`].
    layers: Vec<Vec<Rows>>,
}

/// `n` values of a row of the cache, or of any tensor.
///
/// # Safety
/// `data` points to a row of as many values of this type.
unsafe fn values(kind: sys::ggml_type, data: *const u8, n: usize) -> Vec<f32> {
    // SAFETY: the caller's promise; rows are whole blocks.
    unsafe {
        let half = |at: usize| f16::from_bits(data.add(at).cast::<u16>().read_unaligned()).to_f32();
        match kind {
            sys::GGML_TYPE_F32 => {
                let data = data.cast::<f32>();
                (0..n).map(|i| data.add(i).read_unaligned()).collect()
            }
            sys::GGML_TYPE_F16 => (0..n).map(|i| half(2 * i)).collect(),
            // A scale and 32 integers.
            sys::GGML_TYPE_Q8_0 => (0..n)
                .map(|i| half(i / 32 * 34) * f32::from(*data.add(i / 32 * 34 + 2 + i % 32) as i8))
                .collect(),
            // A scale and 16 pairs: the low halves of the bytes come first.
            sys::GGML_TYPE_Q4_0 => (0..n)
                .map(|i| {
                    let byte = *data.add(i / 32 * 18 + 2 + i % 16);
                    let four = if i % 32 < 16 { byte & 15 } else { byte >> 4 };
                    half(i / 32 * 18) * (f32::from(four) - 8.0)
                })
                .collect(),
            other => panic!("type {other}"),
        }
    }
}

/// A query as ggml multiplies it with quantized keys: in blocks of 32 integers. Its code for x86
/// divides in another order than the others, which decides where a value lies between two integers.
fn quantized(query: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| {
        let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let scale = most / 127.0;
        let inverse = match most {
            0.0 => 0.0,
            _ if cfg!(target_arch = "x86_64") => 127.0 / most,
            _ => 1.0 / scale,
        };
        let scale = f16::from_f32(scale).to_f32();
        let round = move |x: &f32| (x * inverse).round_ties_even() * scale;
        block.iter().map(round).collect::<Vec<f32>>()
    };
    query.chunks(32).flat_map(block).collect()
}

/// For each block of a query, how far its sum is off that of what was rounded, itself rounded to F16.
fn sums_off(rounded: &[f32], exact: &[f32]) -> Vec<f32> {
    let blocks = rounded.chunks(32).zip(exact.chunks(32));
    blocks
        .map(|(rounded, exact)| {
            let sum = f16::from_f32(exact.iter().sum()).to_f32();
            rounded.iter().sum::<f32>() - sum
        })
        .collect()
}

/// What ALiBi multiplies distances with in this head.
fn slope(max_bias: f32, head: usize, n_head: usize) -> f64 {
    if max_bias == 0.0 {
        return 1.0;
    }
    let even = 1 << n_head.ilog2();
    let (bias, n) = (f64::from(max_bias), f64::from(even));
    let head = head as i32;
    match head < even {
        true => (-bias / n).exp2().powi(head + 1),
        false => (-bias / 2.0 / n).exp2().powi(2 * (head - even) + 1),
    }
}

/// A tensor's bytes, from wherever they are, at the strides that they have there.
///
/// # Safety
/// `t` is alive and computed, or comes before what is.
unsafe fn bytes(t: *const sys::ggml_tensor) -> Vec<u8> {
    // SAFETY: the caller's promise; as many bytes as the tensor spans.
    unsafe {
        let mut bytes = vec![0; sys::ggml_nbytes(t)];
        sys::ggml_backend_tensor_get(t, bytes.as_mut_ptr().cast(), 0, bytes.len());
        bytes
    }
}

/// # Safety
/// `t` is a computed node of flash attention.
unsafe fn weights(t: &sys::ggml_tensor, rows: &[usize], way: Query) -> Rows {
    // SAFETY: the sources of a live node are alive; everything is read at strides below their
    // shapes, as the node itself does.
    unsafe {
        let (q, k, mask) = (&*t.src[0], &*t.src[1], &*t.src[3]);
        let option = |i: usize| f32::from_bits(t.op_params[i] as u32);
        let (scale, max_bias, cap) = (option(0), option(1), option(2));
        assert_eq!(cap, 0.0, "no cap");
        assert!(t.src[4].is_null(), "no sinks");
        let [width, _, n_head, _] = q.ne.map(|n| n as usize);
        let n_kv = k.ne[1] as usize;
        let group = n_head / k.ne[2] as usize;
        let [all_q, all_k, all_mask] = [t.src[0], t.src[1], t.src[3]].map(|t| bytes(t));
        let at = |t: &sys::ggml_tensor, bytes: &[u8], row: usize, head: usize| {
            bytes.as_ptr().add(row * t.nb[1] + head * t.nb[2])
        };
        // The scale of a block of q4_0.
        let scale_of = |row: *const u8, block: usize| {
            f16::from_bits(row.add(block * 18).cast::<u16>().read_unaligned()).to_f32()
        };
        let keys: Vec<Vec<Vec<f32>>> = (0..n_head / group)
            .map(|h| {
                (0..n_kv)
                    .map(|j| values(k.type_, at(k, &all_k, j, h), width))
                    .collect()
            })
            .collect();
        let of_row = |&row: &usize| {
            let mask = values(mask.type_, at(mask, &all_mask, row, 0), n_kv);
            let mut mean = vec![0.0; n_kv];
            for head in 0..n_head {
                let mut query = values(q.type_, at(q, &all_q, row, head), width);
                let exact = query.clone();
                match (way, k.type_) {
                    (Query::Exact, _) | (_, sys::GGML_TYPE_F32) => {}
                    (_, sys::GGML_TYPE_F16) => query
                        .iter_mut()
                        .for_each(|x| *x = f16::from_f32(*x).to_f32()),
                    _ => query = quantized(&query),
                }
                let off = match way == Query::OffsetApart && k.type_ == sys::GGML_TYPE_Q4_0 {
                    true => sums_off(&query, &exact),
                    false => Vec::new(),
                };
                let slope = slope(max_bias, head, n_head);
                let score = |(j, (key, mask)): (usize, (&Vec<f32>, &f32))| {
                    let dot = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
                    let sum: f64 = query.iter().zip(key).map(dot).sum();
                    let row = at(k, &all_k, j, head / group);
                    let offset = |(b, off): (usize, &f32)| {
                        8.0 * f64::from(scale_of(row, b)) * f64::from(*off)
                    };
                    let sum = sum + off.iter().enumerate().map(offset).sum::<f64>();
                    sum * f64::from(scale) + slope * f64::from(*mask)
                };
                let keys = keys[head / group].iter().zip(&mask);
                let scores: Vec<f64> = keys.enumerate().map(score).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                for (mean, score) in mean.iter_mut().zip(&scores) {
                    *mean += (score - most).exp() / total / n_head as f64;
                }
            }
            mean
        };
        rows.iter().map(of_row).collect()
    }
}

unsafe extern "C" fn on_node(t: *mut sys::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: the context was made with a pointer to a live `Seen`, which nobody else touches
    // while llama_decode runs; the scheduler passes a live node.
    let (seen, t) = unsafe { (&mut *data.cast::<Seen>(), &*t) };
    if t.op != sys::GGML_OP_FLASH_ATTN_EXT || seen.rows.is_empty() {
        return !ask;
    }
    if !ask {
        // SAFETY: it was just computed; a panic would end the process.
        let of_way = |&way| unsafe { weights(t, &seen.rows, way) };
        seen.layers.push(ways().iter().map(of_way).collect());
    }
    true
}

fn context<'m>(
    model: &'m LlamaModel,
    kinds: (CacheType, CacheType),
    layers: &[i32],
    seen: &mut Seen,
) -> LlamaContext<'m> {
    let raw = |kind| match kind {
        CacheType::F32 => KvCacheType::F32,
        CacheType::F16 => KvCacheType::F16,
        CacheType::Q8_0 => KvCacheType::Q8_0,
        CacheType::Q4_0 => KvCacheType::Q4_0,
        other => panic!("{other:?}"),
    };
    let mut params = LlamaContextParams::default()
        .with_n_ctx(std::num::NonZeroU32::new(512))
        .with_n_batch(512)
        .with_n_ubatch(512)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(raw(kinds.0))
        .with_type_v(raw(kinds.1))
        .with_flash_attention_policy(sys::LLAMA_FLASH_ATTN_TYPE_ENABLED);
    params.as_raw_mut().cb_eval = Some(on_node);
    params.as_raw_mut().cb_eval_user_data = std::ptr::from_mut(seen).cast();
    let mut ctx = model.new_context(backend(), params).unwrap();
    // SAFETY: the context is alive, the pointer is to as many values as said.
    let done = unsafe {
        sys::llama_hae_taps_set(ctx.as_mut_ptr(), layers.as_ptr(), layers.len(), u32::MAX)
    };
    assert_eq!(done, 0);
    ctx
}

fn decode(ctx: &mut LlamaContext<'_>, tokens: &[i32], start: i32) {
    let mut batch = LlamaBatch::new(tokens.len(), 1);
    for (i, &token) in tokens.iter().enumerate() {
        let last = i + 1 == tokens.len();
        batch
            .add(LlamaToken(token), start + i as i32, &[0], last)
            .unwrap();
    }
    ctx.decode(&mut batch).unwrap();
}

/// The largest error of a cell's sum and maximum, as a share of the largest of them; that of the way that is nearest.
fn error(ctx: &mut LlamaContext<'_>, seen: &Seen, layers: &[i32]) -> f64 {
    let (mut sum, mut max) = (vec![0.0f32; 1024], vec![0.0f32; 1024]);
    // SAFETY: both arrays have room for as many values as is said.
    let n = unsafe {
        sys::llama_hae_taps_read(ctx.as_mut_ptr(), sum.as_mut_ptr(), max.as_mut_ptr(), 1024)
    };
    assert!(n > 0, "{n}");
    let theirs = [&sum[..n as usize], &max[..n as usize]];
    let of_way = |way| way_error(theirs, seen, layers, way);
    let errors: Vec<f64> = (0..ways().len()).map(of_way).collect();
    println!("{} rows: {errors:?}", seen.rows.len());
    errors.into_iter().fold(f64::MAX, f64::min)
}

fn way_error(theirs: [&[f32]; 2], seen: &Seen, layers: &[i32], way: usize) -> f64 {
    let n = theirs[0].len();
    let (mut worst, mut largest) = (0.0f64, [0.0f64; 2]);
    for cell in 0..n {
        let of_row = |row: usize| {
            let layers = layers
                .iter()
                .map(|&il| seen.layers[il as usize][way][row][cell]);
            layers.sum::<f64>()
        };
        let rows: Vec<f64> = (0..seen.rows.len())
            .map(|row| of_row(row) / layers.len() as f64)
            .collect();
        let ours = [
            rows.iter().sum::<f64>(),
            rows.iter().copied().fold(0.0, f64::max),
        ];
        for (i, theirs) in theirs.into_iter().enumerate() {
            worst = worst.max((ours[i] - f64::from(theirs[cell])).abs());
            largest[i] = largest[i].max(ours[i]);
        }
    }
    // Sharp enough that a wrong cell would show.
    assert!(largest[1] > 3.0 / n as f64, "{largest:?}");
    worst / largest[1]
}

/// A prompt with holes, then single tokens; the worst error of any layer set.
fn check(model: &LlamaModel, kinds: (CacheType, CacheType), layers: &[i32]) -> f64 {
    let mut seen = Box::<Seen>::default();
    let mut ctx = context(model, kinds, layers, &mut seen);
    let mut worst = 0.0f64;
    let tokens: Vec<i32> = (0..300).map(|i| (i * 7919 + i * i) % 900 + 3).collect();
    decode(&mut ctx, &tokens[..150], 0);
    // SAFETY: a range of positions of a live context's memory.
    unsafe {
        sys::llama_memory_seq_rm(sys::llama_get_memory(ctx.as_mut_ptr()), 0, 20, 71);
    }
    let parts: [(usize, usize, Vec<i32>); 4] = [
        (150, 240, (3..90).step_by(4).collect()),
        (240, 241, vec![0]),
        (241, 290, (0..49).collect()),
        (290, 291, vec![0]),
    ];
    for (start, end, rows) in parts {
        seen.rows = rows.iter().map(|&row| row as usize).collect();
        seen.layers.clear();
        // SAFETY: the context is alive, the pointer is to as many values as said.
        let done = unsafe { sys::llama_hae_taps_rows(ctx.as_mut_ptr(), rows.as_ptr(), rows.len()) };
        assert_eq!(done, 0);
        decode(&mut ctx, &tokens[start..end], start as i32);
        worst = worst.max(error(&mut ctx, &seen, layers));
    }
    worst
}

#[test]
fn scores_of_deep_layers_with_quantized_keys_and_values() {
    let bound = f64::from(precision::attention(1e-5));
    use CacheType::{F16, Q4_0, Q8_0};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("grouped.gguf");
    // Heads of a width that llama.cpp turns before it quantizes them, and of one that it does not.
    for width in [64, 96] {
        let shape = Shape {
            n_layer: 4,
            n_head: 6,
            n_head_kv: 2,
            width,
        };
        llama(&path, shape);
        let model = load(&path);
        for kinds in [(F16, F16), (Q8_0, Q8_0), (Q4_0, Q4_0), (Q8_0, Q4_0)] {
            for layers in [&[3][..], &[1, 2], &[0, 1, 2, 3]] {
                let error = check(&model, kinds, layers);
                println!("width {width}, {kinds:?}, layers {layers:?}: {error:.1e}");
                assert!(error < bound, "{width} {kinds:?} {layers:?}: {error}");
            }
        }
    }
    let small = load(&repository(TEXT));
    for kinds in [(Q8_0, Q8_0), (Q4_0, Q4_0)] {
        let error = check(&small, kinds, &[2, 5]);
        println!("small model, {kinds:?}: {error:.1e}");
        assert!(error < bound, "{kinds:?}: {error}");
    }
}

#[test]
fn scores_with_distances_instead_of_positions() {
    use CacheType::{F16, F32, Q8_0};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bloom.gguf");
    // A number of heads that is a power of two, and one that is not: their slopes differ.
    for n_head in [4, 6] {
        bloom(&path, 3, n_head);
        let model = load(&path);
        for kinds in [(F32, F32), (F16, F16), (Q8_0, Q8_0)] {
            for layers in [&[0][..], &[1, 2]] {
                let error = check(&model, kinds, layers);
                println!("{n_head} heads, {kinds:?}, layers {layers:?}: {error:.1e}");
                // The node gets keys that were rounded to F16, and the mask as well.
                let tolerance = if kinds.0 == F32 { 5e-3 } else { 1e-5 };
                let tolerance = precision::attention(tolerance);
                assert!(
                    error < tolerance.into(),
                    "{n_head} {kinds:?} {layers:?}: {error}"
                );
            }
        }
    }
}
