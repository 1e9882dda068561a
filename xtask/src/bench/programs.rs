//! The programs that a suite runs: built here, or carried in from where they were built.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::origin::Origin;
use crate::{overhead, setup, steps, vendor};

/// Paths of programs by their names.
pub type Programs = BTreeMap<String, PathBuf>;

/// All of them; as cargo's arguments where they are of this package.
const ALL: [(&str, &[&str]); 6] = [
    ("hae", &["build", "--bin", "hae"]),
    ("full_model", &["build", "--example", "full_model"]),
    ("kv", &["build", "--bench", "kv"]),
    ("controller", &["build", "--bench", "controller"]),
    ("suite", &["test", "--no-run", "--test", "suite"]),
    ("hae-stock", &[]),
];

/// Builds what is needed, in the release profile.
///
/// # Errors
/// When the set-up or a build fails.
pub fn build(root: &Path, needed: &BTreeSet<String>, features: &str) -> Result<Programs> {
    setup::run()?;
    vendor::run(root)?;
    let mut programs = Programs::new();
    for (name, args) in ALL {
        if !needed.contains(name) {
            continue;
        }
        let path = match name {
            "hae-stock" => overhead::build_stock(root, features)?,
            _ => {
                let mut args = [args, &["--release"]].concat();
                if !features.is_empty() {
                    args.extend(["--features", features]);
                }
                executable(root, name, &args)?
            }
        };
        programs.insert(name.to_owned(), path);
    }
    Ok(programs)
}

/// Builds one and asks cargo where it lies: benchmarks have a number in their names.
fn executable(root: &Path, name: &str, args: &[&str]) -> Result<PathBuf> {
    let args = [args, &["--message-format", "json-render-diagnostics"]].concat();
    let mut command = steps::cargo_command(root, &args, &[]);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run cargo {}", args.join(" ")))?;
    ensure!(output.status.success(), "the build failed");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut found = text.lines().rev().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is = message.pointer("/target/name")?.as_str()? == name;
        let path = message.get("executable")?.as_str()?;
        is.then(|| PathBuf::from(path))
    });
    found
        .next()
        .with_context(|| format!("cargo named no program {name}"))
}

/// Those of a folder that are there.
///
/// # Errors
/// When it is no folder with a `hae` in it.
pub fn carried(folder: &Path) -> Result<Programs> {
    let folder = fs::canonicalize(folder).with_context(|| folder.display().to_string())?;
    let paths = ALL.map(|(name, _)| (name.to_owned(), folder.join(name)));
    let programs: Programs = paths
        .into_iter()
        .filter(|(_, path)| path.is_file())
        .collect();
    ensure!(
        programs.contains_key("hae"),
        "{}: no hae in it",
        folder.display()
    );
    Ok(programs)
}

/// Builds all programs into a folder that can be carried to a machine without a toolchain: with what
/// they were built from, and this program to run them.
///
/// # Errors
/// When a build fails or a file cannot be written.
pub fn pack(root: &Path, folder: &Path, features: &str) -> Result<()> {
    let all = ALL.map(|(name, _)| name.to_owned());
    let origin = Origin::here(root, features)?;
    let mut programs = build(root, &all.into(), features)?;
    programs.insert("xtask".to_owned(), env::current_exe()?);
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (name, path) in programs {
        let to = folder.join(name);
        fs::copy(&path, &to).with_context(|| to.display().to_string())?;
        println!("{}", to.display());
    }
    origin.write(folder)
}

/// The checkout that a carried program works in: the working directory's, whatever it was built in.
///
/// # Errors
/// When the working directory lies in none.
pub fn checkout() -> Result<PathBuf> {
    let here = env::current_dir()?;
    match here
        .ancestors()
        .find(|dir| dir.join("benches/cpu.toml").is_file())
    {
        Some(root) => Ok(root.to_owned()),
        None => bail!("{}: not within the repository", here.display()),
    }
}
