//! The evaluation callback: what it reads from a running graph, and nothing else.
//!
//! ggml's scheduler shows every node twice: before it is computed (`ask`; answering no costs
//! nothing and does not split the graph) and, if the answer was yes, after. Three kinds of node
//! matter here:
//!
//! - `SET_ROWS` into `cache_k_l0`: its index input says which cell each token of the micro-batch
//!   goes to. Known before the node runs, so it is read in the ask phase.
//! - every `SET_ROWS` into a cache tensor, once: the size of the tensor and of its buffer are the
//!   backend's own figures for KV memory.
//! - `kq_soft_max-<layer>`, `[n_kv, n_tokens, n_head, 1]` in F32: the attention weights, there
//!   only while flash attention is off.

use std::any::Any;
use std::ffi::CStr;

use llama_cpp_sys_2 as sys;

use crate::cache::Cell;
use crate::engine::{KvBytes, Observation};

const SCORES: &[u8] = b"kq_soft_max-";

/// State of the callback of one context. The context holds a pointer to it; both are used by one
/// thread at a time, the callback only inside `llama_decode`.
#[derive(Default)]
pub(super) struct Observer {
    /// Scoring layers, sorted; empty: no attention is read.
    layers: Vec<u32>,
    /// Query rows of the current batch, ascending.
    rows: Vec<u32>,
    /// Cell of each row of the current batch so far.
    cells: Vec<Cell>,
    /// Rows of `rows` that lie in the current micro-batch.
    here: std::ops::Range<usize>,
    /// First batch row of the current micro-batch.
    start: usize,
    /// `[here.len(), n_kv]`, mean over heads and scoring layers.
    acc: Vec<f32>,
    n_kv: usize,
    /// Scoring layers read in the current micro-batch.
    layers_read: usize,
    sum: Vec<f32>,
    max: Vec<f32>,
    scratch: Vec<f32>,
    indices: Vec<i64>,
    memory: Memory,
    failure: Option<String>,
    /// Of the callback: resumed when llama_decode has returned.
    pub panic: Option<Box<dyn Any + Send>>,
}

/// Figures of the cache's tensors, collected while the first graph runs.
#[derive(Default)]
struct Memory {
    complete: bool,
    tensors: Vec<*mut sys::ggml_tensor>,
    buffers: Vec<sys::ggml_backend_buffer_t>,
    tensor_bytes: u64,
    buffer_bytes: u64,
}

impl Observer {
    pub fn new(layers: Vec<u32>) -> Self {
        Observer {
            layers,
            ..Observer::default()
        }
    }

    /// Prepares for one batch; `rows` are the batch rows whose attention is wanted.
    pub fn begin(&mut self, rows: &[u32]) {
        self.rows.clear();
        if !self.layers.is_empty() {
            self.rows.extend_from_slice(rows);
        }
        self.cells.clear();
        self.here = 0..0;
        self.start = 0;
        self.n_kv = 0;
        self.layers_read = 0;
        self.sum.clear();
        self.max.clear();
        self.failure = None;
    }

    /// Ends the batch: hands out cells and attention, or says what went wrong.
    pub fn finish(&mut self, cells: &mut Vec<Cell>, seen: &mut Observation) -> Result<(), String> {
        if let Some(payload) = self.panic.take() {
            std::panic::resume_unwind(payload);
        }
        self.end_micro_batch();
        self.memory.complete |= !self.memory.tensors.is_empty();
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        cells.clear();
        cells.extend_from_slice(&self.cells);
        seen.clear();
        seen.sum.extend_from_slice(&self.sum);
        seen.max.extend_from_slice(&self.max);
        Ok(())
    }

    /// Bytes per cell and in buffers; zero before the first batch.
    pub fn kv_bytes(&self, n_cells: usize) -> KvBytes {
        KvBytes {
            per_cell: self.memory.tensor_bytes / (n_cells.max(1) as u64),
            allocated: self.memory.buffer_bytes,
        }
    }

    /// Adds the micro-batch's rows to the batch's sums and maxima. The maximum is taken over rows
    /// of the average over heads and layers, so it can only be formed when all layers are in.
    fn end_micro_batch(&mut self) {
        if self.here.is_empty() {
            return;
        }
        if self.layers_read != self.layers.len() && self.failure.is_none() {
            self.failure = Some(format!(
                "attention of {} of {} scoring layers appeared in the graph",
                self.layers_read,
                self.layers.len()
            ));
            return;
        }
        if self.sum.len() < self.n_kv {
            self.sum.resize(self.n_kv, 0.0);
            self.max.resize(self.n_kv, 0.0);
        }
        for row in self.acc.chunks_exact(self.n_kv) {
            for ((sum, max), &a) in self.sum.iter_mut().zip(&mut self.max).zip(row) {
                *sum += a;
                // `f32::max` would drop a NaN; the ledger has to see it.
                if a > *max || a.is_nan() {
                    *max = a;
                }
            }
        }
        self.here = 0..0;
    }

    fn begin_micro_batch(&mut self, n_tokens: usize) {
        self.end_micro_batch();
        self.start = self.cells.len();
        let end = self.start + n_tokens;
        let first = self.rows.partition_point(|&r| (r as usize) < self.start);
        let last = self.rows.partition_point(|&r| (r as usize) < end);
        self.here = first..last;
        self.layers_read = 0;
        self.n_kv = 0;
    }

    /// Before a node is computed: whether its result is wanted.
    ///
    /// # Safety
    /// `t` is a node of the graph that the scheduler is running, inputs set.
    pub unsafe fn ask(&mut self, t: &sys::ggml_tensor) -> bool {
        if t.op == sys::GGML_OP_SET_ROWS && !t.view_src.is_null() {
            // SAFETY: a view's source outlives the view.
            let target = unsafe { &*t.view_src };
            // Other SET_ROWS nodes write into the graph's own buffers.
            let cache =
                name(target).starts_with(b"cache_k_l") || name(target).starts_with(b"cache_v_l");
            if cache && !self.memory.complete {
                // SAFETY: as above.
                unsafe { self.memory.add(t.view_src) };
            }
            if name(target) == b"cache_k_l0" {
                // SAFETY: the caller's promise.
                unsafe { self.read_cells(t) };
            }
            return false;
        }
        !self.here.is_empty()
            && scored_layer(t).is_some_and(|il| self.layers.binary_search(&il).is_ok())
    }

    /// # Safety
    /// `t` is a `SET_ROWS` node whose inputs are set.
    unsafe fn read_cells(&mut self, t: &sys::ggml_tensor) {
        let index = t.src[1];
        if index.is_null() {
            self.failure = Some("the cache's SET_ROWS node has no index input".into());
            return;
        }
        // SAFETY: non-null source of a live node.
        let shape = unsafe { &*index };
        let n = usize::try_from(shape.ne[0]).unwrap_or(0);
        if shape.type_ != sys::GGML_TYPE_I64 || shape.ne[1..] != [1, 1, 1] {
            self.failure = Some(format!(
                "the cache's index input has shape {:?}, expected a vector of I64",
                shape.ne
            ));
            return;
        }
        self.begin_micro_batch(n);
        self.indices.resize(n, 0);
        // SAFETY: the buffer holds n values of 8 bytes, the tensor's exact size.
        unsafe {
            sys::ggml_backend_tensor_get(
                index,
                self.indices.as_mut_ptr().cast(),
                0,
                n * size_of::<i64>(),
            )
        };
        for &i in &self.indices {
            match Cell::try_from(i) {
                Ok(cell) => self.cells.push(cell),
                Err(_) => self.failure = Some(format!("cell index {i} is out of range")),
            }
        }
    }

    /// After a `kq_soft_max` node was computed: adds its query rows.
    ///
    /// # Safety
    /// `t` is a computed node of the running graph.
    pub unsafe fn read_scores(&mut self, t: &sys::ggml_tensor) {
        let [n_kv, n_tokens, n_head, n_stream] = t.ne.map(|n| usize::try_from(n).unwrap_or(0));
        if t.type_ != sys::GGML_TYPE_F32
            || n_stream != 1
            || t.nb[0] != size_of::<f32>()
            || n_head == 0
        {
            self.failure = Some(format!(
                "attention node has shape {:?}, expected F32 [n_kv, n_tokens, n_head, 1]",
                t.ne
            ));
            return;
        }
        let n_rows = self.here.len();
        if self.n_kv == 0 {
            self.n_kv = n_kv;
            self.acc.clear();
            self.acc.resize(n_rows * n_kv, 0.0);
        }
        let last = self.rows[self.here.end - 1] as usize - self.start;
        if self.n_kv != n_kv || last >= n_tokens {
            self.failure = Some(format!(
                "attention node has shape {:?}, which does not fit its micro-batch",
                t.ne
            ));
            return;
        }
        // SAFETY: a computed node has a buffer.
        let host = unsafe { sys::ggml_backend_buffer_is_host(t.buffer) };
        let weight = 1.0 / (n_head * self.layers.len()) as f32;
        self.scratch.resize(n_kv, 0.0);
        for (i, acc) in self.acc.chunks_exact_mut(n_kv).enumerate() {
            let row = self.rows[self.here.start + i] as usize - self.start;
            for head in 0..n_head {
                let offset = row * t.nb[1] + head * t.nb[2];
                let values: &[f32] = if host {
                    // SAFETY: row < ne[1] and head < ne[2], so the n_kv floats at this offset lie
                    // inside the tensor; host memory, aligned to f32 as all strides are.
                    unsafe {
                        std::slice::from_raw_parts(t.data.byte_add(offset).cast::<f32>(), n_kv)
                    }
                } else {
                    // SAFETY: as above; the scratch buffer holds n_kv floats.
                    unsafe {
                        sys::ggml_backend_tensor_get(
                            t,
                            self.scratch.as_mut_ptr().cast(),
                            offset,
                            n_kv * size_of::<f32>(),
                        )
                    };
                    &self.scratch
                };
                for (acc, &a) in acc.iter_mut().zip(values) {
                    *acc += a * weight;
                }
            }
        }
        self.layers_read += 1;
    }
}

impl Memory {
    /// # Safety
    /// `tensor` is a live cache tensor.
    unsafe fn add(&mut self, tensor: *mut sys::ggml_tensor) {
        if self.tensors.contains(&tensor) {
            return;
        }
        self.tensors.push(tensor);
        // SAFETY: the caller's promise; an allocated tensor has a buffer.
        unsafe {
            self.tensor_bytes += sys::ggml_nbytes(tensor) as u64;
            let buffer = (*tensor).buffer;
            if !buffer.is_null() && !self.buffers.contains(&buffer) {
                self.buffers.push(buffer);
                self.buffer_bytes += sys::ggml_backend_buffer_get_size(buffer) as u64;
            }
        }
    }
}

fn name(t: &sys::ggml_tensor) -> &[u8] {
    // SAFETY: ggml always terminates its fixed-size names.
    unsafe { CStr::from_ptr(t.name.as_ptr()) }.to_bytes()
}

/// The layer whose attention weights this node is.
fn scored_layer(t: &sys::ggml_tensor) -> Option<u32> {
    let digits = name(t).strip_prefix(SCORES)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}
