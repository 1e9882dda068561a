//! The choice between longrope's two factor sets.

use llama_cpp_sys_2 as sys;

use super::Model;

/// Which of longrope's two factor sets to use. llama.cpp follows the size of the cache, which a
/// cache that evicts does not share with the positions; the choice belongs to the positions that
/// a run will reach (Phi-3's own rule: long from position `original_context_length` on).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeFactors {
    /// llama.cpp's own rule: by the size of the context.
    #[default]
    Context,
    /// Those for positions within the original context.
    Short,
    /// Those for longer contexts.
    Long,
}

impl RopeFactors {
    /// The set that a context of this size uses.
    pub fn resolved(self, model: &Model, n_ctx: u32) -> Self {
        match (self, model.long_rope_from()) {
            (RopeFactors::Context, Some(from)) if n_ctx.next_multiple_of(256) > from => {
                RopeFactors::Long
            }
            (RopeFactors::Context, Some(_)) => RopeFactors::Short,
            _ => self,
        }
    }

    pub(super) fn set(self, params: &mut sys::llama_context_params) {
        params.rope_factors = match self {
            RopeFactors::Context => sys::LLAMA_ROPE_FACTORS_BY_CONTEXT,
            RopeFactors::Short => sys::LLAMA_ROPE_FACTORS_SHORT,
            RopeFactors::Long => sys::LLAMA_ROPE_FACTORS_LONG,
        };
    }
}
