//! `cargo xtask serve`: `hae serve`, judged by programs that others wrote, by many clients at once, and by how many
//! chats fit into the same bytes.

mod capacity;
mod client;
mod clients;
mod load;
mod python;
mod questions;
mod running;
mod schema;
mod server;
mod upstream;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;

use crate::steps;

#[derive(Subcommand)]
pub enum What {
    /// Ask the tests of llama.cpp's server, and write down what came of each
    Upstream(upstream::Args),
    /// Ask by OpenAI's Python package
    Clients(clients::Args),
    /// Send what /openapi.json allows, and what it does not, for some minutes
    Schema(schema::Args),
    /// Many clients at once, some of them rude: each answer has to be that of the question asked alone
    Load(load::Args),
    /// How many chats about pictures the same bytes of KV cache hold, by policy
    Capacity(capacity::Args),
}

/// # Errors
/// When a server cannot be started, or what asks it cannot be had: Python, pip, the network, the questions.
pub fn run(root: &Path, what: &What) -> Result<u8> {
    match what {
        What::Upstream(args) => upstream::run(root, args),
        What::Clients(args) => clients::run(root, args),
        What::Schema(args) => schema::run(root, args),
        What::Load(args) => load::run(root, args),
        What::Capacity(args) => capacity::run(root, args).map(|()| 0),
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

/// Which program serves which model.
#[derive(clap::Args)]
pub struct Served {
    #[command(flatten)]
    program: Program,
    /// Model
    #[arg(short, default_value = "models/small-phi3v-Q8_0.gguf")]
    model: PathBuf,
    /// Its vision file
    #[arg(long, default_value = "models/mmproj-small-phi3v-F16.gguf")]
    mmproj: PathBuf,
    /// Folder of questions
    #[arg(long, default_value = "tests/eval/small-phi3v/test")]
    questions: PathBuf,
    /// Threads of the server
    #[arg(short = 't', default_value_t = 2)]
    n_threads: usize,
}

impl Served {
    /// The program, built where none was named.
    fn program(&self, root: &Path) -> Result<PathBuf> {
        self.program.file(root)
    }

    /// What every server is started with.
    fn flags(&self, root: &Path) -> Vec<String> {
        let path = |path: &Path| root.join(path).display().to_string();
        let (model, mmproj) = (path(&self.model), path(&self.mmproj));
        let threads = self.n_threads.to_string();
        let flags = [
            "-m", &model, "--mmproj", &mmproj, "-t", &threads, "--temp", "0",
        ];
        flags.map(str::to_owned).to_vec()
    }
}
