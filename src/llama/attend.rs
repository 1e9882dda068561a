//! Lookups in llama.cpp's graph (the patch `lookups`).

use llama_cpp_2::context::LlamaContext;
use llama_cpp_sys_2 as sys;

use super::{ContextOptions, LlamaEngine, Model};
use crate::attend::Lookup;
use crate::cache::Cell;
use crate::error::{Error, Result};

/// The error behind a negative code of the call.
fn reason(call: &'static str, code: i32) -> Error {
    let text = match code {
        sys::LLAMA_HAE_ATTEND_ERR_ARGUMENT => "no such layer or cell".to_owned(),
        sys::LLAMA_HAE_ATTEND_ERR_NOTHING => "the last batch looked nothing up".to_owned(),
        sys::LLAMA_HAE_ATTEND_ERR_FAILED => "no memory for the larger graph".to_owned(),
        code => format!("status {code}"),
    };
    Error::llama(call, text)
}

/// Lets the context look up from now on, if that was asked for. Where it is the policy's wish, it is
/// done where it is known to pay: on a CPU, for a model that can. Gives whether it is.
///
/// # Errors
/// [`Error::Option`] for a model whose attention cannot be cut down to some cells.
pub(super) fn begin(
    ctx: &mut LlamaContext<'_>,
    model: &Model,
    options: &ContextOptions,
) -> Result<bool> {
    if options.attend.is_whole() {
        return Ok(false);
    }
    let wish = options.by_policy.attend;
    // There attention to everything is as fast up to some ten thousand cells (docs/lookups.md).
    if wish && model.may_use_gpu() {
        return Ok(false);
    }
    match allow(ctx, options) {
        Err(Error::Option { .. }) if wish => Ok(false),
        allowed => allowed.map(|()| true),
    }
}

fn allow(ctx: &mut LlamaContext<'_>, options: &ContextOptions) -> Result<()> {
    let params = sys::llama_hae_attend_params {
        first_layer: options.attend.first_layer,
        keep_sets: options.keep_sets,
        plain_ops: options.plain_lookups,
    };
    // SAFETY: the context is alive, the parameters live during the call.
    let code = unsafe { sys::llama_hae_attend_set(ctx.as_mut_ptr(), &raw const params) };
    match code {
        0 => Ok(()),
        sys::LLAMA_HAE_ATTEND_ERR_MEMORY => Err(Error::option(
            "attend",
            "this model's attention cannot look cells up: it has no cache, windows in every layer, sinks, a cap or ALiBi, or one K and V for all heads",
        )),
        code => Err(reason("llama_hae_attend_set", code)),
    }
}

impl LlamaEngine {
    /// Tells the graph what the next step looks up.
    pub(super) fn begin_lookup(&mut self, lookup: Option<&Lookup>) -> Result<()> {
        let Some(lookup) = lookup else {
            return Ok(());
        };
        let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        // SAFETY: the context is alive; the kinds are bytes, as many as said, of values that the
        // enum has.
        let code = unsafe {
            sys::llama_hae_attend_cells(
                self.raw.as_ptr(),
                lookup.kinds.as_ptr().cast(),
                lookup.kinds.len(),
                number(lookup.n_vision),
                number(lookup.n_text),
            )
        };
        match code {
            0 => Ok(()),
            code => Err(reason("llama_hae_attend_cells", code)),
        }
    }

    /// The layers that look up, ascending: not those before [`Attend::first_layer`], and not those with
    /// windows, which attend to all that they keep.
    ///
    /// [`Attend::first_layer`]: crate::attend::Attend::first_layer
    pub fn looking_layers(&self) -> Vec<u32> {
        let mut layers = vec![0; self.model.n_layer() as usize];
        // SAFETY: the context is alive, the buffer holds as many values as said.
        let n = unsafe {
            sys::llama_hae_attend_layers(self.raw.as_ptr(), layers.as_mut_ptr(), layers.len())
        };
        layers.truncate(usize::try_from(n).unwrap_or(0));
        layers
    }

    /// The cells that a layer attended to in the last step, ascending. Only where
    /// [`super::ContextOptions::keep_sets`] asked for it.
    ///
    /// # Errors
    /// [`Error::Llama`] when the last step looked nothing up, or the layer does not.
    pub fn looked_up(&mut self, layer: u32) -> Result<Vec<Cell>> {
        let call = "llama_hae_attend_read";
        let mut cells: Vec<i32> = vec![0; self.n_ctx];
        // SAFETY: the context is alive, the buffer holds as many values as said.
        let code = unsafe {
            sys::llama_hae_attend_read(self.raw.as_ptr(), layer, cells.as_mut_ptr(), cells.len())
        };
        let n = usize::try_from(code).map_err(|_| reason(call, code))?;
        let cells = cells.iter().take(n);
        Ok(cells
            .map(|&cell| Cell::try_from(cell).unwrap_or(0))
            .collect())
    }
}
