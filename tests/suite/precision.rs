//! Bounds on rounding, by what computes.
//!
//! The tests' bounds are set for a CPU, which multiplies F16 weights with F32 activations. A GPU
//! rounds activations to F16 as well, next to quantized keys to eight bits, and the order of its
//! sums depends on how many cells are in view. Its errors are up to a hundred times larger, and still
//! far below what a mistake does: with a wrong set of tokens logits differ by 0.1 and more (`holes`,
//! `early`).

use std::sync::LazyLock;

use hae::llama::CacheType;

/// Whether models are loaded onto a GPU in this process.
pub fn on_gpu() -> bool {
    static GPU: LazyLock<bool> =
        LazyLock::new(|| hae::llama::devices().unwrap().iter().any(|d| d.is_gpu));
    *GPU
}

/// How far logits may be apart.
pub fn logits(cpu: f32) -> f32 {
    if on_gpu() { cpu.max(5e-2) } else { cpu }
}

/// How far attention weights, or what is relative to them, may be apart.
pub fn attention(cpu: f32) -> f32 {
    if on_gpu() { cpu.max(1e-2) } else { cpu }
}

/// The same between our scores and llama.cpp's own attention, beside keys of this type. With Vulkan that is computed on the
/// processor where the keys are quantized (`docs/vulkan.md`), so that both round the query to eight bits, each in its
/// own way: on an H200 and on lavapipe they are 0.0103 and 0.0109 apart.
pub fn attention_beside(keys: CacheType, cpu: f32) -> f32 {
    let roundings = if keys.is_quantized() && on_vulkan() {
        2.0
    } else {
        1.0
    };
    if on_gpu() {
        cpu.max(roundings * 1e-2)
    } else {
        cpu
    }
}

fn on_vulkan() -> bool {
    let all = hae::llama::devices().unwrap();
    all.iter().any(|d| d.name.starts_with("Vulkan"))
}

/// Of a thousand cells that stay after a picture is pruned, how many are the same at least where sums are made in
/// another order: nearly equal ones may change places. On lavapipe one of 241 does.
pub fn kept_alike() -> usize {
    if on_gpu() { 990 } else { 1000 }
}

/// Bound on the difference of logits where two cells with nearly the same weight may have changed places;
/// `wrong` is what wrong cells do to logits.
pub fn near_sets(cpu: f32, wrong: f32) -> f32 {
    if on_gpu() { cpu.max(0.4 * wrong) } else { cpu }
}

/// Of a thousand cells of two ways' sets, how many are the same at least. A GPU's products round a
/// query to eight bits beside a quantized cache, its own operations do not.
pub fn sets_alike(cpu: usize) -> usize {
    if on_gpu() { cpu.min(950) } else { cpu }
}
