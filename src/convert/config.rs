//! `config.json` and `preprocessor_config.json`, checked and with defaults filled in.
//!
//! The published Phi-3.5-vision-instruct names its tower ("openai/clip-vit-large-patch14-336")
//! instead of describing it; what `img_processor` leaves out is therefore that tower's.

mod raw;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::json;
use crate::error::{Error, Result};

/// llama.cpp's LLAMA_MAX_LAYERS.
const MAX_LAYERS: u32 = 512;
/// Far above any published model; keeps products of two sizes within 64 bits.
const MAX_SIZE: u32 = 1 << 24;

/// The Phi-3 decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// Positions that the model was made for.
    pub n_ctx: u32,
    /// Positions up to here use the short rope factors.
    pub n_ctx_orig: u32,
    /// Width of the hidden states.
    pub n_embd: u32,
    /// Layers.
    pub n_layer: u32,
    /// Query heads of a layer.
    pub n_head: u32,
    /// K and V heads of a layer.
    pub n_head_kv: u32,
    /// Width of the feed-forward part.
    pub n_ff: u32,
    /// Rows of the embedding table.
    pub n_vocab: u32,
    /// The epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Dimensions of a head that are rotated.
    pub n_rot: u32,
    /// Factors for contexts beyond the original ones; `None`: the model has none.
    pub longrope: Option<Longrope>,
    /// Whether the output layer is the embedding table.
    pub tied: bool,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a generation, the end of a text first.
    pub eos: Vec<u32>,
    /// The token that fills a batch up.
    pub pad: Option<u32>,
    /// The model's own name, where the configuration knows it.
    pub name: Option<String>,
}

/// Frequency divisors, `n_rot / 2` of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Longrope {
    /// For positions within the original context: one for each rotated pair.
    pub short: Vec<f32>,
    /// For longer contexts: as many.
    pub long: Vec<f32>,
    /// What cos and sin are multiplied by, with either set.
    pub attn_factor: f32,
}

/// [`Longrope::attn_factor`] of a model that was stretched from `n_ctx_orig` positions to `n_ctx`.
pub fn attn_factor(n_ctx: u32, n_ctx_orig: u32) -> f32 {
    let original = f64::from(n_ctx_orig);
    let scale = f64::from(n_ctx) / original;
    if scale > 1.0 {
        (1.0 + scale.ln() / original.ln()).sqrt() as f32
    } else {
        1.0
    }
}

/// The CLIP tower and the projection behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Width of the hidden states.
    pub n_embd: u32,
    /// Layers that run: the features are an inner hidden state.
    pub n_layer: u32,
    /// Heads of a layer.
    pub n_head: u32,
    /// Width of the feed-forward part.
    pub n_ff: u32,
    /// Side of a crop, in pixels.
    pub image_size: u32,
    /// Pixels of a patch's side.
    pub patch_size: u32,
    /// The epsilon of LayerNorm.
    pub norm_eps: f32,
    /// Crops of a picture at most, if a run does not say otherwise.
    pub num_crops: u32,
    /// Taken from the values of 0 to 1, by color.
    pub image_mean: [f32; 3],
    /// What they are divided by after that, by color.
    pub image_std: [f32; 3],
}

/// Of the text model and of the vision model.
pub type Configs = (TextConfig, VisionConfig);

/// Reads and checks both files of `dir`.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] naming the file, the field, its value and what was expected.
pub fn read(dir: &Path) -> Result<Configs> {
    let file = Fields {
        path: dir.join("config.json"),
    };
    let raw: raw::Config = json::read(&file.path)?;
    let text = file.text(&raw)?;
    let preprocessor = Fields {
        path: dir.join("preprocessor_config.json"),
    };
    let vision = file.vision(&raw, &preprocessor, &json::read(&preprocessor.path)?)?;
    Ok((text, vision))
}

/// A file whose fields are being checked.
struct Fields {
    path: PathBuf,
}

impl Fields {
    fn text(&self, raw: &raw::Config) -> Result<TextConfig> {
        self.equal("model_type", &raw.model_type, "phi3_v")?;
        self.equal(
            "hidden_act",
            raw.hidden_act.as_deref().unwrap_or("silu"),
            "silu",
        )?;
        self.within("num_hidden_layers", raw.num_hidden_layers, 1..=MAX_LAYERS)?;
        self.within("intermediate_size", raw.intermediate_size, 1..=MAX_SIZE)?;
        self.within("vocab_size", raw.vocab_size, 1..=MAX_SIZE)?;
        self.within(
            "max_position_embeddings",
            raw.max_position_embeddings,
            1..=1 << 30,
        )?;
        self.within(
            "original_max_position_embeddings",
            raw.original_max_position_embeddings,
            2..=1 << 30,
        )?;
        let head_dim = self.heads(
            "hidden_size",
            raw.hidden_size,
            "num_attention_heads",
            raw.num_attention_heads,
        )?;
        let n_head_kv = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        self.heads(
            "num_attention_heads",
            raw.num_attention_heads,
            "num_key_value_heads",
            n_head_kv,
        )?;
        // llama.cpp runs every phi3 without a window (src/models/phi3.cpp), so one that could ever
        // bite would give other results. Phi-3.5-vision's is twice its context.
        if let Some(window) = raw
            .sliding_window
            .filter(|&w| w != 0 && w < raw.max_position_embeddings.into())
        {
            return Err(self.wrong(format!(
                "sliding_window is {window}, below max_position_embeddings ({}): llama.cpp runs phi3 without a window",
                raw.max_position_embeddings
            )));
        }
        let partial = raw.partial_rotary_factor.unwrap_or(1.0);
        let n_rot = (partial * f64::from(head_dim)) as u32;
        if !(partial > 0.0 && partial <= 1.0) || n_rot == 0 || !n_rot.is_multiple_of(2) {
            return Err(self.wrong(format!(
                "partial_rotary_factor {partial} of heads of {head_dim} leaves no even number of dimensions"
            )));
        }
        Ok(TextConfig {
            n_ctx: raw.max_position_embeddings,
            n_ctx_orig: raw.original_max_position_embeddings,
            n_embd: raw.hidden_size,
            n_layer: raw.num_hidden_layers,
            n_head: raw.num_attention_heads,
            n_head_kv,
            n_ff: raw.intermediate_size,
            n_vocab: raw.vocab_size,
            norm_eps: self.positive("rms_norm_eps", raw.rms_norm_eps)?,
            rope_theta: self.positive("rope_theta", raw.rope_theta)?,
            n_rot,
            longrope: raw
                .rope_scaling
                .as_ref()
                .map(|rope| self.longrope(raw, rope, n_rot))
                .transpose()?,
            tied: raw.tie_word_embeddings,
            bos: raw.bos_token_id.known().first().copied(),
            eos: raw.eos_token_id.known(),
            pad: raw.pad_token_id.known().first().copied(),
            name: raw
                .name_or_path
                .as_deref()
                .and_then(|n| n.rsplit('/').next())
                .map(str::to_owned),
        })
    }

    fn longrope(&self, raw: &raw::Config, rope: &raw::Rope, n_rot: u32) -> Result<Longrope> {
        let kind = rope
            .rope_type
            .as_deref()
            .or(rope.r#type.as_deref())
            .unwrap_or_default();
        if !matches!(kind, "su" | "longrope") {
            return Err(self.wrong(format!(
                "rope_scaling.type is \"{}\", expected \"su\" or \"longrope\"",
                kind.escape_debug()
            )));
        }
        let factors = |name: &'static str, values: &[f64]| -> Result<Vec<f32>> {
            if values.len() != n_rot as usize / 2 {
                return Err(self.wrong(format!(
                    "rope_scaling.{name} has {} factors, expected {} (half of {n_rot} rotated dimensions)",
                    values.len(),
                    n_rot / 2
                )));
            }
            values.iter().map(|&v| self.positive(name, v)).collect()
        };
        Ok(Longrope {
            short: factors("short_factor", &rope.short_factor)?,
            long: factors("long_factor", &rope.long_factor)?,
            attn_factor: attn_factor(
                raw.max_position_embeddings,
                raw.original_max_position_embeddings,
            ),
        })
    }

    fn vision(
        &self,
        raw: &raw::Config,
        pre_file: &Fields,
        pre: &raw::Preprocessor,
    ) -> Result<VisionConfig> {
        let tower = &raw.img_processor;
        self.equal("img_processor.name", &tower.name, "clip_vision_model")?;
        self.equal("img_processor.hidden_act", &tower.hidden_act, "quick_gelu")?;
        self.equal("img_processor.type_feature", &tower.type_feature, "patch")?;
        self.equal(
            "embd_layer.projection_cls",
            &raw.embd_layer.projection_cls,
            "mlp",
        )?;
        self.equal(
            "embd_layer.hd_transform_order",
            &raw.embd_layer.hd_transform_order,
            "sub_glb",
        )?;
        if !raw.embd_layer.use_hd_transform || !raw.embd_layer.with_learnable_separator {
            return Err(self.wrong("embd_layer has no HD transform with separators, expected both"));
        }
        self.within(
            "img_processor.num_hidden_layers",
            tower.num_hidden_layers,
            1..=MAX_LAYERS,
        )?;
        self.within(
            "img_processor.intermediate_size",
            tower.intermediate_size,
            1..=MAX_SIZE,
        )?;
        self.within("img_processor.patch_size", tower.patch_size, 1..=1024)?;
        self.within("img_processor.image_size", tower.image_size, 1..=16384)?;
        self.heads(
            "img_processor.hidden_size",
            tower.hidden_size,
            "img_processor.num_attention_heads",
            tower.num_attention_heads,
        )?;
        // Patches are merged two by two, so a crop has an even number of them on a side.
        if !tower.image_size.is_multiple_of(2 * tower.patch_size) {
            return Err(self.wrong(format!(
                "img_processor.image_size is {}, expected a multiple of twice the patch size {}",
                tower.image_size, tower.patch_size
            )));
        }
        let side = tower.image_size / tower.patch_size / 2;
        for (name, value, expected) in [
            ("num_img_tokens", tower.num_img_tokens, side * side),
            ("image_dim_out", tower.image_dim_out, tower.hidden_size),
        ] {
            if value.is_some_and(|v| v != expected) {
                let value = value.unwrap_or_default();
                return Err(self.wrong(format!(
                    "img_processor.{name} is {value}, expected {expected} by the other sizes"
                )));
            }
        }
        // Hidden state 0 is the input of the first layer, so state i takes i layers; negative
        // indices count from the end of the num_hidden_layers + 1 states.
        let n = i64::from(tower.num_hidden_layers);
        let layers = if tower.layer_idx < 0 {
            n + 1 + tower.layer_idx
        } else {
            tower.layer_idx
        };
        if !(1..=n).contains(&layers) {
            return Err(self.wrong(format!(
                "img_processor.layer_idx is {} with {n} layers",
                tower.layer_idx
            )));
        }
        pre_file.within("num_crops", pre.num_crops, 1..=256)?;
        Ok(VisionConfig {
            n_embd: tower.hidden_size,
            n_layer: layers as u32,
            n_head: tower.num_attention_heads,
            n_ff: tower.intermediate_size,
            image_size: tower.image_size,
            patch_size: tower.patch_size,
            norm_eps: self.positive("img_processor.layer_norm_eps", tower.layer_norm_eps)?,
            num_crops: pre.num_crops,
            image_mean: pre_file.channels("image_mean", &pre.image_mean)?,
            image_std: pre_file.channels("image_std", &pre.image_std)?,
        })
    }

    fn channels(&self, name: &str, values: &[f64]) -> Result<[f32; 3]> {
        let values: Vec<f32> = values
            .iter()
            .map(|&v| self.positive(name, v))
            .collect::<Result<_>>()?;
        let n = values.len();
        values
            .try_into()
            .map_err(|_| self.wrong(format!("{name} has {n} values, expected 3")))
    }

    fn heads(&self, size_name: &str, size: u32, heads_name: &str, heads: u32) -> Result<u32> {
        self.within(size_name, size, 1..=MAX_SIZE)?;
        if heads == 0 || !size.is_multiple_of(heads) {
            return Err(self.wrong(format!(
                "{heads_name} is {heads}, expected a divisor of {size_name} ({size})"
            )));
        }
        Ok(size / heads)
    }

    fn within(&self, name: &str, value: u32, range: RangeInclusive<u32>) -> Result<()> {
        if range.contains(&value) {
            return Ok(());
        }
        Err(self.wrong(format!(
            "{name} is {value}, expected {} to {}",
            range.start(),
            range.end()
        )))
    }

    fn positive(&self, name: &str, value: f64) -> Result<f32> {
        let narrow = value as f32;
        if narrow > 0.0 && narrow.is_finite() {
            return Ok(narrow);
        }
        Err(self.wrong(format!("{name} is {value}, expected a positive number")))
    }

    fn equal(&self, name: &str, value: &str, expected: &str) -> Result<()> {
        if value == expected {
            return Ok(());
        }
        Err(self.wrong(format!(
            "{name} is \"{}\", expected \"{expected}\"",
            value.escape_debug()
        )))
    }

    fn wrong(&self, reason: impl Into<String>) -> Error {
        Error::file(&self.path, reason)
    }
}
