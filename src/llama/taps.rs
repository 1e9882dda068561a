//! Attention scores out of llama.cpp's graph: nodes beside the attention of a layer, with flash
//! attention on or off (the patch `score-taps`). Two numbers for each cell leave the device.
//!
//! They are sums over the query rows of a sequence. Cells of the other sequences are masked for
//! these rows, and show 0.

use llama_cpp_2::context::LlamaContext;
use llama_cpp_sys_2 as sys;

use super::{log, memory};
use crate::engine::Part;
use crate::error::{Error, Result};

/// Where attention scores come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoreSource {
    /// The graph sums them up itself.
    #[default]
    Graph,
    /// The evaluation callback reads the attention weights of every head, which exist only while
    /// flash attention is off.
    Callback,
}

/// The error behind a negative code of the call.
fn reason(call: &'static str, code: i32) -> Error {
    let text = match code {
        sys::LLAMA_HAE_TAPS_ERR_ARGUMENT => "no such layer or row".to_owned(),
        sys::LLAMA_HAE_TAPS_ERR_MEMORY => {
            "the attention of this model's memory cannot be read".to_owned()
        }
        sys::LLAMA_HAE_TAPS_ERR_NOTHING => {
            "attention of the scoring layers did not appear in the graph".to_owned()
        }
        sys::LLAMA_HAE_TAPS_ERR_FAILED => memory::explained(
            log::take_reason("no memory for the larger graph"),
            "attention scores",
            "a smaller `n_ubatch` or `n_ctx`, or fewer `score_layers`",
        ),
        code => format!("status {code}"),
    };
    Error::llama(call, text)
}

/// Rows to make buffers for when a batch asks for so many: few steps, since each of them makes
/// all buffers of the graph anew.
pub(super) fn rows_for(n: u32, n_ubatch: usize) -> u32 {
    const WINDOW: u32 = 64;
    let most = u32::try_from(n_ubatch).unwrap_or(u32::MAX);
    if n <= WINDOW { WINDOW.min(most) } else { most }
}

/// Taps these layers from now on, for at most so many rows of a batch, which are returned.
pub(super) fn set(ctx: &mut LlamaContext<'_>, layers: &[u32], max_rows: u32) -> Result<u32> {
    let call = "llama_hae_taps_set";
    let layers: Vec<i32> = layers
        .iter()
        // A layer that no i32 names does not exist: -1 is refused.
        .map(|&il| i32::try_from(il).unwrap_or(-1))
        .collect();
    log::forget();
    // SAFETY: the context is alive, the pointer is to as many values as said.
    let code = unsafe {
        sys::llama_hae_taps_set(ctx.as_mut_ptr(), layers.as_ptr(), layers.len(), max_rows)
    };
    match code {
        0 => Ok(max_rows),
        code => Err(reason(call, code)),
    }
}

/// Whether the sums of each layer are read as well; before [`set`].
pub(super) fn by_layer(ctx: &mut LlamaContext<'_>, on: bool) -> Result<()> {
    // SAFETY: the context is alive.
    match unsafe { sys::llama_hae_taps_by_layer(ctx.as_mut_ptr(), on) } {
        0 => Ok(()),
        code => Err(reason("llama_hae_taps_by_layer", code)),
    }
}

/// Asks for the rows of the batch that comes next, which is one micro-batch. `ends`: for each part
/// that has some, how many there are up to its last.
pub(super) fn begin(ctx: &mut LlamaContext<'_>, rows: &[u32], ends: &[i32]) -> Result<()> {
    let call = "llama_hae_taps_rows";
    // SAFETY: the context is alive, the pointer is to as many values as said. A row beyond
    // i32 becomes negative, which is refused as not ascending.
    let code =
        unsafe { sys::llama_hae_taps_rows(ctx.as_mut_ptr(), rows.as_ptr().cast(), rows.len()) };
    if code != 0 {
        return Err(reason(call, code));
    }
    if ends.len() < 2 {
        // Without groups the rows are one.
        return Ok(());
    }
    // SAFETY: the context is alive, the pointer is to as many values as said.
    let code = unsafe { sys::llama_hae_taps_groups(ctx.as_mut_ptr(), ends.as_ptr(), ends.len()) };
    match code {
        0 => Ok(()),
        code => Err(reason("llama_hae_taps_groups", code)),
    }
}

/// Waits for the batch and takes the scores of all cells in view, for each of the `n_asked` parts
/// that have query rows.
pub(super) fn read(
    ctx: &mut LlamaContext<'_>,
    n_asked: usize,
    parts: &mut [Part<'_>],
) -> Result<()> {
    let call = "llama_hae_taps_read";
    let count = |code: i32| usize::try_from(code).map_err(|_| reason(call, code));
    let none = std::ptr::null_mut();
    // SAFETY: the context is alive; without buffers it only says how many cells are in view.
    let n = count(unsafe { sys::llama_hae_taps_read(ctx.as_mut_ptr(), none, none, 0) })?;
    let asked = parts.iter_mut().filter(|p| !p.batch.queries.is_empty());
    let mut asked = asked.map(|part| &mut *part.seen);
    let Some(first) = asked.next() else {
        return Ok(());
    };
    // The first one's buffers hold those of all meanwhile.
    let all = n.saturating_mul(n_asked);
    first.sum.resize(all, 0.0);
    first.max.resize(all, 0.0);
    let (sum, max) = (first.sum.as_mut_ptr(), first.max.as_mut_ptr());
    // SAFETY: the context is alive, both buffers hold as many values as said.
    count(unsafe { sys::llama_hae_taps_read(ctx.as_mut_ptr(), sum, max, all) })?;
    let scores = first.sum.chunks(n.max(1)).zip(first.max.chunks(n.max(1)));
    for (seen, (sum, max)) in asked.zip(scores.skip(1)) {
        seen.sum.extend_from_slice(sum);
        seen.max.extend_from_slice(max);
    }
    first.sum.truncate(n);
    first.max.truncate(n);
    Ok(())
}

/// The same for the sums of each of the `n_layers` by itself.
pub(super) fn read_layers(
    ctx: &mut LlamaContext<'_>,
    n_layers: usize,
    n_asked: usize,
    parts: &mut [Part<'_>],
) -> Result<()> {
    let Some(n) = parts.iter().map(|part| part.seen.sum.len()).max() else {
        return Ok(());
    };
    let mut all = vec![0.0f32; n.saturating_mul(n_asked).saturating_mul(n_layers)];
    // SAFETY: the context is alive, the buffer holds as many values as said.
    let code =
        unsafe { sys::llama_hae_taps_read_layers(ctx.as_mut_ptr(), all.as_mut_ptr(), all.len()) };
    if usize::try_from(code).ok() != Some(n) {
        return Err(reason("llama_hae_taps_read_layers", code));
    }
    let asked = parts.iter_mut().filter(|p| !p.batch.queries.is_empty());
    for (group, part) in asked.enumerate() {
        let of_group = all.chunks_exact(n.max(1)).skip(group).step_by(n_asked);
        of_group.for_each(|sums| part.seen.layers.extend_from_slice(sums));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::rows_for;

    #[test]
    fn buffers_for_query_rows_grow_in_two_steps() {
        assert_eq!([2, 33, 64].map(|n| rows_for(n, 512)), [64, 64, 64]);
        assert_eq!([65, 512].map(|n| rows_for(n, 512)), [512, 512]);
        assert_eq!([2, 7].map(|n| rows_for(n, 7)), [7, 7]);
    }
}
