//! Flags that several commands share: llama.cpp's names where llama.cpp has one. Each file has its
//! flags, what they come to in the library's types, and their tests.

mod constraint;
mod context;
mod devices;
mod elsewhere;
mod fit;
mod hub;
mod model;
mod policy;
mod sampler;
pub mod spelling;
mod template;

pub use constraint::ConstraintArgs;
pub use context::{AttendArgs, ContextArgs, default_threads};
pub use devices::{DeviceArgs, names};
pub use fit::FitArgs;
pub use hub::HubArgs;
pub use model::{GpuLayers, ModelArgs, gpu_layers};
pub use policy::{PolicyArgs, Taken};
pub use sampler::SamplerArgs;
pub use template::TemplateArgs;

/// Flags that `hae run --help` shows, and beside them those that are for tuning.
pub const POLICY: &str = "KV cache policy";
const PRUNING: &str = "Which visual tokens leave after a prompt";
const SCORES: &str = "How attention becomes a score";
const DECODING: &str = "What leaves while an answer is written";
const QUESTIONS: &str = "What a new question finds";
pub const PRESETS: &str = "Where values come from";
const ONE_POLICY: &str = "What one policy alone reads";

/// Headings of the flags that tune a policy: `-h` leaves them out, `hae help policies` has them all
/// beside [`POLICY`].
pub const TUNING: [&str; 6] = [PRUNING, SCORES, DECODING, QUESTIONS, PRESETS, ONE_POLICY];

#[cfg(test)]
mod tests;
