//! llama.cpp behind the crate's own types: the only home of its bindings and of `unsafe`.
//!
//! [`Model`] loads a GGUF, [`Vision`] turns pictures into embeddings through mtmd, and
//! [`LlamaEngine`] implements [`crate::engine::Engine`] on a context whose evaluation callback
//! ([`observer`]) reads which cell each token went to and, when asked, how much attention each
//! cell had.

pub mod chat;
mod context;
pub mod gguf;
pub mod log;
mod model;
mod observer;
pub mod quantize;
mod sampler;
mod vision;

pub use context::{CacheType, ContextOptions, FlashAttention, LlamaEngine};
pub use model::{Model, ModelOptions, RopeFactors};
pub use sampler::SamplerOptions;
pub use vision::{Vision, VisionOptions};

use std::sync::OnceLock;

use llama_cpp_2::llama_backend::LlamaBackend;

use crate::error::{Error, Result};

/// llama.cpp's process-wide state, set up once and never torn down: models may live in statics.
fn backend() -> Result<&'static LlamaBackend> {
    static BACKEND: OnceLock<std::result::Result<LlamaBackend, String>> = OnceLock::new();
    BACKEND
        .get_or_init(|| {
            log::install();
            LlamaBackend::init().map_err(|e| e.to_string())
        })
        .as_ref()
        .map_err(|e| Error::llama("llama_backend_init", e.clone()))
}
