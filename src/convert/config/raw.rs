//! The two files as they are: names and types only.

use serde::Deserialize;

use crate::convert::json::Ids;

#[derive(Deserialize)]
pub struct Config {
    pub model_type: String,
    pub hidden_size: u32,
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub num_key_value_heads: Option<u32>,
    pub intermediate_size: u32,
    pub vocab_size: u32,
    pub hidden_act: Option<String>,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub partial_rotary_factor: Option<f64>,
    pub original_max_position_embeddings: u32,
    pub max_position_embeddings: u32,
    pub rope_scaling: Option<Rope>,
    pub sliding_window: Option<u64>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub bos_token_id: Ids,
    #[serde(default)]
    pub eos_token_id: Ids,
    #[serde(default)]
    pub pad_token_id: Ids,
    #[serde(rename = "_name_or_path")]
    pub name_or_path: Option<String>,
    pub img_processor: Tower,
    pub embd_layer: Projection,
}

#[derive(Deserialize)]
pub struct Rope {
    pub rope_type: Option<String>,
    pub r#type: Option<String>,
    pub short_factor: Vec<f64>,
    pub long_factor: Vec<f64>,
}

#[derive(Deserialize)]
#[serde(default)]
pub struct Tower {
    pub name: String,
    pub image_dim_out: Option<u32>,
    pub num_img_tokens: Option<u32>,
    pub hidden_size: u32,
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub intermediate_size: u32,
    pub image_size: u32,
    pub patch_size: u32,
    pub layer_idx: i64,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub type_feature: String,
}

impl Default for Tower {
    fn default() -> Self {
        Self {
            name: "clip_vision_model".into(),
            image_dim_out: None,
            num_img_tokens: None,
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            intermediate_size: 4096,
            image_size: 336,
            patch_size: 14,
            layer_idx: -2,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            type_feature: "patch".into(),
        }
    }
}

#[derive(Deserialize)]
pub struct Projection {
    pub projection_cls: String,
    pub use_hd_transform: bool,
    pub with_learnable_separator: bool,
    pub hd_transform_order: String,
}

#[derive(Deserialize)]
pub struct Preprocessor {
    pub image_mean: Vec<f64>,
    pub image_std: Vec<f64>,
    pub num_crops: u32,
}
