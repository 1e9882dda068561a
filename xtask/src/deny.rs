//! `cargo xtask deny`: licences, sources and known holes of everything that is linked, by cargo-deny
//! and `deny.toml`.

use std::path::Path;

use anyhow::{Result, bail};

use crate::{process, steps, vendor};

/// One version, so that everybody's findings are the same.
const INSTALL: &str = "cargo install cargo-deny --locked --version ^0.20";

/// The workspaces, each with a lock file of its own.
const MANIFESTS: [&str; 2] = ["Cargo.toml", "xtask/Cargo.toml"];

#[derive(clap::Args)]
pub struct Args {
    /// Leave out known security holes, whose list is fetched from GitHub
    #[arg(long)]
    offline: bool,
}

/// Runs every check, all of them even if one fails. 0: nothing was found.
///
/// # Errors
/// When cargo-deny is not there, or the list of holes cannot be fetched.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    if process::output("cargo", &["deny", "--version"]).is_none() {
        bail!("cargo-deny is not installed: {INSTALL}");
    }
    vendor::run(root)?;
    // By itself, so that no network is told from a finding.
    if !args.offline && !steps::cargo(root, &["deny", "fetch", "db"])?.success() {
        bail!("the list of known holes cannot be fetched: give --offline to leave it out");
    }
    let mut found = false;
    for manifest in MANIFESTS {
        let args = check(manifest, args.offline);
        found |= !steps::cargo(root, &args)?.success();
    }
    Ok(u8::from(found))
}

fn check(manifest: &str, offline: bool) -> Vec<&str> {
    let mut args = vec![
        "deny",
        "--manifest-path",
        manifest,
        "--config",
        "deny.toml",
        "--locked",
    ];
    if offline {
        args.push("--offline");
    }
    args.push("check");
    // One list for both: what only one of them needs is no finding.
    args.extend(["-A", "license-exception-not-encountered"]);
    args.extend(["licenses", "bans", "sources"]);
    if !offline {
        // Fetched already.
        args.extend(["--disable-fetch", "advisories"]);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::{MANIFESTS, check};

    #[test]
    fn every_lock_file_of_the_repository_is_checked_for_everything() {
        for manifest in MANIFESTS {
            let lock = manifest.replace(".toml", ".lock");
            assert!(crate::root().join(lock).is_file(), "{manifest}");
            let all = check(manifest, false);
            for what in ["licenses", "bans", "sources", "advisories"] {
                assert!(all.contains(&what), "{what}");
            }
        }
        assert!(!check("Cargo.toml", true).contains(&"advisories"));
    }
}
