//! Vision models other than Phi-3.5-vision, through the program: small untrained ones of three
//! families that mtmd knows. What they say means nothing; that they run, or are refused with the
//! reason, and what they count, does.

use std::path::{Path, PathBuf};

use hae::llama::gguf::Value;
use hae::policy;
use serde_json::Value as Json;
use tempfile::TempDir;

use crate::bin::{answer, refusal};
use crate::model::{PICTURE, TEXT, VISION, repository};
use crate::remake::{Remake, Tensor};

/// A text model and its vision file in a folder.
pub struct Pair(TempDir);

impl Pair {
    fn new(text: Option<&Remake>, vision: &Remake) -> Self {
        let dir = TempDir::new().unwrap();
        match text {
            Some(text) => text.write(&dir.path().join("text.gguf")),
            None => {
                let model = repository(TEXT);
                std::fs::copy(model, dir.path().join("text.gguf")).unwrap();
            }
        }
        vision.write(&dir.path().join("vision.gguf"));
        Pair(dir)
    }

    /// `hae run` with a picture; `more` is split at spaces.
    fn args(&self, more: &str) -> Vec<String> {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let mut args = vec![
            "run".into(),
            "-m".into(),
            path(&self.0.path().join("text.gguf")),
        ];
        args.extend(["-mm".into(), path(&self.0.path().join("vision.gguf"))]);
        args.extend(["--image".into(), path(&repository(PICTURE))]);
        let fixed = "-p What? -n 6 --temp 0 -t 1 -o json";
        args.extend(fixed.split(' ').map(str::to_owned));
        args.extend(more.split_whitespace().map(str::to_owned));
        args
    }

    /// `text.gguf` or `vision.gguf`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The report of a run.
    pub fn json(&self, more: &str) -> Json {
        serde_json::from_str(&answer(&self.args(more))).unwrap()
    }
}

fn count(json: &Json, pointer: &str) -> u64 {
    json.pointer(pointer).and_then(Json::as_u64).unwrap()
}

/// The tower of the small model with LLaVA-1.5's projector: two layers, no crops.
fn llava() -> Remake {
    let mut file = Remake::read(&repository(VISION));
    file.set_text("clip.projector_type", "mlp");
    file.drop_key("clip.vision.preproc_max_tiles");
    file.drop_key("clip.vision.spatial_merge_size");
    file.tensors.retain(|t| {
        t.name.starts_with("v.") && !t.name.contains("newline") && !t.name.contains("seperator")
    });
    file.tensors.extend([
        Tensor::random("mm.0.weight", &[192, 256]),
        Tensor::random("mm.0.bias", &[256]),
        Tensor::random("mm.2.weight", &[256, 256]),
        Tensor::random("mm.2.bias", &[256]),
    ]);
    file
}

#[test]
fn llava_runs_under_both_policies() {
    let pair = Pair::new(None, &llava());
    let full = pair.json("");
    // 168 / 14 patches a side, each a token.
    assert_eq!(count(&full, "/tokens/prompt/vision"), 144);
    assert_eq!(count(&full, "/kv/cells/live/vision"), 144);
    let hae = pair.json("--kv-policy hae --dap-keep 0.25");
    assert_eq!(count(&hae, "/kv/cells/live/vision"), 36);
    assert_eq!(count(&hae, "/kv/cells/evicted/vision"), 108);
    // mtmd no longer guesses what the oldest files are.
    let mut old = llava();
    old.drop_key("clip.projector_type");
    let line = refusal(&Pair::new(None, &old).args(""));
    assert!(line.contains("clip.projector_type is missing"), "{line}");
}

/// The same projector behind a tower of its own, for a text model of LLaMA's architecture.
pub fn llava_llama() -> Pair {
    let mut text = text("llama");
    text.set_u32("llama.rope.dimension_count", 32);
    let mut vision = tower("mlp", 168);
    vision.tensors.extend([
        Tensor::random("v.class_embd", &[64]),
        Tensor::random("v.position_embd.weight", &[64, 145]),
        Tensor::ones("v.pre_ln.weight", 64),
        Tensor::random("v.pre_ln.bias", &[64]),
        Tensor::random("mm.0.weight", &[64, 64]),
        Tensor::random("mm.0.bias", &[64]),
        Tensor::random("mm.2.weight", &[64, 64]),
        Tensor::random("mm.2.bias", &[64]),
    ]);
    Pair::new(Some(&text), &vision)
}

/// The vocabulary of the small model, and hyperparameters of a small model of `arch`.
fn text(arch: &str) -> Remake {
    let mut file = Remake::read(&repository(TEXT));
    file.tensors.clear();
    file.keys.retain(|(key, _)| !key.starts_with("phi3."));
    file.set_text("general.architecture", arch);
    for (key, value) in [
        ("context_length", 4096),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("block_count", 2),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 2),
    ] {
        file.set_u32(&format!("{arch}.{key}"), value);
    }
    file.set_f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5);
    file.tensors = vec![
        Tensor::random("token_embd.weight", &[64, 1024]),
        Tensor::ones("output_norm.weight", 64),
    ];
    for block in 0..2 {
        let name = |part: &str| format!("blk.{block}.{part}.weight");
        for part in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            file.tensors.push(Tensor::random(&name(part), &[64, 64]));
        }
        for part in ["ffn_gate", "ffn_up"] {
            file.tensors.push(Tensor::random(&name(part), &[64, 96]));
        }
        file.tensors
            .push(Tensor::random(&name("ffn_down"), &[96, 64]));
        for part in ["attn_norm", "ffn_norm"] {
            file.tensors.push(Tensor::ones(&name(part), 64));
        }
    }
    file
}

/// A vision tower of two blocks, 64 wide, 14 pixels a patch.
fn tower(projector: &str, image_size: u32) -> Remake {
    let mut file = Remake::read(&repository(VISION));
    file.tensors.clear();
    file.drop_key("clip.vision.preproc_max_tiles");
    file.drop_key("clip.vision.spatial_merge_size");
    file.set_text("clip.projector_type", projector);
    for (key, value) in [
        ("image_size", image_size),
        ("embedding_length", 64),
        ("feed_forward_length", 128),
        ("block_count", 2),
        ("attention.head_count", 2),
        ("projection_dim", 64),
    ] {
        file.set_u32(&format!("clip.vision.{key}"), value);
    }
    file.set("clip.use_gelu", Value::Bool(true));
    let mut add = |name: &str, dims: &[u64]| file.tensors.push(Tensor::random(name, dims));
    add("v.patch_embd.weight", &[14, 14, 3, 64]);
    for block in 0..2 {
        for (part, dims) in [
            ("attn_q", [64, 64]),
            ("attn_k", [64, 64]),
            ("attn_v", [64, 64]),
            ("attn_out", [64, 64]),
            ("ffn_up", [64, 128]),
            ("ffn_down", [128, 64]),
        ] {
            add(&format!("v.blk.{block}.{part}.weight"), &dims);
            add(&format!("v.blk.{block}.{part}.bias"), &dims[1..]);
        }
    }
    for name in [
        "v.blk.0.ln1",
        "v.blk.0.ln2",
        "v.blk.1.ln1",
        "v.blk.1.ln2",
        "v.post_ln",
    ] {
        file.tensors
            .push(Tensor::ones(&format!("{name}.weight"), 64));
        file.tensors
            .push(Tensor::random(&format!("{name}.bias"), &[64]));
    }
    file
}

/// Qwen2-VL: all tokens of a picture share positions on the first axis (M-RoPE). Queries and keys are
/// scaled: the larger they are, the sharper is attention.
pub fn qwen2vl(scale: f32) -> Pair {
    let mut text = text("qwen2vl");
    for block in 0..2 {
        for part in ["attn_q", "attn_k"] {
            text.tensor(&format!("blk.{block}.{part}.weight"))
                .scale(scale);
        }
    }
    let sections = [4, 6, 6, 0].map(Value::Signed).to_vec();
    text.set("qwen2vl.rope.dimension_sections", Value::Array(sections));
    let mut vision = tower("qwen2vl_merger", 560);
    vision.tensors.extend([
        Tensor::random("v.patch_embd.weight.1", &[14, 14, 3, 64]),
        Tensor::random("mm.0.weight", &[256, 256]),
        Tensor::random("mm.0.bias", &[256]),
        Tensor::random("mm.2.weight", &[256, 64]),
        Tensor::random("mm.2.bias", &[64]),
    ]);
    Pair::new(Some(&text), &vision)
}

#[test]
fn m_rope_runs_under_full_and_is_refused_for_the_others() {
    let pair = qwen2vl(1.0);
    let full = pair.json("");
    // 336 / 28 merged patches a side.
    assert_eq!(count(&full, "/tokens/prompt/vision"), 144);
    assert_eq!(count(&full, "/kv/cells/live/vision"), 144);
    assert_eq!(count(&full, "/tokens/generated"), 6);
    // In batches that cut the picture, the positions and so the answer are the same.
    let cut = pair.json("-b 50 -ub 50");
    assert_eq!(cut["text"], full["text"]);
    every_policy_is_refused(&pair, "all tokens of a picture share one position (M-RoPE)");
}

/// Qwen2.5-VL: as Qwen2-VL, with windows in every other block of the tower, and gates.
pub fn qwen25vl() -> Pair {
    let pair = qwen2vl(1.0);
    let path = pair.file("vision.gguf");
    let mut vision = Remake::read(&path);
    vision.set_text("clip.projector_type", "qwen2.5vl_merger");
    vision.set_u32("clip.vision.n_wa_pattern", 2);
    vision.drop_key("clip.use_gelu");
    vision.set("clip.use_silu", Value::Bool(true));
    for block in 0..2 {
        let name = format!("v.blk.{block}.ffn_gate");
        vision.tensors.extend([
            Tensor::random(&format!("{name}.weight"), &[64, 128]),
            Tensor::random(&format!("{name}.bias"), &[128]),
        ]);
    }
    vision.write(&path);
    pair
}

/// Whoever evicts names itself and the reason.
fn every_policy_is_refused(pair: &Pair, reason: &str) {
    for name in policy::names().filter(|name| *name != "full") {
        let line = refusal(&pair.args(&format!("--kv-policy {name}")));
        let expected = format!("kv policy {name} cannot serve this model: {reason}");
        assert!(line.contains(&expected), "{line}");
    }
}

/// Gemma 3: a sliding window in every other layer here.
pub fn gemma3_text() -> Remake {
    gemma3_scaled(1.0)
}

/// The larger queries and keys are, the sharper is attention.
fn gemma3_scaled(scale: f32) -> Remake {
    let mut text = text("gemma3");
    for (key, value) in [
        ("key_length", 32),
        ("value_length", 32),
        ("sliding_window", 32),
        ("sliding_window_pattern", 2),
    ] {
        text.set_u32(&format!("gemma3.attention.{key}"), value);
    }
    for block in 0..2 {
        for (part, n) in [
            ("post_attention_norm", 64),
            ("attn_q_norm", 32),
            ("attn_k_norm", 32),
            ("post_ffw_norm", 64),
        ] {
            let name = format!("blk.{block}.{part}.weight");
            text.tensors.push(Tensor::ones(&name, n));
        }
        // Norms make queries and keys as long as these say.
        for part in ["attn_q_norm", "attn_k_norm"] {
            text.tensor(&format!("blk.{block}.{part}.weight"))
                .scale(scale);
        }
    }
    text
}

/// With pictures that attend to all of themselves.
pub fn gemma3(scale: f32) -> Pair {
    let mut vision = tower("gemma3", 224);
    vision.set_u32("clip.vision.projector.scale_factor", 2);
    vision.tensors.extend([
        Tensor::random("v.patch_embd.bias", &[64]),
        Tensor::random("v.position_embd.weight", &[64, 256]),
        Tensor::random("mm.input_projection.weight", &[64, 64]),
        Tensor::ones("mm.soft_emb_norm.weight", 64),
    ]);
    Pair::new(Some(&gemma3_scaled(scale)), &vision)
}

#[test]
fn sliding_windows_run_under_full_and_are_refused_for_the_others() {
    let pair = gemma3(1.0);
    let full = pair.json("");
    // 224 / 28 merged patches a side.
    assert_eq!(count(&full, "/tokens/prompt/vision"), 64);
    assert_eq!(count(&full, "/tokens/generated"), 6);
    every_policy_is_refused(&pair, "it uses sliding-window attention");
    // A picture cannot be cut where its tokens attend to those behind them.
    let fits = pair.json("-b 64 -ub 64");
    assert_eq!(fits["text"], full["text"]);
    for cut in ["-ub 63", "-b 63 -ub 512"] {
        let line = refusal(&pair.args(cut));
        assert!(
            line.contains("-ub: 63 rows, but a picture takes 64 at once with this model"),
            "{line}"
        );
    }
}

/// Mamba: a state instead of a cache. There is no vision file for it.
pub fn mamba() -> Remake {
    let mut text = text("mamba");
    for (key, value) in [
        ("conv_kernel", 4),
        ("inner_size", 128),
        ("state_size", 16),
        ("time_step_rank", 4),
    ] {
        text.set_u32(&format!("mamba.ssm.{key}"), value);
    }
    text.tensors.retain(|t| !t.name.starts_with("blk."));
    for block in 0..2 {
        let name = |part: &str| format!("blk.{block}.{part}");
        text.tensors
            .push(Tensor::ones(&name("attn_norm.weight"), 64));
        for (part, dims) in [
            ("ssm_in.weight", &[64, 256][..]),
            ("ssm_conv1d.weight", &[4, 128]),
            ("ssm_conv1d.bias", &[128]),
            ("ssm_x.weight", &[128, 36]),
            ("ssm_dt.weight", &[4, 128]),
            ("ssm_dt.bias", &[128]),
            ("ssm_a", &[16, 128]),
            ("ssm_d", &[128]),
            ("ssm_out.weight", &[128, 64]),
        ] {
            text.tensors.push(Tensor::random(&name(part), dims));
        }
    }
    text
}

#[test]
fn recurrent_models_run_under_full_and_are_refused_for_the_others() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("text.gguf");
    mamba().write(&path);
    let args = |more: &str| -> Vec<String> {
        let model = ["run", "-m", path.to_str().unwrap()].map(str::to_owned);
        let fixed = "-p What? -n 6 --temp 0 -t 1 -no-cnv -o json ";
        let words = format!("{fixed}{more}");
        let words = words.split_whitespace().map(str::to_owned);
        model.into_iter().chain(words).collect()
    };
    let full: Json = serde_json::from_str(&answer(&args(""))).unwrap();
    assert!(count(&full, "/tokens/generated") > 0);
    for name in policy::names().filter(|name| *name != "full") {
        let line = refusal(&args(&format!("--kv-policy {name}")));
        let expected = format!("kv policy {name} cannot serve this model: its memory is recurrent");
        assert!(line.contains(&expected), "{line}");
    }
}
