//! `hae quantize`

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Done, note};
use clap::Args;
use hae::llama::quantize::{self, Options, Progress, QuantType};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Quantize a GGUF with llama.cpp
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// GGUF of F32, F16 or BF16
    pub input: PathBuf,
    /// GGUF to write
    pub output: PathBuf,
    /// llama.cpp's name of the type, in any case: Q8_0, Q4_K_M, Q4_0, ...
    #[arg(value_name = "TYPE", value_parser = QuantType::parse)]
    pub kind: QuantType,
    /// Take tensors that are quantized already
    ///
    /// They lose once more, unless they are unpacked to F32.
    #[arg(long)]
    pub allow_requantize: bool,
    /// Threads; 0 means all
    #[arg(short, long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(..=512))]
    pub threads: u32,
}

pub fn run(args: &QuantizeArgs) -> anyhow::Result<Done> {
    let progress = Arc::new(Progress::default());
    let style = ProgressStyle::with_template("quantizing {bar:32} {pos}/{len} tensors {elapsed}")?;
    let bar = ProgressBar::no_length().with_style(style);
    let options = Options {
        kind: args.kind,
        threads: args.threads,
        allow_requantize: args.allow_requantize,
    };
    let sizes = std::thread::scope(|scope| {
        let work =
            scope.spawn(|| quantize::quantize(&args.input, &args.output, options, &progress));
        while !work.is_finished() {
            bar.set_length(progress.total.load(Ordering::Relaxed).into());
            bar.set_position(progress.done.load(Ordering::Relaxed).into());
            std::thread::sleep(Duration::from_millis(50));
        }
        work.join()
    });
    bar.finish_and_clear();
    let sizes = sizes.map_err(|_| anyhow::anyhow!("quantizing panicked"))??;
    note(&format!(
        "{}: {}, {} ({:.1} % of {})",
        args.output.display(),
        args.kind.name,
        HumanBytes(sizes.output),
        100.0 * sizes.output as f64 / sizes.input as f64,
        args.input.display(),
    ));
    Ok(Done::Whole)
}
