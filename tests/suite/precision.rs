//! Bounds on rounding, by what computes.
//!
//! The tests' bounds are set for a CPU, which multiplies F16 weights with F32 activations. A GPU
//! rounds activations to F16 as well, next to quantized keys to eight bits, and the order of its
//! sums depends on how many cells are in view. Its errors are up to a hundred times larger, and still
//! far below what a mistake does: with a wrong set of tokens logits differ by 0.1 and more (`holes`,
//! `early`).

use std::sync::LazyLock;

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
