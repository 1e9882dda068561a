//! The program that is judged, and where things of its judges lie.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::steps;

/// Below the repository's root; Git ignores it.
pub const FOLDER: &str = "target/serve";

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
