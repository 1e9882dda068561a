//! The program: parse, dispatch, exit code.

mod cli;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use cli::{convert, demo, options, quantize, run};

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
    Demo(Box<demo::Args>),
}

/// Parses the command line and runs it. Exit codes: 0 done, 1 a threshold was missed, 2 usage or
/// run-time error; a closed pipe is 0, as for any filter.
fn main() -> ExitCode {
    let result = match Cli::parse_from(options::llama_spelling(std::env::args_os())).command {
        Command::Run(args) => run::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Demo(args) => demo::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if cli::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hae: {e:#}");
            ExitCode::from(2)
        }
    }
}
