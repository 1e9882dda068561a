//! `cargo xtask serve clients`: OpenAI's Python package and Vercel's AI SDK against a server with the built-in model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::program::{FOLDER, Program, venv};
use super::running::Running;
use crate::python::{run as run_shown, shown};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    program: Program,
    /// One of the two, in the place of both
    #[arg(long, value_enum)]
    client: Option<Which>,
    /// Handed to pytest, as in -k stream
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pytest: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    /// The package openai of Python
    Openai,
    /// The packages ai and @ai-sdk/openai-compatible of Node.js
    AiSdk,
}

/// # Errors
/// Without Python, Node.js or the program.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let wants = |which| args.client.is_none_or(|client| client == which);
    // What is missing is told before anything takes time.
    let python = wants(Which::Openai).then(|| venv(root)).transpose()?;
    let node = wants(Which::AiSdk).then(|| packages(root)).transpose()?;
    let program = args.program.file(root)?;
    let server = Running::start(&program, &["--metrics", "-c", "4096", "--temp", "0"])?;
    let mut passed = true;
    if let Some(python) = python {
        let mut command = Command::new(python);
        command
            .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
            .args(["--timeout", "120", "tests/server/openai_client.py"])
            .args(&args.pytest)
            .current_dir(root);
        passed &= passes(&mut command, &server)?;
    }
    if let Some(folder) = node {
        let mut command = Command::new("node");
        command
            .args(["--test", "--test-reporter", "spec", "client.test.js"])
            .env("HAE_ROOT", root)
            .current_dir(folder);
        passed &= passes(&mut command, &server)?;
    }
    Ok(u8::from(!passed))
}

fn passes(command: &mut Command, server: &Running) -> Result<bool> {
    command.env("HAE_URL", &server.url);
    eprintln!("$ {}", shown(command));
    let status = command.status().with_context(|| shown(command))?;
    Ok(status.success())
}

/// A folder with the test and the packages of `tests/server/ai_sdk`, at the versions and hashes of its list.
fn packages(root: &Path) -> Result<PathBuf> {
    let found = Command::new("npm").arg("--version").output();
    let found = found.is_ok_and(|output| output.status.success());
    ensure!(
        found,
        "no npm: install Node.js 20 or newer, or ask for --client openai alone"
    );
    let (from, to) = (
        root.join("tests/server/ai_sdk"),
        root.join(FOLDER).join("ai_sdk"),
    );
    fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
    for name in ["package.json", "package-lock.json", "client.test.js"] {
        fs::copy(from.join(name), to.join(name)).with_context(|| name.to_owned())?;
    }
    run_shown(
        Command::new("npm")
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
            .current_dir(&to),
    )?;
    Ok(to)
}
