//! `cargo xtask serve schema`: Schemathesis sends what the interface's own description allows, and what it does
//! not, and compares the answers with the description.

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
    /// Go on for so long
    #[arg(long, default_value_t = 5, value_name = "N")]
    minutes: u64,
    /// What the requests are drawn with
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// 0: every answer was as described, and none was a bug.
///
/// # Errors
/// Without Python or the program.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let python = venv(root)?;
    let program = args.program.file(root)?;
    let folder = tempfile::tempdir()?;
    let kept = folder.path().to_string_lossy().into_owned();
    let flags = [
        "--metrics",
        "--slot-save-path",
        &kept,
        "-c",
        "512",
        "-n",
        "8",
        "--timeout",
        "60",
    ];
    let mut server = Running::start(&program, &flags)?;
    let mut command = Command::new(&python);
    command
        .args(["-m", "schemathesis.cli", "run"])
        .arg(format!("{}/openapi.json", server.url))
        .args([
            "--checks",
            "all",
            // The description knows no template, no vocabulary and no file.
            "--exclude-checks",
            "positive_data_acceptance",
            "--request-timeout",
            "60",
            // Answers take as long as they take.
            "--max-response-time",
            "60",
            "--generation-database",
            "none",
        ])
        .args(["--max-time", &(args.minutes * 60).to_string()])
        .args(["--seed", &args.seed.to_string()])
        .current_dir(root);
    eprintln!("$ {}", shown(&command));
    let status = command.status().context("cannot run Schemathesis")?;
    let lives = server.lives();
    if !lives {
        eprintln!("the server ended");
    }
    Ok(u8::from(!status.success() || !lives))
}
