//! Bad checkpoints: each is refused with one line that names the file and the value, and leaves no
//! output behind.

use hae::convert::OutType;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::convert::shard;
use crate::fixture::{Copy, checkpoint, convert, convert_fails, fails_with, options, read_tensors};

/// Damages a copy, converts it to F16 and compares the message.
fn refused(damage: impl FnOnce(&Copy), expected: &[&str]) {
    let copy = Copy::new();
    damage(&copy);
    let message = convert_fails(copy.0.path(), OutType::F16);
    for part in expected {
        assert!(message.contains(part), "expected \"{part}\" in: {message}");
    }
}

fn config(change: impl FnOnce(&mut Value), expected: &[&str]) {
    refused(|c| c.edit("config.json", change), expected);
}

#[test]
fn directories_without_a_model() {
    let empty = TempDir::new().unwrap();
    assert!(convert_fails(empty.path(), OutType::F16).contains("config.json"));
    let missing = convert_fails(&empty.path().join("nowhere"), OutType::F16);
    assert!(missing.contains("nowhere: is not a directory"), "{missing}");
    refused(
        |c| c.remove("model.safetensors"),
        &["holds neither model.safetensors nor model.safetensors.index.json"],
    );
    refused(
        |c| c.remove("preprocessor_config.json"),
        &["preprocessor_config.json"],
    );
    refused(
        |c| {
            c.remove("tokenizer.model");
            c.remove("tokenizer.json");
        },
        &["holds neither tokenizer.model nor tokenizer.json"],
    );
}

#[test]
fn json_that_is_none() {
    refused(
        |c| c.write("config.json", "{\"model_type\": "),
        &["config.json", "line 1"],
    );
    refused(
        |c| c.write("config.json", "{}"),
        &["config.json", "missing field"],
    );
    refused(
        |c| c.write("tokenizer_config.json", "[1"),
        &["tokenizer_config.json"],
    );
    refused(
        |c| c.write("added_tokens.json", "{\"a\": -1}"),
        &["added_tokens.json", "-1"],
    );
    refused(
        |c| c.write("generation_config.json", "\u{0}"),
        &["generation_config.json"],
    );
    refused(
        |c| {
            c.edit("preprocessor_config.json", |p| {
                p["image_mean"] = json!([0.5, 0.5])
            })
        },
        &["image_mean has 2 values, expected 3"],
    );
    refused(
        |c| c.edit("preprocessor_config.json", |p| p["num_crops"] = json!(0)),
        &["num_crops is 0"],
    );
}

#[test]
fn configurations_that_cannot_be() {
    config(
        |c| c["model_type"] = json!("llama"),
        &["model_type is \"llama\", expected \"phi3_v\""],
    );
    config(
        |c| c["num_attention_heads"] = json!(7),
        &["num_attention_heads is 7, expected a divisor of hidden_size (256)"],
    );
    config(
        |c| c["num_attention_heads"] = json!(0),
        &["num_attention_heads is 0"],
    );
    config(
        |c| c["num_hidden_layers"] = json!(513),
        &["num_hidden_layers is 513, expected 1 to 512"],
    );
    config(|c| c["hidden_size"] = json!(-1), &["config.json", "-1"]);
    config(
        |c| c["rms_norm_eps"] = json!(0.0),
        &["rms_norm_eps is 0, expected a positive number"],
    );
    config(
        |c| c["sliding_window"] = json!(2048),
        &["sliding_window is 2048"],
    );
    config(
        |c| c["rope_scaling"]["type"] = json!("yarn"),
        &["rope_scaling.type is \"yarn\""],
    );
    config(
        |c| {
            c["rope_scaling"]["long_factor"]
                .as_array_mut()
                .unwrap()
                .pop();
        },
        &["rope_scaling.long_factor has 31 factors, expected 32"],
    );
    config(
        |c| c["rope_scaling"]["short_factor"][3] = json!(-1.0),
        &["short_factor is -1"],
    );
    config(
        |c| c["img_processor"]["layer_idx"] = json!(-6),
        &["layer_idx is -6 with 4 layers"],
    );
    config(
        |c| c["img_processor"]["image_size"] = json!(182),
        &["image_size is 182, expected a multiple of twice"],
    );
    config(
        |c| c["img_processor"]["num_img_tokens"] = json!(144),
        &["num_img_tokens is 144, expected 36"],
    );
    config(
        |c| c["img_processor"]["hidden_act"] = json!("gelu"),
        &["hidden_act is \"gelu\", expected \"quick_gelu\""],
    );
    config(
        |c| c["embd_layer"]["hd_transform_order"] = json!("glb_sub"),
        &["hd_transform_order is \"glb_sub\""],
    );
}

#[test]
fn tensors_that_are_missing_or_misshapen() {
    let norm = "model.layers.3.input_layernorm.weight";
    let newline = "model.vision_embed_tokens.sub_GN";
    refused(
        |c| c.edit_tensors(|t| drop(t.remove(norm))),
        &[
            "model.safetensors",
            norm,
            "is missing, expected shape [256]",
        ],
    );
    refused(
        |c| c.edit_tensors(|t| drop(t.remove(newline))),
        &[newline, "is missing, expected shape [1, 1, 1, 512]"],
    );
    refused(
        |c| c.edit_tensors(|t| t.get_mut(newline).unwrap().1 = vec![512]),
        &[newline, "has shape [512], expected [1, 1, 1, 512]"],
    );
    refused(
        |c| c.edit_tensors(|t| t.get_mut(norm).unwrap().0 = Dtype::I16),
        &[norm, "is I16, expected F32, F16 or BF16"],
    );
    refused(
        |c| c.edit_tensors(|t| t.get_mut(norm).unwrap().2[..2].copy_from_slice(&[0xff, 0x7f])),
        &[norm, "holds NaN or infinity"],
    );
}

#[test]
fn values_too_large_for_f16() {
    let copy = Copy::new();
    let name = "lm_head.weight";
    copy.edit_tensors(|t| {
        let (dtype, shape, raw) = t.get_mut(name).unwrap();
        *dtype = Dtype::F32;
        *raw = vec![0; shape.iter().product::<usize>() * 4];
        raw[..4].copy_from_slice(&1e6f32.to_le_bytes());
    });
    let message = convert_fails(copy.0.path(), OutType::F16);
    assert!(
        message.contains("lm_head.weight holds 1000000, which F16 cannot"),
        "{message}"
    );
    convert(copy.0.path(), OutType::Bf16);
}

#[test]
fn safetensors_that_lie() {
    let bytes = std::fs::read(checkpoint().join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for len in [
        0,
        7,
        8,
        100,
        8 + header - 1,
        8 + header,
        bytes.len() / 2,
        bytes.len() - 1,
    ] {
        refused(
            |c| c.write("model.safetensors", &bytes[..len]),
            &["model.safetensors: "],
        );
    }
    let mut longer = bytes.clone();
    longer.push(0);
    refused(
        |c| c.write("model.safetensors", &longer),
        &["its header describes"],
    );
    for claimed in [u64::MAX, 100_000_001, bytes.len() as u64] {
        let mut lying = bytes.clone();
        lying[..8].copy_from_slice(&claimed.to_le_bytes());
        refused(
            |c| c.write("model.safetensors", &lying),
            &["claims a header of"],
        );
    }
    let huge =
        json!({"a": {"dtype": "F32", "shape": [u64::MAX, 2], "data_offsets": [0, 8]}}).to_string();
    let mut file = (huge.len() as u64).to_le_bytes().to_vec();
    file.extend(huge.bytes());
    file.extend([0; 8]);
    refused(
        |c| c.write("model.safetensors", &file),
        &["safetensors header"],
    );
}

#[test]
fn shards_that_are_missing_or_elsewhere() {
    let first = "model-00001-of-00002.safetensors";
    let sharded = |damage: &dyn Fn(&Copy), expected: &[&str]| {
        refused(
            |c| {
                shard(c, read_tensors(&c.path("model.safetensors")));
                damage(c);
            },
            expected,
        );
    };
    let index = "model.safetensors.index.json";
    sharded(&|c| c.remove(first), &[first]);
    sharded(
        &|c| {
            c.edit(index, |i| {
                i["weight_map"]["lm_head.weight"] = json!("../x.safetensors")
            })
        },
        &["../x.safetensors", "is not a plain file name"],
    );
    sharded(
        &|c| c.edit(index, |i| i["weight_map"]["new"] = json!(first)),
        &[first, "tensor new is missing"],
    );
    sharded(
        &|c| {
            c.edit(index, |i| {
                drop(
                    i["weight_map"]
                        .as_object_mut()
                        .unwrap()
                        .remove("lm_head.weight"),
                )
            })
        },
        &["lm_head.weight is missing"],
    );
}

#[test]
fn vocabularies_that_llama_cpp_would_choke_on() {
    config(
        |c| c["vocab_size"] = json!(900),
        &["tokenizer.model: has 960 pieces, the embedding table 900 rows"],
    );
    refused(
        |c| c.edit("added_tokens.json", |t| t["<|extra|>"] = json!(1024)),
        &["\"<|extra|>\" has id 1024, the embedding table 1024 rows"],
    );
    refused(
        |c| c.edit("added_tokens.json", |t| t["<|user|>"] = json!(1010)),
        &["token \"<|user|>\" has the ids 970 and 1010"],
    );
    refused(
        |c| {
            c.edit("tokenizer_config.json", |t| {
                t["bos_token"] = json!("<begin>")
            })
        },
        &["bos_token \"<begin>\" is not in the vocabulary"],
    );
    refused(
        |c| {
            c.edit("generation_config.json", |g| {
                g["eos_token_id"] = json!([5000])
            })
        },
        &["eos_token_id is 5000"],
    );
    refused(
        |c| c.write("tokenizer.model", b"\xff\xff\xff\xff"),
        &["tokenizer.model: is not a SentencePiece model"],
    );
    // An empty message is a valid protobuf: a model without pieces, of the default type.
    refused(
        |c| c.write("tokenizer.model", b""),
        &["model type 1, expected 2 (BPE)"],
    );
    let whole = std::fs::read(checkpoint().join("tokenizer.model")).unwrap();
    refused(
        |c| c.write("tokenizer.model", &whole[..whole.len() / 2]),
        &["tokenizer.model"],
    );
    refused(
        |c| {
            c.remove("tokenizer.model");
            c.edit("tokenizer.json", |t| t["model"]["vocab"]["▁"] = json!(0));
        },
        &["tokenizer.json: piece", "expected each of 0 to 959 once"],
    );
}

#[test]
fn names_and_outputs() {
    let out = TempDir::new().unwrap();
    let good = options(&checkpoint(), out.path(), OutType::F16);

    let mut bad = good.clone();
    bad.name = Some("tiny".into());
    assert!(fails_with(&bad, out.path()).contains("\"tiny\" does not hold \"phi-3\" or \"phi3\""));

    let mut bad = good.clone();
    bad.mmproj_out = bad.text_out.clone();
    assert!(fails_with(&bad, out.path()).contains("is the same file"));

    // The second file cannot be created: the first must not stay.
    let mut bad = good.clone();
    bad.mmproj_out = out.path().join("nowhere/mmproj.gguf");
    assert!(fails_with(&bad, out.path()).contains("nowhere does not exist"));

    let mut bad = good;
    bad.mmproj_out = out.path().to_owned();
    assert!(fails_with(&bad, out.path()).contains("is a directory"));
}

#[test]
fn a_failure_keeps_the_file_that_was_there() {
    let out = TempDir::new().unwrap();
    let old = out.path().join("text.gguf");
    std::fs::write(&old, "old").unwrap();
    let copy = Copy::new();
    // Found only while the second file is being written.
    copy.edit_tensors(|t| {
        t.get_mut("model.vision_embed_tokens.glb_GN").unwrap().2[..2]
            .copy_from_slice(&[0xff, 0x7f]);
    });
    let result = hae::convert::convert(
        &options(copy.0.path(), out.path(), OutType::F16),
        &mut |_, _| (),
    );
    assert!(result.unwrap_err().to_string().contains("glb_GN holds NaN"));
    assert_eq!(std::fs::read_to_string(&old).unwrap(), "old");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1);
}
