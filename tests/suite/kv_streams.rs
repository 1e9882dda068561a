//! Caches of two sequences, which share cells or keep apart: llama.cpp driven by hand, beside a twin
//! that gets the same tokens, removals, copies and shifts, but no moves and no other size. And what
//! every function refuses.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use hae::engine::scripted::hashed;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use crate::fixture::{backend, load};
use crate::kv_graphs::{by_graph, compare_digests, graphs};
use crate::model::converted;
use crate::npz::max_abs_diff;
use crate::precision;
use crate::remake::Remake;

#[derive(Clone, Copy, Debug)]
struct Kind {
    /// Whether one sequence may take over the other's cells. Otherwise positions are shifted, which
    /// would move the other's too.
    shares: bool,
    flash: bool,
    /// Of K and V.
    types: (KvCacheType, KvCacheType),
    n_ctx: u32,
    kv_size: u32,
}

const F32: (KvCacheType, KvCacheType) = (KvCacheType::F32, KvCacheType::F32);
const F16: (KvCacheType, KvCacheType) = (KvCacheType::F16, KvCacheType::F16);
const Q8_0: (KvCacheType, KvCacheType) = (KvCacheType::Q8_0, KvCacheType::Q8_0);
const Q4_0: (KvCacheType, KvCacheType) = (KvCacheType::Q4_0, KvCacheType::Q4_0);

fn params(kind: Kind) -> LlamaContextParams {
    let mut params = LlamaContextParams::default()
        .with_n_ctx(std::num::NonZeroU32::new(kind.n_ctx))
        .with_n_batch(64)
        .with_n_ubatch(64)
        .with_n_seq_max(2)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(kind.types.0)
        .with_type_v(kind.types.1)
        .with_flash_attention_policy(i32::from(kind.flash));
    params.as_raw_mut().kv_unified = true;
    params.as_raw_mut().kv_size = kind.kv_size;
    params
}

fn context(model: &LlamaModel, kind: Kind) -> LlamaContext<'_> {
    model.new_context(backend(), params(kind)).unwrap()
}

fn memory(ctx: &mut LlamaContext<'_>) -> sys::llama_memory_t {
    // SAFETY: the context is alive.
    unsafe { sys::llama_get_memory(ctx.as_mut_ptr()) }
}

fn newest(ctx: &mut LlamaContext<'_>, seq: i32) -> i32 {
    // SAFETY: as above.
    unsafe { sys::llama_memory_seq_pos_max(memory(ctx), seq) }
}

/// Decodes tokens behind the sequence's newest; the last one's logits.
fn decode(ctx: &mut LlamaContext<'_>, seq: i32, tokens: &[i32]) -> Vec<f32> {
    let mut batch = LlamaBatch::new(64, 1);
    let start = newest(ctx, seq) + 1;
    for (i, &token) in tokens.iter().enumerate() {
        let last = i + 1 == tokens.len();
        batch
            .add(LlamaToken(token), start + i as i32, &[seq], last)
            .unwrap();
    }
    ctx.decode(&mut batch).unwrap();
    ctx.get_logits_ith(-1).to_vec()
}

fn cells(ctx: &mut LlamaContext<'_>) -> Vec<sys::llama_hae_cell> {
    let none = sys::llama_hae_cell {
        pos: 0,
        n_seq: 0,
        seq: 0,
    };
    // SAFETY: the array has room for as many cells as is said.
    unsafe {
        let n = sys::llama_hae_kv_size(ctx.as_mut_ptr());
        let mut out = vec![none; n as usize];
        let got = sys::llama_hae_kv_cells(ctx.as_mut_ptr(), out.as_mut_ptr(), n as u32);
        assert_eq!(got, n);
        out
    }
}

/// Used cells by what they say, and how often.
fn kinds(ctx: &mut LlamaContext<'_>) -> BTreeMap<(i32, i32, i32), usize> {
    let mut out = BTreeMap::new();
    for cell in cells(ctx) {
        if cell.pos >= 0 {
            *out.entry((cell.pos, cell.n_seq, cell.seq)).or_default() += 1;
        }
    }
    out
}

fn compact(ctx: &mut LlamaContext<'_>) -> i32 {
    let (mut from, mut to) = (vec![0; 1024], vec![0; 1024]);
    // SAFETY: both arrays have room for 1024 moves.
    unsafe { sys::llama_hae_kv_compact(ctx.as_mut_ptr(), from.as_mut_ptr(), to.as_mut_ptr(), 1024) }
}

fn resize(ctx: &mut LlamaContext<'_>, n: u32) -> i32 {
    // SAFETY: the context is alive.
    unsafe { sys::llama_hae_kv_resize(ctx.as_mut_ptr(), n) }
}

/// The small model without the factor on cos and sin: llama.cpp's shift of K multiplies every cell
/// with it once more each time, so that one shift of two steps would differ from two of one.
fn shiftable() -> LlamaModel {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    let mut file = Remake::read(converted("f32").0);
    file.set_f32("phi3.rope.scaling.attn_factor", 1.0);
    file.write(&path);
    load(&path)
}

/// Every cell, and K and V of those in use. What a row says of its place is left out:
/// llama.cpp's own states do not hold all of it.
fn contents(ctx: &mut LlamaContext<'_>, hasher: &mut DefaultHasher) {
    const PLACE: usize = 16;
    let map = cells(ctx);
    let mut used = Vec::new();
    for (cell, at) in map.iter().zip(0u32..) {
        (cell.pos, cell.n_seq, cell.seq).hash(hasher);
        if cell.pos >= 0 {
            used.push(at);
        }
    }
    // SAFETY: as many cells as are said, and as many bytes as their rows have.
    unsafe {
        let size = sys::llama_hae_kv_rows_size(ctx.as_mut_ptr()) as usize;
        let mut rows = vec![0u8; size * used.len()];
        let data = rows.as_mut_ptr().cast();
        let n = used.len() as u32;
        let got = sys::llama_hae_kv_rows_get(ctx.as_mut_ptr(), used.as_ptr(), n, data, rows.len());
        assert_eq!(got, n as i32);
        for row in rows.chunks(size) {
            row[PLACE..].hash(hasher);
        }
    }
}

/// Random steps on two contexts: the largest difference of logits, and what they leave in the first.
fn walk(model: &LlamaModel, kind: Kind, seed: u64) -> (f32, u64) {
    let before = if by_graph() { graphs() } else { 0 };
    let mut ctx = context(model, kind);
    let twin_kind = Kind { kv_size: 0, ..kind };
    let mut twin = context(model, twin_kind);
    let n_max = kind.n_ctx;
    let mut draws = 0;
    let mut draw = |n: i32| {
        draws += 1;
        // The uniform number that it was made from.
        let share = 1.0 + hashed(seed, draws, 0).ln() / 6.0;
        (share * f64::from(n)) as i32 % n
    };
    let mut worst = 0.0f32;
    for step in 0..150 {
        let seq = draw(2);
        match draw(10) {
            0..4 => {
                let n = 1 + draw(24);
                let tokens: Vec<i32> = (0..n).map(|_| 3 + draw(900)).collect();
                let free =
                    |ctx: &mut LlamaContext<'_>| cells(ctx).iter().filter(|c| c.pos < 0).count();
                if free(&mut ctx) < n as usize
                    && (resize(&mut ctx, n_max) < 0 || free(&mut ctx) < n as usize)
                {
                    continue;
                }
                let ours = decode(&mut ctx, seq, &tokens);
                let theirs = decode(&mut twin, seq, &tokens);
                worst = worst.max(max_abs_diff(&ours, &theirs));
            }
            4..6 => {
                let newest = newest(&mut ctx, seq);
                let start = draw(newest.max(1));
                let end = (start + 1 + draw(20)).min(newest);
                for ctx in [&mut ctx, &mut twin] {
                    // SAFETY: a range of positions, start >= 0.
                    unsafe {
                        if start < end {
                            sys::llama_memory_seq_rm(memory(ctx), seq, start, end);
                        }
                    }
                }
                // Now and then the rest moves up, which turns K of all of them at the next decode,
                // or before the next compaction.
                if draw(3) == 0 && start < end && !kind.shares {
                    for ctx in [&mut ctx, &mut twin] {
                        // SAFETY: as above.
                        unsafe {
                            sys::llama_memory_seq_add(memory(ctx), seq, end, -1, start - end);
                        }
                    }
                }
            }
            6 if kind.shares => {
                for ctx in [&mut ctx, &mut twin] {
                    // SAFETY: the whole of one sequence becomes the other's.
                    unsafe {
                        sys::llama_memory_seq_rm(memory(ctx), 1 - seq, -1, -1);
                        sys::llama_memory_seq_cp(memory(ctx), seq, 1 - seq, -1, -1);
                    }
                }
            }
            6..9 => {
                assert!(compact(&mut ctx) >= 0);
                let map = cells(&mut ctx);
                let used = map.iter().filter(|c| c.pos >= 0).count();
                assert!(map[used..].iter().all(|c| c.pos < 0), "step {step}");
            }
            _ => {
                let n = 256 * (1 + draw(n_max as i32 / 256)) as u32;
                let map = cells(&mut ctx);
                let needed = map.iter().rposition(|c| c.pos >= 0).map_or(0, |i| i + 1);
                let fits = needed <= n as usize;
                let got = resize(&mut ctx, n);
                let expected = if fits {
                    n as i32
                } else {
                    sys::LLAMA_HAE_KV_NO_ROOM
                };
                assert_eq!(got, expected, "step {step}");
            }
        }
        assert_eq!(kinds(&mut ctx), kinds(&mut twin), "step {step}");
    }
    assert!(!by_graph() || graphs() > before, "no graph moved a cell");
    let mut hasher = DefaultHasher::new();
    contents(&mut ctx, &mut hasher);
    (worst, hasher.finish())
}

/// Two sequences that share cells.
fn together(flash: bool, types: (KvCacheType, KvCacheType)) -> Kind {
    Kind {
        shares: true,
        flash,
        types,
        n_ctx: 1024,
        kv_size: 256,
    }
}

/// Two sequences that keep apart.
fn apart(flash: bool, types: (KvCacheType, KvCacheType), kv_size: u32) -> Kind {
    Kind {
        shares: false,
        n_ctx: 2048,
        kv_size,
        ..together(flash, types)
    }
}

fn check(model: &LlamaModel, kind: Kind, seed: u64) {
    let (worst, _) = walk(model, kind, seed);
    println!("{kind:?}: {worst:.1e}");
    let tolerance = match kind.types.0 {
        KvCacheType::F32 if !kind.flash => precision::logits(1e-4),
        // With flash attention llama.cpp casts an F32 cache to F16.
        KvCacheType::F32 | KvCacheType::F16 => 1e-1,
        _ => 1.0,
    };
    assert!(worst < tolerance, "{kind:?}: {worst}");
}

#[test]
fn two_sequences_that_share_cells() {
    let model = shiftable();
    for (flash, types, seed) in [
        (false, F32, 1),
        (true, F32, 2),
        (false, F16, 3),
        (true, Q8_0, 4),
        (true, Q4_0, 9),
    ] {
        check(&model, together(flash, types), seed);
    }
}

#[test]
fn two_sequences_apart() {
    let model = shiftable();
    for (flash, types, kv_size, seed) in [
        (false, F32, 256, 5),
        (true, F16, 256, 6),
        (false, F16, 0, 7),
        (true, F32, 0, 8),
        (true, Q8_0, 256, 10),
        (true, Q4_0, 0, 11),
    ] {
        check(&model, apart(flash, types, kv_size), seed);
    }
}

#[test]
fn graphs_and_copies_leave_the_same_bits() {
    let model = shiftable();
    let mut ours = Vec::new();
    for (flash, types) in [
        (false, F32),
        (true, F16),
        (false, F16),
        (true, Q8_0),
        (true, Q4_0),
    ] {
        for kind in [together(flash, types), apart(flash, types, 256)] {
            let (_, digest) = walk(&model, kind, 21);
            ours.push(format!("{kind:?} {digest:016x}"));
        }
    }
    compare_digests("kv_streams::graphs_and_copies_leave_the_same_bits", &ours);
}

#[test]
fn mistakes_are_refused() {
    let (text, _) = converted("f32");
    let model = load(text);
    let kind = Kind {
        kv_size: 300,
        ..together(true, F32)
    };
    let mut context = context(&model, kind);
    decode(&mut context, 0, &[5; 40]);
    let map = kinds(&mut context);
    let ctx = context.as_mut_ptr();
    let (mut a, mut b) = ([0u32; 4], [0u32; 4]);
    let (pa, pb) = (a.as_mut_ptr(), b.as_mut_ptr());
    let null: *mut u32 = std::ptr::null_mut();
    let nothing = std::ptr::null_mut();
    use sys::{
        LLAMA_HAE_KV_ARGUMENT as ARGUMENT, LLAMA_HAE_KV_NO_ROOM as NO_ROOM,
        LLAMA_HAE_KV_PRESENT as PRESENT, LLAMA_HAE_KV_UNSUPPORTED as UNSUPPORTED,
    };
    // SAFETY: every array has as many elements as is said, or is null with the claim that it has
    // some, which has to be refused before it is touched.
    unsafe {
        assert_eq!(sys::llama_hae_kv_size(ctx), 512, "rounded up");
        assert_eq!(sys::llama_hae_kv_size(nothing), UNSUPPORTED);
        assert_eq!(
            sys::llama_hae_kv_bytes(nothing, null.cast()),
            i64::from(UNSUPPORTED)
        );
        assert_eq!(sys::llama_hae_kv_cells(ctx, null.cast(), 1), ARGUMENT);
        assert_eq!(sys::llama_hae_kv_cells(ctx, null.cast(), 0), 512);
        assert_eq!(sys::llama_hae_kv_batch_cells(ctx, null, 1), ARGUMENT);
        assert_eq!(sys::llama_hae_kv_batch_cells(ctx, pa, 4), 40);
        assert_eq!(a, [0, 1, 2, 3]);
        assert_eq!(sys::llama_hae_kv_compact(ctx, null, null, 0), 0);
        for n in [0, 1025, u32::MAX] {
            assert_eq!(sys::llama_hae_kv_resize(ctx, n), ARGUMENT);
        }
        let size = sys::llama_hae_kv_rows_size(ctx) as usize;
        assert_eq!(size, 16 + 6 * 2 * 256 * 4);
        let mut row = vec![0u8; size];
        let data = row.as_mut_ptr().cast();
        for (cell, bytes) in [
            (7, size - 1),
            (7, 0),
            (40, size),
            (512, size),
            (u32::MAX, size),
        ] {
            let got = sys::llama_hae_kv_rows_get(ctx, &raw const cell, 1, data, bytes);
            assert_eq!(got, ARGUMENT, "cell {cell}, {bytes} bytes");
        }
        assert_eq!(
            sys::llama_hae_kv_rows_get(ctx, null, 1, data, size),
            ARGUMENT
        );
        let cell = 7;
        assert_eq!(
            sys::llama_hae_kv_rows_get(ctx, &raw const cell, 1, data, size),
            1
        );
        let put = |seq, pos: i32| {
            let mut to = 0;
            sys::llama_hae_kv_rows_set(ctx, seq, &raw const pos, 1, data, size, &raw mut to)
        };
        assert_eq!(put(0, 7), PRESENT);
        for (seq, pos) in [(0, 8), (0, -1), (2, 7), (-1, 7), (i32::MAX, 7)] {
            assert_eq!(put(seq, pos), ARGUMENT, "sequence {seq}, position {pos}");
        }
        assert_eq!(put(1, 7), 1, "the other sequence has it not");
        sys::llama_memory_seq_rm(sys::llama_get_memory(ctx), 1, -1, -1);

        // Two rows of one position.
        let twice = [row.clone(), row.clone()].concat();
        let positions = [7, 7];
        let got = sys::llama_hae_kv_rows_set(
            ctx,
            1,
            positions.as_ptr(),
            2,
            twice.as_ptr().cast(),
            twice.len(),
            pa,
        );
        assert_eq!(got, PRESENT);

        // No place for what the moves were.
        sys::llama_memory_seq_rm(sys::llama_get_memory(ctx), 0, 3, 9);
        assert_eq!(sys::llama_hae_kv_compact(ctx, pa, pb, 4), NO_ROOM);
        assert_eq!(sys::llama_hae_kv_compact(ctx, null, null, 4), NO_ROOM);
        assert_eq!(sys::llama_hae_kv_compact(ctx, null, null, 6), ARGUMENT);
    }
    let mut left = map;
    left.retain(|&(pos, ..), _| !(3..9).contains(&pos));
    assert_eq!(kinds(&mut context), left);
}

/// A stream for each sequence: no function takes such a cache, and none begins small.
#[test]
fn several_streams_are_refused() {
    use sys::LLAMA_HAE_KV_UNSUPPORTED as UNSUPPORTED;
    let model = shiftable();
    let mut params = params(together(true, F32));
    params.as_raw_mut().kv_unified = false;
    assert!(model.new_context(backend(), params.clone()).is_err());
    params.as_raw_mut().kv_size = 0;
    let mut context = model.new_context(backend(), params.clone()).unwrap();
    decode(&mut context, 0, &[5; 40]);
    let mut other = model.new_context(backend(), params).unwrap();
    decode(&mut other, 0, &[5; 40]);
    let (ctx, other) = (context.as_mut_ptr(), other.as_mut_ptr());
    let (mut a, mut b) = ([0u32; 4], [0u32; 4]);
    let (pa, pb) = (a.as_mut_ptr(), b.as_mut_ptr());
    let mut row = [0u8; 16];
    let data = row.as_mut_ptr().cast();
    let null: *mut u32 = std::ptr::null_mut();
    // SAFETY: every array has as many elements as is said.
    unsafe {
        assert_eq!(sys::llama_hae_kv_size(ctx), UNSUPPORTED);
        let unsupported = i64::from(UNSUPPORTED);
        assert_eq!(sys::llama_hae_kv_bytes(ctx, null.cast()), unsupported);
        assert_eq!(sys::llama_hae_kv_cells(ctx, null.cast(), 0), UNSUPPORTED);
        assert_eq!(sys::llama_hae_kv_batch_cells(ctx, pa, 4), UNSUPPORTED);
        assert_eq!(sys::llama_hae_kv_compact(ctx, pa, pb, 4), UNSUPPORTED);
        assert_eq!(sys::llama_hae_kv_resize(ctx, 256), UNSUPPORTED);
        assert_eq!(sys::llama_hae_kv_rows_size(ctx), unsupported);
        let got = sys::llama_hae_kv_rows_get(ctx, pa, 1, data, 16);
        assert_eq!(got, UNSUPPORTED);
        let got = sys::llama_hae_kv_rows_set(ctx, 0, pa.cast(), 1, data, 16, pb);
        assert_eq!(got, UNSUPPORTED);
        let got = sys::llama_hae_layers_from(ctx, other, pa, 1);
        assert_eq!(got, sys::LLAMA_HAE_LAYERS_ERR_ARGUMENT);
    }
}
