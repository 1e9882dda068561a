//! `cargo xtask fuzz`: each reader of strangers' files on bytes that libFuzzer makes up, and the controller on
//! operations of that kind (`fuzz/`).
//!
//! libFuzzer counts what a program's branches do, which only a nightly Rust compiles in. So the targets are built
//! by one, into a folder of their own, llama.cpp included. What was learned stays in `target/fuzz/corpus`, so that
//! the next run goes on from there; what breaks a target goes to `target/fuzz/artifacts`.

use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{sanitize, setup, vendor};

const MANIFEST: &str = "fuzz/Cargo.toml";
/// Below the repository's root; Git ignores it.
const FOLDER: &str = "target/fuzz";

/// As cargo-fuzz compiles: counters and comparisons of every branch.
const FLAGS: [&str; 8] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "--cfg",
    "fuzzing",
];

/// Seconds that one input may take, MiB that the process may hold, bytes of an input.
const LIMITS: [&str; 3] = ["-timeout=20", "-rss_limit_mb=3072", "-max_len=16384"];

#[derive(clap::Args)]
pub struct Args {
    /// Minutes for each target
    #[arg(long, default_value_t = 1.0, value_name = "N")]
    minutes: f64,
    /// Processes for each target
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    jobs: u16,
    /// Targets, in the place of all
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// What came of a target.
struct Ran {
    target: String,
    executions: u64,
    /// Edges of the program's branches that were taken.
    edges: u64,
    finds: Vec<PathBuf>,
}

/// Builds the targets and runs each. 0: nothing was found; 1: something was, and it was printed what.
///
/// # Errors
/// Without a nightly Rust, for a target that there is not, and when the set-up or the build fails.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    ensure!(args.minutes > 0.0, "--minutes: expected more than 0");
    let all = targets(root)?;
    let wanted: Vec<&String> = match &args.targets[..] {
        [] => all.iter().collect(),
        some => some.iter().collect(),
    };
    if let Some(unknown) = wanted.iter().find(|target| !all.contains(target)) {
        bail!("no target {unknown:?}, expected some of {}", all.join(", "));
    }
    setup::run()?;
    vendor::run(root)?;
    let folder = build(root)?;
    let seconds = (args.minutes * 60.0).ceil();
    let mut rows = Vec::new();
    for target in wanted {
        rows.push(fuzz(root, &folder, target, seconds, args.jobs)?);
    }
    print!("{}", table(&rows, args.minutes));
    Ok(u8::from(rows.iter().any(|row| !row.finds.is_empty())))
}

/// Every file of `fuzz/targets` is one.
fn targets(root: &Path) -> Result<Vec<String>> {
    let folder = root.join("fuzz/targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "rs") {
            names.extend(path.file_stem().and_then(|s| s.to_str()).map(str::to_owned));
        }
    }
    names.sort();
    Ok(names)
}

/// Gives the folder of the programs.
fn build(root: &Path) -> Result<PathBuf> {
    let host = sanitize::host()?;
    let args = [
        "run",
        "nightly",
        "cargo",
        "build",
        "--release",
        "--locked",
        "--manifest-path",
        MANIFEST,
        "--target-dir",
        FOLDER,
        // So that build scripts and macros, which run on the way, are compiled as usual.
        "--target",
        &host,
    ];
    let flags = FLAGS.join(" ");
    eprintln!("$ RUSTFLAGS='{flags}' rustup {}", args.join(" "));
    let mut command = Command::new("rustup");
    command.args(args).current_dir(root).env("RUSTFLAGS", flags);
    // Cargo and rustup describe this very program's toolchain to what it starts.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let theirs = ["CARGO_PKG_", "CARGO_MANIFEST_", "RUSTUP_TOOLCHAIN", "RUSTC"];
        if text == "CARGO" || theirs.iter().any(|start| text.starts_with(start)) {
            command.env_remove(&name);
        }
    }
    let status = command.status().context("cannot run rustup")?;
    ensure!(
        status.success(),
        "the targets were not built; they want a nightly Rust: rustup toolchain install nightly --profile minimal"
    );
    Ok(root.join(FOLDER).join(host).join("release"))
}

fn fuzz(root: &Path, programs: &Path, target: &str, seconds: f64, jobs: u16) -> Result<Ran> {
    let own = root.join(FOLDER);
    let (learned, artifacts) = (
        own.join("corpus").join(target),
        own.join("artifacts").join(target),
    );
    for folder in [&learned, &artifacts] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let before = files(&artifacts)?;
    let log_path = own.join(format!("{target}.log"));
    let log = fs::File::create(&log_path).with_context(|| log_path.display().to_string())?;
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(artifacts.join(""));
    let mut command = Command::new(programs.join(target));
    command
        .arg(&learned)
        .arg(root.join("fuzz/corpus").join(target))
        .arg(prefix)
        .args(LIMITS)
        .args([
            format!("-max_total_time={seconds}"),
            "-print_final_stats=1".to_owned(),
        ])
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    if jobs > 1 {
        command.arg(format!("-fork={jobs}"));
    }
    let words = root.join("fuzz/dictionaries").join(format!("{target}.txt"));
    if words.is_file() {
        let mut dict = OsString::from("-dict=");
        dict.push(words);
        command.arg(dict);
    }
    eprintln!(
        "{target}: {seconds} seconds, says all in {}",
        log_path.display()
    );
    let status = command
        .status()
        .with_context(|| format!("cannot run {target}"))?;
    let said = String::from_utf8_lossy(&fs::read(&log_path)?).into_owned();
    let mut finds = files(&artifacts)?;
    finds.retain(|path| !before.contains(path));
    for find in &finds {
        eprintln!("{target}: found {}", find.display());
    }
    if !status.success() && finds.is_empty() {
        bail!("{target} ended with {status}: {}", log_path.display());
    }
    Ok(Ran {
        target: target.to_owned(),
        executions: executions(&said).unwrap_or(0),
        edges: edges(&said).unwrap_or(0),
        finds,
    })
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        paths.push(entry?.path());
    }
    paths.sort();
    Ok(paths)
}

/// The number of runs, as libFuzzer says it at the end, or by its last line where it found something.
fn executions(said: &str) -> Option<u64> {
    let end = said
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let last = said.lines().rev().find_map(|line| {
        let number = line.strip_prefix('#')?.split_whitespace().next()?;
        // Several processes have a colon behind it.
        number.trim_end_matches(':').parse().ok()
    });
    end.and_then(|n| n.trim().parse().ok()).or(last)
}

/// The last `cov:` that was said.
fn edges(said: &str) -> Option<u64> {
    said.lines().rev().find_map(|line| {
        let mut words = line
            .strip_prefix('#')?
            .split_whitespace()
            .skip_while(|w| *w != "cov:");
        words.nth(1)?.parse().ok()
    })
}

fn table(rows: &[Ran], minutes: f64) -> String {
    let mut out = String::from(
        "| target | minutes | executions | coverage, edges | finds |\n|---|---|---|---|---|\n",
    );
    for row in rows {
        let Ran {
            target,
            executions,
            edges,
            finds,
        } = row;
        let finds = finds.len();
        let _ = writeln!(
            out,
            "| `{target}` | {minutes} | {executions} | {edges} | {finds} |"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "INFO: Seed: 1\n#2\tINITED cov: 823 ft: 823 corp: 1/1b\n\
        #200\tDONE   cov: 1065 ft: 2635 corp: 46/70Kb\nstat::number_of_executed_units: 200\n";

    #[test]
    fn libfuzzers_numbers_are_read() {
        assert_eq!((executions(SAID), edges(SAID)), (Some(200), Some(1065)));
        // It stops in the middle where it finds something.
        let stopped = "#2\tINITED cov: 8 ft: 8\n#64\tNEW    cov: 9 ft: 9\n==1== ERROR: libFuzzer: deadly signal\n";
        assert_eq!((executions(stopped), edges(stopped)), (Some(64), Some(9)));
        let several =
            "#77: cov: 12 ft: 30 corp: 4 exec/s: 9 oom/timeout/crash: 0/0/0 time: 6s job: 3\n";
        assert_eq!((executions(several), edges(several)), (Some(77), Some(12)));
        assert_eq!((executions(""), edges("")), (None, None));
    }

    #[test]
    fn each_target_has_seeds_a_program_and_a_row() {
        let root = crate::root();
        let manifest = fs::read_to_string(root.join(MANIFEST)).unwrap();
        let all = targets(root).unwrap();
        assert!(all.len() > 10, "{all:?}");
        for target in &all {
            assert!(manifest.contains(&format!("path = \"targets/{target}.rs\"")));
            let seeds = files(&root.join("fuzz/corpus").join(target)).unwrap();
            assert!(!seeds.is_empty(), "{target}");
        }
        let row = Ran {
            target: "a".into(),
            executions: 7,
            edges: 3,
            finds: vec!["b".into()],
        };
        assert!(table(&[row], 0.5).ends_with("| `a` | 0.5 | 7 | 3 | 1 |\n"));
    }
}
