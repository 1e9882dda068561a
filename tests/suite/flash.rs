//! Attention on the CPU, operation by operation, against the same in F64 over the rows as the cache
//! holds them (the patches `small-products-in-registers`, `flash-attention-tiles-of-all-types` and
//! `flash-attention-of-a-few-queries`). For a few queries llama.cpp's own way of doing it (`use_ref`)
//! is the yardstick: ours is no further off. One query goes through NVIDIA GPUs as well
//! (`flash-attention-of-one-query-on-cuda`).

use std::f64::consts::TAU;
use std::ffi::CStr;
use std::ptr::{null, null_mut};

use hae::engine::scripted::hashed;
use half::f16;
use llama_cpp_sys_2 as sys;

use sys::{
    GGML_TYPE_BF16 as BF16, GGML_TYPE_F16 as F16, GGML_TYPE_F32 as F32, GGML_TYPE_Q4_0 as Q4_0,
    GGML_TYPE_Q5_1 as Q5_1, GGML_TYPE_Q8_0 as Q8_0,
};

/// Whether a query of a stream sees a cell.
type Sees = fn(&Call, usize, usize, usize) -> bool;

/// One call of attention.
#[derive(Clone)]
struct Call {
    /// Width of a key and of a value.
    width: (usize, usize),
    /// Heads of queries, and of keys and values.
    heads: (usize, usize),
    cells: usize,
    queries: usize,
    streams: usize,
    types: (sys::ggml_type, sys::ggml_type),
    threads: i32,
    /// How far logits spread: their standard deviation.
    spread: f32,
    /// The largest slope of ALiBi, or 0.
    bias: f32,
    sinks: bool,
    sees: Sees,
}

/// Normal, and not of the order of cells: the same for a cell wherever it lies.
fn draw(what: u64, i: usize) -> f32 {
    let uniform = |what| hashed(what, (i >> 16) as i32, (i & 0xffff) as i32).ln() / 6.0 + 1.0;
    let (a, b) = (uniform(what).max(1e-12), uniform(what + 100));
    ((-2.0 * a.ln()).sqrt() * (TAU * b).cos()) as f32
}

fn all(_: &Call, _: usize, _: usize, _: usize) -> bool {
    true
}

/// Two thirds, the same for all.
fn holes(_: &Call, _: usize, _: usize, cell: usize) -> bool {
    !(cell * 7 % 11).is_multiple_of(3)
}

/// What came before, with holes.
fn causal(_: &Call, _: usize, query: usize, cell: usize) -> bool {
    cell < 500 + query && !cell.is_multiple_of(5)
}

/// The last rows see all but some, those before them less.
fn prompt(call: &Call, _: usize, query: usize, cell: usize) -> bool {
    cell + call.queries <= call.cells + query && cell % 7 != 3
}

/// Conversations side by side.
fn apart(_: &Call, stream: usize, query: usize, cell: usize) -> bool {
    cell % 4 == (query + stream) % 4
}

fn none(_: &Call, _: usize, _: usize, _: usize) -> bool {
    false
}

impl Call {
    fn new(width: usize, kind: sys::ggml_type) -> Call {
        Call {
            width: (width, width),
            heads: (4, 4),
            cells: 600,
            queries: 1,
            streams: 1,
            types: (kind, kind),
            threads: 2,
            spread: 2.0,
            bias: 0.0,
            sinks: false,
            sees: holes,
        }
    }

    /// `[streams][heads][queries][width]`
    fn queries(&self) -> Vec<f32> {
        let n = self.streams * self.heads.0 * self.queries * self.width.0;
        (0..n).map(|i| draw(1, i)).collect()
    }

    fn sink(&self, head: usize) -> f32 {
        3.0 * draw(4, head)
    }

    fn scale(&self) -> f32 {
        self.spread / (self.width.0 as f32).sqrt()
    }

    /// What the mask says, from the last query's place on.
    fn mask(&self, stream: usize, query: usize, cell: usize) -> f32 {
        match (self.sees)(self, stream, query, cell) {
            false => f32::NEG_INFINITY,
            true if self.bias > 0.0 => (cell as f32 - self.cells as f32) / 64.0,
            true => 0.0,
        }
    }

    /// `[streams][queries][heads][width]`, and what F64 says of the same rows.
    fn run(&self, reference: bool) -> (Vec<f32>, Vec<f64>) {
        self.run_with(reference, |cell| cell)
    }

    /// As above; `of`: which cell's key and value lie in a cell. Hidden cells hold what is no number,
    /// where the type has it and queries are few: tiles read all cells.
    fn run_with(&self, reference: bool, of: fn(usize) -> usize) -> (Vec<f32>, Vec<f64>) {
        self.run_by(of, &|graph| {
            // SAFETY: the plan's memory lives until the end of the call.
            unsafe {
                let mut plan = sys::ggml_graph_plan(graph, self.threads, null_mut());
                plan.use_ref = reference;
                let mut work = vec![0u64; plan.work_size / 8 + 1];
                plan.work_data = work.as_mut_ptr().cast();
                let status = sys::ggml_graph_compute(graph, &mut plan);
                assert_eq!(status, sys::GGML_STATUS_SUCCESS);
                let out = sys::ggml_graph_node(graph, -1);
                let n = usize::try_from(sys::ggml_nelements(out)).unwrap();
                std::slice::from_raw_parts((*out).data.cast::<f32>(), n).to_vec()
            }
        })
    }

    /// By a device; `None` where it does not have this.
    fn run_on(&self, device: sys::ggml_backend_dev_t) -> Option<(Vec<f32>, Vec<f64>)> {
        let (got, want) = self.run_by(|cell| cell, &|graph| {
            // SAFETY: the copy lies on the backend, and both are given back.
            unsafe {
                let op = sys::ggml_graph_node(graph, -1);
                if !sys::ggml_backend_dev_supports_op(device, op) {
                    return Vec::new();
                }
                let backend = sys::ggml_backend_dev_init(device, null());
                assert!(!backend.is_null());
                let copy = sys::ggml_backend_graph_copy(backend, graph);
                let status = sys::ggml_backend_graph_compute(backend, copy.graph);
                assert_eq!(status, sys::GGML_STATUS_SUCCESS);
                let out = sys::ggml_graph_node(copy.graph, -1);
                let mut got = vec![0f32; usize::try_from(sys::ggml_nelements(out)).unwrap()];
                sys::ggml_backend_tensor_get(out, got.as_mut_ptr().cast(), 0, 4 * got.len());
                sys::ggml_backend_graph_copy_free(copy);
                sys::ggml_backend_free(backend);
                got
            }
        });
        (!got.is_empty()).then_some((got, want))
    }

    fn run_by(
        &self,
        of: fn(usize) -> usize,
        compute: &dyn Fn(*mut sys::ggml_cgraph) -> Vec<f32>,
    ) -> (Vec<f32>, Vec<f64>) {
        let (n_cells, n_queries) = (self.cells, self.queries);
        let seen =
            |stream, cell| (0..n_queries).any(|query| (self.sees)(self, stream, query, cell));
        let rows = |what: u64, width: usize, kind| {
            let row = width * self.heads.1;
            (0..self.streams * n_cells * row)
                .map(|i| match seen(i / row / n_cells, i / row % n_cells) {
                    false if n_queries < 64 && (kind == F16 || kind == F32) => f32::NAN,
                    _ => draw(what, of(i / row % n_cells) * row + i % row),
                })
                .collect::<Vec<f32>>()
        };
        let queries = self.queries();
        let keys = rows(2, self.width.0, self.types.0);
        let values = rows(3, self.width.1, self.types.1);

        // SAFETY: tensors are filled within their sizes; the context outlives all that lies in it.
        unsafe {
            sys::ggml_cpu_init();
            let floats = queries.len() + keys.len() + values.len() + 64 * n_cells * self.streams;
            let ctx = sys::ggml_init(sys::ggml_init_params {
                mem_size: 8 * floats + (16 << 20),
                mem_buffer: null_mut(),
                no_alloc: false,
            });
            // The view of a layer, and what lies in it as numbers.
            let cache = |kind, width: usize, from: &[f32]| {
                let mut read = from.to_vec();
                let row = (width * self.heads.1) as i64;
                let all =
                    sys::ggml_new_tensor_3d(ctx, kind, row, n_cells as i64, self.streams as i64);
                match kind {
                    F32 => {
                        std::ptr::copy_nonoverlapping(from.as_ptr(), (*all).data.cast(), from.len())
                    }
                    _ => {
                        let n = (self.streams * n_cells) as i64;
                        sys::ggml_quantize_chunk(
                            kind,
                            from.as_ptr(),
                            (*all).data,
                            0,
                            n,
                            row,
                            null(),
                        );
                        let to_float = (*sys::ggml_get_type_traits(kind)).to_float.unwrap();
                        to_float((*all).data, read.as_mut_ptr(), from.len() as i64);
                    }
                }
                let nb = (*all).nb;
                let of_head = sys::ggml_row_size(kind, width as i64);
                let view = sys::ggml_view_4d(
                    ctx,
                    all,
                    width as i64,
                    n_cells as i64,
                    self.heads.1 as i64,
                    self.streams as i64,
                    nb[1],
                    of_head,
                    nb[2],
                    0,
                );
                (view, read)
            };
            let (k, keys) = cache(self.types.0, self.width.0, &keys);
            let (v, values) = cache(self.types.1, self.width.1, &values);
            let tensor = |kind, ne: [usize; 4]| {
                let [a, b, c, d] = ne.map(|n| n as i64);
                sys::ggml_new_tensor_4d(ctx, kind, a, b, c, d)
            };
            let q = tensor(F32, [self.width.0, n_queries, self.heads.0, self.streams]);
            std::ptr::copy_nonoverlapping(queries.as_ptr(), (*q).data.cast(), queries.len());
            let mask = tensor(F16, [n_cells, n_queries, 1, self.streams]);
            let mut at = (*mask).data.cast::<u16>();
            for stream in 0..self.streams {
                for query in 0..n_queries {
                    for cell in 0..n_cells {
                        *at = f16::from_f32(self.mask(stream, query, cell)).to_bits();
                        at = at.add(1);
                    }
                }
            }
            let out = sys::ggml_flash_attn_ext(ctx, q, k, v, mask, self.scale(), self.bias, 0.0);
            sys::ggml_prec_set_acc(out, sys::GGML_PREC_F32);
            if self.sinks {
                let sinks = tensor(F32, [self.heads.0, 1, 1, 1]);
                for head in 0..self.heads.0 {
                    *(*sinks).data.cast::<f32>().add(head) = self.sink(head);
                }
                sys::ggml_flash_attn_ext_add_sinks(out, sinks);
            }
            let graph = sys::ggml_new_graph(ctx);
            sys::ggml_build_forward_expand(graph, out);
            // What copies a graph to a device asks each tensor for its buffer.
            let memory = sys::ggml_get_mem_buffer(ctx);
            let buffer = sys::ggml_backend_cpu_buffer_from_ptr(memory, sys::ggml_get_mem_size(ctx));
            let mut tensor = sys::ggml_get_first_tensor(ctx);
            while !tensor.is_null() {
                (*tensor).buffer = buffer;
                tensor = sys::ggml_get_next_tensor(ctx, tensor);
            }
            let got = compute(graph);
            let want = self.in_f64(&queries, &keys, &values);
            sys::ggml_backend_buffer_free(buffer);
            sys::ggml_free(ctx);
            (got, want)
        }
    }

    /// Keys and values: `[streams][cells][heads][width]`.
    fn in_f64(&self, queries: &[f32], keys: &[f32], values: &[f32]) -> Vec<f64> {
        let mut out = Vec::new();
        let n_log2 = 1usize << self.heads.0.ilog2();
        for stream in 0..self.streams {
            for query in 0..self.queries {
                for head in 0..self.heads.0 {
                    let at = (stream * self.heads.0 + head) * self.queries + query;
                    let own = &queries[at * self.width.0..][..self.width.0];
                    let of = head / (self.heads.0 / self.heads.1);
                    let at = |cell: usize| (stream * self.cells + cell) * self.heads.1 + of;
                    let key = |cell: usize| &keys[at(cell) * self.width.0..][..self.width.0];
                    let value = |cell: usize| &values[at(cell) * self.width.1..][..self.width.1];
                    let slope = match head {
                        _ if self.bias == 0.0 => 1.0,
                        h if h < n_log2 => (-f64::from(self.bias) / n_log2 as f64)
                            .exp2()
                            .powi(h as i32 + 1),
                        h => (-f64::from(self.bias) / 2.0 / n_log2 as f64)
                            .exp2()
                            .powi(2 * (h - n_log2) as i32 + 1),
                    };
                    let cells =
                        (0..self.cells).filter(|&cell| (self.sees)(self, stream, query, cell));
                    let logits: Vec<(usize, f64)> = cells
                        .map(|cell| {
                            let products = key(cell).iter().zip(own);
                            let dot: f64 =
                                products.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
                            let bias = f16::from_f32(self.mask(stream, query, cell)).to_f64();
                            (cell, dot * f64::from(self.scale()) + slope * bias)
                        })
                        .collect();
                    let sink = if self.sinks {
                        f64::from(self.sink(head))
                    } else {
                        f64::NEG_INFINITY
                    };
                    let most = logits.iter().map(|&(_, x)| x).fold(sink, f64::max);
                    let mut sum = if self.sinks { (sink - most).exp() } else { 0.0 };
                    let mut acc = vec![0.0; self.width.1];
                    for (cell, x) in logits {
                        let w = (x - most).exp();
                        sum += w;
                        for (acc, &x) in acc.iter_mut().zip(value(cell)) {
                            *acc += w * f64::from(x);
                        }
                    }
                    out.extend(acc.iter().map(|x| if sum == 0.0 { 0.0 } else { x / sum }));
                }
            }
        }
        out
    }
}

/// The root of the mean square of what lies between.
fn rms(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum: f64 = got
        .iter()
        .zip(want)
        .map(|(&a, b)| (f64::from(a) - b).powi(2))
        .sum();
    (sum / got.len() as f64).sqrt()
}

#[test]
fn it_is_no_further_from_f64_than_llama_cpps_own() {
    let mut calls = Vec::new();
    for kind in [F32, F16, Q8_0, Q4_0] {
        for width in [32, 64, 96, 128, 256] {
            calls.push(Call::new(width, kind));
        }
    }
    let call = Call::new(96, F16);
    let mixed = Call {
        heads: (9, 3),
        types: (F16, Q8_0),
        ..Call::new(64, F16)
    };
    calls.extend([
        Call {
            threads: 1,
            ..call.clone()
        },
        Call {
            threads: 16,
            cells: 17,
            sees: all,
            ..call.clone()
        },
        Call {
            queries: 5,
            threads: 3,
            sinks: true,
            sees: causal,
            ..call.clone()
        },
        Call {
            queries: 63,
            sees: causal,
            ..call.clone()
        },
        Call {
            queries: 8,
            sees: apart,
            streams: 2,
            ..call.clone()
        },
        Call {
            streams: 3,
            heads: (8, 2),
            ..Call::new(128, F16)
        },
        mixed.clone(),
        Call {
            queries: 7,
            types: (Q8_0, Q4_0),
            sees: causal,
            ..mixed.clone()
        },
        Call {
            queries: 16,
            bias: 8.0,
            sinks: true,
            types: (F16, F16),
            sees: causal,
            ..mixed
        },
        Call {
            heads: (28, 4),
            queries: 2,
            bias: 8.0,
            threads: 4,
            ..Call::new(128, Q4_0)
        },
        Call {
            width: (192, 128),
            queries: 3,
            sees: all,
            ..call.clone()
        },
        Call {
            width: (576, 512),
            heads: (16, 1),
            ..call
        },
    ]);
    for (i, call) in calls.iter().enumerate() {
        let (own, want) = call.run(false);
        let (theirs, _) = call.run(true);
        let (own, theirs) = (rms(&own, &want), rms(&theirs, &want));
        // Sums of F32 in two orders.
        assert!(
            own <= 1.05 * theirs + 3e-7,
            "{i}: {own:e}, llama.cpp's own {theirs:e}"
        );
        // Keys of eight bits and less are multiplied with queries of eight.
        let bound = if matches!(call.types.0, Q8_0 | Q4_0) {
            2e-2
        } else {
            2e-6
        };
        let bound = if cfg!(target_arch = "x86_64") {
            bound
        } else {
            1e-2
        };
        assert!(own < bound, "{i}: {own:e}");
    }
}

/// Whether it is the processor, or an NVIDIA GPU. Others have kernels of their own, which round as they do.
fn is_ours(device: sys::ggml_backend_dev_t) -> bool {
    // SAFETY: the registry's name is a C string that lives as long as the process.
    let name = unsafe {
        let registry = sys::ggml_backend_dev_backend_reg(device);
        CStr::from_ptr(sys::ggml_backend_reg_name(registry))
    };
    matches!(name.to_bytes(), b"CPU" | b"CUDA")
}

/// One query on the processor and on every NVIDIA GPU.
#[test]
fn devices_attend_as_in_f64() {
    let mut calls = Vec::new();
    for kind in [F16, Q8_0, Q4_0] {
        for (width, cells) in [(32, 17), (96, 256), (96, 5000), (160, 600), (224, 300)] {
            let call = Call {
                width: (width, width),
                cells,
                ..Call::new(width, kind)
            };
            calls.push(call.clone());
            calls.push(Call {
                heads: (32, 32),
                sees: all,
                ..call.clone()
            });
            calls.push(Call {
                heads: (9, 3),
                streams: 3,
                sees: apart,
                ..call.clone()
            });
            calls.push(Call { sees: none, ..call });
        }
    }
    // SAFETY: devices are there as long as the process is.
    let devices = unsafe {
        sys::ggml_backend_load_all();
        (0..sys::ggml_backend_dev_count()).map(|i| sys::ggml_backend_dev_get(i))
    };
    let devices: Vec<_> = devices.filter(|&device| is_ours(device)).collect();
    assert!(!devices.is_empty());
    for device in devices {
        // SAFETY: as above.
        let is_cpu =
            unsafe { sys::ggml_backend_dev_type(device) } == sys::GGML_BACKEND_DEVICE_TYPE_CPU;
        for (i, call) in calls.iter().enumerate() {
            let Some((got, want)) = call.run_on(device) else {
                // Heads of 96 are Phi-3.5's.
                assert_ne!(call.width.0, 96, "{i}");
                continue;
            };
            let apart = rms(&got, &want);
            // A processor rounds the query to eight bits, as it always did.
            let rounds = is_cpu && matches!(call.types.0, Q8_0 | Q4_0);
            let bound = if rounds { 2e-2 } else { 2e-6 };
            let bound = if is_cpu && !cfg!(target_arch = "x86_64") {
                1e-2
            } else {
                bound
            };
            assert!(apart < bound, "{i}: {apart:e}, processor: {is_cpu}");
        }
    }
}

/// Cells that lie together, and the same ones with others between them.
#[test]
fn hidden_cells_change_no_bit() {
    fn every_third(_: &Call, _: usize, _: usize, cell: usize) -> bool {
        cell.is_multiple_of(3)
    }
    for (kind, threads) in [(F16, 1), (F16, 2), (F32, 3), (Q8_0, 2), (Q4_0, 2)] {
        let together = Call {
            cells: 500,
            threads,
            sees: all,
            ..Call::new(96, kind)
        };
        let scattered = Call {
            cells: 1500,
            sees: every_third,
            ..together.clone()
        };
        let (a, _) = together.run(false);
        let (b, _) = scattered.run_with(false, |cell| cell / 3);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(a, b, "{kind} {threads}");
        } else {
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3));
        }
    }
}

#[test]
fn where_nothing_is_in_view_there_is_nothing() {
    for queries in [1, 5] {
        let (got, _) = Call {
            queries,
            sees: none,
            ..Call::new(64, F16)
        }
        .run(false);
        assert!(got.iter().all(|&x| x == 0.0), "{got:?}");
    }
}

/// How far the two are apart at most.
fn furthest(call: &Call) -> f64 {
    let (got, want) = call.run(false);
    let apart = got
        .iter()
        .zip(&want)
        .map(|(&a, b)| (f64::from(a) - b).abs());
    apart.fold(0.0, f64::max)
}

/// What sums in F32 may be apart, of values between -3 and 3.
const BOUND: f64 = 3e-5;

const TYPES: [(sys::ggml_type, sys::ggml_type); 7] = [
    (F32, F32),
    (F16, F16),
    (BF16, BF16),
    (Q8_0, Q8_0),
    (Q4_0, Q4_0),
    (Q5_1, Q8_0),
    (F16, Q4_0),
];

/// A prompt behind some cells: logits spread far.
fn prompt_of(queries: usize, types: (sys::ggml_type, sys::ggml_type)) -> Call {
    Call {
        heads: (4, 2),
        cells: 150,
        queries,
        types,
        spread: 4.0,
        sees: prompt,
        ..Call::new(96, types.0)
    }
}

/// Prompts: whatever the cache's type, nothing is rounded to it but what lies in it.
#[test]
fn prompts_attend_as_in_f64() {
    for types in TYPES {
        for (rows, heads, kv_heads, cells, d) in [
            (64, 2, 2, 256, 96),
            (71, 4, 2, 200, 64),
            (130, 2, 1, 131, 128),
        ] {
            for threads in [1, 3] {
                let error = furthest(&Call {
                    width: (d, d),
                    heads: (heads, kv_heads),
                    cells,
                    threads,
                    ..prompt_of(rows, types)
                });
                assert!(error < BOUND, "{types:?} {rows}x{cells}: {error:.1e}");
            }
        }
    }
}

/// Few rows: neither F16's sums nor queries of eight bits where a cache is quantized.
#[test]
fn short_prompts_over_quantized_caches_attend_as_in_f64() {
    for types in TYPES.into_iter().skip(2) {
        for rows in [8, 9, 33] {
            let error = furthest(&prompt_of(rows, types));
            assert!(error < BOUND, "{types:?} {rows}: {error:.1e}");
        }
    }
}

/// Beside fewer rows llama.cpp rounds queries, and so do we: this shows that the bounds above tell one from
/// the other.
#[test]
fn single_rows_round_queries_to_eight_bits() {
    let error = furthest(&prompt_of(2, (Q8_0, Q8_0)));
    assert!((10.0 * BOUND..3e-1).contains(&error), "{error:.1e}");
}
