//! The command line: parse, dispatch, exit code. Nothing below this module prints.

mod chat;
mod convert;
mod demo;
mod load;
mod options;
mod output;
mod quantize;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run vision-language GGUFs with a KV cache that stays small.
#[derive(Debug, Parser)]
#[command(name = "hae", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer a prompt about pictures, or chat when no prompt is given
    Run(Box<run::Args>),
    /// Make GGUFs from a Phi-3.5-vision directory in Hugging Face layout
    Convert(convert::ConvertArgs),
    /// Quantize a text GGUF
    Quantize(quantize::QuantizeArgs),
    /// Describe a picture twice, with llama.cpp's KV cache and with HAE, and compare
    Demo(demo::Args),
}

/// Parses the command line and runs it. Exit codes: 0 done, 1 a threshold was missed, 2 usage or
/// run-time error; a closed pipe is 0, as for any filter.
pub fn main() -> ExitCode {
    let result = match Cli::parse_from(options::llama_spelling(std::env::args_os())).command {
        Command::Run(args) => run::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Demo(args) => demo::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hae: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A warning or a mistake that does not end the program.
fn warn(text: &str) {
    eprintln!("hae: {text}");
}
