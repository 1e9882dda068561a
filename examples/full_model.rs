//! Writes a model of Phi-3.5-vision's full size with made-up weights, for measurements:
//! `cargo xtask model full`.
//!
//! An example, not a command of the program: users have no use for a model that talks nonsense.
//! And not part of xtask, which is built without llama.cpp and would need a second writer of GGUF
//! files, a second list of tensor names and a second quantizer.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use hae::convert::random::{self, Mix, Options, phi35_text, phi35_vision};

/// Write a text and a vision GGUF with Phi-3.5-vision's shapes and made-up weights, and the vision
/// GGUF of a LLaVA with the same tower to compare with
#[derive(Debug, Parser)]
#[command(name = "cargo xtask model full")]
struct Args {
    /// Folder for the files
    #[arg(long, value_name = "DIR", default_value = "models/full")]
    out: PathBuf,
    /// Type of the text model: llama.cpp's mix of that name
    #[arg(long = "type", value_enum, value_name = "TYPE", default_value = "q4_0")]
    kind: Type,
    /// The same seed gives the same files
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Layers of the text model, for a smaller one
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=512))]
    layers: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k_m")]
    Q4KM,
    F16,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (mix, name) = match args.kind {
        Type::Q4_0 => (Mix::Q4_0, "Q4_0"),
        Type::Q4KM => (Mix::Q4KM, "Q4_K_M"),
        Type::F16 => (Mix::F16, "F16"),
    };
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make {}", args.out.display()))?;
    let mut text = phi35_text();
    let layers = match args.layers {
        n if n == text.n_layer => String::new(),
        n => format!("-{n}-layers"),
    };
    text.n_layer = args.layers;
    let options = Options {
        text,
        vision: phi35_vision(),
        mix,
        seed: args.seed,
        text_out: args.out.join(format!("phi-3.5-random{layers}-{name}.gguf")),
        mmproj_out: args.out.join("mmproj-phi-3.5-random-F16.gguf"),
    };
    let start = Instant::now();
    let summary = random::write(&options, &mut |_, _| ())?;
    let llava = args.out.join("mmproj-llava-random-F16.gguf");
    let llava = random::write_llava(&options.vision, &options.text, args.seed, &llava)?;
    for file in [&summary.text, &summary.mmproj, &llava] {
        let path = file.path.display();
        println!("{path}: {} tensors, {} bytes", file.n_tensors, file.bytes);
    }
    println!("in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
