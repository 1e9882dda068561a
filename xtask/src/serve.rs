//! `cargo xtask serve`: `hae serve` with the small model and questions about pictures.

mod capacity;
mod client;
mod load;
mod questions;
mod server;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::steps;

#[derive(clap::Subcommand)]
pub enum What {
    /// Many clients at once, some of them rude: each answer has to be that of the question asked alone
    Load(load::Args),
    /// How many chats about pictures the same bytes of KV cache hold, by policy
    Capacity(capacity::Args),
}

/// Which program serves which model.
#[derive(clap::Args)]
pub struct Served {
    /// Program to start; otherwise target/release/hae is built
    #[arg(long)]
    program: Option<PathBuf>,
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
        if let Some(program) = &self.program {
            return Ok(program.clone());
        }
        let build = steps::cargo(root, &["build", "--release", "--bin", "hae"])?;
        ensure!(build.success(), "the build failed");
        Ok(root.join("target/release/hae"))
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

/// Runs it. 0: all went as it should; 1: not so, and it was printed what.
///
/// # Errors
/// When a server cannot be started, or the questions cannot be read.
pub fn run(root: &Path, what: &What) -> Result<u8> {
    match what {
        What::Load(args) => load::run(root, args),
        What::Capacity(args) => capacity::run(root, args).map(|()| 0),
    }
}
