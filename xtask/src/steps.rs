//! `cargo xtask demo`, `model` and `test`: set up, then run plain cargo commands, which are
//! printed so that each can be repeated by itself.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, ensure};

use crate::{pin, setup, vendor};

/// Builds the program and runs its demo; the exit code is the demo's.
///
/// # Errors
/// When the set-up fails or cargo cannot be run.
pub fn demo(root: &Path, args: &[String]) -> Result<u8> {
    set_up(root)?;
    build_and_run(root, &["--bin", "hae"], &["demo"], args)
}

/// Builds the example that writes a model of full size, and runs it; the exit code is its own.
///
/// # Errors
/// When the set-up fails or cargo cannot be run.
pub fn full_model(root: &Path, args: &[String]) -> Result<u8> {
    set_up(root)?;
    build_and_run(root, &["--example", "full_model"], &[], args)
}

/// Runs the tests of `tests/dry-metal` for every GPU, which with `write` write the tables of docs/metal.md instead
/// of comparing them. 0: all passed.
///
/// # Errors
/// When the set-up fails or cargo cannot be run.
pub fn metal(root: &Path, write: bool) -> Result<u8> {
    ensure!(
        cfg!(target_os = "linux"),
        "Metal is stood in for on Linux; on a Mac the tests have the GPU itself"
    );
    set_up(root)?;
    let mut variables = vec![("METAL_ALL".to_owned(), OsString::from("1"))];
    if write {
        variables.push(("METAL_WRITE".to_owned(), "1".into()));
    }
    let args = ["test", "--release", "--test", "suite", "--", "metal::"];
    let done = cargo_with(root, &args, &variables)?;
    Ok(u8::from(!done.success()))
}

fn build_and_run(root: &Path, target: &[&str], words: &[&str], args: &[String]) -> Result<u8> {
    let build = cargo(root, &[&["build", "--release"], target].concat())?;
    ensure!(build.success(), "the build failed");
    let mut run = [&["run", "--quiet", "--release"], target, &["--"], words].concat();
    run.extend(args.iter().map(String::as_str));
    let status = cargo(root, &run)?;
    Ok(status
        .code()
        .and_then(|c| u8::try_from(c).ok())
        .unwrap_or(1))
}

const XTASK: &str = "xtask/Cargo.toml";
const FUZZ: &str = "fuzz/Cargo.toml";

/// Only the release profile is used: each profile would build its own llama.cpp.
const CHECKS: [&[&str]; 10] = [
    &["fmt", "--check"],
    &["fmt", "--check", "--manifest-path", XTASK],
    &["fmt", "--check", "--manifest-path", FUZZ],
    // Its lock file names what the library needs, and nothing here builds it.
    &["tree", "--locked", "--depth", "0", "--manifest-path", FUZZ],
    &[
        "fmt",
        "--check",
        "--manifest-path",
        "tests/dry-metal/Cargo.toml",
    ],
    &[
        "clippy",
        "--release",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ],
    &[
        "clippy",
        "--release",
        "--all-targets",
        "--locked",
        "--manifest-path",
        XTASK,
        "--",
        "-D",
        "warnings",
    ],
    // The library as another program takes it. OpenMP stays: without it llama.cpp would be built
    // a second time.
    &[
        "check",
        "--release",
        "--lib",
        "--no-default-features",
        "--features",
        "openmp",
        "--locked",
    ],
    &["test", "--release", "--locked", "--manifest-path", XTASK],
    &["test", "--release", "--locked", "--no-fail-fast"],
];

/// Runs every check and test, all of them even if one fails. 0: all passed; 1: some failed.
///
/// # Errors
/// When the set-up fails or cargo cannot be run.
pub fn test(root: &Path) -> Result<u8> {
    set_up(root)?;
    components(root)?;
    let mut failed = Vec::new();
    eprintln!("$ cargo xtask vendor --check");
    if vendor::check(root)? != 0 {
        failed.push("xtask vendor --check".to_owned());
    }
    for check in CHECKS {
        if !cargo(root, check)?.success() {
            failed.push(check.join(" "));
        }
    }
    if failed.is_empty() {
        eprintln!("all {} steps passed", CHECKS.len() + 1);
        return Ok(0);
    }
    for step in &failed {
        eprintln!("failed: cargo {step}");
    }
    Ok(1)
}

fn set_up(root: &Path) -> Result<()> {
    setup::run()?;
    vendor::run(root)
}

/// Adds rustfmt and clippy, which rustup's minimal profile leaves out.
fn components(root: &Path) -> Result<()> {
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let mut probe = Command::new(pin::cargo());
        if probe
            .args([command, "--version"])
            .output()
            .is_ok_and(|o| o.status.success())
        {
            continue;
        }
        eprintln!("$ rustup component add {component}");
        let added = Command::new("rustup")
            .args(["component", "add", component])
            .current_dir(root)
            .status();
        ensure!(
            added.is_ok_and(|s| s.success()),
            "missing: {component}; install it with the Rust toolchain"
        );
    }
    Ok(())
}

/// Runs a cargo command and prints it first.
///
/// # Errors
/// When cargo cannot be run.
pub fn cargo(root: &Path, args: &[&str]) -> Result<ExitStatus> {
    cargo_with(root, args, &[])
}

/// The same with these variables on top of the environment.
///
/// # Errors
/// When cargo cannot be run.
pub fn cargo_with(
    root: &Path,
    args: &[&str],
    variables: &[(String, OsString)],
) -> Result<ExitStatus> {
    cargo_command(root, args, variables)
        .status()
        .with_context(|| format!("cannot run cargo {}", args.join(" ")))
}

/// Such a command, to be run by the caller; it is printed here.
pub fn cargo_command(root: &Path, args: &[&str], variables: &[(String, OsString)]) -> Command {
    for (name, value) in variables {
        eprintln!("$ export {name}='{}'", value.to_string_lossy());
    }
    eprintln!("$ cargo {}", args.join(" "));
    unprinted(root, args, variables)
}

/// Such a command, which is one of many.
pub fn unprinted(root: &Path, args: &[&str], variables: &[(String, OsString)]) -> Command {
    let mut command = Command::new(pin::cargo());
    command.args(args).current_dir(root);
    // Cargo describes this program to itself through its environment; the commands below must
    // see what a plain shell would show them.
    for (name, _) in std::env::vars_os() {
        let ours = |n: &str| n.starts_with("CARGO_PKG_") || n.starts_with("CARGO_MANIFEST_");
        if name.to_str().is_some_and(ours) {
            command.env_remove(name);
        }
    }
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
}
