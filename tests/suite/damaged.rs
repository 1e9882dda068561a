//! Damaged and hostile GGUFs given to the program: each is refused with one line, exit code 2 and
//! nothing else, whatever ggml or llama.cpp would have done with it.

use std::path::{Path, PathBuf};

use hae::llama::gguf::{TensorType, Value};
use tempfile::TempDir;

use crate::bin::{answer, refusal};
use crate::model::{PICTURE, VISION, repository};
use crate::remake::Remake;

fn text() -> PathBuf {
    repository("models/small-phi3v-Q4_K_M.gguf")
}

fn vision() -> PathBuf {
    repository(VISION)
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    Vision,
}

const BOTH: [Kind; 2] = [Kind::Text, Kind::Vision];

impl Kind {
    fn good(self) -> PathBuf {
        match self {
            Kind::Text => text(),
            Kind::Vision => vision(),
        }
    }

    /// A short run with `file` in its place.
    fn args(self, file: &Path) -> Vec<String> {
        let (good, picture) = (text(), repository(PICTURE));
        let mut args: Vec<String> = "run -p hi -n 2 --temp 0 -t 1 -c 512"
            .split(' ')
            .map(Into::into)
            .collect();
        let mut add = |flag: &str, path: &Path| {
            args.extend([flag.into(), path.to_str().unwrap().into()]);
        };
        match self {
            Kind::Text => add("-m", file),
            Kind::Vision => {
                add("-m", &good);
                add("--mmproj", file);
                add("--image", &picture);
            }
        }
        args
    }

    /// The line that `bytes` are refused with; it names the file.
    fn refuses_bytes(self, bytes: &[u8]) -> String {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("bad.gguf");
        std::fs::write(&file, bytes).unwrap();
        let line = refusal(&self.args(&file));
        assert!(line.contains("bad.gguf: "), "{line}");
        line
    }

    fn refuses(self, change: impl FnOnce(&mut Remake), expected: &str) {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("bad.gguf");
        let mut remake = Remake::read(&self.good());
        change(&mut remake);
        remake.write(&file);
        let line = refusal(&self.args(&file));
        assert!(
            line.contains("bad.gguf: ") && line.contains(expected),
            "expected \"{expected}\" in: {line}"
        );
    }
}

#[test]
fn remade_files_still_run() {
    for kind in BOTH {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("good.gguf");
        Remake::read(&kind.good()).write(&file);
        assert_eq!(
            answer(&kind.args(&file)),
            answer(&kind.args(&kind.good())),
            "the same answer"
        );
    }
}

#[test]
fn files_that_are_not_there_or_not_files() {
    let dir = TempDir::new().unwrap();
    for kind in BOTH {
        let line = refusal(&kind.args(&dir.path().join("nowhere.gguf")));
        assert!(line.contains("nowhere.gguf: No such file"), "{line}");
        let line = refusal(&kind.args(dir.path()));
        assert!(line.contains("is not a regular file"), "{line}");
        assert!(kind.refuses_bytes(b"").contains("ends within magic"));
        assert!(
            kind.refuses_bytes(b"\x89PNG....")
                .contains("expected \"GGUF\"")
        );
    }
}

#[test]
fn text_and_vision_are_not_mixed_up() {
    let line = refusal(&Kind::Text.args(&vision()));
    assert!(
        line.contains("expected a text model: pass it as --mmproj"),
        "{line}"
    );
    let line = refusal(&Kind::Vision.args(&text()));
    assert!(
        line.contains("expected a vision file: pass it as -m"),
        "{line}"
    );
}

#[test]
fn cut_files() {
    for kind in BOTH {
        let bytes = std::fs::read(kind.good()).unwrap();
        // Dense in the metadata, sparse in the tensors.
        for i in 0..20usize {
            let len = (bytes.len() as f64 * (i as f64 / 20.0).powi(3)) as usize + i * 7;
            kind.refuses_bytes(&bytes[..len]);
        }
    }
}

/// The file with the bytes at the first occurrence of `key`, plus `skip`, replaced.
fn patched(kind: Kind, key: &[u8], skip: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = std::fs::read(kind.good()).unwrap();
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + skip;
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn sizes_that_lie() {
    for kind in BOTH {
        let header = |at: usize, n: u64| {
            let mut bytes = std::fs::read(kind.good()).unwrap();
            bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
            kind.refuses_bytes(&bytes)
        };
        for n in [u64::MAX, 1 << 63, 1 << 40] {
            assert!(header(8, n).contains("tensor count counts"));
            assert!(header(16, n).contains("key count counts"));
        }
        header(8, 1000);
        header(16, 1000);

        // A key of the same length stands in for the alignment.
        let file_type: &[u8] = b"general.file_type";
        for (alignment, what) in [(0u32, "0"), (3, "3"), (1 << 31, "2^31")] {
            let mut bytes = patched(kind, file_type, 4, &alignment.to_le_bytes());
            let at = bytes.windows(17).position(|w| w == file_type).unwrap();
            bytes[at..at + 17].copy_from_slice(b"general.alignment");
            let line = kind.refuses_bytes(&bytes);
            assert!(line.contains("general.alignment is not"), "{what}: {line}");
        }
    }
    // The dimensions of a tensor follow its name and their number.
    for (n, expected) in [
        (0u64, "cannot have shape"),
        (u64::MAX, "cannot have shape"),
        (1 << 62, "cannot have shape"),
        (1 << 30, "ends behind the end of the file"),
    ] {
        let line = Kind::Text.refuses_bytes(&patched(
            Kind::Text,
            b"token_embd.weight",
            12,
            &n.to_le_bytes(),
        ));
        assert!(line.contains(expected), "{n}: {line}");
        let line = Kind::Vision.refuses_bytes(&patched(
            Kind::Vision,
            b"mm.0.weight",
            12,
            &n.to_le_bytes(),
        ));
        assert!(line.contains(expected), "{n}: {line}");
    }
    // An array of strings that says it is one of 2^60, and a string of 2^60 bytes.
    let line = Kind::Text.refuses_bytes(&patched(
        Kind::Text,
        b"tokenizer.ggml.tokens",
        8,
        &(1u64 << 60).to_le_bytes(),
    ));
    assert!(line.contains("tokenizer.ggml.tokens counts"), "{line}");
    Kind::Text.refuses_bytes(&patched(
        Kind::Text,
        b"general.architecture",
        4,
        &(1u64 << 60).to_le_bytes(),
    ));
}

#[test]
fn values_of_a_text_model_that_cannot_be() {
    let refuses = |key: &str, value: Value, expected: &str| {
        Kind::Text.refuses(|r| r.set(key, value), expected);
    };
    let number = Value::Unsigned;
    for blocks in [0, 513, 1 << 31, u64::from(u32::MAX)] {
        let expected = format!("phi3.block_count is {blocks}, expected 1 to 512");
        refuses("phi3.block_count", number(blocks), &expected);
    }
    refuses("phi3.block_count", number(9), "tensor blk.8");
    refuses("phi3.block_count", number(7), "wrong number of tensors");
    refuses(
        "phi3.context_length",
        number(u64::from(u32::MAX)),
        "phi3.context_length is 4294967295",
    );
    for heads in [0, 3, u64::from(u32::MAX)] {
        refuses("phi3.attention.head_count", number(heads), "");
        refuses("phi3.attention.head_count_kv", number(heads), "");
    }
    refuses("phi3.embedding_length", number(0), "");
    refuses("phi3.rope.dimension_count", number(u64::from(u32::MAX)), "");
    for eps in [-1.0, f64::NAN, f64::INFINITY] {
        refuses(
            "phi3.attention.layer_norm_rms_epsilon",
            Value::Float(eps),
            "epsilon is",
        );
    }
    refuses(
        "general.architecture",
        Value::Text("gpt5".into()),
        "gpt5.block_count is missing",
    );
    Kind::Text.refuses(
        |r| {
            r.set_text("general.architecture", "gpt5");
            r.set_u32("gpt5.block_count", 8);
        },
        "unknown model architecture: 'gpt5'",
    );
    refuses("general.architecture", number(3), "expected a string");
    // llama.cpp asserts that each text is one token's; one without a text gets a name.
    for [first, second] in [["a\n", "a\n"], ["", "[EMPTY_5]"]] {
        Kind::Text.refuses(
            |r| {
                let tokens = r
                    .keys
                    .iter_mut()
                    .find(|(k, _)| k == "tokenizer.ggml.tokens");
                let Some((_, Value::Array(tokens))) = tokens else {
                    panic!("no tokens");
                };
                tokens[5] = Value::Text(first.into());
                tokens[9] = Value::Text(second.into());
            },
            "at 5 and at 9, expected each text once",
        );
    }
    refuses(
        "tokenizer.ggml.model",
        Value::Text("x".into()),
        "unknown tokenizer",
    );
}

#[test]
fn arrays_of_the_wrong_type_or_length() {
    let floats = |n: usize| Value::Array(vec![Value::Float(0.5); n]);
    let ints = |n: usize| Value::Array(vec![Value::Signed(1); n]);
    let texts = Value::Array(vec![Value::Text("a".into()); 3]);
    for (key, value) in [
        ("tokenizer.ggml.tokens", floats(1024)),
        ("tokenizer.ggml.tokens", Value::Unsigned(7)),
        ("tokenizer.ggml.scores", ints(3)),
        ("tokenizer.ggml.scores", texts.clone()),
        ("tokenizer.ggml.token_type", floats(1024)),
        ("phi3.attention.head_count", ints(600)),
        ("phi3.attention.head_count", texts.clone()),
        ("phi3.feed_forward_length", floats(8)),
    ] {
        Kind::Text.refuses(|r| r.set(key, value), "");
    }
    for (key, value) in [
        ("clip.vision.image_mean", floats(2)),
        ("clip.vision.image_mean", ints(3)),
        ("clip.vision.image_std", texts),
        ("clip.vision.image_std", Value::Float(0.5)),
    ] {
        Kind::Vision.refuses(|r| r.set(key, value), "");
    }
}

/// The file with a matrix of numbers of this type, as large as it has to be.
fn with_type(file: &mut Remake, name: &str, raw: u32) {
    let tensor = file.tensor(name);
    tensor.kind = TensorType::from_raw(raw).unwrap();
    let bytes = tensor.kind.tensor_bytes(&tensor.dims).unwrap();
    tensor.data = vec![1; bytes as usize];
}

/// llama.cpp loads them, and then has no function that multiplies them.
#[test]
fn weights_of_types_that_cannot_be_multiplied() {
    for (name, raw, kind) in [
        ("blk.0.attn_qkv.weight", 24, "i8"),
        ("blk.1.attn_output.weight", 25, "i16"),
        ("blk.2.ffn_up.weight", 26, "i32"),
        ("output.weight", 27, "i64"),
        ("token_embd.weight", 28, "f64"),
        ("blk.0.ffn_down.weight", 9, "q8_1"),
        ("output_norm.weight", 26, "i32"),
    ] {
        let expected = format!("tensor {name} is {kind}, expected f32, f16");
        Kind::Text.refuses(|r| with_type(r, name, raw), &expected);
    }
    for (name, raw, kind) in [
        ("v.blk.0.attn_q.weight", 24, "i8"),
        ("v.blk.1.ffn_up.weight", 28, "f64"),
        ("v.blk.1.ln1.weight", 25, "i16"),
    ] {
        let expected = format!("tensor {name} is {kind}, expected f32, f16");
        Kind::Vision.refuses(|r| with_type(r, name, raw), &expected);
    }
}

/// mtmd makes room for as many blocks as a file claims, whatever its projector.
#[test]
fn vision_files_of_any_projector_claim_blocks_that_can_be() {
    for projector in ["mlp", "gemma3", "qwen2vl_merger", "idefics3", "phi3v"] {
        for claimed in [513, 2_000_000_000] {
            let change = |r: &mut Remake| {
                r.set_text("clip.projector_type", projector);
                r.set_u32("clip.vision.block_count", claimed);
            };
            let expected = format!("clip.vision.block_count is {claimed}, expected at most 512");
            Kind::Vision.refuses(change, &expected);
        }
    }
}

#[test]
fn values_of_a_vision_file_that_cannot_be() {
    for (key, values) in [
        ("image_size", &[0u32, 13, 1 << 30, u32::MAX][..]),
        ("patch_size", &[0, 13, u32::MAX]),
        ("embedding_length", &[0, 64, u32::MAX]),
        ("block_count", &[0, 5, 513, u32::MAX]),
        ("attention.head_count", &[0, 5, u32::MAX]),
        ("spatial_merge_size", &[0, 1, u32::MAX]),
        ("preproc_max_tiles", &[0, u32::MAX]),
        ("projection_dim", &[0, u32::MAX]),
    ] {
        for &value in values {
            let key = format!("clip.vision.{key}");
            Kind::Vision.refuses(|r| r.set_u32(&key, value), "");
        }
    }
    Kind::Vision.refuses(
        |r| r.set_text("clip.projector_type", "phi9v"),
        "unknown projector type: phi9v",
    );
    Kind::Vision.refuses(|r| r.drop_key("clip.vision.image_std"), "image_std");
}

#[test]
fn tensors_that_are_missing_or_misshapen() {
    for (kind, name) in [
        (Kind::Text, "blk.3.attn_qkv.weight"),
        (Kind::Text, "token_embd.weight"),
        (Kind::Text, "rope_factors_long.weight"),
        (Kind::Vision, "v.class_embd"),
        (Kind::Vision, "v.blk.2.ffn_up.weight"),
        (Kind::Vision, "mm.2.weight"),
        (Kind::Vision, "v.image_newline"),
    ] {
        kind.refuses(|r| r.tensors.retain(|t| t.name != name), name);
        kind.refuses(
            |r| {
                // The first dimension stays: rows of quantized blocks must be whole.
                let tensor = r.tensor(name);
                tensor.dims.push(2);
                tensor.data.extend(tensor.data.clone());
            },
            "",
        );
    }
}

#[test]
fn a_vision_file_for_another_width() {
    // The last layer of the projector gives 512 values where the text model takes 256.
    let wider = |r: &mut Remake| {
        r.set_u32("clip.vision.projection_dim", 512);
        for name in ["mm.2.weight", "mm.2.bias"] {
            let tensor = r.tensor(name);
            *tensor.dims.last_mut().unwrap() *= 2;
            tensor.data.extend(tensor.data.clone());
        }
    };
    Kind::Vision.refuses(wider, "256");
}

/// An assertion that nothing foresaw: the process tells its handler and ends with its status.
#[test]
fn an_assertion_of_ggml_ends_the_process_in_order() {
    const CHILD: &str = "HAE_TEST_ASSERTION";
    if std::env::var_os(CHILD).is_some() {
        hae::llama::on_abort(|message| {
            eprintln!("told: {message}");
            2
        });
        // SAFETY: C strings, and a format without arguments.
        unsafe { llama_cpp_sys_2::ggml_abort(c"a/b/file.cpp".as_ptr(), 12, c"oh no".as_ptr()) }
    }
    let name = "damaged::an_assertion_of_ggml_ends_the_process_in_order";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        stderr.contains("told: llama.cpp: file.cpp:12: oh no"),
        "{stderr}"
    );
}
