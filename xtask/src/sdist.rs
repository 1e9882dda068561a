//! Sources of Python's packages, whose releases have checksums, for the files of tests that are in them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use tar::Archive;

use crate::digest::sha256;
use crate::python::shown;

/// A package's sources.
pub struct Sdist {
    pub name: &'static str,
    pub version: &'static str,
    pub sha256: &'static str,
    /// The folder within it that is wanted.
    pub within: &'static str,
}

/// llama.cpp's own sources, its tests and their files.
pub const LLAMA_CPP: Sdist = Sdist {
    name: "llama_cpp_python",
    version: "0.3.36",
    sha256: "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    within: "vendor/llama.cpp",
};

impl Sdist {
    /// The name of its file.
    pub fn file(&self) -> String {
        format!("{}-{}.tar.gz", self.name, self.version)
    }

    /// The package, from `given` or from PyPI.
    ///
    /// # Errors
    /// Without pip or the network, and when what comes is not what is pinned.
    pub fn fetch(&self, folder: &Path, python: &Path, given: Option<&Path>) -> Result<PathBuf> {
        let Sdist { name, version, .. } = self;
        let target = folder.join(self.file());
        let is_right = |path: &Path| -> Result<bool> {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            Ok(sha256(file, &mut io::sink())? == self.sha256)
        };
        if let Some(given) = given {
            ensure!(
                is_right(given)?,
                "{}: not {name} {version}",
                given.display()
            );
            return Ok(given.to_owned());
        }
        if target.is_file() && is_right(&target)? {
            return Ok(target);
        }
        let wanted = format!("{name}=={version}");
        let mut command = Command::new(python);
        command
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                name,
                "--dest",
            ])
            .arg(folder)
            .arg(&wanted);
        eprintln!("$ {}", shown(&command));
        if !command.status().is_ok_and(|status| status.success()) {
            bail!(
                "pip did not fetch {wanted}: it needs the network; or fetch its sdist from PyPI by other means and say where it is (--help)"
            );
        }
        ensure!(
            is_right(&target)?,
            "{}: another SHA-256 than the pinned one",
            target.display()
        );
        Ok(target)
    }

    /// What is needed of its folder, into one that holds nothing else afterwards. `needed`: how the names begin.
    ///
    /// # Errors
    /// When it cannot be read or written, or holds nothing of that.
    pub fn unpack(&self, sdist: &Path, target: &Path, needed: &[&str]) -> Result<()> {
        if target.exists() {
            fs::remove_dir_all(target).with_context(|| target.display().to_string())?;
        }
        let mut archive = Archive::new(GzDecoder::new(File::open(sdist)?));
        let Sdist {
            name,
            version,
            within,
            ..
        } = self;
        let above = format!("{name}-{version}/{within}");
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
}
