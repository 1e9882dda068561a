//! Which type llama.cpp's quantizer gives to each matrix of a phi3 model (`llama-quant.cpp`,
//! without an importance matrix). A test has llama.cpp quantize the same shapes and compares.

use crate::llama::gguf::TensorType;

/// A type by llama.cpp's name for the whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// All matrices F16.
    F16,
    /// llama.cpp's `Q4_0`.
    Q4_0,
    /// llama.cpp's `Q4_K_M`.
    Q4KM,
}

impl Mix {
    /// llama.cpp's `llama_ftype`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Mix::F16 => 1,
            Mix::Q4_0 => 2,
            Mix::Q4KM => 15,
        }
    }

    pub(super) fn kind(self, tensor: &str, n_layer: u32) -> TensorType {
        let is_output = tensor == "output.weight";
        let layer_of = |part: &str| -> Option<u32> {
            let rest = tensor.strip_prefix("blk.")?;
            let (layer, name) = rest.split_once('.')?;
            layer.parse().ok().filter(|_| name == part)
        };
        let finer = layer_of("ffn_down.weight").or_else(|| layer_of("attn_qkv.weight"));
        match self {
            Mix::F16 => TensorType::F16,
            _ if is_output => TensorType::Q6_K,
            Mix::Q4_0 => TensorType::Q4_0,
            Mix::Q4KM if finer.is_some_and(|layer| more_bits(layer, n_layer)) => TensorType::Q6_K,
            Mix::Q4KM => TensorType::Q4_K,
        }
    }
}

/// The first eighth of the layers, the last, and every third between.
fn more_bits(layer: u32, n_layer: u32) -> bool {
    let eighth = n_layer / 8;
    layer < eighth || layer >= 7 * n_layer / 8 || (layer - eighth) % 3 == 2
}
