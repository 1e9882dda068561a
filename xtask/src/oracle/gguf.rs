//! `cargo xtask oracle gguf`: what `hae convert` and `hae quantize` write, read by gguf-py, llama.cpp's own package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::FOLDER;
use crate::python::{shown, venv};
use crate::serve::program::Program;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    program: Program,
    /// Directory to convert
    #[arg(long, value_name = "DIR", default_value = "models/small-phi3v")]
    model: PathBuf,
}

/// 0: gguf-py reads what `hae inspect` shows, and the values that are there. 1: not so.
///
/// # Errors
/// Without the program, Python, pip or the network.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let program = args.program.file(root)?;
    let folder = root.join(FOLDER);
    let python = venv(&folder, &root.join("tests/oracle/requirements.txt"))?;
    let out = folder.join("converted");
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let hae = |words: &[&Path]| -> Result<()> {
        let mut command = Command::new(&program);
        command.args(words);
        eprintln!("$ {}", shown(&command));
        let status = command.status().context("cannot run hae")?;
        ensure!(status.success(), "{} failed", shown(&command));
        Ok(())
    };
    let model = root.join(&args.model);
    for kind in ["f32", "f16", "bf16", "q8_0"] {
        let [text, vision] = ["text", "mmproj"].map(|name| out.join(format!("{name}-{kind}.gguf")));
        let [to, mmproj, outtype] = ["-o", "--mmproj", "--outtype"].map(Path::new);
        let convert = Path::new("convert");
        hae(&[
            convert,
            &model,
            to,
            &text,
            mmproj,
            &vision,
            outtype,
            Path::new(kind),
        ])?;
    }
    for kind in ["q4_0", "q4_K_M"] {
        let [from, to] = ["f32", kind].map(|kind| out.join(format!("text-{kind}.gguf")));
        hae(&[Path::new("quantize"), &from, &to, Path::new(kind)])?;
    }
    let mut compare = Command::new(&python);
    compare
        .arg(root.join("tests/oracle/read_gguf.py"))
        .arg(&program)
        .arg(&out);
    eprintln!("$ {}", shown(&compare));
    let status = compare.status().context("cannot run Python")?;
    match status.code() {
        Some(0) => Ok(0),
        Some(1) => Ok(1),
        _ => anyhow::bail!("{} failed", shown(&compare)),
    }
}
