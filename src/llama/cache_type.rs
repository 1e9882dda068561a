//! The types that the cache can hold.

use llama_cpp_2::context::params::KvCacheType;

/// Element type of the K or V cache (`-ctk`, `-ctv`), by llama.cpp's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    /// 32 bits a value.
    F32,
    /// 16 bits a value, IEEE's.
    #[default]
    F16,
    /// 16 bits a value, the upper half of an F32.
    Bf16,
    /// Blocks of 32 values, 8.5 bits each.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Blocks of 32 values, 4.5 bits each.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// Blocks of 32 values with a minimum, 5 bits each.
    #[serde(rename = "q4_1")]
    Q4_1,
    /// Blocks of 32 values on an uneven scale, 4.5 bits each.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    /// Blocks of 32 values, 5.5 bits each.
    #[serde(rename = "q5_0")]
    Q5_0,
    /// Blocks of 32 values with a minimum, 6 bits each.
    #[serde(rename = "q5_1")]
    Q5_1,
}

impl CacheType {
    pub(super) fn raw(self) -> KvCacheType {
        match self {
            CacheType::F32 => KvCacheType::F32,
            CacheType::F16 => KvCacheType::F16,
            CacheType::Bf16 => KvCacheType::BF16,
            CacheType::Q8_0 => KvCacheType::Q8_0,
            CacheType::Q4_0 => KvCacheType::Q4_0,
            CacheType::Q4_1 => KvCacheType::Q4_1,
            CacheType::Iq4Nl => KvCacheType::IQ4_NL,
            CacheType::Q5_0 => KvCacheType::Q5_0,
            CacheType::Q5_1 => KvCacheType::Q5_1,
        }
    }

    /// As the flags spell it.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Bf16 => "bf16",
            CacheType::Q8_0 => "q8_0",
            CacheType::Q4_0 => "q4_0",
            CacheType::Q4_1 => "q4_1",
            CacheType::Iq4Nl => "iq4_nl",
            CacheType::Q5_0 => "q5_0",
            CacheType::Q5_1 => "q5_1",
        }
    }

    /// Whether llama.cpp stores blocks of this type: as V it then needs flash attention.
    pub fn is_quantized(self) -> bool {
        !matches!(self, CacheType::F32 | CacheType::F16 | CacheType::Bf16)
    }
}
