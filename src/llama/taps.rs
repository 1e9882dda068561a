//! Attention scores out of llama.cpp's graph: nodes beside the attention of a layer, with flash
//! attention on or off (the patch `score-taps`). Two numbers for each cell leave the device.

/// Where attention scores come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoreSource {
    /// The graph sums them up itself.
    #[cfg(feature = "kv-patches")]
    #[default]
    Graph,
    /// The evaluation callback reads the attention weights of every head, which exist only while
    /// flash attention is off.
    #[cfg_attr(not(feature = "kv-patches"), default)]
    Callback,
}

#[cfg(feature = "kv-patches")]
pub(super) use patched::{begin, read, tapped};

#[cfg(feature = "kv-patches")]
mod patched {
    use llama_cpp_2::context::LlamaContext;
    use llama_cpp_sys_2 as sys;

    use crate::engine::Observation;
    use crate::error::{Error, Result};

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
            sys::LLAMA_HAE_TAPS_ERR_FAILED => "no memory for the larger graph".to_owned(),
            code => format!("status {code}"),
        };
        Error::llama(call, text)
    }

    /// The context with these layers tapped from now on.
    pub(in crate::llama) fn tapped<'m>(
        mut ctx: LlamaContext<'m>,
        layers: &[u32],
    ) -> Result<LlamaContext<'m>> {
        let call = "llama_hae_taps_set";
        let layers: Vec<i32> = layers
            .iter()
            // A layer that no i32 names does not exist: -1 is refused.
            .map(|&il| i32::try_from(il).unwrap_or(-1))
            .collect();
        // SAFETY: the context is alive, the pointer is to as many values as said.
        let code =
            unsafe { sys::llama_hae_taps_set(ctx.as_mut_ptr(), layers.as_ptr(), layers.len()) };
        if code == 0 {
            Ok(ctx)
        } else {
            Err(reason(call, code))
        }
    }

    /// Asks for the rows of the batch that comes next, which is one micro-batch.
    pub(in crate::llama) fn begin(ctx: &mut LlamaContext<'_>, rows: &[u32]) -> Result<()> {
        let call = "llama_hae_taps_rows";
        // SAFETY: the context is alive, the pointer is to as many values as said. A row beyond
        // i32 becomes negative, which is refused as not ascending.
        let code =
            unsafe { sys::llama_hae_taps_rows(ctx.as_mut_ptr(), rows.as_ptr().cast(), rows.len()) };
        if code == 0 {
            Ok(())
        } else {
            Err(reason(call, code))
        }
    }

    /// Waits for the batch and takes the scores of all cells in view, at most `n_cells`.
    pub(in crate::llama) fn read(
        ctx: &mut LlamaContext<'_>,
        n_cells: usize,
        seen: &mut Observation,
    ) -> Result<()> {
        let call = "llama_hae_taps_read";
        seen.sum.resize(n_cells, 0.0);
        seen.max.resize(n_cells, 0.0);
        // SAFETY: the context is alive, both buffers hold n_cells values.
        let code = unsafe {
            sys::llama_hae_taps_read(
                ctx.as_mut_ptr(),
                seen.sum.as_mut_ptr(),
                seen.max.as_mut_ptr(),
                n_cells,
            )
        };
        let n_kv = usize::try_from(code).map_err(|_| reason(call, code))?;
        seen.sum.truncate(n_kv);
        seen.max.truncate(n_kv);
        Ok(())
    }
}
