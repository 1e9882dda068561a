//! What `hae plan` says beside what llama.cpp then takes, and what `--fit` makes of it.

use hae::engine::{Batch, Engine, Input, Observation};
use hae::image::Picture;
use hae::llama::{
    CacheType, ContextOptions, Footprint, LlamaEngine, Model, ModelOptions, Part, Piece,
    SamplerOptions, Vision, VisionOptions,
};
use hae::memory::{Estimate, Work, estimate};
use hae::policy::{Amount, PolicyOptions, PolicySpec};
use serde_json::Value;

use crate::bin::{answer, hae, refusal};
use crate::fixture::root;
use crate::precision;

fn model(file: &str, measure: bool) -> Model {
    let options = ModelOptions {
        // As the weights lie when they are measured: without pages of a file between them.
        no_mmap: true,
        measure,
        ..ModelOptions::default()
    };
    Model::load(&root().join("models").join(file), &options).unwrap()
}

fn vision(model: &Model) -> Vision {
    let path = root().join("models/mmproj-small-phi3v-F16.gguf");
    Vision::load(&path, model, &VisionOptions::default()).unwrap()
}

fn context(kind: CacheType) -> ContextOptions {
    ContextOptions {
        n_ctx: 3000,
        type_k: kind,
        type_v: kind,
        n_threads: 2,
        n_threads_batch: 2,
        ..ContextOptions::default()
    }
}

fn estimated(kind: CacheType, policy: &PolicySpec, work: &Work) -> Estimate {
    let model = model("small-phi3v-Q8_0.gguf", true);
    let mut vision = vision(&model);
    estimate(&model, Some(&mut vision), &context(kind), policy, work, 0).unwrap()
}

/// Weights, cache and what computing takes, on all devices together.
fn in_all(parts: &[Footprint]) -> [u64; 3] {
    let sum = |of: fn(&Footprint) -> u64| parts.iter().map(of).sum();
    [sum(|p| p.weights), sum(|p| p.kv), sum(|p| p.compute)]
}

fn full() -> PolicySpec {
    PolicySpec::new("full", PolicyOptions::default())
}

#[test]
fn what_is_planned_is_what_llama_cpp_takes() {
    for file in ["small-phi3v-Q8_0.gguf", "small-phi3v-Q4_K_M.gguf"] {
        let (planned, real) = (model(file, true), model(file, false));
        for kind in [CacheType::F16, CacheType::Q8_0, CacheType::Q4_0] {
            for n_seq_max in [1, 4] {
                let options = ContextOptions {
                    n_seq_max,
                    ..context(kind)
                };
                let taken = |model: &Model| {
                    let options = options.clone();
                    let engine = LlamaEngine::new(model, options, &SamplerOptions::GREEDY);
                    engine.unwrap().footprint()
                };
                let (planned, real) = (taken(&planned), taken(&real));
                assert_eq!(planned, real, "{file} {kind:?} {n_seq_max}");
                let [weights, kv, compute] = in_all(&real);
                assert!(
                    weights > 4 << 20 && kv > 1 << 20 && compute > 1 << 20,
                    "{real:?}"
                );
            }
        }
    }
}

#[test]
fn a_picture_takes_what_was_planned() {
    let [planned, real] = [true, false].map(|measure| model("small-phi3v-Q8_0.gguf", measure));
    let (mut planned, mut real) = (vision(&planned), vision(&real));
    for (width, height, num_crops) in [(336, 336, Some(1)), (700, 400, Some(4)), (1344, 1344, None)]
    {
        let picture = Picture {
            width,
            height,
            rgb: vec![0; 3 * width as usize * height as usize],
            num_crops,
        };
        let image = |vision: &mut Vision| {
            let pieces = vision.tokenize(&[Part::Picture(&picture)], false).unwrap();
            let mut images = pieces.into_iter().filter_map(|piece| match piece {
                Piece::Image(image) => Some(image),
                Piece::Text(_) => None,
            });
            images.next().unwrap()
        };
        let expected = {
            let image = image(&mut planned);
            planned.footprint(Some(&image)).unwrap()
        };
        let image = image(&mut real);
        real.encode(&image).unwrap();
        assert_eq!(real.footprint(None).unwrap(), expected, "{width}x{height}");
        let [weights, _, compute] = in_all(&expected);
        assert!(weights > 4 << 20 && compute > 1 << 20, "{expected:?}");
    }
    let image = planned.tokenize(&[], false);
    assert!(image.unwrap().is_empty());
}

#[test]
fn nothing_is_computed_with_what_was_measured() {
    let model = model("small-phi3v-Q8_0.gguf", true);
    let engine = LlamaEngine::new(&model, context(CacheType::F16), &SamplerOptions::GREEDY);
    let batch = Batch {
        logits: true,
        ..Batch::new(Input::Tokens(&[1]), &[0])
    };
    let decoded = engine
        .unwrap()
        .decode(batch, &mut Vec::new(), &mut Observation::default());
    let error = decoded.unwrap_err().to_string();
    assert_eq!(
        error,
        "broken contract: a model that was loaded to be measured"
    );
}

#[test]
fn a_budget_takes_less_than_the_full_cache() {
    let work = Work {
        pictures: vec![(1344, 1344, Some(16)), (336, 336, Some(1))],
        n_prompt: Some(100),
        n_predict: Some(200),
    };
    let whole = estimated(CacheType::F16, &full(), &work);
    assert_eq!(whole.cells.full, 3072);
    assert_eq!(whole.kv.full, whole.kv.decoding);
    assert_eq!(
        whole.bytes,
        whole.places.iter().map(|share| share.all()).sum::<u64>()
    );
    assert!(whole.image_tokens > 144 && whole.places[0].pictures > 3 * 1344 * 1344);
    let q8 = estimated(CacheType::Q8_0, &full(), &work);
    // Some GPUs read whole blocks behind the last row of a quantized tensor.
    let more = (q8.kv.full * 32).checked_sub(whole.kv.full * 17).unwrap();
    match precision::on_gpu() {
        true => assert!(more * 500 < q8.kv.full * 32, "{more}"),
        false => assert_eq!(more, 0),
    }

    let options = PolicyOptions {
        kv_budget: Some(Amount::Cells(300)),
        ..PolicyOptions::default()
    };
    let budget = estimated(CacheType::F16, &PolicySpec::new("hae", options), &work);
    assert_eq!(budget.cells.decoding, 512);
    assert_eq!(budget.kv.full, whole.kv.full);
    assert_eq!(budget.kv.decoding, whole.kv.full / 6);
    assert!(budget.kv.prompt < budget.kv.full);
    // Without one hae keeps what it has, as q8_0.
    let hae = estimated(CacheType::F16, &PolicySpec::hae(), &work);
    assert!(hae.cells.decoding >= 100 + 200 + hae.image_tokens);
}

/// In main memory, of which one knows what is free: a margin for a GPU would be one for it too.
fn planned(args: &[&str]) -> (Option<i32>, Value) {
    let output = hae()
        .arg("plan")
        .args(["-o", "json", "--device", "none"])
        .args(args)
        .output()
        .unwrap();
    let value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    (output.status.code(), value)
}

#[test]
fn the_program_plans_and_fits() {
    let text = answer(&[
        "plan",
        "--images",
        "2x336x336,1x672x336",
        "--num-crops",
        "4",
        "-c",
        "4096",
    ]);
    for expected in [
        "main memory",
        "KV cache: 4096 cells, K f16, V f16: ",
        "pictures: ",
        " MiB: fits with 1024.0 MiB to spare",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let (status, small) = planned(&["-c", "4096"]);
    assert_eq!((status, &small["fits"]), (Some(0), &true.into()));
    // The cache as q8_0, where nobody says what it is; then fewer cells, where nobody says how many.
    let free = small["places"][0]["free"].as_u64().unwrap() >> 20;
    let kv = |value: &Value| value["kv"]["full"].as_u64().unwrap();
    let large = ["-c", "4000000", "-fitt", "0"];
    let (status, asked) = planned(&large);
    if kv(&asked) >> 20 > free {
        assert_eq!((status, &asked["fits"]), (Some(1), &false.into()));
    }
    // Other tests take and give memory meanwhile: only a call between two that found about as much is judged.
    let now = || {
        planned(&["-c", "4096"]).1["places"][0]["free"]
            .as_u64()
            .unwrap()
            >> 20
    };
    let judged = (0..20).find_map(|_| {
        let before = now();
        let room = before.saturating_sub(400).to_string();
        let found = planned(&["-c", "0", "-fit", "on", "-fitt", &room, "-fitc", "512"]);
        (before.abs_diff(now()) < 200).then_some(found)
    });
    let (status, fitted) = judged.expect("memory is never the same");
    let cells = fitted["n_ctx"].as_u64().unwrap();
    assert_eq!(status, Some(0), "{fitted}");
    assert_eq!(fitted["type_k"], "q8_0");
    assert!((512..131_072).contains(&cells), "{cells}");

    for (args, expected) in [
        (&["--images", "5"][..], "--images"),
        (&["--images", "1x99999x1"], "--images"),
        (&["-c", "99999999"], "-c: 99999999 cells"),
        (&["--kv-policy", "none"], "none"),
    ] {
        let output = hae().arg("plan").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(expected), "{stderr}");
    }
    let missing = refusal(&["plan", "-m", "/no/such.gguf"]);
    assert!(missing.starts_with("hae: /no/such.gguf: "), "{missing}");
}
