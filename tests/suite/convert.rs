//! Tensors that `hae convert` writes, against the safetensors file; determinism; the commands.

use std::collections::BTreeMap;
use std::path::Path;

use hae::convert::OutType;
use hae::llama::gguf::{Gguf, TensorType};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;

use crate::fixture::{self, Copy, Tensors, checkpoint, convert, load, read_tensors};

/// GGUF name and checkpoint name of every tensor, from the two formats' documentation.
fn text_names(n_layer: usize) -> BTreeMap<String, String> {
    let mut names = BTreeMap::from([
        (
            "token_embd.weight".into(),
            "model.embed_tokens.weight".into(),
        ),
        ("output_norm.weight".into(), "model.norm.weight".into()),
        ("output.weight".into(), "lm_head.weight".into()),
    ]);
    for i in 0..n_layer {
        for (gguf, hf) in [
            ("attn_norm", "input_layernorm"),
            ("attn_qkv", "self_attn.qkv_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_up", "mlp.gate_up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ] {
            names.insert(
                format!("blk.{i}.{gguf}.weight"),
                format!("model.layers.{i}.{hf}.weight"),
            );
        }
    }
    names
}

fn vision_names(n_layer: usize) -> BTreeMap<String, String> {
    let root = "model.vision_embed_tokens";
    let tower = format!("{root}.img_processor.vision_model");
    let mut names = BTreeMap::from([
        (
            "v.class_embd".into(),
            format!("{tower}.embeddings.class_embedding"),
        ),
        (
            "v.patch_embd.weight".into(),
            format!("{tower}.embeddings.patch_embedding.weight"),
        ),
        (
            "v.position_embd.weight".into(),
            format!("{tower}.embeddings.position_embedding.weight"),
        ),
        ("v.image_newline".into(), format!("{root}.sub_GN")),
        ("v.view_seperator".into(), format!("{root}.glb_GN")),
    ]);
    for end in ["weight", "bias"] {
        names.insert(
            format!("v.pre_ln.{end}"),
            format!("{tower}.pre_layrnorm.{end}"),
        );
        for k in [0, 2] {
            names.insert(
                format!("mm.{k}.{end}"),
                format!("{root}.img_projection.{k}.{end}"),
            );
        }
        for i in 0..n_layer {
            for (gguf, hf) in [
                ("attn_q", "self_attn.q_proj"),
                ("attn_k", "self_attn.k_proj"),
                ("attn_v", "self_attn.v_proj"),
                ("attn_out", "self_attn.out_proj"),
                ("ln1", "layer_norm1"),
                ("ln2", "layer_norm2"),
                ("ffn_up", "mlp.fc1"),
                ("ffn_down", "mlp.fc2"),
            ] {
                let hf = format!("{tower}.encoder.layers.{i}.{hf}.{end}");
                names.insert(format!("v.blk.{i}.{gguf}.{end}"), hf);
            }
        }
    }
    names
}

fn values(raw: &[u8], dtype: Dtype) -> Vec<f32> {
    let halves = raw.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F16 => halves.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => halves.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F32 => raw
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        other => panic!("{other:?}"),
    }
}

/// Every tensor of the file has the checkpoint's values and shape, and there are no others.
fn compare(path: &Path, names: &BTreeMap<String, String>, source: &Tensors, skip: &[&str]) {
    let bytes = std::fs::read(path).unwrap();
    let mut seen = 0;
    for tensor in Gguf::open(path).unwrap().tensors() {
        if skip.contains(&tensor.name.as_str()) {
            continue;
        }
        let (dtype, shape, raw) = &source[&names[&tensor.name]];
        let mut dims: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        // The separators are stored as [1, 1, (1,) 4 d] and written as vectors.
        dims.truncate(dims.iter().rposition(|&d| d != 1).unwrap() + 1);
        assert_eq!(tensor.dims, dims, "{}", tensor.name);
        let written = &bytes[tensor.offset as usize..][..tensor.bytes as usize];
        let kind = match tensor.kind {
            TensorType::F32 => Dtype::F32,
            TensorType::F16 => Dtype::F16,
            TensorType::BF16 => Dtype::BF16,
            other => panic!("{other:?}"),
        };
        assert!(
            values(written, kind) == values(raw, *dtype),
            "{} differs",
            tensor.name
        );
        seen += 1;
    }
    assert_eq!(seen, names.len());
}

#[test]
fn f32_and_f16_hold_the_checkpoints_values() {
    let source = read_tensors(&checkpoint().join("model.safetensors"));
    for outtype in [OutType::F32, OutType::F16] {
        let out = convert(&checkpoint(), outtype);
        compare(
            &out.text(),
            &text_names(6),
            &source,
            &["rope_factors_long.weight", "rope_factors_short.weight"],
        );
        compare(&out.mmproj(), &vision_names(3), &source, &[]);
    }
}

#[test]
fn rope_factors_are_the_configurations() {
    let out = convert(&checkpoint(), OutType::Q8_0);
    let bytes = std::fs::read(out.text()).unwrap();
    let scaling = &fixture::json(&checkpoint().join("config.json"))["rope_scaling"];
    for set in ["long", "short"] {
        let name = format!("rope_factors_{set}.weight");
        let tensor = Gguf::open(&out.text())
            .unwrap()
            .tensors()
            .into_iter()
            .find(|t| t.name == name)
            .unwrap();
        let expected: Vec<f32> = scaling[format!("{set}_factor")]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap() as f32)
            .collect();
        assert_eq!(tensor.kind, TensorType::F32);
        assert_eq!(
            values(
                &bytes[tensor.offset as usize..][..tensor.bytes as usize],
                Dtype::F32
            ),
            expected
        );
    }
}

#[test]
fn types_follow_the_request() {
    use TensorType as T;
    for (outtype, matrix, vision_matrix, kernel, file_types) in [
        (OutType::F32, T::F32, T::F32, T::F32, (0, 0)),
        (OutType::F16, T::F16, T::F16, T::F16, (1, 1)),
        (OutType::Bf16, T::BF16, T::BF16, T::F32, (32, 32)),
        (OutType::Q8_0, T::Q8_0, T::F16, T::F16, (7, 1)),
    ] {
        let out = convert(&checkpoint(), outtype);
        let text = Gguf::open(&out.text()).unwrap();
        let vision = Gguf::open(&out.mmproj()).unwrap();
        assert_eq!(text.unsigned("general.file_type").unwrap(), file_types.0);
        assert_eq!(vision.unsigned("general.file_type").unwrap(), file_types.1);
        for tensor in text.tensors() {
            let expected = if tensor.dims.len() == 1 {
                T::F32
            } else {
                matrix
            };
            assert_eq!(tensor.kind, expected, "{outtype:?} {}", tensor.name);
        }
        for tensor in vision.tensors() {
            let expected = match tensor.name.as_str() {
                "v.patch_embd.weight" => kernel,
                "v.position_embd.weight" => T::F32,
                _ if tensor.dims.len() == 1 => T::F32,
                _ => vision_matrix,
            };
            assert_eq!(tensor.kind, expected, "{outtype:?} {}", tensor.name);
        }
    }
}

#[test]
fn same_bytes_from_any_directory() {
    let copy = Copy::new();
    for outtype in [OutType::F16, OutType::Q8_0] {
        let (a, b) = (
            convert(&checkpoint(), outtype),
            convert(copy.0.path(), outtype),
        );
        assert!(std::fs::read(a.text()).unwrap() == std::fs::read(b.text()).unwrap());
        assert!(std::fs::read(a.mmproj()).unwrap() == std::fs::read(b.mmproj()).unwrap());
    }
}

#[test]
fn shards_equal_a_single_file() {
    let copy = Copy::new();
    shard(&copy, read_tensors(&copy.path("model.safetensors")));
    let (one, many) = (
        convert(&checkpoint(), OutType::F16),
        convert(copy.0.path(), OutType::F16),
    );
    assert!(std::fs::read(one.text()).unwrap() == std::fs::read(many.text()).unwrap());
    assert!(std::fs::read(one.mmproj()).unwrap() == std::fs::read(many.mmproj()).unwrap());
}

/// Replaces model.safetensors by two shards and their index.
pub fn shard(copy: &Copy, tensors: Tensors) {
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", i % 2 + 1);
        map.insert(name.clone(), json!(file));
        shards[i % 2].insert(name, tensor);
    }
    for (i, tensors) in shards.iter().enumerate() {
        copy.write(
            &format!("model-0000{}-of-00002.safetensors", i + 1),
            fixture::serialize(tensors),
        );
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    copy.write("model.safetensors.index.json", index.to_string());
    copy.remove("model.safetensors");
}

/// The published layout at the tiny model's sizes: bf16 shards, "longrope", tower sizes that the
/// configuration leaves out where they are CLIP's defaults.
#[test]
fn bf16_shards_convert_without_loss_to_bf16() {
    let copy = Copy::new();
    let mut tensors = read_tensors(&copy.path("model.safetensors"));
    for (dtype, _, raw) in tensors.values_mut() {
        *raw = values(raw, *dtype)
            .iter()
            .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
            .collect();
        *dtype = Dtype::BF16;
    }
    shard(&copy, tensors.clone());
    copy.edit("config.json", |c| {
        c["torch_dtype"] = json!("bfloat16");
        c["rope_scaling"]["type"] = json!("longrope");
        c["_name_or_path"] = json!("somebody/Phi-3.5-vision-instruct");
        let tower = c["img_processor"].as_object_mut().unwrap();
        for default in [
            "patch_size",
            "layer_idx",
            "hidden_act",
            "layer_norm_eps",
            "type_feature",
        ] {
            tower.remove(default);
        }
    });
    copy.edit("preprocessor_config.json", |p| p["num_crops"] = json!(16));
    let out = convert(copy.0.path(), OutType::Bf16);
    assert_eq!(out.summary.name, "Phi-3.5-vision-instruct");
    compare(
        &out.text(),
        &text_names(6),
        &tensors,
        &["rope_factors_long.weight", "rope_factors_short.weight"],
    );
    compare(&out.mmproj(), &vision_names(3), &tensors, &[]);
    let vision = Gguf::open(&out.mmproj()).unwrap();
    assert_eq!(
        vision.unsigned("clip.vision.preproc_max_tiles").unwrap(),
        16
    );
}

/// The published Phi-3.5-vision-instruct's configuration, as far as a conversion reads it.
#[test]
fn tied_embeddings_need_no_output_matrix() {
    let copy = Copy::new();
    copy.edit("config.json", |c| c["tie_word_embeddings"] = json!(true));
    copy.edit_tensors(|t| {
        t.remove("lm_head.weight");
    });
    let out = convert(copy.0.path(), OutType::F16);
    assert!(
        Gguf::open(&out.text())
            .unwrap()
            .tensors()
            .iter()
            .all(|t| t.name != "output.weight")
    );
    load(&out.text());
}

#[test]
fn rows_that_are_no_whole_blocks_stay_f16() {
    let copy = Copy::new();
    // 764 is no multiple of 32, so ffn_down (rows of 764) cannot be Q8_0.
    copy.edit("config.json", |c| c["intermediate_size"] = json!(764));
    copy.edit_tensors(|t| {
        for (name, (_, shape, raw)) in t.iter_mut() {
            if name.ends_with("gate_up_proj.weight") {
                shape[0] = 1528;
                raw.truncate(1528 * 256 * 2);
            } else if name.ends_with("down_proj.weight") {
                shape[1] = 764;
                raw.truncate(256 * 764 * 2);
            }
        }
    });
    let out = convert(copy.0.path(), OutType::Q8_0);
    let tensors = Gguf::open(&out.text()).unwrap().tensors();
    let kind = |name: &str| tensors.iter().find(|t| t.name == name).unwrap().kind;
    assert_eq!(kind("blk.0.ffn_down.weight"), TensorType::F16);
    assert_eq!(kind("blk.0.ffn_up.weight"), TensorType::Q8_0);
    load(&out.text());
}

/// The files in models/ are those of SHA256SUMS, the GGUFs stay small enough for a repository, and
/// the vision file is what the README says made it.
#[test]
fn kept_models_are_what_their_readme_says() {
    use sha2::{Digest, Sha256};
    let models = fixture::root().join("models");
    let sums = std::fs::read_to_string(models.join("SHA256SUMS")).unwrap();
    assert_eq!(sums.lines().count(), 21);
    for line in sums.lines() {
        let (expected, file) = line.split_once("  ").unwrap();
        let digest = Sha256::digest(std::fs::read(models.join(file)).unwrap());
        let found: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, expected, "{file}");
    }
    let size = |file: &str| std::fs::metadata(models.join(file)).unwrap().len();
    let files = sums.lines().map(|line| line.split_once("  ").unwrap().1);
    let ggufs: u64 = files.filter(|file| file.ends_with(".gguf")).map(size).sum();
    assert!(ggufs <= 25_000_000, "{ggufs}");
    let dir = tempfile::TempDir::new().unwrap();
    let mut options = fixture::options(&models.join("small-phi3v"), dir.path(), OutType::F16);
    options.name = Some("small-phi3v".into());
    hae::convert::convert(&options, &mut |_, _| ()).unwrap();
    let kept = std::fs::read(models.join("mmproj-small-phi3v-F16.gguf")).unwrap();
    assert!(std::fs::read(options.mmproj_out).unwrap() == kept);
}

#[test]
fn commands_keep_stdout_empty() {
    let dir = tempfile::TempDir::new().unwrap();
    let hae = || {
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_hae"));
        command.current_dir(dir.path());
        command
    };
    let convert = [
        "convert",
        "-o",
        "t.gguf",
        "--mmproj",
        "m.gguf",
        "--outtype",
        "f32",
    ];
    hae()
        .args(convert)
        .arg(checkpoint())
        .assert()
        .success()
        .stdout("");
    hae()
        .args(["quantize", "t.gguf", "q.gguf", "q5_k"])
        .assert()
        .success()
        .stdout("");
    assert_eq!(load(&dir.path().join("q.gguf")).n_vocab(), 1024);
    for bad in [
        &["quantize", "t.gguf", "x.gguf", "Q9"][..],
        &["quantize", "q.gguf", "x.gguf", "Q8_0"],
        &["convert", "nowhere", "-o", "x.gguf", "--mmproj", "y.gguf"],
    ] {
        hae().args(bad).assert().code(2).stdout("");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
}
