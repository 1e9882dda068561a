//! Attention of a few queries on the CPU, operation by operation, against the same in F64 over the
//! rows as the cache holds them. Llama.cpp's own way of doing it (`use_ref`) is the yardstick: ours
//! is no further off.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use hae::engine::scripted::hashed;
use half::f16;
use llama_cpp_sys_2 as sys;

use crate::taps_oracle::values;

use sys::{
    GGML_TYPE_F16 as F16, GGML_TYPE_F32 as F32, GGML_TYPE_Q4_0 as Q4_0, GGML_TYPE_Q8_0 as Q8_0,
};

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
    /// The largest slope of ALiBi, or 0.
    bias: f32,
    sinks: bool,
    /// Whether a query of a stream sees a cell.
    sees: fn(usize, usize, usize) -> bool,
}

/// Not of the order of cells: the same for a cell wherever it lies.
fn draw(what: u64, i: usize) -> f32 {
    (hashed(what, (i >> 16) as i32, (i & 0xffff) as i32) as f32).ln() / 3.0 + 1.0
}

fn all(_: usize, _: usize, _: usize) -> bool {
    true
}

/// Two thirds, the same for all.
fn holes(_: usize, _: usize, cell: usize) -> bool {
    !(cell * 7 % 11).is_multiple_of(3)
}

/// What came before, with holes.
fn causal(_: usize, query: usize, cell: usize) -> bool {
    cell < 500 + query && !cell.is_multiple_of(5)
}

/// Conversations side by side.
fn apart(stream: usize, query: usize, cell: usize) -> bool {
    cell % 4 == (query + stream) % 4
}

fn none(_: usize, _: usize, _: usize) -> bool {
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
            bias: 0.0,
            sinks: false,
            sees: holes,
        }
    }

    /// One value of a query.
    fn query(&self, stream: usize, head: usize, query: usize, i: usize) -> f32 {
        2.0 * draw(
            1,
            ((stream * 64 + query) * self.heads.0 + head) * self.width.0 + i,
        )
    }

    fn sink(&self, head: usize) -> f32 {
        3.0 * draw(4, head)
    }

    fn scale(&self) -> f32 {
        (self.width.0 as f32).sqrt().recip()
    }

    /// What the mask says, from the last query's place on.
    fn mask(&self, stream: usize, query: usize, cell: usize) -> f32 {
        match (self.sees)(stream, query, cell) {
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
    /// where the type has it.
    fn run_with(&self, reference: bool, of: fn(usize) -> usize) -> (Vec<f32>, Vec<f64>) {
        let (n_cells, n_queries) = (self.cells, self.queries);
        let seen = |stream, cell| (0..n_queries).any(|query| (self.sees)(stream, query, cell));
        let rows = |what: u64, width: usize, kind| {
            let row = width * self.heads.1;
            (0..self.streams * n_cells * row)
                .map(|i| match seen(i / row / n_cells, i / row % n_cells) {
                    false if kind == F16 || kind == F32 => f32::NAN,
                    _ => draw(what, of(i / row % n_cells) * row + i % row),
                })
                .collect::<Vec<f32>>()
        };
        let keys = rows(2, self.width.0, self.types.0);
        let values_ = rows(3, self.width.1, self.types.1);

        // SAFETY: tensors are filled within their sizes; the context outlives all that lies in it.
        unsafe {
            sys::ggml_cpu_init();
            let floats = keys.len() + values_.len() + 64 * n_cells * self.streams;
            let ctx = sys::ggml_init(sys::ggml_init_params {
                mem_size: 8 * floats + (16 << 20),
                mem_buffer: null_mut(),
                no_alloc: false,
            });
            let cache = |kind, width: usize, from: &[f32]| {
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
                    }
                }
                let nb = (*all).nb;
                let of_head = sys::ggml_row_size(kind, width as i64);
                sys::ggml_view_4d(
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
                )
            };
            let k = cache(self.types.0, self.width.0, &keys);
            let v = cache(self.types.1, self.width.1, &values_);
            let tensor = |kind, ne: [usize; 4]| {
                let [a, b, c, d] = ne.map(|n| n as i64);
                sys::ggml_new_tensor_4d(ctx, kind, a, b, c, d)
            };
            let q = tensor(F32, [self.width.0, n_queries, self.heads.0, self.streams]);
            let mut at = (*q).data.cast::<f32>();
            for stream in 0..self.streams {
                for head in 0..self.heads.0 {
                    for query in 0..n_queries {
                        for i in 0..self.width.0 {
                            *at = self.query(stream, head, query, i);
                            at = at.add(1);
                        }
                    }
                }
            }
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
            let mut plan = sys::ggml_graph_plan(graph, self.threads, null_mut());
            plan.use_ref = reference;
            let mut work = vec![0u64; plan.work_size / 8 + 1];
            plan.work_data = work.as_mut_ptr().cast();
            assert_eq!(
                sys::ggml_graph_compute(graph, &mut plan),
                sys::GGML_STATUS_SUCCESS
            );
            let n = self.streams * n_queries * self.heads.0 * self.width.1;
            let got = std::slice::from_raw_parts((*out).data.cast::<f32>(), n).to_vec();
            let want = self.in_f64((*k).data, (*v).data);
            sys::ggml_free(ctx);
            (got, want)
        }
    }

    /// # Safety
    /// The rows of keys and values of this call lie there.
    unsafe fn in_f64(&self, keys: *const c_void, rows: *const c_void) -> Vec<f64> {
        let mut out = Vec::new();
        let n_log2 = 1usize << self.heads.0.ilog2();
        for stream in 0..self.streams {
            for query in 0..self.queries {
                for head in 0..self.heads.0 {
                    let of = head / (self.heads.0 / self.heads.1);
                    // SAFETY: the caller's promise.
                    let row = |kind, data: *const c_void, width: usize, cell: usize| unsafe {
                        let of_head = sys::ggml_row_size(kind, width as i64);
                        let at = ((stream * self.cells + cell) * self.heads.1 + of) * of_head;
                        values(kind, data.cast::<u8>().add(at), width)
                    };
                    let slope = match head {
                        _ if self.bias == 0.0 => 1.0,
                        h if h < n_log2 => (-f64::from(self.bias) / n_log2 as f64)
                            .exp2()
                            .powi(h as i32 + 1),
                        h => (-f64::from(self.bias) / 2.0 / n_log2 as f64)
                            .exp2()
                            .powi(2 * (h - n_log2) as i32 + 1),
                    };
                    let cells = (0..self.cells).filter(|&cell| (self.sees)(stream, query, cell));
                    let logits: Vec<(usize, f64)> = cells
                        .map(|cell| {
                            let key = row(self.types.0, keys, self.width.0, cell);
                            let product = |(i, &x): (usize, &f32)| {
                                f64::from(x) * f64::from(self.query(stream, head, query, i))
                            };
                            let dot: f64 = key.iter().enumerate().map(product).sum();
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
                        for (acc, x) in
                            acc.iter_mut()
                                .zip(row(self.types.1, rows, self.width.1, cell))
                        {
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

/// Cells that lie together, and the same ones with others between them.
#[test]
fn hidden_cells_change_no_bit() {
    fn every_third(_: usize, _: usize, cell: usize) -> bool {
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
