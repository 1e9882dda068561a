//! The two models in the forms that the tests need: the tiny one, which the numpy oracle of
//! `tests/golden/masked` knows, and the small one, which the program contains.

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use hae::attend::Lookup;
use hae::cache::Pos;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::generate::{Hooks, Segment};
use hae::image::{self, Picture};
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, ModelOptions, Piece,
    SamplerOptions, Vision, VisionOptions,
};
use hae::prompt;
use hae::turn::segment;
use serde_json::Value;

use crate::npz::golden;

pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The small model's files, which the program contains.
pub const TEXT: &str = "models/small-phi3v-Q8_0.gguf";
pub const VISION: &str = "models/mmproj-small-phi3v-F16.gguf";
/// A picture of 336 x 336 pixels that it understands, in 199 tokens, and questions about it.
pub const PICTURE: &str = "tests/golden/small-phi3v/story0_1.png";
pub const WHERE: &str = "Where is the pink heart?";
pub const WHERE_ANSWER: &str = "Row 3, column 4";
pub const STORY: &str = "Tell a long story. Kai is in row 1, column 3, Sam is in row 3, column 3, Vera is the pink heart, Ben is in row 4, column 2.";

/// The tiny checkpoint, converted once per test run.
pub fn converted(outtype: &str) -> (&'static Path, &'static Path) {
    converted_of("tiny-phi3v", outtype)
}

/// The same of `tiny-phi3v` or `small-phi3v`.
pub fn converted_of(model: &str, outtype: &str) -> (&'static Path, &'static Path) {
    type Files = OnceLock<(PathBuf, PathBuf)>;
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    static FILES: [Files; 4] = [const { OnceLock::new() }; 4];
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().unwrap()).path();
    let (cell, outtype) = match (model, outtype) {
        ("tiny-phi3v", "f32") => (&FILES[0], hae::convert::OutType::F32),
        ("tiny-phi3v", "f16") => (&FILES[1], hae::convert::OutType::F16),
        ("small-phi3v", "f32") => (&FILES[2], hae::convert::OutType::F32),
        ("small-phi3v", "f16") => (&FILES[3], hae::convert::OutType::F16),
        other => panic!("{other:?}"),
    };
    let (text, vision) = cell.get_or_init(|| {
        let name = |what: &str| folder.join(format!("{what}-{model}-{outtype:?}.gguf"));
        let options = hae::convert::Options {
            model_dir: repository(&format!("models/{model}")),
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
        n_batch: 2048.min(n_ctx),
        n_ubatch: 512.min(n_ctx),
        n_threads: 1,
        n_threads_batch: 1,
        flash_attention: FlashAttention::Off,
        type_k: CacheType::F32,
        type_v: CacheType::F32,
        ..ContextOptions::default()
    }
}

pub fn load(path: &Path) -> Model {
    crate::rpc::join_workers();
    Model::load(path, &ModelOptions::default()).unwrap()
}

pub fn load_vision(path: &Path, model: &Model) -> Vision {
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
    pub fn pieces(&self, model: &Model, vision: &Vision) -> Vec<Piece> {
        let n = self.pictures.len();
        let (text, order) = prompt::place_pictures(self.prompt(), 0, n, true).unwrap();
        let pictures: Vec<&Picture> = order.iter().map(|&i| &self.pictures[i]).collect();
        prompt::tokenize(model, Some(vision), &text, &pictures, true).unwrap()
    }

    pub fn segments(&self, model: &Model, vision: &mut Vision) -> Vec<Segment> {
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

/// The tiny model's.
pub fn goldens() -> Vec<Golden> {
    goldens_of("tiny-phi3v")
}

/// The tiny model in F32, and a golden prompt of it.
pub fn golden_prompt(id: &str) -> (Model, Vec<Segment>) {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let golden = goldens().into_iter().find(|g| g.id() == id).unwrap();
    let segments = golden.segments(&model, &mut vision);
    (model, segments)
}

/// The same of `tiny-phi3v` or `small-phi3v`.
pub fn goldens_of(model: &str) -> Vec<Golden> {
    let index = std::fs::read_to_string(golden(&format!("{model}/index.json"))).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    let rows = index["prompts"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            // The tiny model's are all cut as its file says.
            let num_crops = row["num_crops"].as_u64().map(|n| n as u32);
            let pictures = row["images"].as_array().unwrap().iter().map(|name| {
                let path = golden(&format!("{model}/{}", name.as_str().unwrap()));
                let picture = image::load(&path, &image::Limits::default()).unwrap();
                Picture {
                    num_crops,
                    ..picture
                }
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
    engine: &mut LlamaEngine,
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
        let places: Vec<Pos> = (pos..).take(input.len()).collect();
        let batch = Batch {
            queries: &queries,
            logits: i + 1 == segments.len(),
            ..Batch::new(input, &places)
        };
        engine.decode(batch, &mut cells, &mut all).unwrap();
        if !queries.is_empty() {
            *seen = all.clone();
        }
        pos += input.len() as Pos;
    }
    pos
}

/// Feeds text from a position on, and asks for the logits behind it.
pub fn feed(engine: &mut LlamaEngine, tokens: &[i32], from: Pos) {
    feed_and_read(engine, tokens, from, &[], None);
}

/// The same; reads the attention of some of its rows, and looks cells up.
pub fn feed_and_read(
    engine: &mut LlamaEngine,
    tokens: &[i32],
    from: Pos,
    queries: &[u32],
    lookup: Option<&Lookup>,
) -> Observation {
    let pos: Vec<Pos> = (from..).take(tokens.len()).collect();
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(tokens),
        pos: &pos,
        queries,
        logits: true,
        lookup,
    };
    let mut seen = Observation::default();
    engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
    seen
}

/// Whether a cache of this type can be where models go: some of Apple's GPUs write no BF16, and such a cache is refused.
pub fn takes(kind: CacheType) -> bool {
    static BF16: LazyLock<bool> = LazyLock::new(|| {
        let options = ContextOptions {
            type_k: CacheType::Bf16,
            type_v: CacheType::Bf16,
            ..exact(256)
        };
        let model = load(converted("f16").0);
        match LlamaEngine::new(&model, options, &SamplerOptions::GREEDY) {
            Ok(_) => true,
            Err(hae::Error::Option { name: "type_k", .. }) => false,
            Err(e) => panic!("{e}"),
        }
    });
    kind != CacheType::Bf16 || *BF16
}

pub fn engine(model: &Model, options: ContextOptions) -> LlamaEngine {
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
