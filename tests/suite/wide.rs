//! A model whose cache is as large as that of a real one while its weights are next to nothing: wide
//! heads behind narrow embeddings. What it says means nothing.

use std::path::Path;

use hae::llama::gguf::{TensorType, Writer};

/// Heads of every layer, each with its own K and V.
const HEADS: u64 = 32;
/// Width of a head; Phi-3.5's. A row of K or V is 32 times as wide.
const HEAD: u64 = 96;
const EMBD: u64 = 64;
const FF: u64 = 64;
pub const VOCAB: u64 = 64;

/// Bytes that an F16 cell takes in one layer.
pub const LAYER_BYTES: u64 = 2 * 2 * HEADS * HEAD;

/// Values in -0.05..0.05.
fn values(n: u64, seed: &mut u64) -> Vec<u8> {
    let mut next = || {
        // Marsaglia's xorshift.
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        half::f16::from_f32(((*seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1)
    };
    (0..n).flat_map(|_| next().to_le_bytes()).collect()
}

/// Writes the model with so many layers.
pub fn write(path: &Path, n_layer: u32) {
    let mut w = Writer::new(path).expect("a writer");
    w.set_text("general.architecture", "llama").expect("a key");
    w.set_text("tokenizer.ggml.model", "no_vocab")
        .expect("a key");
    for (key, value) in [
        ("vocab_size", VOCAB as u32),
        ("context_length", 8192),
        ("embedding_length", EMBD as u32),
        ("feed_forward_length", FF as u32),
        ("block_count", n_layer),
        ("attention.head_count", HEADS as u32),
        ("attention.head_count_kv", HEADS as u32),
        ("attention.key_length", HEAD as u32),
        ("attention.value_length", HEAD as u32),
        ("rope.dimension_count", HEAD as u32),
    ] {
        w.set_u32(&format!("llama.{key}"), value).expect("a key");
    }
    w.set_f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .expect("a key");
    let wide = HEADS * HEAD;
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), vec![EMBD, VOCAB]),
        ("output_norm.weight".to_owned(), vec![EMBD]),
    ];
    for block in 0..n_layer {
        for (part, dims) in [
            ("attn_norm", vec![EMBD]),
            ("attn_q", vec![EMBD, wide]),
            ("attn_k", vec![EMBD, wide]),
            ("attn_v", vec![EMBD, wide]),
            ("attn_output", vec![wide, EMBD]),
            ("ffn_norm", vec![EMBD]),
            ("ffn_gate", vec![EMBD, FF]),
            ("ffn_up", vec![EMBD, FF]),
            ("ffn_down", vec![FF, EMBD]),
        ] {
            tensors.push((format!("blk.{block}.{part}.weight"), dims));
        }
    }
    let kind = |dims: &[u64]| match dims.len() {
        1 => TensorType::F32,
        _ => TensorType::F16,
    };
    for (name, dims) in &tensors {
        w.add_tensor(name, kind(dims), dims).expect("a tensor");
    }
    let file = std::fs::File::create(path).expect("a file");
    let mut out = w.begin(std::io::BufWriter::new(file)).expect("metadata");
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for (_, dims) in &tensors {
        let n = dims.iter().product();
        let data = match dims.len() {
            1 => (0..n).flat_map(|_| 1.0f32.to_le_bytes()).collect(),
            _ => values(n, &mut seed),
        };
        out.write(&data).expect("data");
        out.end_tensor().expect("a whole tensor");
    }
    out.finish().expect("all tensors");
}
