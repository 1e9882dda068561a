//! llama.cpp behind the crate's own types: the only home of its bindings and of `unsafe`.
//!
//! [`Model`] loads a GGUF, [`Vision`] turns pictures into embeddings through mtmd, and
//! [`LlamaEngine`] implements [`crate::engine::Engine`] on a context whose evaluation callback
//! (`observer.rs`) reads which cell each token went to. How much attention each cell had comes
//! from nodes in llama.cpp's graph (`taps.rs`), or from the callback as well.

mod abort;
mod as_engine;
mod attend;
mod cache_type;
mod callback;
mod cells;
pub mod chat;
mod decode;
mod devices;
mod engine;
mod exhausted;
mod footprint;
pub mod gguf;
mod hparams;
mod layers;
pub mod log;
mod memory;
mod model;
mod observer;
mod options;
mod placement;
mod predict;
pub mod quantize;
mod room;
mod rope;
mod rows;
mod sampler;
mod sequence;
mod state;
mod taps;
mod threads;
mod tokens;
mod trial;
mod vision;
mod vocab;
mod weights;
mod workers;

pub use abort::on_abort;
pub use cache_type::CacheType;
pub use devices::{Device, device_memory, devices};
pub use engine::LlamaEngine;
pub use exhausted::OrExit;
pub use footprint::{Footprint, Place, by_device, places};
pub use model::{Model, ModelOptions};
pub use options::{ByPolicy, ContextOptions, FlashAttention};
pub use placement::{Override, Placement, SplitMode};
pub use room::grown;
pub use rope::RopeFactors;
pub use rows::MAX_POS;
pub use sampler::SamplerOptions;
pub use state::SequenceState;
pub use taps::ScoreSource;
pub use threads::Poll;
pub use vision::{ImageEmbeddings, ImageTokens, Mrope, Part, Piece, Vision, VisionOptions};
pub use vocab::Around;
pub use workers::{WorkerOptions, add_workers, serve_worker};

use std::sync::OnceLock;

use llama_cpp_2::llama_backend::LlamaBackend;

use crate::error::{Error, Result};

/// llama.cpp's process-wide state, set up once and never torn down: models may live in statics.
fn backend() -> Result<&'static LlamaBackend> {
    static BACKEND: OnceLock<std::result::Result<LlamaBackend, String>> = OnceLock::new();
    BACKEND
        .get_or_init(|| {
            log::install();
            memory::set_up();
            LlamaBackend::init().map_err(|e| e.to_string())
        })
        .as_ref()
        .map_err(|e| Error::llama("llama_backend_init", e.clone()))
}

/// ggml's version number.
pub fn ggml_version() -> String {
    // SAFETY: returns a static C string.
    unsafe { static_str(llama_cpp_sys_2::ggml_version()) }
}

/// The processor features that llama.cpp was built for and found.
pub fn system_info() -> String {
    // llama.cpp writes it into one place, whoever asks: two threads would write there at a time.
    static INFO: OnceLock<String> = OnceLock::new();
    // SAFETY: returns a C string that lives until the next call, and there is none.
    let info =
        INFO.get_or_init(|| unsafe { static_str(llama_cpp_sys_2::llama_print_system_info()) });
    info.clone()
}

/// # Safety
/// `text` is null or a C string that lives during the call.
unsafe fn static_str(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { std::ffi::CStr::from_ptr(text) }
        .to_string_lossy()
        .trim()
        .to_owned()
}
