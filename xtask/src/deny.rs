//! `cargo xtask deny`: licences, sources and known holes of everything that is linked, by cargo-deny
//! and `deny.toml`; and that nothing of it needs a newer Rust than the manifest says.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

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
        for newer in newer(&metadata(root, manifest)?)? {
            eprintln!("error: {manifest}: {newer}");
            found = true;
        }
    }
    Ok(u8::from(found))
}

fn metadata(root: &Path, manifest: &str) -> Result<Value> {
    let args = [
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--manifest-path",
    ];
    let path = root.join(manifest);
    let path = path
        .to_str()
        .context("the repository's path is not UTF-8")?;
    let text = process::output("cargo", &[&args[..], &[path]].concat());
    let text = text.with_context(|| format!("cargo metadata of {manifest} failed"))?;
    serde_json::from_str(&text).context("cargo metadata")
}

/// The packages that need a newer Rust than the first one of the workspace says.
fn newer(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"].as_array().context("no packages")?;
    let own = &metadata["workspace_members"][0];
    let own = packages.iter().find(|package| package["id"] == *own);
    let wanted = own.and_then(|own| own["rust_version"].as_str());
    let wanted = wanted.context("no rust-version in the manifest")?;
    let number = |version: &str| -> Vec<u32> {
        let parts = version.split('.').map(|part| part.parse().unwrap_or(0));
        parts.chain([0; 3]).take(3).collect()
    };
    let needs = packages.iter().filter_map(|package| {
        let needed = package["rust_version"].as_str()?;
        (number(needed) > number(wanted)).then(|| {
            let [name, version] =
                ["name", "version"].map(|key| package[key].as_str().unwrap_or("?"));
            format!("{name} {version} needs Rust {needed}, the manifest says {wanted}")
        })
    });
    Ok(needs.collect())
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
    use serde_json::json;

    use super::{MANIFESTS, check, newer};

    #[test]
    fn what_needs_a_newer_rust_is_named() {
        let package = |name: &str, rust: Option<&str>| json!({"id": name, "name": name, "version": "1.0", "rust_version": rust});
        let own = package("own", Some("1.88"));
        let all = [
            own,
            package("a", None),
            package("b", Some("1.88.0")),
            package("c", Some("1.9")),
            package("d", Some("1.88.1")),
        ];
        let found = newer(&json!({"packages": all, "workspace_members": ["own"]})).unwrap();
        assert_eq!(found, ["d 1.0 needs Rust 1.88.1, the manifest says 1.88"]);
        assert!(newer(&json!({"packages": [], "workspace_members": []})).is_err());
    }

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
