//! The model of made-up weights, in small: the same code, fewer and narrower layers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hae::convert::config::VisionConfig;
use hae::convert::random::{self, Mix, Options, phi35_text, phi35_vision};
use hae::engine::{Engine, Observation};
use hae::generate::Segment;
use hae::image;
use hae::llama::gguf::{Gguf, TensorType};
use hae::llama::quantize::{self, QuantType};
use hae::llama::{Part, Piece};
use hae::turn::segment;
use tempfile::TempDir;

use crate::model::{engine, exact, load, load_vision, prefill, repository};

struct Files {
    dir: TempDir,
}

impl Files {
    fn text(&self) -> PathBuf {
        self.dir.path().join("text.gguf")
    }

    fn mmproj(&self) -> PathBuf {
        self.dir.path().join("mmproj.gguf")
    }
}

fn small(mix: Mix, layers: u32, seed: u64) -> Options {
    let mut text = phi35_text();
    (text.n_embd, text.n_head, text.n_head_kv) = (768, 8, 8);
    (text.n_ff, text.n_layer) = (512, layers);
    Options {
        text,
        vision: VisionConfig {
            n_embd: 64,
            n_layer: 2,
            n_head: 2,
            n_ff: 128,
            image_size: 56,
            ..phi35_vision()
        },
        mix,
        seed,
        text_out: PathBuf::new(),
        mmproj_out: PathBuf::new(),
    }
}

fn write(options: Options) -> Files {
    let files = Files {
        dir: TempDir::new().unwrap(),
    };
    let options = Options {
        text_out: files.text(),
        mmproj_out: files.mmproj(),
        ..options
    };
    let mut last = (0, 1);
    let summary = random::write(&options, &mut |done, all| last = (done, all)).unwrap();
    assert_eq!(last.0, last.1, "progress ends at the whole");
    let bytes = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert_eq!(summary.text.bytes, bytes(&files.text()));
    assert_eq!(summary.mmproj.bytes, bytes(&files.mmproj()));
    files
}

fn types(path: &Path) -> Vec<(String, TensorType, Vec<u64>)> {
    let tensors = Gguf::open(path).unwrap().tensors();
    let mut all: Vec<_> = tensors
        .into_iter()
        .map(|t| (t.name, t.kind, t.dims))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// llama.cpp's quantizer is the reference, on as many layers as the real model has.
#[test]
fn types_are_those_of_llama_cpps_quantizer() {
    let small = |mix| {
        let mut options = small(mix, 32, 1);
        options.text.n_vocab = 1024;
        options
    };
    let plain = write(small(Mix::F16));
    for (mix, name) in [(Mix::Q4_0, "Q4_0"), (Mix::Q4KM, "Q4_K_M")] {
        let quantized = plain.dir.path().join(format!("{name}.gguf"));
        let kind = QuantType::parse(name).unwrap();
        quantize::quantize(
            &plain.text(),
            &quantized,
            quantize::Options::of(kind),
            &Arc::default(),
        )
        .unwrap();
        let ours = write(small(mix));
        let file_type = |path: &Path| Gguf::open(path).unwrap().unsigned("general.file_type");
        assert_eq!(
            file_type(&ours.text()).unwrap(),
            file_type(&quantized).unwrap()
        );
        let (ours, theirs) = (types(&ours.text()), types(&quantized));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs, "{name}");
        }
    }
}

#[test]
fn the_metadata_is_that_of_phi_3_5() {
    let files = write(small(Mix::Q4_0, 2, 1));
    let text = Gguf::open(&files.text()).unwrap();
    assert_eq!(text.text("general.architecture").unwrap(), "phi3");
    // By which llama.cpp knows how to treat the added tokens.
    assert!(text.text("general.name").unwrap().contains("Phi-3"));
    for (key, value) in [
        ("context_length", 131_072),
        ("rope.scaling.original_context_length", 4096),
        ("rope.dimension_count", 96),
        ("block_count", 2),
    ] {
        assert_eq!(text.unsigned(&format!("phi3.{key}")).unwrap(), value);
    }
    let factors = types(&files.text())
        .into_iter()
        .filter(|(name, ..)| name.starts_with("rope_factors"));
    assert!(factors.map(|(.., dims)| dims).eq([[48], [48]]));
    let vision = Gguf::open(&files.mmproj()).unwrap();
    assert_eq!(vision.text("clip.projector_type").unwrap(), "phi3v");
    assert_eq!(
        vision.unsigned("clip.vision.projection_dim").unwrap(),
        768,
        "the text model's width"
    );
}

#[test]
fn the_real_sizes_are_the_published_ones() {
    let (text, vision) = (phi35_text(), phi35_vision());
    // Weights of the decoder: 3.82 billion, as the model card of Phi-3.5-mini has it.
    let (d, ff, layers) = (text.n_embd, text.n_ff, text.n_layer);
    let layer = u64::from(d) * (4 * u64::from(d) + 3 * u64::from(ff) + 2);
    let all = u64::from(layers) * layer + u64::from(d) * (2 * u64::from(text.n_vocab) + 1);
    assert_eq!(all, 3_821_079_552);
    // A crop of 336 pixels is 24 by 24 patches, merged two by two.
    assert_eq!(vision.image_size / vision.patch_size / 2, 12);
}

#[test]
fn it_decodes_text_and_pictures_to_sane_numbers() {
    let picture = repository("models/demo.png");
    let picture = image::load(&picture, &image::Limits::default()).unwrap();
    for mix in [Mix::F16, Mix::Q4_0, Mix::Q4KM] {
        let files = write(small(mix, 4, 3));
        let model = load(&files.text());
        let mut vision = load_vision(&files.mmproj(), &model);
        let question = [
            Part::Text("<|user|>\n".into()),
            Part::Picture(&picture),
            Part::Text("\nWhere is it?<|end|>\n".into()),
        ];
        let pieces = vision.tokenize(&question, true).unwrap();
        let segments: Vec<Segment> = pieces
            .into_iter()
            .map(|piece| match piece {
                Piece::Text(tokens) => Segment::Tokens(tokens),
                Piece::Image(image) => segment(vision.encode(&image).unwrap(), 0),
            })
            .collect();
        let [
            Segment::Tokens(before),
            Segment::Image { embeddings, n, .. },
            Segment::Tokens(after),
        ] = &segments[..]
        else {
            panic!("{segments:?}");
        };
        assert_eq!(before[..2], [1, 32010], "BOS and a whole added token");
        assert!(after.contains(&32007), "{after:?}");
        // 2x2 crops and the global view of 2x2 tokens, 3 lines of 2 ends, 1 separator.
        assert_eq!(*n, 5 * 4 + 3 * 2 + 1);
        let spread = deviation(embeddings);
        assert!(
            (0.1..10.0).contains(&spread),
            "{mix:?}: embeddings {spread}"
        );

        let mut engine = engine(&model, exact(256));
        prefill(&mut engine, &segments, &mut Observation::default(), |_| {
            false
        });
        let spread = deviation(engine.logits().unwrap());
        assert!((1.0..4.0).contains(&spread), "{mix:?}: logits {spread}");
    }
}

/// llama.cpp's own LLaVA code runs the same layers: its file has one more, which that code leaves out.
#[test]
fn the_llava_tower_is_the_same_one() {
    let options = small(Mix::Q4_0, 1, 3);
    let (tower, text) = (options.vision.clone(), options.text.clone());
    let files = write(options);
    let llava = files.dir.path().join("llava.gguf");
    let written = random::write_llava(&tower, &text, 3, &llava).unwrap();
    assert_eq!(written.bytes, std::fs::metadata(&llava).unwrap().len());

    let of_tower = |path: &Path, last: u32| {
        let left_out = format!("v.blk.{last}.");
        let is_tower = |name: &str| name.starts_with("v.") && !name.starts_with(&left_out);
        let mut all = types(path);
        all.retain(|(name, ..)| is_tower(name));
        all
    };
    let ends = ["v.image_newline", "v.view_seperator"];
    let mut ours = of_tower(&files.mmproj(), tower.n_layer);
    ours.retain(|(name, ..)| !ends.contains(&name.as_str()));
    assert_eq!(ours, of_tower(&llava, tower.n_layer));
    let layers = Gguf::open(&llava).unwrap();
    let layers = layers.unsigned("clip.vision.block_count").unwrap();
    assert_eq!(layers, u64::from(tower.n_layer) + 1);

    let model = load(&files.text());
    let picture = repository("models/demo.png");
    let picture = image::load(&picture, &image::Limits::default()).unwrap();
    let encode = |path: &Path| {
        let mut vision = load_vision(path, &model);
        assert_eq!(vision.projector(), "mlp");
        let pieces = vision.tokenize(&[Part::Picture(&picture)], false).unwrap();
        let image = pieces.into_iter().find_map(|piece| match piece {
            Piece::Image(image) => Some(image),
            Piece::Text(_) => None,
        });
        vision.encode(&image.unwrap()).unwrap()
    };
    let embeddings = encode(&llava);
    // One crop, whatever the picture's size: 4 by 4 patches, none merged.
    assert_eq!(embeddings.n, 16);
    let spread = deviation(&embeddings.data);
    assert!((0.1..10.0).contains(&spread), "embeddings {spread}");

    // As many layers run as in ours: what the last one holds is not looked at.
    let without = |layer: u32| {
        let mut bytes = std::fs::read(&llava).unwrap();
        let layer = format!("v.blk.{layer}.");
        let mut tensors = Gguf::open(&llava).unwrap().tensors();
        tensors.retain(|tensor| tensor.name.starts_with(&layer));
        assert_eq!(tensors.len(), 16);
        for tensor in tensors {
            let from = tensor.offset as usize;
            bytes[from..from + tensor.bytes as usize].fill(0);
        }
        let path = files.dir.path().join("without.gguf");
        std::fs::write(&path, bytes).unwrap();
        encode(&path).data
    };
    assert!(without(tower.n_layer) == embeddings.data);
    assert!(without(tower.n_layer - 1) != embeddings.data);
}

/// Of finite numbers; NaN otherwise, which is in no range.
fn deviation(values: &[f32]) -> f64 {
    let values = || values.iter().map(|&v| f64::from(v));
    let n = values().count() as f64;
    let mean = values().sum::<f64>() / n;
    (values().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt()
}

#[test]
fn the_seed_decides_the_bytes() {
    let bytes = |seed| {
        let files = write(small(Mix::Q4KM, 1, seed));
        [files.text(), files.mmproj()].map(|path| std::fs::read(path).unwrap())
    };
    let first = bytes(1);
    assert!(first == bytes(1));
    let second = bytes(2);
    assert!(first[0] != second[0] && first[1] != second[1]);
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    let folder = TempDir::new().unwrap();
    let refused = |change: fn(&mut Options)| {
        let mut options = Options {
            text_out: folder.path().join("text.gguf"),
            mmproj_out: folder.path().join("mmproj.gguf"),
            ..small(Mix::Q4KM, 1, 1)
        };
        change(&mut options);
        let message = random::write(&options, &mut |_, _| ()).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        message.to_string()
    };
    let narrow = refused(|o| o.text.n_ff = 96);
    assert!(narrow.contains("ffn_down.weight: type q"), "{narrow}");
    let none = refused(|o| o.vision.n_ff = 0);
    assert!(
        none.starts_with("`shapes`: v.blk.0.ffn_up.weight"),
        "{none}"
    );
    let few = refused(|o| o.text.n_vocab = 64);
    assert!(few.starts_with("`n_vocab`: 64 tokens"), "{few}");
}
