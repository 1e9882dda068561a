//! Main memory: whether the machine can hold a cache, and that a smaller one gives some back.
//!
//! llama.cpp asks the system for it and writes zeros, and a system that promises more than it has
//! then ends the process instead of refusing.

use llama_cpp_sys_2 as sys;

use super::Model;
use super::cache_type::CacheType;
use crate::error::{Error, Result};

/// Whether blocks of main memory go back to the system as soon as they are freed.
///
/// glibc takes large blocks from the system one by one and gives them back at once, but with each such
/// block that is freed it raises what counts as large to the block's own size, up to 32 MiB. After that
/// a layer of a cache comes from the heap and stays in it: a process that had shrunk its cache kept
/// all of the memory. Taking every large block one by one, on the other hand, costs the pages of a
/// batch of embeddings anew for each batch. So caches are made with a small limit, and everything else
/// with the one that glibc would have reached by itself.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set_large(bytes: i32) {
    // SAFETY: sets numbers of the allocator; glibc takes its own locks.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * HEAP_UP_TO);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set_large(_: i32) {}

/// The most that glibc raises its limit to.
const HEAP_UP_TO: i32 = 32 << 20;

/// Sets what counts as a large block, before anything is allocated.
pub(super) fn set_up() {
    set_large(HEAP_UP_TO);
}

/// While it lives, buffers are made that go back to the system as soon as they are freed.
pub(super) struct OwnBlocks(());

impl OwnBlocks {
    pub fn new() -> Self {
        set_large(1 << 20);
        OwnBlocks(())
    }
}

impl Drop for OwnBlocks {
    fn drop(&mut self) {
        set_large(HEAP_UP_TO);
    }
}

/// Refuses a cache in main memory that would leave no room for the rest.
///
/// # Errors
/// [`Error::Option`] naming `-c`.
pub(super) fn check(
    model: &Model,
    n_layer: u32,
    n_ctx: u32,
    k: CacheType,
    v: CacheType,
) -> Result<()> {
    // Layers on a GPU have their cells there; windows and recurrent layers need fewer.
    if model.may_use_gpu() || model.eviction_obstacle().is_some() {
        return Ok(());
    }
    match total_memory() {
        Some(total) => fits(n_ctx, bytes_per_cell(model, n_layer, k, v), total),
        None => Ok(()),
    }
}

/// A fifth is left for the weights, the graphs and everybody else.
fn fits(n_ctx: u32, per_cell: u64, total: u64) -> Result<()> {
    let most = total / 5 * 4 / per_cell.max(1);
    if u64::from(n_ctx) <= most {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(Error::option(
        "n_ctx",
        format!(
            "{n_ctx} cells take {:.1} of the machine's {:.1} GiB, expected at most {most}",
            gib(per_cell.saturating_mul(n_ctx.into())),
            gib(total)
        ),
    ))
}

/// Bytes of one cell over so many layers, as if every layer had as many heads as the first.
fn bytes_per_cell(model: &Model, n_layer: u32, k: CacheType, v: CacheType) -> u64 {
    let model_ptr = model.inner.as_ptr();
    // SAFETY: the pointer is valid while the model lives; both types are known to ggml.
    unsafe {
        let heads = i64::from(sys::llama_model_n_head(model_ptr)).max(1);
        let kv_heads = i64::from(sys::llama_model_n_head_kv(model_ptr)).max(1);
        let width = i64::from(sys::llama_model_n_embd(model_ptr)).max(1) / heads * kv_heads;
        let row = |kind: CacheType| sys::ggml_row_size(kind.raw().into(), width) as u64;
        (row(k) + row(v)).saturating_mul(n_layer.into())
    }
}

/// Whether a reason of llama.cpp's or ggml's says that memory was refused. Both speak of memory in
/// other senses, too: a memory slot is a cell, a memory module is the cache.
pub(super) fn was_refused(reason: &str) -> bool {
    let refusals = [
        "not enough memory",
        "insufficient memory",
        "out of memory",
        "no memory",
        "alloc",
    ];
    let reason = reason.to_lowercase();
    refusals.iter().any(|words| reason.contains(words))
}

/// llama.cpp's reason for a failure; if memory was refused, what for, and which options need less.
pub(super) fn explained(reason: String, what: &str, smaller: &str) -> String {
    match was_refused(&reason) {
        true => refusal(&reason, what, smaller),
        false => reason,
    }
}

fn refusal(reason: &str, what: &str, smaller: &str) -> String {
    format!("not enough memory for {what}: give {smaller} ({reason})")
}

/// As [`explained`], for what this program would allocate itself.
///
/// # Errors
/// [`Error::Llama`] where there is no room for `n` more values.
pub(super) fn reserve<T>(
    values: &mut Vec<T>,
    n: usize,
    call: &'static str,
    what: &str,
    smaller: &str,
) -> Result<()> {
    values.try_reserve_exact(n).map_err(|_| {
        let bytes = n.saturating_mul(size_of::<T>());
        let bytes = format!("{bytes} bytes of memory");
        Error::llama(call, refusal(&bytes, what, smaller))
    })
}

/// All of the machine's main memory, if ggml knows.
fn total_memory() -> Option<u64> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the CPU is always registered once the backend is; both numbers are live variables.
    unsafe {
        let cpu = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if cpu.is_null() {
            return None;
        }
        sys::ggml_backend_dev_memory(cpu, &raw mut free, &raw mut total);
    }
    (total > 0).then_some(total as u64)
}

#[cfg(test)]
mod tests {
    use super::{explained, fits};

    #[test]
    fn a_cache_larger_than_the_machine_is_refused() {
        assert!(fits(1 << 20, 6144, 8 << 30).is_ok());
        let error = fits(1 << 24, 6144, 24 << 30).unwrap_err().to_string();
        assert_eq!(
            error,
            "`n_ctx`: 16777216 cells take 96.0 of the machine's 24.0 GiB, expected at most 3355443"
        );
        assert!(fits(u32::MAX, u64::MAX, u64::MAX - 1).is_err());
    }

    #[test]
    fn a_lack_of_memory_says_what_needs_less() {
        let text = |reason: &str| explained(reason.to_owned(), "a picture", "a smaller one");
        for reason in [
            "not enough memory",
            "failed to allocate graph",
            "std::bad_alloc",
        ] {
            let expected =
                format!("not enough memory for a picture: give a smaller one ({reason})");
            assert_eq!(text(reason), expected);
        }
        for reason in [
            "no such layer",
            "failed to find a memory slot for batch of size 8",
            "failed to initialize memory module",
        ] {
            assert_eq!(text(reason), reason);
        }
    }
}
