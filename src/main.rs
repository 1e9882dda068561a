//! The program: parse, dispatch, exit code.

mod cli;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use cli::options::DeviceArgs;
use cli::polling::PollArgs;
#[cfg(feature = "serve")]
use cli::serve;
use cli::{
    Done, bench, calibrate, compare, convert, demo, eval, help, inspect, interrupt, options, plan,
    quantize, replay, report, rpc_worker, run, tokenize,
};

/// Small buffers that cannot be had end the program with a line, not with an abort.
#[global_allocator]
static MEMORY: hae::llama::OrExit = hae::llama::OrExit;

/// Run vision-language GGUFs with a KV cache that stays small.
#[derive(Debug, Parser)]
#[command(name = "hae", version, about, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer a prompt about pictures, or chat when no prompt is given
    Run(Box<run::Args>),
    /// Serve a model by HTTP, with the paths of OpenAI's interface and of llama.cpp's server
    #[cfg(feature = "serve")]
    Serve(Box<serve::Args>),
    /// Make GGUFs from a Phi-3.5-vision directory in Hugging Face layout
    Convert(convert::ConvertArgs),
    /// Quantize a GGUF with llama.cpp
    Quantize(quantize::QuantizeArgs),
    /// Say what a file is, what is in it, and what a token of it takes, without loading it
    Inspect(inspect::Args),
    /// Print the tokens of a text, as llama-tokenize does
    Tokenize(tokenize::Args),
    /// Ask about a picture twice, with llama.cpp's KV cache and with HAE, and compare
    Demo(Box<demo::Args>),
    /// Say what a run will take of which memory, and whether it fits, without loading anything
    Plan(Box<plan::Args>),
    /// Measure speed and memory under several cache policies, as llama-bench does
    Bench(Box<bench::Args>),
    /// Answer a prompt, or a file of them, under several cache policies and budgets, side by side
    Compare(Box<compare::Args>),
    /// Score several cache policies on a file of questions with known answers
    Eval(Box<eval::Args>),
    /// Find the parameters of hae that keep the most of a model's quality at a given memory
    Calibrate(Box<calibrate::Args>),
    /// Run cache policies on traces of earlier runs, without a model
    Replay(Box<replay::Args>),
    /// Show saved results and traces in one HTML file
    Report(report::Args),
    /// Compute with this machine's devices for models of other machines, as llama.cpp's rpc-server does
    RpcWorker(rpc_worker::Args),
    /// List the cache policies and the flags that tune them
    Policies,
}

impl Command {
    /// Fetches the model of a command that wants one of the hub's.
    fn fetch(&mut self) -> anyhow::Result<()> {
        match self {
            Command::Run(args) => args.model.fetch(),
            #[cfg(feature = "serve")]
            Command::Serve(args) => args.model.fetch(),
            Command::Demo(args) => args.model.fetch(),
            Command::Plan(args) => args.model.fetch(),
            Command::Bench(args) => args.fetch(),
            Command::Compare(args) => args.evaluation.inference.model.fetch(),
            Command::Eval(args) => args.evaluation.inference.model.fetch(),
            Command::Calibrate(args) => args.inference.model.fetch(),
            Command::Convert(_)
            | Command::Quantize(_)
            | Command::Inspect(_)
            | Command::Tokenize(_)
            | Command::Replay(_)
            | Command::Report(_)
            | Command::RpcWorker(_)
            | Command::Policies => Ok(()),
        }
    }

    /// Of a command that computes with a model.
    fn devices(&self) -> Option<&DeviceArgs> {
        match self {
            Command::Run(args) => Some(&args.model.devices),
            #[cfg(feature = "serve")]
            Command::Serve(args) => Some(&args.model.devices),
            Command::Demo(args) => Some(&args.model.devices),
            Command::Plan(args) => Some(&args.model.devices),
            Command::Bench(args) => Some(&args.devices),
            Command::Compare(args) => Some(&args.evaluation.inference.model.devices),
            Command::Eval(args) => Some(&args.evaluation.inference.model.devices),
            Command::Calibrate(args) => Some(&args.inference.model.devices),
            Command::Convert(_)
            | Command::Quantize(_)
            | Command::Inspect(_)
            | Command::Tokenize(_)
            | Command::Replay(_)
            | Command::Report(_)
            | Command::RpcWorker(_)
            | Command::Policies => None,
        }
    }

    /// Of a command that computes with a model.
    fn poll(&self) -> Option<PollArgs> {
        match self {
            Command::Run(args) => Some(args.context.poll),
            #[cfg(feature = "serve")]
            Command::Serve(args) => Some(args.context.poll),
            Command::Demo(args) => Some(args.context.poll),
            Command::Plan(args) => Some(args.context.poll),
            Command::Bench(args) => Some(args.poll),
            Command::Compare(args) => Some(args.evaluation.inference.context.poll),
            Command::Eval(args) => Some(args.evaluation.inference.context.poll),
            Command::Calibrate(args) => Some(args.inference.context.poll),
            Command::Convert(_)
            | Command::Quantize(_)
            | Command::Inspect(_)
            | Command::Tokenize(_)
            | Command::Replay(_)
            | Command::Report(_)
            | Command::Policies => None,
            Command::RpcWorker(args) => Some(args.poll),
        }
    }
}

/// Parses the command line and runs it. Exit codes: 0 done, 1 a threshold was
/// missed, 2 usage or run-time error, 130 ended by Ctrl-C, 143 and 129 by SIGTERM and SIGHUP; a
/// closed pipe is 0, as for any filter.
fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|bug| {
        if !hae::guard::is_guarded() {
            cli::warn(&format!("a bug in hae: {bug}"));
        }
    }));
    hae::llama::on_abort(|message| {
        cli::warn(message);
        hae::tempfiles::remove_all();
        2
    });
    let mut program = help::in_two_sizes(Cli::command());
    let args = match options::spelling::llama_spelling(std::env::args_os(), &program) {
        Ok(args) => args,
        Err(e) => {
            cli::warn(&e.to_string());
            return ExitCode::from(2);
        }
    };
    let mut cli = program
        .try_get_matches_from_mut(args)
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .unwrap_or_else(|e| e.exit());
    if let Some(poll) = cli.command.poll() {
        poll.apply();
    }
    let command = || {
        // A signal ends a worker, as it ends ggml's.
        if !matches!(cli.command, Command::RpcWorker(_)) {
            interrupt::install()?;
        }
        if let Some(devices) = cli.command.devices()
            && devices.begin()?
        {
            return Ok(Done::Whole);
        }
        cli.command.fetch()?;
        match cli.command {
            Command::Run(args) => run::run(&args),
            #[cfg(feature = "serve")]
            Command::Serve(args) => serve::run(&args),
            Command::Convert(args) => convert::run(&args),
            Command::Quantize(args) => quantize::run(&args),
            Command::Inspect(args) => inspect::run(&args),
            Command::Tokenize(args) => tokenize::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Plan(args) => plan::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Compare(args) => compare::run(&args),
            Command::Eval(args) => eval::run(&args),
            Command::Calibrate(args) => calibrate::run(&args),
            Command::Replay(args) => replay::run(&args),
            Command::Report(args) => report::run(&args),
            Command::RpcWorker(args) => rpc_worker::run(&args),
            Command::Policies => help::print_policies(&mut program),
        }
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(command)) {
        Ok(Ok(Done::Interrupted)) => ExitCode::from(interrupt::status()),
        Ok(Ok(_)) if interrupt::ends() => ExitCode::from(interrupt::status()),
        Ok(Ok(Done::Whole)) => ExitCode::SUCCESS,
        Ok(Ok(Done::Missed)) => ExitCode::from(1),
        // A terminal that hung up takes no more text.
        Ok(Err(e)) if interrupt::ends() && cli::is_of_output(&e) => {
            ExitCode::from(interrupt::status())
        }
        Ok(Err(e)) if cli::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Ok(Err(e)) => {
            cli::warn(&format!("{e:#}"));
            ExitCode::from(2)
        }
        // The hook has reported it.
        Err(_) => ExitCode::from(2),
    }
}
