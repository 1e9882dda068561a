//! Minimal: enough to run `convert` and `quantize`.

mod cli;

use clap::Parser;

#[derive(Parser)]
enum Command {
    Convert(cli::convert::ConvertArgs),
    Quantize(cli::quantize::QuantizeArgs),
}

fn main() {
    let result = match Command::parse() {
        Command::Convert(args) => cli::convert::run(&args),
        Command::Quantize(args) => cli::quantize::run(&args),
    };
    if let Err(e) = result {
        eprintln!("error: {e:#}");
        std::process::exit(2);
    }
}
