//! The pinned crates: what `vendor/pin/Cargo.lock` names, by version and checksum.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::digest::sha256;
use crate::layout::{File, Tree};
use anyhow::{Context, Result, bail, ensure};

/// The crates that are vendored; everything else in the lock file is only their dependencies.
pub const CRATES: [&str; 2] = ["llama-cpp-2", "llama-cpp-sys-2"];

/// One package of the lock file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Pin {
    pub name: String,
    pub version: String,
    /// SHA-256 of the package file, in hex. Path dependencies have none.
    pub checksum: Option<String>,
}

#[derive(serde::Deserialize)]
struct Lock {
    #[serde(default)]
    package: Vec<Pin>,
}

/// Reads the vendored crates' entries, in the order of [`CRATES`].
///
/// # Errors
/// When the lock file is unreadable, or does not hold each crate exactly once with a checksum.
pub fn read(lock: &Path) -> Result<Vec<Pin>> {
    let text = fs::read_to_string(lock).with_context(|| lock.display().to_string())?;
    parse(&text).with_context(|| lock.display().to_string())
}

fn parse(text: &str) -> Result<Vec<Pin>> {
    let lock: Lock = toml::from_str(text)?;
    CRATES
        .iter()
        .map(|name| {
            let mut found = lock.package.iter().filter(|p| p.name == *name);
            match (found.next(), found.next()) {
                (Some(pin), None) if pin.checksum.is_some() => Ok(pin.clone()),
                (Some(_), None) => bail!("{name} has no checksum"),
                (None, _) => bail!("{name} is not pinned"),
                _ => bail!("{name} is pinned more than once"),
            }
        })
        .collect()
}

/// The files of a pinned crate, from Cargo's own download cache. Cargo is asked to fill the
/// cache when it lacks the package; the checksum is compared here in either case.
///
/// # Errors
/// When Cargo cannot fetch the package, or what it fetched is not what the lock file names.
pub fn files(pin: &Pin, manifest: &Path) -> Result<Tree> {
    let bytes = match cached(pin)? {
        Some(bytes) => bytes,
        None => {
            fetch(manifest)?;
            cached(pin)?.with_context(|| {
                format!(
                    "{} {}: cargo's download cache holds no package with the pinned checksum {}",
                    pin.name,
                    pin.version,
                    pin.checksum.as_deref().unwrap_or("none"),
                )
            })?
        }
    };
    unpack(pin, &bytes).with_context(|| format!("{} {}", pin.name, pin.version))
}

fn fetch(manifest: &Path) -> Result<()> {
    let status = Command::new(cargo())
        .args(["fetch", "--locked", "--manifest-path"])
        .arg(manifest)
        .status()
        .context("cannot run cargo")?;
    ensure!(
        status.success(),
        "cargo fetch --locked --manifest-path {} failed",
        manifest.display()
    );
    Ok(())
}

/// The cargo that runs this program, so that a toolchain chosen on the command line is kept.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// Looks for the package in every source's cache (there is one folder for each registry or
/// mirror) and takes the one whose checksum fits.
fn cached(pin: &Pin) -> Result<Option<Vec<u8>>> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => std::env::home_dir()
            .context("cannot tell the home folder: set CARGO_HOME")?
            .join(".cargo"),
    };
    let name = format!("{}-{}.crate", pin.name, pin.version);
    let Ok(sources) = fs::read_dir(home.join("registry/cache")) else {
        return Ok(None);
    };
    for source in sources.flatten() {
        let path = source.path().join(&name);
        if !path.is_file() {
            continue;
        }
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        if Some(sha256(&bytes[..], &mut io::sink())?) == pin.checksum {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// Unpacks a package; its files lie in a folder `<name>-<version>/`.
fn unpack(pin: &Pin, bytes: &[u8]) -> Result<Tree> {
    let top = format!("{}-{}/", pin.name, pin.version);
    let mut tree = Tree::new();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            continue;
        }
        let path = entry
            .path()?
            .to_str()
            .context("a file name is not UTF-8")?
            .replace('\\', "/");
        ensure!(kind.is_file(), "{path} is neither a file nor a folder");
        let path = path
            .strip_prefix(&top)
            .with_context(|| format!("{path} is not below {top}"))?;
        let plain = path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
        ensure!(plain, "{path} is not a plain relative path");
        let executable = entry.header().mode()? & 0o100 != 0;
        let path = path.to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        tree.insert(path, File { bytes, executable });
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"
version = 4
[[package]]
name = "llama-cpp-2"
version = "0.1.160"
checksum = "aa"
[[package]]
name = "llama-cpp-sys-2"
version = "0.1.161"
checksum = "bb"
"#;

    #[test]
    fn each_crate_is_pinned_once_with_a_checksum() {
        let pins = parse(LOCK).unwrap();
        assert_eq!(pins[0].version, "0.1.160");
        assert_eq!(pins[1].checksum.as_deref(), Some("bb"));

        let without = LOCK.replace("checksum = \"bb\"\n", "");
        assert_eq!(
            parse(&without).unwrap_err().to_string(),
            "llama-cpp-sys-2 has no checksum"
        );
        let absent = LOCK.replace("llama-cpp-sys-2", "other");
        assert_eq!(
            parse(&absent).unwrap_err().to_string(),
            "llama-cpp-sys-2 is not pinned"
        );
        let twice = LOCK.replace("llama-cpp-sys-2", "llama-cpp-2");
        assert_eq!(
            parse(&twice).unwrap_err().to_string(),
            "llama-cpp-2 is pinned more than once"
        );
    }

    #[test]
    fn a_package_unpacks_below_its_own_folder_only() {
        let pin = &parse(LOCK).unwrap()[0];
        let inside = unpack(pin, &package("llama-cpp-2-0.1.160/src/lib.rs")).unwrap();
        assert_eq!(inside["src/lib.rs"].bytes, b"text");
        assert!(unpack(pin, &package("elsewhere/src/lib.rs")).is_err());
        assert!(unpack(pin, &package("llama-cpp-2-0.1.160/../b")).is_err());
    }

    fn package(path: &str) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        // Written by hand: the library would refuse the path that must not be accepted here.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_size(4);
        header.set_mode(0o644);
        header.set_cksum();
        let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gz);
        tar.append(&header, &b"text"[..]).unwrap();
        tar.into_inner().unwrap().finish().unwrap()
    }
}
