//! The vision file (mmproj): CLIP tower, projection and separators, with the keys and names of
//! llama.cpp's clip.cpp, projector type `phi3v`. The tower alone serves other projectors, too.
//!
//! Features are an inner hidden state of the tower, so the layers behind it and the last norm are
//! not written. Neither `clip.use_gelu` nor `clip.use_silu` is set, which means quick_gelu there.

use super::config::{TextConfig, VisionConfig};
use super::tensors::{Plan, Planned, Role};
use crate::error::Result;
use crate::llama::gguf::Writer;

const ROOT: &str = "model.vision_embed_tokens";
/// Patches of a crop are merged 2x2 before the projection.
const MERGE: u32 = 2;

/// All tensors, each made by `plan`.
///
/// # Errors
/// Those of `plan`.
pub fn tensors<'a>(
    config: &VisionConfig,
    text: &TextConfig,
    plan: &mut Plan<'_, 'a>,
) -> Result<Vec<Planned<'a>>> {
    let merged = config.n_embd * MERGE * MERGE;
    let mut all = tower(config, config.n_layer, plan)?;
    all.extend(projection(merged, text, plan)?);
    let newline = plan(
        &format!("{ROOT}.sub_GN"),
        &[1, 1, 1, merged],
        "v.image_newline",
        Role::Vector,
    )?;
    let separator = plan(
        &format!("{ROOT}.glb_GN"),
        &[1, 1, merged],
        "v.view_seperator",
        Role::Vector,
    )?;
    all.extend([newline.flattened(), separator.flattened()]);
    Ok(all)
}

/// The tensors of the CLIP tower, of which the file holds `n_layer` layers.
///
/// # Errors
/// Those of `plan`.
pub fn tower<'a>(
    config: &VisionConfig,
    n_layer: u32,
    plan: &mut Plan<'_, 'a>,
) -> Result<Vec<Planned<'a>>> {
    let (d, ff) = (config.n_embd, config.n_ff);
    let side = config.image_size / config.patch_size;
    let tower = format!("{ROOT}.img_processor.vision_model");

    let patch = &[d, 3, config.patch_size, config.patch_size];
    let mut all = vec![
        plan(
            &format!("{tower}.embeddings.class_embedding"),
            &[d],
            "v.class_embd",
            Role::Vector,
        )?,
        plan(
            &format!("{tower}.embeddings.patch_embedding.weight"),
            patch,
            "v.patch_embd.weight",
            Role::Kernel,
        )?,
        plan(
            &format!("{tower}.embeddings.position_embedding.weight"),
            &[side * side + 1, d],
            "v.position_embd.weight",
            Role::Positions,
        )?,
    ];
    // The name is spelt so in CLIP's implementation.
    all.extend(pair(
        plan,
        &format!("{tower}.pre_layrnorm"),
        &[d],
        "v.pre_ln",
    )?);
    for il in 0..n_layer {
        for (from, shape, name) in [
            ("self_attn.q_proj", &[d, d][..], "attn_q"),
            ("self_attn.k_proj", &[d, d], "attn_k"),
            ("self_attn.v_proj", &[d, d], "attn_v"),
            ("self_attn.out_proj", &[d, d], "attn_out"),
            ("layer_norm1", &[d], "ln1"),
            ("layer_norm2", &[d], "ln2"),
            ("mlp.fc1", &[ff, d], "ffn_up"),
            ("mlp.fc2", &[d, ff], "ffn_down"),
        ] {
            let from = format!("{tower}.encoder.layers.{il}.{from}");
            all.extend(pair(plan, &from, shape, &format!("v.blk.{il}.{name}"))?);
        }
    }
    Ok(all)
}

/// The two layers from `inputs` values of the tower to the text model's embeddings.
///
/// # Errors
/// Those of `plan`.
pub fn projection<'a>(
    inputs: u32,
    text: &TextConfig,
    plan: &mut Plan<'_, 'a>,
) -> Result<Vec<Planned<'a>>> {
    let out = text.n_embd;
    let mut all = Vec::new();
    for (from, shape, name) in [
        ("img_projection.0", &[out, inputs], "mm.0"),
        ("img_projection.2", &[out, out], "mm.2"),
    ] {
        all.extend(pair(plan, &format!("{ROOT}.{from}"), shape, name)?);
    }
    Ok(all)
}

/// A weight, which is a matrix or a norm's vector, and its bias.
fn pair<'a>(
    plan: &mut Plan<'_, 'a>,
    from: &str,
    shape: &[u32],
    name: &str,
) -> Result<[Planned<'a>; 2]> {
    let role = if shape.len() == 1 {
        Role::Vector
    } else {
        Role::Matrix
    };
    let mut one = |part: &str, shape: &[u32], role| {
        plan(
            &format!("{from}.{part}"),
            shape,
            &format!("{name}.{part}"),
            role,
        )
    };
    Ok([
        one("weight", shape, role)?,
        one("bias", &shape[..1], Role::Vector)?,
    ])
}

/// Writes everything but the tensors.
///
/// # Errors
/// From [`Writer`].
pub fn metadata(writer: &mut Writer, config: &VisionConfig, text: &TextConfig) -> Result<()> {
    let projector = Projector {
        name: "phi3v",
        n_layer: config.n_layer,
        sizes: &[
            ("preproc_max_tiles", config.num_crops),
            ("spatial_merge_size", MERGE),
        ],
    };
    projector.metadata(writer, config, text)
}

/// What clip.cpp makes of a tower's output.
pub struct Projector<'a> {
    /// Its name there.
    pub name: &'a str,
    /// Layers in the file; some projectors leave the last one out while they run.
    pub n_layer: u32,
    /// Keys that it wants besides those of every tower.
    pub sizes: &'a [(&'a str, u32)],
}

impl Projector<'_> {
    /// As [`metadata`].
    ///
    /// # Errors
    /// From [`Writer`].
    pub fn metadata(
        &self,
        writer: &mut Writer,
        config: &VisionConfig,
        text: &TextConfig,
    ) -> Result<()> {
        writer.set_bool("clip.has_vision_encoder", true)?;
        writer.set_text("clip.projector_type", self.name)?;
        let sizes = [
            ("image_size", config.image_size),
            ("patch_size", config.patch_size),
            ("embedding_length", config.n_embd),
            ("feed_forward_length", config.n_ff),
            ("block_count", self.n_layer),
            ("attention.head_count", config.n_head),
            ("projection_dim", text.n_embd),
        ];
        for (key, value) in sizes.iter().chain(self.sizes) {
            writer.set_u32(&format!("clip.vision.{key}"), *value)?;
        }
        writer.set_f32("clip.vision.attention.layer_norm_epsilon", config.norm_eps)?;
        writer.set_f32_array("clip.vision.image_mean", &config.image_mean)?;
        writer.set_f32_array("clip.vision.image_std", &config.image_std)
    }
}
