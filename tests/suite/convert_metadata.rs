//! Metadata and vocabulary of what `hae convert` writes, and what llama.cpp makes of them.

use std::path::Path;

use hae::convert::{OutType, config};
use hae::llama::gguf::{Gguf, Value};
use serde_json::json;

use crate::fixture::{self, Copy, checkpoint, convert, load};

#[test]
fn text_metadata_is_what_llama_cpp_reads() {
    let out = convert(&checkpoint(), OutType::F16);
    let gguf = Gguf::open(&out.text()).unwrap();
    assert_eq!(gguf.text("general.architecture").unwrap(), "phi3");
    assert_eq!(gguf.text("general.type").unwrap(), "model");
    assert!(
        gguf.text("general.name")
            .unwrap()
            .to_lowercase()
            .contains("phi-3")
    );
    for (key, expected) in [
        ("phi3.context_length", 131072),
        ("phi3.rope.scaling.original_context_length", 4096),
        ("phi3.embedding_length", 256),
        ("phi3.feed_forward_length", 768),
        ("phi3.block_count", 6),
        ("phi3.attention.head_count", 4),
        ("phi3.attention.head_count_kv", 4),
        ("phi3.rope.dimension_count", 64),
        ("phi3.attention.sliding_window", 0),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 960),
        ("tokenizer.ggml.padding_token_id", 960),
        ("tokenizer.ggml.unknown_token_id", 0),
    ] {
        assert_eq!(gguf.unsigned(key).unwrap(), expected, "{key}");
    }
    // The checkpoint's description gives 1.190 for sqrt(1 + ln 32 / ln 4096).
    assert!((gguf.float("phi3.rope.scaling.attn_factor").unwrap() - 1.190).abs() < 5e-4);
    assert_eq!(
        gguf.get("tokenizer.ggml.add_bos_token"),
        Some(Value::Bool(true))
    );
    let Some(Value::Array(kinds)) = gguf.get("tokenizer.ggml.token_type") else {
        panic!()
    };
    // Special tokens are control tokens, <0x00> is a byte, rows without a token are unused.
    for (id, kind) in [
        (0, 3),
        (1, 3),
        (2, 3),
        (3, 6),
        (300, 1),
        (960, 3),
        (1004, 3),
        (1005, 5),
        (1023, 5),
    ] {
        assert_eq!(kinds[id], Value::Signed(kind), "token {id}");
    }
    let template =
        fixture::json(&checkpoint().join("tokenizer_config.json"))["chat_template"].clone();
    assert_eq!(
        gguf.text("tokenizer.chat_template").unwrap(),
        template.as_str().unwrap()
    );
}

#[test]
fn vision_metadata_is_what_clip_reads() {
    let out = convert(&checkpoint(), OutType::F16);
    let gguf = Gguf::open(&out.mmproj()).unwrap();
    assert_eq!(gguf.text("general.architecture").unwrap(), "clip");
    assert_eq!(gguf.text("general.type").unwrap(), "mmproj");
    assert_eq!(gguf.text("clip.projector_type").unwrap(), "phi3v");
    assert_eq!(gguf.get("clip.has_vision_encoder"), Some(Value::Bool(true)));
    assert_eq!(gguf.get("clip.use_gelu"), None);
    assert_eq!(gguf.get("clip.use_silu"), None);
    for (key, expected) in [
        ("image_size", 168),
        ("patch_size", 14),
        ("embedding_length", 128),
        ("feed_forward_length", 512),
        ("block_count", 3),
        ("attention.head_count", 4),
        ("projection_dim", 256),
        ("preproc_max_tiles", 4),
        ("spatial_merge_size", 2),
    ] {
        assert_eq!(
            gguf.unsigned(&format!("clip.vision.{key}")).unwrap(),
            expected,
            "{key}"
        );
    }
    let preprocessor = fixture::json(&checkpoint().join("preprocessor_config.json"));
    for key in ["image_mean", "image_std"] {
        let Some(Value::Array(found)) = gguf.get(&format!("clip.vision.{key}")) else {
            panic!("{key}")
        };
        let expected: Vec<Value> = preprocessor[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| Value::Float(f64::from(v.as_f64().unwrap() as f32)))
            .collect();
        assert_eq!(found, expected);
    }
}

/// Asks llama.cpp's tokenizer for the ids of all golden prompts.
fn check_golden_ids(text: &Path) {
    let model = load(text);
    let mut checked = 0;
    for prompt in fixture::golden()["prompts"].as_array().unwrap() {
        let expected: Vec<i32> = prompt["input_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_i64().unwrap() as i32)
            .filter(|&id| id >= 0)
            .collect();
        let found = fixture::tokenize_pieces(&model, prompt["prompt"].as_str().unwrap());
        assert_eq!(found, expected, "{}", prompt["id"]);
        checked += 1;
    }
    assert_eq!(checked, 12);
}

#[test]
fn golden_prompts_tokenize_as_in_the_processor() {
    check_golden_ids(&convert(&checkpoint(), OutType::Q8_0).text());
}

#[test]
fn tokenizer_json_alone_gives_the_same_ids() {
    let copy = Copy::new();
    copy.remove("tokenizer.model");
    check_golden_ids(&convert(copy.0.path(), OutType::Q8_0).text());
}

#[test]
fn generation_ends_where_the_model_stops() {
    let model = load(&convert(&checkpoint(), OutType::Q8_0).text());
    let stops: Vec<i32> =
        fixture::json(&checkpoint().join("generation_config.json"))["eos_token_id"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_i64().unwrap() as i32)
            .collect();
    assert_eq!(stops, [967, 961, 960]);
    for id in 0..1024 {
        // </s> (2) ends every model of this tokenizer in llama.cpp.
        let expected = stops.contains(&id) || id == 2;
        assert_eq!(
            model.vocab().is_eog(llama_cpp_2::token::LlamaToken(id)),
            expected,
            "token {id}"
        );
    }
}

/// In the order in which llama.cpp's converter looks for it, whatever editor wrote the files.
#[test]
fn the_chat_template_is_found_where_transformers_saved_it() {
    let template = |copy: &Copy| {
        let out = convert(copy.0.path(), OutType::Q8_0);
        let gguf = Gguf::open(&out.text()).unwrap();
        let template = gguf.text("tokenizer.chat_template").ok();
        (template.map(|t| t.to_owned()), out.summary.notes)
    };
    let copy = Copy::new();
    let (expected, notes) = template(&copy);
    let text = expected.clone().unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    copy.edit("tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let (none, notes) = template(&copy);
    assert_eq!(none, None);
    assert!(
        notes.iter().any(|n| n.starts_with("no chat template in")),
        "{notes:?}"
    );
    let saved = json!({ "chat_template": text.clone() }).to_string();
    copy.write("chat_template.json", format!("\u{feff}{saved}"));
    assert_eq!(template(&copy), (expected.clone(), vec![]));
    let several = json!({"chat_template": [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": text.clone()},
    ]});
    copy.write("chat_template.json", several.to_string());
    assert_eq!(template(&copy).0, expected);
    // Also without a tokenizer_config.json, whose special tokens config.json then names.
    let config = fixture::json(&copy.path("tokenizer_config.json"));
    copy.write("chat_template.json", saved);
    copy.remove("tokenizer_config.json");
    copy.edit("config.json", |config| {
        config["bos_token_id"] = json!(1);
        config["eos_token_id"] = json!(960);
    });
    assert_eq!(template(&copy).0, expected);
    copy.write("tokenizer_config.json", format!("\u{feff}{config}"));
    let lines = format!("\u{feff}{}", text.replace('\n', "\r\n"));
    copy.write("chat_template.jinja", lines);
    copy.write("chat_template.json", r#"{"chat_template": "another"}"#);
    assert_eq!(template(&copy).0, expected);
    copy.write("chat_template.json", r#"{"template": "x"}"#);
    copy.remove("chat_template.jinja");
    let message = fixture::convert_fails(copy.0.path(), OutType::Q8_0);
    assert!(
        message.contains("chat_template.json: missing field `chat_template`"),
        "{message}"
    );
}

/// A list's first id is the end of a text; all of them end a generation.
#[test]
fn ids_may_be_lists_or_less_than_none() {
    let copy = Copy::new();
    copy.edit("config.json", |config| {
        config["eos_token_id"] = json!([2, 961, 970]);
        config["pad_token_id"] = json!(-1);
        config["bos_token_id"] = json!(1);
    });
    copy.edit("tokenizer_config.json", |config| {
        let config = config.as_object_mut().unwrap();
        config.remove("eos_token");
        config.remove("pad_token");
    });
    copy.remove("generation_config.json");
    let out = convert(copy.0.path(), OutType::Q8_0);
    let gguf = Gguf::open(&out.text()).unwrap();
    assert_eq!(gguf.unsigned("tokenizer.ggml.eos_token_id").unwrap(), 2);
    assert!(gguf.get("tokenizer.ggml.padding_token_id").is_none());
    let model = load(&out.text());
    let ends = |id| model.vocab().is_eog(llama_cpp_2::token::LlamaToken(id));
    for id in 0..1024 {
        // <|endoftext|> (960) and <|end|> (967) are known to llama.cpp by their text.
        let expected = [2, 960, 961, 967, 970].contains(&id);
        let left = out
            .summary
            .notes
            .iter()
            .any(|note| note.contains(&format!("({id})")));
        assert_eq!(
            ends(id) || left,
            expected,
            "token {id}: {:?}",
            out.summary.notes
        );
    }
    copy.edit("config.json", |config| {
        config["eos_token_id"] = json!([2, 5000])
    });
    let message = fixture::convert_fails(copy.0.path(), OutType::Q8_0);
    assert!(
        message.contains("config.json: eos_token_id is 5000"),
        "{message}"
    );
}

#[test]
fn published_configuration_implies_clip_large() {
    let copy = Copy::new();
    let factors: Vec<f64> = (0..48).map(|i| 1.0 + 0.05 * f64::from(i)).collect();
    let config = json!({
        "_name_or_path": "Phi-3.5-vision-instruct",
        "architectures": ["Phi3VForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
        "bos_token_id": 1,
        "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
                       "use_hd_transform": true, "with_learnable_separator": true},
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "img_processor": {"image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
                          "name": "clip_vision_model", "num_img_tokens": 144},
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "model_type": "phi3_v",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"long_factor": factors, "short_factor": factors, "type": "su"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064
    });
    copy.write("config.json", config.to_string());
    copy.write(
        "preprocessor_config.json",
        json!({"auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}, "num_crops": 4,
               "image_mean": [0.48145466, 0.4578275, 0.40821073],
               "image_std": [0.26862954, 0.26130258, 0.27577711],
               "image_processor_type": "Phi3VImageProcessor", "num_img_tokens": 144})
        .to_string(),
    );
    let (text, vision) = config::read(copy.0.path()).unwrap();
    assert_eq!(
        (text.n_embd, text.n_layer, text.n_head, text.n_head_kv),
        (3072, 32, 32, 32)
    );
    assert_eq!(
        (text.n_ff, text.n_vocab, text.n_rot, text.tied),
        (8192, 32064, 96, false)
    );
    assert_eq!((text.n_ctx, text.n_ctx_orig), (131072, 4096));
    assert_eq!(text.longrope.unwrap().long.len(), 48);
    assert_eq!(
        (vision.n_embd, vision.n_layer, vision.n_head, vision.n_ff),
        (1024, 23, 16, 4096)
    );
    assert_eq!(
        (vision.image_size, vision.patch_size, vision.num_crops),
        (336, 14, 4)
    );
    assert_eq!(vision.norm_eps, 1e-5);
    // The tensors of the tiny checkpoint are not that model's, and that is found out.
    let message = fixture::convert_fails(copy.0.path(), OutType::F16);
    assert!(
        message.contains("model.embed_tokens.weight has shape [1024, 256], expected [32064, 3072]"),
        "{message}"
    );
}
