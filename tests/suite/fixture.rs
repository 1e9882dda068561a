//! The tiny checkpoint, copies of it to damage, and llama.cpp's own tokenizer to ask.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hae::Error;
use hae::convert::{self, Options, OutType, Summary};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_sys_2 as sys;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use tempfile::TempDir;

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub fn checkpoint() -> PathBuf {
    root().join("models/tiny-phi3v")
}

pub fn golden() -> Value {
    json(&root().join("tests/golden/tiny-phi3v/index.json"))
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A copy of the tiny checkpoint that a test may change.
pub struct Copy(pub TempDir);

impl Copy {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        for entry in std::fs::read_dir(checkpoint()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        Self(dir)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    pub fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value = json(&self.path(file));
        change(&mut value);
        self.write(file, serde_json::to_vec(&value).unwrap());
    }

    pub fn edit_tensors(&self, change: impl FnOnce(&mut Tensors)) {
        let mut tensors = read_tensors(&self.path("model.safetensors"));
        change(&mut tensors);
        self.write("model.safetensors", serialize(&tensors));
    }
}

/// Type, shape and little-endian bytes by name.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, t)| {
            (
                name.to_owned(),
                (t.dtype(), t.shape().to_vec(), t.data().to_vec()),
            )
        })
        .collect()
}

pub fn serialize(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Where [`convert`] puts its two files.
pub struct Converted {
    pub dir: TempDir,
    pub summary: Summary,
}

impl Converted {
    pub fn text(&self) -> PathBuf {
        self.dir.path().join("text.gguf")
    }

    pub fn mmproj(&self) -> PathBuf {
        self.dir.path().join("mmproj.gguf")
    }
}

pub fn options(model_dir: &Path, out: &Path, outtype: OutType) -> Options {
    Options {
        model_dir: model_dir.to_owned(),
        text_out: out.join("text.gguf"),
        mmproj_out: out.join("mmproj.gguf"),
        outtype,
        name: None,
    }
}

pub fn convert(model_dir: &Path, outtype: OutType) -> Converted {
    let dir = TempDir::new().unwrap();
    let summary =
        convert::convert(&options(model_dir, dir.path(), outtype), &mut |_, _| ()).unwrap();
    Converted { dir, summary }
}

/// The message of a conversion that must fail, after checking that it is one line and that nothing
/// was left behind.
pub fn convert_fails(model_dir: &Path, outtype: OutType) -> String {
    let dir = TempDir::new().unwrap();
    fails_with(&options(model_dir, dir.path(), outtype), dir.path())
}

pub fn fails_with(options: &Options, out: &Path) -> String {
    let error: Error = convert::convert(options, &mut |_, _| ()).expect_err("conversion succeeded");
    let message = error.to_string();
    assert!(!message.contains('\n'), "more than one line: {message}");
    let left: Vec<_> = std::fs::read_dir(out)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?} ({message})");
    message
}

/// llama.cpp's backend belongs to the process, and `hae` sets it up. This is the proof of it that
/// llama-cpp-2 asks for; a static is never dropped, which would tear the backend down.
pub fn backend() -> &'static LlamaBackend {
    static BACKEND: std::sync::OnceLock<LlamaBackend> = std::sync::OnceLock::new();
    BACKEND.get_or_init(|| {
        crate::model::load(&crate::model::repository(crate::model::TEXT));
        LlamaBackend {}
    })
}

pub fn load(path: &Path) -> LlamaModel {
    LlamaModel::load_from_file(backend(), path, &LlamaModelParams::default()).unwrap()
}

/// Where there are GPUs as well.
pub fn load_on_host(path: &Path) -> LlamaModel {
    let params = LlamaModelParams::default().with_n_gpu_layers(0);
    LlamaModel::load_from_file(backend(), path, &params).unwrap()
}

/// Decodes tokens of sequence 0 at these positions: llama.cpp's status. `logits`: of the last one.
pub fn decode(ctx: &mut LlamaContext<'_>, tokens: &[i32], pos: &[i32], logits: bool) -> i32 {
    let (mut tokens, mut pos, mut seq) = (tokens.to_vec(), pos.to_vec(), 0);
    let mut n_seq = vec![1; pos.len()];
    let mut seqs = vec![&raw mut seq; pos.len()];
    let mut outputs = vec![0i8; pos.len()];
    *outputs.last_mut().unwrap() = logits.into();
    let batch = sys::llama_batch {
        n_tokens: pos.len() as i32,
        token: tokens.as_mut_ptr(),
        embd: std::ptr::null_mut(),
        pos: pos.as_mut_ptr(),
        n_seq_id: n_seq.as_mut_ptr(),
        seq_id: seqs.as_mut_ptr(),
        logits: outputs.as_mut_ptr(),
    };
    // SAFETY: every array has as many elements as the batch says, and outlives the call.
    unsafe { sys::llama_decode(ctx.as_mut_ptr(), batch) }
}

/// The ids of a prompt as the processor makes them: every piece of text between pictures begins
/// with its own `<s>`.
pub fn tokenize_pieces(model: &LlamaModel, prompt: &str) -> Vec<i32> {
    let mut ids = Vec::new();
    let mut rest = prompt;
    loop {
        let (piece, next) = match rest.split_once("<|image_") {
            Some((piece, tail)) => (piece, tail.split_once("|>").map(|(_, after)| after)),
            None => (rest, None),
        };
        let piece = model.vocab().tokenize(piece.as_bytes(), true, true);
        ids.extend(piece.iter().map(|t| t.0));
        match next {
            Some(after) => rest = after,
            None => return ids,
        }
    }
}

/// The two files that `llama-gguf-split` would make of a model.
pub fn halves(path: &Path) -> [Vec<u8>; 2] {
    let folder = TempDir::new().unwrap();
    let c = |text: &str| std::ffi::CString::new(text).unwrap();
    let path = c(path.to_str().unwrap());
    // SAFETY: a good file of this repository; tensors live in `data` until it is freed, after all files are
    // written; every text outlives the call.
    unsafe {
        let mut data = std::ptr::null_mut();
        let params = sys::gguf_init_params {
            no_alloc: false,
            ctx: &raw mut data,
        };
        let whole = sys::gguf_init_from_file(path.as_ptr(), params);
        assert!(!whole.is_null());
        let n = sys::gguf_get_n_tensors(whole);
        let halves = [0..n / 2, n / 2..n].map(|range| {
            let file = folder.path().join(range.start.to_string());
            let half = sys::gguf_init_empty();
            let number = u16::from(range.start > 0);
            if number == 0 {
                sys::gguf_set_kv(half, whole);
            }
            sys::gguf_set_val_u16(half, c("split.no").as_ptr(), number);
            sys::gguf_set_val_u16(half, c("split.count").as_ptr(), 2);
            sys::gguf_set_val_i32(half, c("split.tensors.count").as_ptr(), n as i32);
            for i in range {
                let tensor = sys::ggml_get_tensor(data, sys::gguf_get_tensor_name(whole, i));
                sys::gguf_add_tensor(half, tensor);
            }
            assert!(sys::gguf_write_to_file(
                half,
                c(file.to_str().unwrap()).as_ptr(),
                false
            ));
            sys::gguf_free(half);
            std::fs::read(file).unwrap()
        });
        sys::gguf_free(whole);
        sys::ggml_free(data);
        halves
    }
}
