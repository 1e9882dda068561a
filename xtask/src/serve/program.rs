//! The program that is judged, and where things of its judges lie.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{python, steps};

/// Below the repository's root; Git ignores it.
pub const FOLDER: &str = "target/serve";

/// The interpreter with what the judges need.
///
/// # Errors
/// As [`python::venv`].
pub fn venv(root: &Path) -> Result<PathBuf> {
    let list = root.join("tests/server/requirements.txt");
    python::venv(&root.join(FOLDER), &list)
}

/// What is asked.
#[derive(clap::Args)]
pub struct Program {
    /// The program to ask, in the place of one that is built now
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

impl Program {
    /// # Errors
    /// Without that file, or where it cannot be built.
    pub fn file(&self, root: &Path) -> Result<PathBuf> {
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

/// Which program serves which model, to those that ask about pictures.
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
    pub questions: PathBuf,
    /// Threads of the server
    #[arg(short = 't', default_value_t = 2)]
    n_threads: usize,
}

impl Served {
    /// # Errors
    /// As [`Program::file`].
    pub fn program(&self, root: &Path) -> Result<PathBuf> {
        self.program.file(root)
    }

    /// What every server is started with.
    pub fn flags(&self, root: &Path) -> Vec<String> {
        let path = |path: &Path| root.join(path).display().to_string();
        let (model, mmproj) = (path(&self.model), path(&self.mmproj));
        let threads = self.n_threads.to_string();
        let flags = [
            "-m", &model, "--mmproj", &mmproj, "-t", &threads, "--temp", "0",
        ];
        flags.map(str::to_owned).to_vec()
    }
}
