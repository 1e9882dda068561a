//! The CPU's flash attention over every type of cache, against attention in f64 over the same values (the
//! patches `small-products-in-registers` and `flash-attention-tiles-of-all-types`).

use std::ptr::null_mut;

use llama_cpp_sys_2 as sys;

use super::CacheType;
use crate::noise::Noise;

/// Rows of queries, heads, heads of K and V, and so on.
struct Shape {
    rows: usize,
    heads: usize,
    kv_heads: usize,
    cells: usize,
    d: usize,
}

/// A ggml context that goes with it.
struct Graph(*mut sys::ggml_context);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by ggml_init(), and nothing of it is used any more.
        unsafe { sys::ggml_free(self.0) };
    }
}

/// Values of a type near the given ones, as bytes in `out` and as what they say.
fn stored(values: &[f32], width: usize, kind: CacheType, out: *mut u8) -> Vec<f32> {
    let kind = kind.raw().into();
    let mut read = values.to_vec();
    // SAFETY: `out` has room for so many values of the type; rows are whole blocks.
    unsafe {
        if kind == sys::GGML_TYPE_F32 {
            out.cast::<f32>()
                .copy_from_nonoverlapping(values.as_ptr(), values.len());
            return read;
        }
        let rows = (values.len() / width) as i64;
        sys::ggml_quantize_chunk(
            kind,
            values.as_ptr(),
            out.cast(),
            0,
            rows,
            width as i64,
            std::ptr::null(),
        );
        let to_float = (*sys::ggml_get_type_traits(kind)).to_float.unwrap();
        to_float(out.cast(), read.as_mut_ptr(), values.len() as i64);
    }
    read
}

/// How far ggml's attention is from the same in f64: the largest difference, in units of the values'.
fn error(shape: &Shape, type_k: CacheType, type_v: CacheType, threads: i32) -> f64 {
    let &Shape {
        rows,
        heads,
        kv_heads,
        cells,
        d,
    } = shape;
    let mut noise = Noise::new(1 + rows as u64);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| noise.normal()).collect() };
    let (q, k, v) = (
        random(d * rows * heads),
        random(d * kv_heads * cells),
        random(d * kv_heads * cells),
    );
    // The last rows see all, those before them less.
    let sees = |row: usize, cell: usize| cell + rows <= cells + row && cell % 7 != 3;
    let scale = 4.0 / (d as f32).sqrt();
    let n = |n: usize| n as i64;

    // SAFETY: the context has room for all of it, each tensor is written within its size, and read after the graph ran.
    let (out, k, v) = unsafe {
        let params = sys::ggml_init_params {
            mem_size: 64 << 20,
            mem_buffer: null_mut(),
            no_alloc: false,
        };
        let graph = Graph(sys::ggml_init(params));
        let ctx = graph.0;
        let tensor = |kind, a, b, c| sys::ggml_new_tensor_3d(ctx, kind, n(a), n(b), n(c));
        let bytes = |t| sys::ggml_get_data(t).cast::<u8>();
        let tq = tensor(sys::GGML_TYPE_F32, d, rows, heads);
        stored(&q, d, CacheType::F32, bytes(tq));
        let [(tk, k), (tv, v)] = [(k, type_k), (v, type_v)].map(|(values, kind)| {
            let t = tensor(kind.raw().into(), d, kv_heads, cells);
            let read = stored(&values, d, kind, bytes(t));
            (sys::ggml_permute(ctx, t, 0, 2, 1, 3), read)
        });
        let mask = tensor(sys::GGML_TYPE_F16, cells, rows, 1);
        let values = bytes(mask).cast::<sys::ggml_fp16_t>();
        for i in 0..cells * rows {
            let value = match sees(i / cells, i % cells) {
                true => 0.0,
                false => f32::NEG_INFINITY,
            };
            *values.add(i) = sys::ggml_fp32_to_fp16(value);
        }
        let out = sys::ggml_flash_attn_ext(ctx, tq, tk, tv, mask, scale, 0.0, 0.0);
        let nodes = sys::ggml_new_graph(ctx);
        sys::ggml_build_forward_expand(nodes, out);
        sys::ggml_graph_compute_with_ctx(ctx, nodes, threads);
        let out = std::slice::from_raw_parts(bytes(out).cast::<f32>(), d * rows * heads);
        (out.to_vec(), k, v)
    };

    let mut most = 0.0_f64;
    for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        let own = &q[(head * rows + row) * d..][..d];
        let of = |values: &[f32], cell: usize| -> Vec<f64> {
            let at = (cell * kv_heads + head / (heads / kv_heads)) * d;
            values[at..at + d].iter().map(|&x| x.into()).collect()
        };
        let logit = |cell: usize| -> f64 {
            let products = of(&k, cell).into_iter().zip(own);
            products.map(|(x, &y)| x * f64::from(y)).sum::<f64>() * f64::from(scale)
        };
        let seen: Vec<_> = (0..cells).filter(|&cell| sees(row, cell)).collect();
        let weights: Vec<f64> = seen.iter().map(|&cell| logit(cell).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut expected = vec![0.0; d];
        for (&cell, weight) in seen.iter().zip(&weights) {
            for (e, x) in expected.iter_mut().zip(of(&v, cell)) {
                *e += weight / sum * x;
            }
        }
        let got = &out[(row * heads + head) * d..][..d];
        for (e, &x) in expected.iter().zip(got) {
            most = most.max((e - f64::from(x)).abs());
        }
    }
    most
}

/// What sums in F32 may be apart, of values between -3 and 3.
const BOUND: f64 = 3e-5;

const TYPES: [(CacheType, CacheType); 7] = [
    (CacheType::F32, CacheType::F32),
    (CacheType::F16, CacheType::F16),
    (CacheType::Bf16, CacheType::Bf16),
    (CacheType::Q8_0, CacheType::Q8_0),
    (CacheType::Q4_0, CacheType::Q4_0),
    (CacheType::Q5_1, CacheType::Q8_0),
    (CacheType::F16, CacheType::Q4_0),
];

/// Prompts: whatever the cache's type, nothing is rounded to it but what lies in it.
#[test]
fn prompts_attend_as_in_f64() {
    for (type_k, type_v) in TYPES {
        for (rows, heads, kv_heads, cells, d) in [
            (64, 2, 2, 256, 96),
            (71, 4, 2, 200, 64),
            (130, 2, 1, 131, 128),
        ] {
            let shape = Shape {
                rows,
                heads,
                kv_heads,
                cells,
                d,
            };
            for threads in [1, 3] {
                let error = error(&shape, type_k, type_v, threads);
                assert!(
                    error < BOUND,
                    "{type_k:?} {type_v:?} {rows}x{cells}: {error:.1e}"
                );
            }
        }
    }
}

/// Few rows: neither F16's sums nor queries of eight bits where a cache is quantized.
#[test]
fn short_prompts_over_quantized_caches_attend_as_in_f64() {
    for (type_k, type_v) in TYPES.into_iter().skip(2) {
        for rows in [8, 9, 33] {
            let shape = Shape {
                rows,
                heads: 4,
                kv_heads: 2,
                cells: 150,
                d: 96,
            };
            let error = error(&shape, type_k, type_v, 2);
            assert!(error < BOUND, "{type_k:?} {type_v:?} {rows}: {error:.1e}");
        }
    }
}

/// Single rows are llama.cpp's own way: this shows that the bounds above tell one from the other.
#[test]
fn single_rows_round_queries_to_eight_bits() {
    let shape = Shape {
        rows: 2,
        heads: 4,
        kv_heads: 2,
        cells: 150,
        d: 96,
    };
    let error = error(&shape, CacheType::Q8_0, CacheType::Q8_0, 2);
    assert!((10.0 * BOUND..3e-1).contains(&error), "{error:.1e}");
}
