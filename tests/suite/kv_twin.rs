//! A cache in which nothing is ever removed, moved or resized: llama.cpp by hand, with a second
//! sequence to which evicted tokens change over. The first one's attention does not see them there,
//! and a token that comes back from host memory changes back, with the bits that it had.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::ptr::NonNull;

use hae::attend::{Kind, Lookup};
use hae::cache::Pos;
use hae::engine::{Batch, Input};
use hae::llama::{CacheType, ContextOptions, FlashAttention};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
pub use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use crate::fixture::backend;

const SEEN: i32 = 0;
const HIDDEN: i32 = 1;

/// As many as go in during a whole conversation, and not more than the short rope factors reach.
const N_CTX: u32 = 4096;

pub struct Twin<'m> {
    ctx: LlamaContext<'m>,
    /// The same, for calls that only read it.
    raw: NonNull<sys::llama_context>,
    n_vocab: usize,
}

impl<'m> Twin<'m> {
    pub fn new(model: &'m LlamaModel, like: &ContextOptions) -> Self {
        let raw = |kind| match kind {
            CacheType::F32 => KvCacheType::F32,
            CacheType::F16 => KvCacheType::F16,
            CacheType::Q8_0 => KvCacheType::Q8_0,
            other => panic!("{other:?}"),
        };
        let flash = like.flash_attention == FlashAttention::On;
        let mut params = LlamaContextParams::default()
            .with_n_ctx(std::num::NonZeroU32::new(N_CTX))
            .with_n_batch(like.n_batch)
            .with_n_ubatch(like.n_ubatch)
            .with_n_seq_max(2)
            .with_n_threads(like.n_threads)
            .with_n_threads_batch(like.n_threads_batch)
            .with_type_k(raw(like.type_k))
            .with_type_v(raw(like.type_v))
            .with_flash_attention_policy(i32::from(flash));
        params.as_raw_mut().kv_unified = true;
        let mut ctx = model.new_context(backend(), params).unwrap();
        if !like.attend.is_whole() {
            let params = sys::llama_hae_attend_params {
                first_layer: like.attend.first_layer,
                keep_sets: true,
                plain_ops: like.plain_lookups,
            };
            // SAFETY: the context is alive, the parameters live during the call.
            let code = unsafe { sys::llama_hae_attend_set(ctx.as_mut_ptr(), &raw const params) };
            assert_eq!(code, 0);
        }
        Twin {
            raw: NonNull::new(ctx.as_mut_ptr()).unwrap(),
            ctx,
            n_vocab: model.n_vocab() as usize,
        }
    }

    pub fn decode(&mut self, batch: Batch<'_>) {
        let n = batch.input.len();
        // Evicted tokens that are computed again.
        for &pos in batch.pos {
            self.remove(HIDDEN, pos..pos + 1);
        }
        let (token, embd) = match batch.input {
            Input::Tokens(tokens) => (tokens.as_ptr().cast_mut(), std::ptr::null_mut()),
            Input::Embeddings { data, .. } => (std::ptr::null_mut(), data.as_ptr().cast_mut()),
            Input::Trial(_) => panic!("the twin has no trial runs"),
        };
        let mut pos = batch.pos.to_vec();
        let mut seq = SEEN;
        let mut n_seq = vec![1; n];
        let mut seqs = vec![&raw mut seq; n];
        let mut logits = vec![0i8; n];
        logits[n - 1] = batch.logits.into();
        let raw = sys::llama_batch {
            n_tokens: n as i32,
            token,
            embd,
            pos: pos.as_mut_ptr(),
            n_seq_id: n_seq.as_mut_ptr(),
            seq_id: seqs.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        // SAFETY: every array has as many elements as the batch says and outlives the call, which
        // only reads them.
        let status = unsafe { sys::llama_decode(self.ctx.as_mut_ptr(), raw) };
        assert_eq!(status, 0);
    }

    /// Lets the next token look up what `lookup` says of cells that hold these positions.
    pub fn look_up(&mut self, lookup: &Lookup, positions: &[Option<Pos>]) {
        let own = self.cells();
        let mut kinds = vec![Kind::Always; N_CTX as usize];
        for (kind, pos) in lookup.kinds.iter().zip(positions) {
            if let Some(cell) = pos.and_then(|pos| own.get(&pos)) {
                kinds[*cell] = *kind;
            }
        }
        // SAFETY: the context is alive; the kinds are bytes, as many as said.
        let code = unsafe {
            sys::llama_hae_attend_cells(
                self.raw.as_ptr(),
                kinds.as_ptr().cast(),
                kinds.len(),
                lookup.n_vision as i32,
                lookup.n_text as i32,
            )
        };
        assert_eq!(code, 0);
    }

    /// The positions that a layer attended to in the last step.
    pub fn looked_up(&self, layer: u32) -> BTreeSet<Pos> {
        let mut cells = vec![0; N_CTX as usize];
        // SAFETY: the context is alive, the array has room for as many cells as is said.
        let n = unsafe {
            sys::llama_hae_attend_read(self.raw.as_ptr(), layer, cells.as_mut_ptr(), cells.len())
        };
        let chosen = &cells[..usize::try_from(n).unwrap()];
        let held = self.cells();
        let positions: BTreeMap<usize, Pos> =
            held.iter().map(|(&pos, &cell)| (cell, pos)).collect();
        chosen
            .iter()
            .map(|&cell| positions[&(cell as usize)])
            .collect()
    }

    pub fn logits(&self) -> &[f32] {
        &self.ctx.get_logits_ith(-1)[..self.n_vocab]
    }

    /// Evicted: attention no longer sees these.
    pub fn hide(&mut self, range: Range<Pos>) {
        self.copy(SEEN, HIDDEN, range.clone());
        self.remove(SEEN, range);
    }

    /// Back from host memory.
    pub fn show(&mut self, pos: Pos) {
        self.copy(HIDDEN, SEEN, pos..pos + 1);
        self.remove(HIDDEN, pos..pos + 1);
    }

    /// A prompt that is taken back.
    pub fn forget_from(&mut self, from: Pos) {
        self.remove(SEEN, from..Pos::MAX);
        self.remove(HIDDEN, from..Pos::MAX);
    }

    /// The positions that attention sees, and their cells.
    pub fn cells(&self) -> BTreeMap<Pos, usize> {
        let empty = sys::llama_hae_cell {
            pos: -1,
            n_seq: 0,
            seq: -1,
        };
        let mut cells = vec![empty; N_CTX as usize];
        // SAFETY: the context is alive, the array has room for as many cells as is said.
        let n = unsafe { sys::llama_hae_kv_cells(self.raw.as_ptr(), cells.as_mut_ptr(), N_CTX) };
        assert_eq!(n, N_CTX as i32);
        let seen = cells.iter().zip(0..).filter(|(cell, _)| cell.seq == SEEN);
        seen.map(|(cell, at)| (cell.pos, at)).collect()
    }

    fn copy(&mut self, from: i32, to: i32, range: Range<Pos>) {
        // SAFETY: the context is alive; positions are not negative.
        unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
            sys::llama_memory_seq_cp(memory, from, to, range.start, range.end);
        }
    }

    fn remove(&mut self, seq: i32, range: Range<Pos>) {
        // SAFETY: as above.
        unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
            sys::llama_memory_seq_rm(memory, seq, range.start, range.end);
        }
    }
}
