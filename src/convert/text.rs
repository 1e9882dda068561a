//! The text model: architecture `phi3`, with the keys and tensor names that llama.cpp reads
//! (src/llama-arch.cpp, src/models/phi3.cpp) and its converter writes (Phi3MiniModel).

use super::config::TextConfig;
use super::tensors::{Plan, Planned, Role};
use super::vocab::Vocabulary;
use crate::error::Result;
use crate::llama::gguf::Writer;

/// All tensors, each made by `plan`.
///
/// # Errors
/// Those of `plan`.
pub fn tensors<'a>(c: &TextConfig, plan: &mut Plan<'_, 'a>) -> Result<Vec<Planned<'a>>> {
    let n_kv = c.n_embd / c.n_head * c.n_head_kv;
    let mut all = vec![plan(
        "model.embed_tokens.weight",
        &[c.n_vocab, c.n_embd],
        "token_embd.weight",
        Role::Matrix,
    )?];
    if let Some(rope) = &c.longrope {
        all.push(Planned::values(
            "rope_factors_long.weight",
            rope.long.clone(),
        ));
        all.push(Planned::values(
            "rope_factors_short.weight",
            rope.short.clone(),
        ));
    }
    for il in 0..c.n_layer {
        // q, k and v are one matrix here and there; so are gate and up, in the order that
        // llama.cpp's swiglu splits them.
        for (from, shape, name, role) in [
            (
                "input_layernorm",
                &[c.n_embd][..],
                "attn_norm",
                Role::Vector,
            ),
            (
                "self_attn.qkv_proj",
                &[c.n_embd + 2 * n_kv, c.n_embd],
                "attn_qkv",
                Role::Matrix,
            ),
            (
                "self_attn.o_proj",
                &[c.n_embd, c.n_embd],
                "attn_output",
                Role::Matrix,
            ),
            (
                "post_attention_layernorm",
                &[c.n_embd],
                "ffn_norm",
                Role::Vector,
            ),
            (
                "mlp.gate_up_proj",
                &[2 * c.n_ff, c.n_embd],
                "ffn_up",
                Role::Matrix,
            ),
            (
                "mlp.down_proj",
                &[c.n_embd, c.n_ff],
                "ffn_down",
                Role::Matrix,
            ),
        ] {
            let from = format!("model.layers.{il}.{from}.weight");
            all.push(plan(
                &from,
                shape,
                &format!("blk.{il}.{name}.weight"),
                role,
            )?);
        }
    }
    all.push(plan(
        "model.norm.weight",
        &[c.n_embd],
        "output_norm.weight",
        Role::Vector,
    )?);
    // Without an output matrix llama.cpp takes the embeddings.
    if !c.tied {
        all.push(plan(
            "lm_head.weight",
            &[c.n_vocab, c.n_embd],
            "output.weight",
            Role::Matrix,
        )?);
    }
    Ok(all)
}

/// Writes everything but the tensors.
///
/// # Errors
/// From [`Writer`].
pub fn metadata(writer: &mut Writer, config: &TextConfig, vocabulary: &Vocabulary) -> Result<()> {
    let c = config;
    for (key, value) in [
        ("context_length", c.n_ctx),
        ("rope.scaling.original_context_length", c.n_ctx_orig),
        ("embedding_length", c.n_embd),
        ("feed_forward_length", c.n_ff),
        ("block_count", c.n_layer),
        ("attention.head_count", c.n_head),
        ("attention.head_count_kv", c.n_head_kv),
        ("rope.dimension_count", c.n_rot),
        // llama.cpp's phi3 runs without a window whatever stands here, and warns if it is not 0.
        ("attention.sliding_window", 0),
    ] {
        writer.set_u32(&format!("phi3.{key}"), value)?;
    }
    writer.set_f32("phi3.attention.layer_norm_rms_epsilon", c.norm_eps)?;
    writer.set_f32("phi3.rope.freq_base", c.rope_theta)?;
    if let Some(rope) = &c.longrope {
        writer.set_f32("phi3.rope.scaling.attn_factor", rope.attn_factor)?;
    }
    tokenizer(writer, vocabulary)
}

fn tokenizer(writer: &mut Writer, v: &Vocabulary) -> Result<()> {
    writer.set_text("tokenizer.ggml.model", "llama")?;
    writer.set_text("tokenizer.ggml.pre", "default")?;
    writer.set_text_array("tokenizer.ggml.tokens", &v.tokens)?;
    writer.set_f32_array("tokenizer.ggml.scores", &v.scores)?;
    writer.set_i32_array("tokenizer.ggml.token_type", &v.kinds)?;
    for (key, id) in [
        ("bos", Some(v.bos)),
        ("eos", Some(v.eos)),
        ("eot", v.eot),
        ("eom", v.eom),
        ("unknown", v.unk),
        ("padding", v.pad),
    ] {
        if let Some(id) = id {
            writer.set_u32(&format!("tokenizer.ggml.{key}_token_id"), id)?;
        }
    }
    writer.set_bool("tokenizer.ggml.add_bos_token", v.add_bos)?;
    writer.set_bool("tokenizer.ggml.add_eos_token", v.add_eos)?;
    writer.set_bool("tokenizer.ggml.add_space_prefix", v.add_space_prefix)?;
    if let Some(template) = &v.chat_template {
        writer.set_text("tokenizer.chat_template", template)?;
    }
    Ok(())
}
