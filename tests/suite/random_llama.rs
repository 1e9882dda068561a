//! Untrained models of chosen shapes, with the small model's vocabulary.

use std::path::Path;

use crate::model::{TEXT, repository};
use crate::remake::{Remake, Tensor};

/// Width of a token between the layers.
pub const EMBD: u64 = 64;
const FF: u64 = 96;
const VOCAB: u64 = 1024;

/// The attention of every layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub n_layer: u32,
    pub n_head: u32,
    /// Heads of K and V.
    pub n_head_kv: u32,
    /// Of a head.
    pub width: u32,
}

/// A file of this architecture without tensors: vocabulary and hyperparameters that all have.
pub fn keys(arch: &str, shape: Shape) -> Remake {
    let mut file = Remake::read(&repository(TEXT));
    file.tensors.clear();
    file.keys.retain(|(key, _)| !key.starts_with("phi3."));
    file.set_text("general.architecture", arch);
    for (key, value) in [
        ("context_length", 8192),
        ("embedding_length", EMBD as u32),
        ("feed_forward_length", FF as u32),
        ("block_count", shape.n_layer),
        ("attention.head_count", shape.n_head),
        ("attention.head_count_kv", shape.n_head_kv),
    ] {
        file.set_u32(&format!("{arch}.{key}"), value);
    }
    file
}

/// A tensor of layer `block`; those of queries and keys are scaled, so that attention is sharper
/// than that of an untrained model.
pub fn layer(block: u32, part: &str, dims: &[u64]) -> Tensor {
    let name = format!("blk.{block}.{part}");
    if dims.len() == 1 {
        return match part.ends_with("bias") {
            true => Tensor::random(&name, dims),
            false => Tensor::ones(&name, dims[0]),
        };
    }
    let mut tensor = Tensor::random(&name, dims);
    if ["attn_q.weight", "attn_k.weight", "attn_qkv.weight"].contains(&part) {
        tensor.scale(6.0);
    }
    tensor
}

/// LLaMA, its heads as wide as is said.
pub fn llama(path: &Path, shape: Shape) {
    let mut file = keys("llama", shape);
    for key in [
        "rope.dimension_count",
        "attention.key_length",
        "attention.value_length",
    ] {
        file.set_u32(&format!("llama.{key}"), shape.width);
    }
    file.set_f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let (q, kv) = (
        u64::from(shape.n_head * shape.width),
        u64::from(shape.n_head_kv * shape.width),
    );
    file.tensors = vec![
        Tensor::random("token_embd.weight", &[EMBD, VOCAB]),
        Tensor::ones("output_norm.weight", EMBD),
    ];
    for block in 0..shape.n_layer {
        for (part, dims) in [
            ("attn_q.weight", &[EMBD, q][..]),
            ("attn_k.weight", &[EMBD, kv]),
            ("attn_v.weight", &[EMBD, kv]),
            ("attn_output.weight", &[q, EMBD]),
            ("ffn_gate.weight", &[EMBD, FF]),
            ("ffn_up.weight", &[EMBD, FF]),
            ("ffn_down.weight", &[FF, EMBD]),
            ("attn_norm.weight", &[EMBD]),
            ("ffn_norm.weight", &[EMBD]),
        ] {
            file.tensors.push(layer(block, part, dims));
        }
    }
    file.write(path);
}

/// BLOOM, whose attention knows distances instead of positions (ALiBi). A token is as wide as its
/// heads together, 32 values each.
pub fn bloom(path: &Path, n_layer: u32, n_head: u32) {
    let shape = Shape {
        n_layer,
        n_head,
        n_head_kv: n_head,
        width: 32,
    };
    let embd = u64::from(n_head * shape.width);
    let mut file = keys("bloom", shape);
    file.set_u32("bloom.embedding_length", n_head * shape.width);
    file.set_f32("bloom.attention.layer_norm_epsilon", 1e-5);
    file.tensors = vec![
        Tensor::random("token_embd.weight", &[embd, VOCAB]),
        Tensor::ones("token_embd_norm.weight", embd),
        Tensor::random("token_embd_norm.bias", &[embd]),
        Tensor::ones("output_norm.weight", embd),
        Tensor::random("output_norm.bias", &[embd]),
    ];
    for block in 0..n_layer {
        for (part, dims) in [
            ("attn_qkv", &[embd, 3 * embd][..]),
            ("attn_output", &[embd, embd]),
            ("ffn_up", &[embd, FF]),
            ("ffn_down", &[FF, embd]),
            ("attn_norm", &[embd]),
            ("ffn_norm", &[embd]),
        ] {
            let wide = dims[dims.len() - 1];
            let weight = format!("{part}.weight");
            file.tensors.push(layer(block, &weight, dims));
            file.tensors
                .push(layer(block, &format!("{part}.bias"), &[wide]));
        }
    }
    file.write(path);
}

/// Grok, which caps its scores and knows experts; llama.cpp computes it without flash attention.
pub fn grok(path: &Path, n_layer: u32) {
    const EXPERTS: u64 = 4;
    let shape = Shape {
        n_layer,
        n_head: 4,
        n_head_kv: 2,
        width: 16,
    };
    let mut file = keys("grok", shape);
    for (key, value) in [
        ("rope.dimension_count", shape.width),
        ("expert_count", EXPERTS as u32),
        ("expert_used_count", 2),
    ] {
        file.set_u32(&format!("grok.{key}"), value);
    }
    file.set_f32("grok.attention.layer_norm_rms_epsilon", 1e-5);
    // Low enough that sharp scores meet it.
    file.set_f32("grok.attn_logit_softcapping", 2.0);
    let kv = u64::from(shape.n_head_kv * shape.width);
    file.tensors = vec![
        Tensor::random("token_embd.weight", &[EMBD, VOCAB]),
        Tensor::ones("output_norm.weight", EMBD),
    ];
    for block in 0..n_layer {
        for (part, dims) in [
            ("attn_q.weight", &[EMBD, EMBD][..]),
            ("attn_k.weight", &[EMBD, kv]),
            ("attn_v.weight", &[EMBD, kv]),
            ("attn_output.weight", &[EMBD, EMBD]),
            ("ffn_gate_inp.weight", &[EMBD, EXPERTS]),
            ("ffn_gate_exps.weight", &[EMBD, FF, EXPERTS]),
            ("ffn_down_exps.weight", &[FF, EMBD, EXPERTS]),
            ("ffn_up_exps.weight", &[EMBD, FF, EXPERTS]),
            ("attn_norm.weight", &[EMBD]),
            ("attn_output_norm.weight", &[EMBD]),
            ("ffn_norm.weight", &[EMBD]),
            ("layer_output_norm.weight", &[EMBD]),
        ] {
            file.tensors.push(layer(block, part, dims));
        }
    }
    file.write(path);
}
