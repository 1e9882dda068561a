//! `cargo xtask serve clients`: OpenAI's Python package against a server with the built-in model.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::program::{Program, venv};
use super::running::Running;
use crate::python::shown;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    program: Program,
    /// Handed to pytest, as in -k stream
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pytest: Vec<String>,
}

/// # Errors
/// Without Python or the program.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let python = venv(root)?;
    let program = args.program.file(root)?;
    let server = Running::start(&program, &["--metrics", "-c", "4096", "--temp", "0"])?;
    let mut command = Command::new(&python);
    command
        .args([
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout",
            "120",
        ])
        .arg("tests/server/openai_client.py")
        .args(&args.pytest)
        .current_dir(root)
        .env("HAE_URL", &server.url);
    eprintln!("$ {}", shown(&command));
    let status = command.status().context("cannot run pytest")?;
    Ok(u8::from(!status.success()))
}
