//! The small model in the forms that the tests need.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use hae::cache::Pos;
use hae::conversation::segment;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::generate::{Hooks, Segment};
use hae::image::{self, Picture};
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, ModelOptions, Piece,
    SamplerOptions, Vision, VisionOptions,
};
use hae::prompt;
use serde_json::Value;

use crate::npz::golden;

pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The checkpoint, converted once per test run.
pub fn converted(outtype: &str) -> (&'static Path, &'static Path) {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    static F32: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    static F16: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().unwrap()).path();
    let (cell, outtype) = match outtype {
        "f32" => (&F32, hae::convert::OutType::F32),
        "f16" => (&F16, hae::convert::OutType::F16),
        other => panic!("{other}"),
    };
    let (text, vision) = cell.get_or_init(|| {
        let name = |what: &str| folder.join(format!("{what}-{outtype:?}.gguf"));
        let options = hae::convert::Options {
            model_dir: repository("models/tiny-phi3v"),
            text_out: name("text"),
            mmproj_out: name("vision"),
            outtype,
            name: None,
        };
        hae::convert::convert(&options, &mut |_, _| {}).unwrap();
        (options.text_out, options.mmproj_out)
    });
    (text, vision)
}

/// What most tests run with: exact sums, one thread, nothing quantized.
pub fn exact(n_ctx: u32) -> ContextOptions {
    ContextOptions {
        n_ctx,
        kv_size: None,
        n_batch: 2048.min(n_ctx),
        n_ubatch: 512.min(n_ctx),
        n_threads: 1,
        n_threads_batch: 1,
        flash_attention: FlashAttention::Off,
        type_k: CacheType::F32,
        type_v: CacheType::F32,
        score_layers: Vec::new(),
        non_causal_images: false,
    }
}

pub fn load(path: &Path) -> Model {
    Model::load(path, &ModelOptions::default()).unwrap()
}

pub fn load_vision<'m>(path: &Path, model: &'m Model) -> Vision<'m> {
    let options = VisionOptions {
        use_gpu: false,
        n_threads: 1,
    };
    Vision::load(path, model, &options).unwrap()
}

/// A golden prompt: its row of `index.json` and its pictures.
pub struct Golden {
    pub row: Value,
    pub pictures: Vec<Picture>,
}

impl Golden {
    pub fn id(&self) -> &str {
        self.row["id"].as_str().unwrap()
    }

    /// The whole prompt, template included.
    pub fn prompt(&self) -> &str {
        self.row["prompt"].as_str().unwrap()
    }

    pub fn ids(&self, key: &str) -> Vec<i32> {
        let list = self.row[key].as_array().unwrap();
        list.iter().map(|x| x.as_i64().unwrap() as i32).collect()
    }

    /// The prompt cut up, pictures not yet encoded.
    pub fn pieces(&self, model: &Model, vision: &Vision<'_>) -> Vec<Piece> {
        let n = self.pictures.len();
        let (text, order) = prompt::place_pictures(self.prompt(), n, true).unwrap();
        let pictures: Vec<&Picture> = order.iter().map(|&i| &self.pictures[i]).collect();
        prompt::tokenize(model, Some(vision), &text, &pictures, true).unwrap()
    }

    pub fn segments(&self, model: &Model, vision: &mut Vision<'_>) -> Vec<Segment> {
        let mut images = 0..;
        self.pieces(model, vision)
            .into_iter()
            .map(|piece| match piece {
                Piece::Text(tokens) => Segment::Tokens(tokens),
                Piece::Image(image) => {
                    segment(vision.encode(&image).unwrap(), images.next().unwrap())
                }
            })
            .collect()
    }
}

pub fn goldens() -> Vec<Golden> {
    let index = std::fs::read_to_string(golden("tiny-phi3v/index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    let rows = index["prompts"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            let pictures = row["images"].as_array().unwrap().iter().map(|name| {
                let path = golden(&format!("tiny-phi3v/{}", name.as_str().unwrap()));
                image::load(&path, &image::Limits::default()).unwrap()
            });
            Golden {
                row: row.clone(),
                pictures: pictures.collect(),
            }
        })
        .collect()
}

/// Feeds segments without a controller and gives the positions taken. `observe` picks query
/// positions whose attention is wanted.
pub fn prefill(
    engine: &mut LlamaEngine<'_>,
    segments: &[Segment],
    seen: &mut Observation,
    observe: impl Fn(Pos) -> bool,
) -> Pos {
    let (mut pos, mut cells, mut all) = (0, Vec::new(), Observation::default());
    for (i, segment) in segments.iter().enumerate() {
        let input = match segment {
            Segment::Tokens(tokens) => Input::Tokens(tokens),
            Segment::Image { embeddings, n, .. } => Input::Embeddings {
                data: embeddings,
                n: *n,
                mrope: None,
            },
        };
        let rows = 0..input.len() as u32;
        let queries: Vec<u32> = rows.filter(|&r| observe(pos + r as Pos)).collect();
        let batch = Batch {
            input,
            pos,
            queries: &queries,
            logits: i + 1 == segments.len(),
        };
        engine.decode(batch, &mut cells, &mut all).unwrap();
        if !queries.is_empty() {
            *seen = all.clone();
        }
        pos += input.len() as Pos;
    }
    pos
}

pub fn engine<'m>(model: &'m Model, options: ContextOptions) -> LlamaEngine<'m> {
    LlamaEngine::new(model, options, &SamplerOptions::GREEDY).unwrap()
}

/// Runs `f` with hooks that collect nothing and never cancel.
pub fn quiet<R>(f: impl FnOnce(Hooks<'_>) -> R) -> R {
    f(Hooks {
        on_text: &mut |_| {},
        cancelled: &|| false,
        now: &|| Duration::ZERO,
    })
}
