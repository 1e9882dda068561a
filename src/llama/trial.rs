//! Contexts of a model's first layers, for trial runs.

use llama_cpp_sys_2 as sys;

#[cfg(feature = "kv-patches")]
use {
    super::{ContextOptions, LlamaEngine, Model, SamplerOptions},
    crate::engine::Engine,
    crate::error::Result,
};

/// Cuts the context off after this many layers.
#[cfg(feature = "kv-patches")]
pub(super) fn set(n_layer_first: Option<u32>, params: &mut sys::llama_context_params) {
    if let Some(n) = n_layer_first {
        params.n_layer_first = n;
        params.n_outputs_max = 1;
    }
}

#[cfg(not(feature = "kv-patches"))]
pub(super) fn set(_: Option<u32>, _: &mut sys::llama_context_params) {}

/// An empty engine of the layers up to the last whose attention is read, that computes as one
/// with `options` does.
#[cfg(feature = "kv-patches")]
pub(super) fn engine<'m>(
    model: &'m Model,
    options: &ContextOptions,
    n_cells: usize,
) -> Result<Option<Box<dyn Engine + 'm>>> {
    let Some(&last) = options.score_layers.last() else {
        return Ok(None);
    };
    let options = ContextOptions {
        n_ctx: u32::try_from(n_cells).unwrap_or(u32::MAX),
        kv_size: None,
        // The smaller cache must not change what llama.cpp's rule says of the real one.
        rope_factors: options.rope_factors.resolved(model, options.n_ctx),
        ..options.clone()
    };
    let engine = LlamaEngine::of_layers(model, options, &SamplerOptions::GREEDY, Some(last + 1))?;
    Ok(Some(Box::new(engine)))
}
