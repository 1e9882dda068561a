//! The sizes of Phi-3.5-vision-instruct, from its published configuration.

use crate::convert::config::{Longrope, TextConfig, VisionConfig, attn_factor};

/// Its decoder. The rope factors have their number and order of size, not their values.
pub fn phi35_text() -> TextConfig {
    const N_EMBD: u32 = 3072;
    const N_HEAD: u32 = 32;
    const N_CTX: u32 = 131_072;
    const N_CTX_ORIG: u32 = 4096;
    let n_rot = N_EMBD / N_HEAD;
    let factors = |last: f32| -> Vec<f32> {
        let n = n_rot / 2;
        let share = |i| i as f32 / (n - 1) as f32;
        (0..n).map(|i| 1.0 + (last - 1.0) * share(i)).collect()
    };
    TextConfig {
        n_ctx: N_CTX,
        n_ctx_orig: N_CTX_ORIG,
        n_embd: N_EMBD,
        n_layer: 32,
        n_head: N_HEAD,
        n_head_kv: N_HEAD,
        n_ff: 8192,
        n_vocab: 32064,
        norm_eps: 1e-5,
        rope_theta: 10000.0,
        n_rot,
        longrope: Some(Longrope {
            short: factors(3.0),
            long: factors(64.0),
            attn_factor: attn_factor(N_CTX, N_CTX_ORIG),
        }),
        tied: false,
        // The vocabulary says which tokens these are.
        bos: None,
        eos: Vec::new(),
        pad: None,
        name: None,
    }
}

/// Its tower, CLIP ViT-L/14 at 336 pixels, of whose 24 layers 23 run; its processor's four crops.
pub fn phi35_vision() -> VisionConfig {
    VisionConfig {
        n_embd: 1024,
        n_layer: 23,
        n_head: 16,
        n_ff: 4096,
        image_size: 336,
        patch_size: 14,
        norm_eps: 1e-5,
        num_crops: 4,
        image_mean: [0.481_454_66_f64, 0.457_827_5, 0.408_210_73].map(|v| v as f32),
        image_std: [0.268_629_54_f64, 0.261_302_58, 0.275_777_11].map(|v| v as f32),
    }
}
