//! Types of weights that llama.cpp loads and then has no function for: it calls through a null
//! pointer, or asserts, when they are first computed with.

use llama_cpp_sys_2 as sys;

use super::gguf::{Gguf, TensorInfo, TensorType};
use crate::error::{Error, Result};

/// Weights that are only looked up: which experts a token goes to.
const TABLES: [&str; 1] = ["ffn_gate_tid2eid"];

/// Refuses weights of types that cannot be computed with.
///
/// # Errors
/// [`Error::File`] naming the tensor, its type and what was expected.
pub(super) fn check(gguf: &Gguf) -> Result<()> {
    let tensors = gguf.tensors();
    let Some((tensor, expected)) = tensors.iter().find_map(|t| Some((t, unfit(t)?))) else {
        return Ok(());
    };
    let (name, kind) = (&tensor.name, tensor.kind.name());
    let reason = format!("tensor {name} is {kind}, expected {expected}");
    Err(Error::file(gguf.path(), reason))
}

/// What a tensor would have to be, if it cannot be what it is.
fn unfit(tensor: &TensorInfo) -> Option<&'static str> {
    let is_weight = tensor.name.ends_with(".weight") || tensor.name.ends_with(".bias");
    if !is_weight || TABLES.iter().any(|table| tensor.name.contains(table)) {
        return None;
    }
    let is_plain = [TensorType::F32, TensorType::F16, TensorType::BF16].contains(&tensor.kind);
    if tensor.dims.len() > 1 {
        let expected = "f32, f16, bf16 or a quantized type that can be multiplied";
        return (!multiplies(tensor.kind)).then_some(expected);
    }
    // A quantized one is added or scaled by as what it says, or llama.cpp refuses it by itself.
    let is_number = !is_plain && tensor.kind.block_len() == 1;
    is_number.then_some("f32, f16 or bf16")
}

/// Whether the processor multiplies matrices of the type.
fn multiplies(kind: TensorType) -> bool {
    // SAFETY: a TensorType is a type that ggml knows, of which the table has an entry.
    let traits = unsafe { sys::ggml_get_type_traits_cpu(kind.raw()).as_ref() };
    traits.is_some_and(|traits| traits.vec_dot.is_some())
}

#[cfg(test)]
mod tests {
    use super::{multiplies, unfit};
    use crate::llama::gguf::{TensorInfo, TensorType};
    use crate::llama::quantize::TYPES;

    fn tensor(name: &str, raw: u32, dims: &[u64]) -> TensorInfo {
        TensorInfo {
            name: name.to_owned(),
            kind: TensorType::from_raw(raw).unwrap(),
            dims: dims.to_vec(),
            offset: 0,
            bytes: 0,
        }
    }

    #[test]
    fn numbers_are_no_weights_and_types_between_products_neither() {
        // I8, I16, I32, I64, F64; Q8_1 and Q8_K, what rows are multiplied as.
        for raw in [24, 25, 26, 27, 28, 9, 15] {
            let is_block = raw < 16;
            assert!(
                unfit(&tensor("blk.0.ffn_up.weight", raw, &[256, 2])).is_some(),
                "{raw}"
            );
            let vector = unfit(&tensor("output_norm.weight", raw, &[256]));
            assert_eq!(vector.is_some(), !is_block, "{raw}");
        }
        assert_eq!(
            unfit(&tensor("blk.0.ffn_gate_tid2eid.weight", 26, &[6, 2])),
            None
        );
        assert_eq!(unfit(&tensor("d2t", 27, &[6])), None);
    }

    #[test]
    fn what_models_are_made_of_can_be_multiplied() {
        for kind in [
            TensorType::F32,
            TensorType::F16,
            TensorType::BF16,
            TensorType::Q8_0,
        ] {
            assert!(multiplies(kind), "{}", kind.name());
        }
        // Every type that a name of the quantizer stands for, and those of its mixes.
        let names = (0..64).filter_map(TensorType::from_raw);
        let known: Vec<String> = names
            .filter(|&k| multiplies(k))
            .map(|k| k.name().to_lowercase())
            .collect();
        for kind in TYPES {
            let plain = kind.name.to_lowercase();
            let family = known.iter().any(|name| {
                let stem = name.trim_end_matches(['x', 's', 'm']).trim_end_matches('_');
                plain.starts_with(&**name) || plain.starts_with(stem)
            });
            assert!(family || plain == "copy", "{plain}: {known:?}");
        }
    }
}
