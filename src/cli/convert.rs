//! `hae convert`

use std::path::PathBuf;

use super::named::named;
use super::{Done, note};
use clap::Args;
use hae::convert::{self, Options, OutType};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Convert a Phi-3.5-vision directory from Hugging Face into a text and a vision GGUF
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Directory with config.json, safetensors and tokenizer files
    pub model_dir: PathBuf,
    /// Text model to write
    #[arg(short, long, value_name = "GGUF")]
    pub output: PathBuf,
    /// Vision file to write
    #[arg(long, value_name = "GGUF")]
    pub mmproj: PathBuf,
    /// Type of the matrices. With q8_0 the vision file gets f16
    #[arg(long, value_name = "TYPE", value_parser = named::<OutType>(), default_value = "f16")]
    pub outtype: OutType,
    /// The model's name in both files. It must hold "phi-3" or "phi3" [default: config.json's, or
    /// Phi-3.5-vision]
    #[arg(long)]
    pub name: Option<String>,
}

pub fn run(args: &ConvertArgs) -> anyhow::Result<Done> {
    let options = Options {
        model_dir: args.model_dir.clone(),
        text_out: args.output.clone(),
        mmproj_out: args.mmproj.clone(),
        outtype: args.outtype,
        name: args.name.clone(),
    };
    let style = ProgressStyle::with_template("converting {bar:32} {bytes}/{total_bytes} {eta}")?;
    let bar = ProgressBar::no_length().with_style(style);
    let summary = convert::convert(&options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let summary = summary?;
    for text in &summary.notes {
        note(&format!("note: {text}"));
    }
    let [text, mmproj] = [&summary.text, &summary.mmproj].map(|w| {
        format!(
            "{} ({} tensors, {})",
            w.path.display(),
            w.n_tensors,
            HumanBytes(w.bytes)
        )
    });
    note(&format!("{}: {text} and {mmproj}", summary.name));
    Ok(Done::Whole)
}
