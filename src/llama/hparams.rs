//! Values of a text model's metadata that llama.cpp asserts on instead of refusing them
//! (`load_hparams` in llama-model.cpp, llama-hparams.cpp; `ggml_compute_forward_rms_norm`).

use std::collections::HashSet;

use super::gguf::{Gguf, TensorInfo, Value};
use crate::error::{Error, Result};

/// `LLAMA_MAX_LAYERS`
const MAX_LAYERS: u64 = 512;
/// `LLAMA_MAX_EXPERTS`
const MAX_EXPERTS: u64 = 1024;

/// Refuses values that would abort the process.
///
/// # Errors
/// [`Error::File`] naming the key, its value and what was expected.
pub(super) fn check(gguf: &Gguf, arch: &str, tensors: &[TensorInfo]) -> Result<()> {
    let wrong = |reason: String| Err(Error::file(gguf.path(), reason));
    let optional = |key: &str| match gguf.get(key) {
        None => Ok(None),
        Some(_) => gguf.unsigned(key).map(Some),
    };
    let key = |name: &str| format!("{arch}.{name}");
    let blocks = gguf.unsigned(&key("block_count"))?;
    if !(1..=MAX_LAYERS).contains(&blocks) {
        return wrong(format!(
            "{arch}.block_count is {blocks}, expected 1 to {MAX_LAYERS}"
        ));
    }
    let nextn = optional(&key("nextn_predict_layers"))?.unwrap_or(0);
    if nextn >= blocks {
        return wrong(format!(
            "{arch}.nextn_predict_layers is {nextn}, expected less than {blocks} blocks"
        ));
    }
    if let Some(n) = optional(&key("context_length"))?.filter(|&n| n > i32::MAX as u64) {
        return wrong(format!(
            "{arch}.context_length is {n}, expected at most {}",
            i32::MAX
        ));
    }
    let prefix = format!("{arch}.");
    for name in gguf.keys() {
        if let (true, Some(Value::Float(eps))) = (
            name.starts_with(&prefix) && name.ends_with("epsilon"),
            gguf.get(&name),
        ) && !(eps.is_finite() && eps >= 0.0)
        {
            return wrong(format!("{name} is {eps}, expected a number of at least 0"));
        }
    }
    if let Some(found) = gguf.get(&key("rope.scaling.type")) {
        let known = ["none", "linear", "yarn", "longrope"].map(|s| Value::Text(s.into()));
        if !known.contains(&found) {
            return wrong(format!(
                "{arch}.rope.scaling.type is {found:?}, expected none, linear, yarn or longrope"
            ));
        }
    }
    let experts = optional(&key("expert_count"))?.unwrap_or(0);
    let used = match gguf.get(&key("expert_used_count")) {
        Some(Value::Array(each)) => each
            .iter()
            .filter_map(|v| match v {
                Value::Unsigned(n) => Some(*n),
                Value::Signed(n) => Some(*n as u64),
                _ => None,
            })
            .max()
            .unwrap_or(0),
        _ => optional(&key("expert_used_count"))?.unwrap_or(0),
    };
    if experts > MAX_EXPERTS || used > experts || (experts > 0) != (used > 0) {
        return wrong(format!(
            "{arch}.expert_count is {experts} and expert_used_count {used}, expected at most {MAX_EXPERTS} and no more used"
        ));
    }
    let groups = optional(&key("expert_group_count"))?.unwrap_or(0);
    let groups_used = optional(&key("expert_group_used_count"))?.unwrap_or(0);
    let grouped =
        groups > 1 && (experts % groups != 0 || groups_used == 0 || groups_used >= groups);
    if grouped || (groups > 0 && groups >= experts) {
        return wrong(format!(
            "{arch}.expert_group_count is {groups} ({groups_used} used) with {experts} experts"
        ));
    }
    if arch == "phi3" {
        check_phi3(gguf, blocks, tensors)?;
    }
    Ok(())
}

/// The same of a vision file, whatever its projector: mtmd makes room for as many blocks as the file
/// claims.
///
/// # Errors
/// As [`check`].
pub(super) fn check_vision(gguf: &Gguf) -> Result<()> {
    let keys = gguf.keys().into_iter();
    for key in keys.filter(|key| key.starts_with("clip.") && key.ends_with("block_count")) {
        let claimed = match gguf.get(&key) {
            Some(Value::Unsigned(n)) => n,
            _ => continue,
        };
        if claimed > MAX_LAYERS {
            let reason = format!("{key} is {claimed}, expected at most {MAX_LAYERS}");
            return Err(Error::file(gguf.path(), reason));
        }
    }
    Ok(())
}

/// llama.cpp asserts that heads of K and V are equally wide. It takes all of these tensors for optional with this
/// architecture, and reads through a null pointer, or without rope factors, where they are missing (models/phi3.cpp).
fn check_phi3(gguf: &Gguf, blocks: u64, tensors: &[TensorInfo]) -> Result<()> {
    let names: HashSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    let missing = |name: &str| {
        Err(Error::file(
            gguf.path(),
            format!("tensor {name} is missing"),
        ))
    };
    let heads = gguf.unsigned("phi3.attention.head_count").ok();
    let width = gguf.unsigned("phi3.embedding_length").ok();
    let usual = width.zip(heads).and_then(|(w, n)| w.checked_div(n));
    let wide = |key: &str| gguf.unsigned(key).ok().or(usual);
    let [k, v] = ["phi3.attention.key_length", "phi3.attention.value_length"];
    if let (Some(n_k), Some(n_v)) = (wide(k), wide(v))
        && n_k != n_v
    {
        let reason = format!("{k} is {n_k} and {v} {n_v}, expected the same");
        return Err(Error::file(gguf.path(), reason));
    }
    for block in 0..blocks {
        let has = |part: &str| names.contains(format!("blk.{block}.{part}.weight").as_str());
        if !has("attn_qkv") && !["attn_q", "attn_k", "attn_v"].iter().all(|part| has(part)) {
            return missing(&format!("blk.{block}.attn_qkv.weight"));
        }
    }
    let factors = ["rope_factors_long.weight", "rope_factors_short.weight"];
    match factors.map(|name| names.contains(name)) {
        [false, true] => missing(factors[0]),
        [true, false] => missing(factors[1]),
        _ => Ok(()),
    }
}
