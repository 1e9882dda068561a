//! Compares what `hae plan` says of a run in main memory with the peak of the process that then runs:
//!
//! ```text
//! cargo run --release --example plan_peak -- models/full/text-Q4_0.gguf models/full/mmproj.gguf 4096 1344x1344 q8_0
//! ```
//!
//! Linux alone says the peak (`VmHWM`). The run fills the whole cache, since pages that nobody writes are not
//! taken.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hae::cache::Pos;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::image::Picture;
use hae::llama::{
    CacheType, ContextOptions, LlamaEngine, Model, ModelOptions, Part, Piece, SamplerOptions,
    Vision, VisionOptions,
};
use hae::memory::{Work, estimate};
use hae::policy::{PolicyOptions, PolicySpec};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [text, mmproj, n_ctx, size, kind] = args.as_slice() else {
        bail!("expected TEXT.gguf MMPROJ.gguf CELLS WIDTHxHEIGHT CACHE_TYPE");
    };
    let (text, mmproj) = (PathBuf::from(text), PathBuf::from(mmproj));
    let (width, height) = size.split_once('x').context("expected WIDTHxHEIGHT")?;
    let (width, height): (u32, u32) = (width.parse()?, height.parse()?);
    let kind = match kind.as_str() {
        "f16" => CacheType::F16,
        "q8_0" => CacheType::Q8_0,
        "q4_0" => CacheType::Q4_0,
        _ => bail!("expected f16, q8_0 or q4_0"),
    };
    let context = ContextOptions {
        n_ctx: n_ctx.parse()?,
        type_k: kind,
        type_v: kind,
        ..ContextOptions::default()
    };
    let load = |measure| -> Result<(Model, Vision)> {
        let options = ModelOptions {
            n_gpu_layers: Some(0),
            // Pages of a mapped file count as the process's until somebody else needs the memory.
            no_mmap: true,
            measure,
            ..ModelOptions::default()
        };
        let model = Model::load(&text, &options)?;
        let options = VisionOptions {
            use_gpu: false,
            n_threads: context.n_threads,
        };
        let vision = Vision::load(&mmproj, &model, &options)?;
        Ok((model, vision))
    };

    let (model, mut vision) = load(true)?;
    let work = Work {
        pictures: vec![(width, height, None)],
        ..Work::default()
    };
    let policy = PolicySpec::new("full", PolicyOptions::default());
    let planned = estimate(&model, Some(&mut vision), &context, &policy, &work, 0)?;
    drop((vision, model));

    let (model, mut vision) = load(false)?;
    let mut engine = LlamaEngine::new(&model, context, &SamplerOptions::GREEDY)?;
    let picture = Picture {
        width,
        height,
        rgb: vec![127; 3 * width as usize * height as usize],
        num_crops: None,
    };
    let mut rows = Vec::new();
    for piece in vision.tokenize(&[Part::Picture(&picture)], false)? {
        if let Piece::Image(image) = piece {
            rows.extend(vision.encode(&image)?.data);
        }
    }
    let n_batch = 2048;
    for from in (0..planned.cells.full).step_by(n_batch) {
        let n = n_batch.min(planned.cells.full - from);
        let tokens: Vec<i32> = (0..n).map(|i| 3 + i as i32 % 500).collect();
        let pos: Vec<Pos> = (0..n).map(|i| (from + i) as Pos).collect();
        let batch = Batch {
            seq: 0,
            input: Input::Tokens(&tokens),
            pos: &pos,
            queries: &[],
            logits: true,
            lookup: None,
        };
        engine.decode(batch, &mut Vec::new(), &mut Observation::default())?;
    }
    engine.logits()?;
    let status = std::fs::read_to_string("/proc/self/status").context("no peak is known here")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|kb| kb.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let peak = peak.context("no peak is known here")? * 1024;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("{}", serde_json::to_string_pretty(&planned)?);
    println!("planned {:.1} MiB", mib(planned.bytes));
    println!(
        "peak    {:.1} MiB, {:+.1} %",
        mib(peak),
        (peak as f64 / planned.bytes as f64 - 1.0) * 100.0
    );
    println!("{} values of embeddings", rows.len());
    Ok(())
}
