//! `cargo xtask serve`: `hae serve`, judged by programs that others wrote.

mod clients;
mod python;
mod running;
mod schema;
mod upstream;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;

use crate::steps;

#[derive(Subcommand)]
pub enum Which {
    /// Ask the tests of llama.cpp's server, and write down what came of each
    Upstream(upstream::Args),
    /// Ask by OpenAI's Python package
    Clients(clients::Args),
    /// Send what /openapi.json allows, and what it does not, for some minutes
    Schema(schema::Args),
}

/// # Errors
/// Without Python, pip, the network, or a program that can be built.
pub fn run(root: &Path, which: &Which) -> Result<u8> {
    match which {
        Which::Upstream(args) => upstream::run(root, args),
        Which::Clients(args) => clients::run(root, args),
        Which::Schema(args) => schema::run(root, args),
    }
}

/// Below the repository's root; Git ignores it.
const FOLDER: &str = "target/serve";

/// What is asked.
#[derive(clap::Args)]
pub struct Program {
    /// The program to ask, in the place of one that is built now
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

impl Program {
    fn file(&self, root: &Path) -> Result<PathBuf> {
        if let Some(program) = &self.program {
            let whole = std::path::absolute(program).context("the program's path")?;
            ensure!(whole.is_file(), "{}: no such file", program.display());
            return Ok(whole);
        }
        let built = steps::cargo(root, &["build", "--release", "--bin", "hae"])?;
        ensure!(built.success(), "the build failed");
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
        let name = format!("hae{}", std::env::consts::EXE_SUFFIX);
        Ok(target.join("release").join(name))
    }
}
