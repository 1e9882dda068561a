//! Writes questions about long texts into a file for `hae eval`: `cargo run --release --example long_text -- --help`.
//!
//! An example, not a command of the program: who measures has the repository, who asks a model needs none.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use hae::Model;
use hae::eval::long_text::{Options, Task, questions};
use hae::llama::ModelOptions;
use hae::outfile::{FilesInUse, OutFile};
use hae::text;

/// Write questions whose answer stands somewhere in a long text, for `hae eval`
#[derive(Debug, Parser)]
#[command(name = "long_text")]
struct Args {
    /// Prose to hide the answers in
    #[arg(long, value_name = "FILE", default_value = "tests/eval/text/dev.txt")]
    text: PathBuf,
    /// The model whose tokens are counted; without it a word counts as 1.4
    #[arg(short, long, value_name = "GGUF")]
    model: Option<PathBuf>,
    /// Tokens of a prompt at most, without a chat template
    #[arg(long, value_name = "N", default_value_t = 1024)]
    tokens: usize,
    /// Questions of each task
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    each: u32,
    /// passkey, facts, middle, turns, list, instruction: a list
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = task, default_values = Task::ALL.map(Task::name))]
    tasks: Vec<Task>,
    /// The same seed gives the same questions
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The file to write, JSON lines; without it stdout
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
}

fn task(name: &str) -> Result<Task, String> {
    let found = Task::ALL.into_iter().find(|task| task.name() == name);
    found.ok_or_else(|| format!("expected one of {}", Task::ALL.map(Task::name).join(", ")))
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let path = &args.text;
    let mut files = FilesInUse::default();
    files.reads("--text", path);
    if let Some(model) = &args.model {
        files.reads_model("--model", model);
    }
    if let Some(out) = &args.out {
        files.writes("--out", out)?;
    }
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let prose = text::decode(path, bytes)?;
    let model = args.model.as_deref();
    let model = model
        .map(|path| Model::load(path, &ModelOptions::default()))
        .transpose()?;
    let count = |text: &str| match &model {
        Some(model) => Ok(model.tokenize(text, false, false)?.len()),
        None => Ok(text.split_whitespace().count() * 7 / 5),
    };
    let options = Options {
        tasks: args.tasks,
        each: args.each as usize,
        tokens: args.tokens,
        seed: args.seed,
    };
    let mut lines = String::new();
    for line in questions(&prose, &options, &count)? {
        lines += &serde_json::to_string(&line)?;
        lines.push('\n');
    }
    match &args.out {
        Some(path) => {
            let out = OutFile::create(path)?;
            let written = out.file().write_all(lines.as_bytes());
            written.with_context(|| format!("cannot write {}", path.display()))?;
            Ok(out.commit()?)
        }
        None => std::io::stdout()
            .write_all(lines.as_bytes())
            .context("stdout"),
    }
}
