//! Environments of Python with packages of a list.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The interpreter of an environment in `folder/venv` with the packages of `list`. Made anew where the list is another
/// one than the last time.
///
/// # Errors
/// Without Python 3 with `venv`, or without the network.
pub fn venv(folder: &Path, list: &Path) -> Result<PathBuf> {
    let folder = folder.join("venv");
    let stamp = folder.join("requirements.txt");
    let python = match cfg!(windows) {
        true => folder.join("Scripts/python.exe"),
        false => folder.join("bin/python"),
    };
    let wanted = fs::read(list).with_context(|| list.display().to_string())?;
    if fs::read(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(python);
    }
    let base = if cfg!(windows) { "python" } else { "python3" };
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    run(Command::new(base)
        .args(["-m", "venv", "--clear"])
        .arg(&folder))?;
    run(Command::new(&python)
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--only-binary",
            ":all:",
            "--requirement",
        ])
        .arg(list))?;
    fs::write(&stamp, wanted).with_context(|| stamp.display().to_string())?;
    Ok(python)
}

/// Runs a command, printed first.
///
/// # Errors
/// When it cannot be run, or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    eprintln!("$ {shown}");
    let status = command
        .status()
        .with_context(|| format!("cannot run {shown}"))?;
    ensure!(status.success(), "failed: {shown}");
    Ok(())
}

/// A command as one would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
