//! `cargo xtask overhead`: this project switched off against llama.cpp as its crate comes, built
//! without our patches, by turns.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::median::median;
use crate::{setup, steps, vendor};

#[derive(clap::Args)]
pub struct Args {
    /// Text model (GGUF); it has to be one that llama.cpp runs without patches
    #[arg(short)]
    model: PathBuf,
    /// Tokens of the prompt
    #[arg(short = 'p', default_value_t = 512)]
    n_prompt: usize,
    /// Tokens decoded after it
    #[arg(short = 'n', default_value_t = 32)]
    n_gen: usize,
    /// Tokens in the cache before
    #[arg(short = 'd', default_value_t = 0)]
    n_depth: usize,
    /// Threads
    #[arg(short = 't', default_value_t = 2)]
    n_threads: usize,
    /// Pairs of runs
    #[arg(short = 'r', default_value_t = 5)]
    rounds: usize,
    /// Only build both programs
    #[arg(long)]
    build: bool,
}

/// What either program prints of a run.
#[derive(Deserialize, Clone, Copy)]
struct Run {
    #[serde(rename = "prefill_ms_median")]
    prefill: Option<f64>,
    #[serde(rename = "tpot_ms_median")]
    token: Option<f64>,
}

/// Builds both, runs them by turns and prints the medians of each and of the ratio by pairs.
///
/// # Errors
/// When the set-up or a build fails, or a program does.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    setup::run()?;
    vendor::run(root)?;
    let stock = build_stock(root, "")?;
    let build = steps::cargo(root, &["build", "--release", "--bin", "hae"])?;
    ensure!(build.success(), "the build failed");
    let programs = [stock, root.join("target/release/hae")];
    if args.build {
        programs.iter().for_each(|p| println!("{}", p.display()));
        return Ok(());
    }
    let mut runs: [Vec<Run>; 2] = Default::default();
    for round in 0..args.rounds {
        for i in [round % 2, 1 - round % 2] {
            runs[i].push(measure(&programs[i], i == 1, args)?);
        }
    }
    println!("milliseconds     llama.cpp      hae full    ratio");
    for (name, of) in [
        (
            "prompt",
            (|run: &Run| run.prefill) as fn(&Run) -> Option<f64>,
        ),
        ("token", |run| run.token),
    ] {
        let columns = runs.each_ref().map(|r| r.iter().filter_map(of).collect());
        let [stock, ours]: [Vec<f64>; 2] = columns;
        let ratios = ours.iter().zip(&stock).map(|(ours, stock)| ours / stock);
        let [ratio, stock, ours] =
            [ratios.collect(), stock, ours].map(|values| median(values).unwrap_or(f64::NAN));
        println!("{name:<12}{stock:14.2}{ours:14.2}{ratio:9.4}");
    }
    Ok(())
}

/// Builds the timing program on the crates without patches, and says where it lies.
///
/// # Errors
/// When a crate cannot be had or the build fails.
pub fn build_stock(root: &Path, features: &str) -> Result<PathBuf> {
    vendor::unpatched(root, &root.join("target/unpatched"))?;
    let mut args = vec![
        "build",
        "--release",
        "--manifest-path",
        "benches/stock/Cargo.toml",
    ];
    args.extend(["--target-dir", "target/stock"]);
    if !features.is_empty() {
        args.extend(["--features", features]);
    }
    ensure!(steps::cargo(root, &args)?.success(), "the build failed");
    Ok(root.join("target/stock/release/hae-stock"))
}

fn measure(program: &Path, ours: bool, args: &Args) -> Result<Run> {
    let mut command = Command::new(program);
    // Each waits for its threads as it does by itself: cargo sets one of them for what it starts.
    command.env_remove("GOMP_SPINCOUNT");
    command.env_remove("OMP_WAIT_POLICY");
    let numbers = [("-d", args.n_depth), ("-t", args.n_threads)];
    if ours {
        command.args(["bench", "-r", "1", "-o", "jsonl", "--kv-policy", "full"]);
        // Only the one test with both: hae measures lists.
        command.args(["-p", "0", "-n", "0", "--pg"]);
        command.arg(format!("{},{}", args.n_prompt, args.n_gen));
        command.arg("--no-warmup");
    } else {
        command.arg("-p").arg(args.n_prompt.to_string());
        command.arg("-n").arg(args.n_gen.to_string());
    }
    command.arg("-m").arg(&args.model);
    for (flag, n) in numbers {
        command.arg(flag).arg(n.to_string());
    }
    let output = command
        .output()
        .with_context(|| program.display().to_string())?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {error}", program.display());
    let line = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(line.trim()).with_context(|| format!("{}: {line}", program.display()))
}
