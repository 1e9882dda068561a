//! Writes the seeds that only hae itself can make, into `corpus/` beside this crate: sessions, traces, GGUFs.
//! `make.py` makes the others. Built as the targets are, it is one: `seeds -runs=0`.

#![no_main]

use std::error::Error;
use std::fs;
use std::path::Path;

use hae::cache::{BinOptions, BinStore};
use hae::calibrate::file::{Calibration, Chosen, Compared, Scores, VERSION};
use hae::calibrate::search::Tried;
use hae::calibrate::{Score, Setting};
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::eval::record::{FileId, QuestionSet};
use hae::generate::{Segment, Session};
use hae::llama::gguf::{TensorType, Writer};
use hae::llama::{CacheType, FlashAttention, RopeFactors};
use hae::policy::{Amount, Limits, PolicyOptions, PolicySpec, create};
use hae::prompt::{ChatTemplate, Transcript};
use hae::saved::{ModelIdentity, Storage};
use hae::trace::{self, Cut, Header, Reader, Record};
use serde_json::Value;

type Done = Result<(), Box<dyn Error>>;

const LIMITS: Limits = Limits {
    n_layer: 2,
    n_cells: 64,
};

libfuzzer_sys::fuzz_target!(init: write().unwrap(), |_data: &[u8]| {});

fn write() -> Done {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (seed, (name, share)) in [
        ("full", None),
        ("hae", Some(0.6)),
        ("hae", None),
        ("h2o", Some(0.5)),
    ]
    .into_iter()
    .enumerate()
    {
        let options = PolicyOptions {
            kv_budget: share.map(Amount::Share),
            bin_size: 2,
            sinks: 1,
            recent: 2,
            ..PolicyOptions::default()
        };
        let policy = PolicySpec {
            name: name.to_owned(),
            options,
            ..PolicySpec::full()
        };
        let folder = hae_fuzz::new_folder();
        let path = folder.path().join("trace");
        let session = converse(&policy, seed as u64, &path)?;
        put(
            &corpus,
            "trace",
            &format!("{seed}-{name}"),
            &[&[0], &records(&path)?[..]].concat(),
        )?;
        put(
            &corpus,
            "trace",
            &format!("{seed}-{name}-file"),
            &[&[1], &fs::read(&path)?[..]].concat(),
        )?;
        put(
            &corpus,
            "session",
            &format!("{seed}-{name}"),
            &saved(&session)?,
        )?;
    }
    put(
        &corpus,
        "calibration",
        "one",
        &serde_json::to_vec(&calibration())?,
    )?;
    for n_layer in 0..3 {
        put(
            &corpus,
            "gguf",
            &format!("{n_layer}-layers"),
            &gguf(n_layer)?,
        )?;
    }
    Ok(())
}

fn put(corpus: &Path, target: &str, name: &str, bytes: &[u8]) -> Done {
    let folder = corpus.join(target);
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join(name), bytes)?)
}

/// Two turns with a picture, recorded.
fn converse(
    policy: &PolicySpec,
    seed: u64,
    path: &Path,
) -> Result<Session<Scripted>, Box<dyn Error>> {
    let made = create(&policy.name, &policy.options, LIMITS)?;
    let mut controller = Controller::new(made, LIMITS.n_cells);
    let header = Header::new("m".into(), LIMITS, policy, vec![0, 1]);
    trace::record(&mut controller, path, header)?;
    let engine = Scripted::new(LIMITS.n_cells, 16)
        .patched()
        .with_attention(move |q, k| hashed(seed, q, k));
    let mut session = Session::new(engine, controller).with_store(BinOptions {
        store: BinStore::Ram,
        max_bytes: 1 << 16,
    });
    for image in 0..2 {
        let n = 8;
        let picture = Segment::Image {
            embeddings: (0..2 * n).map(|x| x as f32).collect(),
            n,
            image,
            axes: None,
            separators: vec![3, 7],
        };
        let prompt = [
            Segment::Tokens(vec![2, 3]),
            picture,
            Segment::Tokens(vec![4; 3]),
        ];
        session.prefill(&prompt, &|| false)?;
        for _ in 0..6 {
            session.step(1)?;
        }
    }
    session.controller.finish_recording()?;
    Ok(session)
}

/// The records of a trace, without blocks around them.
fn records(path: &Path) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut reader = Reader::open(path, Cut::Refuse)?;
    let mut bytes = postcard::to_stdvec(&Record::Header(Box::new(reader.header().clone())))?;
    for record in reader.rest()? {
        bytes.extend(postcard::to_stdvec(&record)?);
    }
    bytes.extend(postcard::to_stdvec(&Record::End)?);
    Ok(bytes)
}

/// A session as `hae::saved::Saved` lays it out, without the model's state.
fn saved(session: &Session<Scripted>) -> Result<Vec<u8>, Box<dyn Error>> {
    let model = ModelIdentity {
        arch: "phi3".into(),
        n_layer: 2,
        n_embd: 2,
        n_vocab: 256,
        bytes: 7,
        fingerprint: "0123".into(),
    };
    let storage = Storage {
        type_k: CacheType::F16,
        type_v: CacheType::F16,
        flash_attention: FlashAttention::Off,
    };
    let mut transcript = Transcript::new(Some(ChatTemplate::built_in("phi3")?), None);
    transcript.ask("What?".into())?;
    transcript.answered("That.");
    let state: Vec<u8> = vec![1, 2, 3];
    Ok(postcard::to_stdvec(&(
        (
            model,
            RopeFactors::Short,
            storage,
            transcript,
            Some(1),
            vec![1, 1],
        ),
        (
            2u32,
            session.controller.ledger().save(),
            session.history(),
            session.store().texts()?,
            state,
        ),
    ))?)
}

fn calibration() -> Calibration {
    let file = FileId {
        file: "m.gguf".into(),
        sha256: "ab".into(),
    };
    let set = QuestionSet {
        file: file.clone(),
        format: "jsonl".into(),
        part: Some("tune:0.5".into()),
        every: 1,
        limit: None,
        n: 3,
    };
    let score = Score {
        points: 2.5,
        kl_mean: Some(0.125),
        ..Score::default()
    };
    let compared = Compared {
        full: score.clone(),
        defaults: score.clone(),
        found: score.clone(),
    };
    let parameters = Setting::default();
    Calibration {
        format: Calibration::format(),
        version: VERSION,
        time: 1,
        model: file,
        fingerprint: Some("cd".into()),
        mmproj: None,
        tune: set.clone(),
        held_out: set,
        kv_budget: Amount::Share(0.4),
        chosen: Chosen::Found,
        scores: Scores {
            tune: compared.clone(),
            held_out: compared,
        },
        tried: vec![Tried {
            stage: "defaults".into(),
            parameters: parameters.clone(),
            score,
        }],
        found: parameters.clone(),
        parameters,
        context: Value::Null,
        n_predict: None,
        build: Value::Null,
    }
}

/// A text model of this many layers that llama.cpp knows the shape of, with the smallest vocabulary.
fn gguf(n_layer: u32) -> Result<Vec<u8>, Box<dyn Error>> {
    const WIDTH: u64 = 32;
    let mut writer = Writer::new(Path::new("seed"))?;
    writer.set_text("general.architecture", "llama")?;
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", WIDTH as u32),
        ("feed_forward_length", WIDTH as u32),
        ("block_count", n_layer),
        ("attention.head_count", 1),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", WIDTH as u32),
    ] {
        writer.set_u32(&format!("llama.{key}"), value)?;
    }
    writer.set_f32("llama.attention.layer_norm_rms_epsilon", 1e-5)?;
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
        .map(String::from)
        .into();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let n = tokens.len();
    writer.set_text("tokenizer.ggml.model", "llama")?;
    writer.set_text_array("tokenizer.ggml.tokens", &tokens)?;
    writer.set_f32_array("tokenizer.ggml.scores", &vec![0.0; n])?;
    let kinds: Vec<i32> = (0..n).map(|id| if id < 4 { 3 } else { 6 }).collect();
    writer.set_i32_array("tokenizer.ggml.token_type", &kinds)?;
    writer.set_bool("tokenizer.ggml.add_bos_token", true)?;
    let mut tensors: Vec<(String, Vec<u64>)> = vec![
        ("token_embd.weight".into(), vec![WIDTH, n as u64]),
        ("output_norm.weight".into(), vec![WIDTH]),
    ];
    for block in 0..n_layer {
        for part in [
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ] {
            tensors.push((format!("blk.{block}.{part}.weight"), vec![WIDTH, WIDTH]));
        }
        for part in ["attn_norm", "ffn_norm"] {
            tensors.push((format!("blk.{block}.{part}.weight"), vec![WIDTH]));
        }
    }
    // As small as matrices can be.
    let kind = |dims: &[u64]| {
        if dims.len() == 2 {
            TensorType::Q4_0
        } else {
            TensorType::F32
        }
    };
    let bytes = |dims: &[u64]| match dims {
        [n] => 4 * n,
        _ => dims.iter().product::<u64>() / 32 * 18,
    };
    for (name, dims) in &tensors {
        writer.add_tensor(name, kind(dims), dims)?;
    }
    let mut out = writer.begin(Vec::new())?;
    for (_, dims) in &tensors {
        out.write(&vec![0; bytes(dims) as usize])?;
        out.end_tensor()?;
    }
    Ok(out.finish()?)
}
