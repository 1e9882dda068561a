//! Runs one round of one run, and reads what it prints.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::bandwidth;
use super::plan::{Kind, Plan, Run};
use super::programs::Programs;

pub struct Runner<'a> {
    pub root: &'a Path,
    pub out: &'a Path,
    pub plan: &'a Plan,
    pub programs: Programs,
    /// Folder of the models that are made.
    pub models: PathBuf,
    pub threads: usize,
    pub quick: bool,
}

/// What a round gave.
pub struct Outcome {
    pub rows: Vec<Value>,
    pub seconds: f64,
}

/// A command line, as it runs and as it is told.
struct Line {
    words: Vec<String>,
    told: String,
}

impl Runner<'_> {
    /// Where a model lies.
    ///
    /// # Errors
    /// When the plan has none of this name.
    pub fn model(&self, name: &str) -> Result<PathBuf> {
        let file = &self.plan.model(name)?.file;
        let models = self.models.to_string_lossy();
        Ok(self.root.join(file.replace("{models}", &models)))
    }

    /// Makes a model that is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(&self, name: &str) -> Result<()> {
        let path = self.model(name)?;
        if path.is_file() {
            return Ok(());
        }
        let arguments = self.plan.model(name)?.make.as_ref();
        let arguments = arguments.with_context(|| format!("{}: missing", path.display()))?;
        let program = self.program("full_model")?;
        let arguments = shlex::split(arguments).context("an open quote")?;
        eprintln!("making {}", path.display());
        let made = Command::new(program)
            .args(arguments)
            .arg("--out")
            .arg(&self.models)
            .current_dir(self.root)
            .stdout(Stdio::null())
            .status();
        let made = made.with_context(|| program.display().to_string())?;
        ensure!(
            made.success() && path.is_file(),
            "{}: could not be made",
            path.display()
        );
        Ok(())
    }

    fn program(&self, name: &str) -> Result<&Path> {
        let found = self.programs.get(name);
        Ok(found.with_context(|| format!("no program {name} here"))?)
    }

    /// Whether every program that it runs is here.
    pub fn can(&self, run: &Run) -> bool {
        needs(run)
            .iter()
            .all(|name| self.programs.contains_key(*name))
    }

    /// The command line as it can be repeated, the programs without their folder.
    ///
    /// # Errors
    /// As [`Runner::model`].
    pub fn told(&self, run: &Run) -> Result<String> {
        Ok(self.line(run)?.told)
    }

    fn line(&self, run: &Run) -> Result<Line> {
        let mut words: Vec<String> = Vec::new();
        let threads = self.threads.to_string();
        let model = match &run.model {
            Some(name) => self.model(name)?.to_string_lossy().into_owned(),
            None => String::new(),
        };
        let mut add = |list: &[&str]| words.extend(list.iter().map(|&word| word.to_owned()));
        match &run.kind {
            Kind::Hae(args) => {
                add(&["{hae}", "bench", "-m", &model]);
                let has = |flag: &str| args.iter().any(|word| word == flag);
                if !has("-t") {
                    add(&["-t", &threads]);
                }
                if !has("-r") {
                    add(&["-r", "1"]);
                }
                if !run.warmup {
                    add(&["--no-warmup"]);
                }
                words.extend(args.iter().cloned());
                words.extend(["-o", "jsonl"].map(str::to_owned));
            }
            Kind::Stock(args) => {
                add(&["{hae-stock}", "-m", &model, "-t", &threads]);
                if run.warmup {
                    add(&["--warmup"]);
                }
                words.extend(args.iter().cloned());
            }
            Kind::Command { words: command, .. } => words.extend(command.iter().cloned()),
            Kind::Read => {}
        }
        let models = self.models.to_string_lossy().into_owned();
        let out = self.out.to_string_lossy().into_owned();
        let mut values =
            BTreeMap::from([("model", model), ("models", models), ("threads", threads)]);
        values.insert("out", out);
        let mut told = words.clone();
        for word in &mut told {
            for (name, value) in &values {
                *word = word.replace(&format!("{{{name}}}"), value);
            }
        }
        let mut words = told.clone();
        for name in PROGRAMS {
            let place = format!("{{{name}}}");
            for word in words.iter_mut().filter(|word| word.contains(&place)) {
                let path = self.programs.get(name).map(|path| path.to_string_lossy());
                *word = word.replace(&place, &path.unwrap_or_default());
            }
            told.iter_mut()
                .for_each(|word| *word = word.replace(&place, name));
        }
        if let Some(cpus) = &run.cpus {
            for line in [&mut words, &mut told] {
                line.splice(0..0, ["taskset", "-c", cpus].map(str::to_owned));
            }
        }
        let root = format!("{}/", self.root.display());
        let told = told.iter().map(|word| word.replace(&root, ""));
        let told: Vec<String> = told.map(|word| quoted(&word)).collect();
        let told = told.join(" ");
        let env = run
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value} "));
        Ok(Line {
            words,
            told: format!("{}{told}", env.collect::<String>()),
        })
    }

    /// Runs it once.
    ///
    /// # Errors
    /// When it cannot be run, fails, takes too long, or prints nothing that can be read.
    pub fn run(&self, run: &Run, round: usize) -> Result<Outcome> {
        let start = Instant::now();
        let done = |rows| Outcome {
            rows,
            seconds: start.elapsed().as_secs_f64(),
        };
        if run.kind == Kind::Read {
            let rate = bandwidth::read(self.threads, self.quick);
            return Ok(done(vec![json!({ "read_bytes_per_s": rate })]));
        }
        let line = self.line(run)?;
        let logs = self.out.join("logs");
        fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let program = if matches!(run.kind, Kind::Stock(_)) {
            "-stock"
        } else {
            ""
        };
        let name = format!("{}-{}{program}-{round}", run.part, run.name);
        let letter = |c: char| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        };
        let name: String = name.chars().map(letter).collect();
        let (stdout, stderr) = (
            logs.join(format!("{name}.out")),
            logs.join(format!("{name}.log")),
        );
        let _busy = Busy::start(run.loops, run.cpus.as_deref())?;
        let memory = run.gpu_memory.then(GpuMemory::start).transpose()?;
        let criterion = self.out.join("criterion");
        let mut command = Command::new(&line.words[0]);
        command.args(&line.words[1..]).current_dir(self.root);
        // hae and llama.cpp wait for their threads as they do by themselves: cargo sets one of these for
        // what it starts. Tests and benchmarks, which set nothing for themselves, get here what hae sets.
        command
            .env_remove("GOMP_SPINCOUNT")
            .env_remove("OMP_WAIT_POLICY");
        if matches!(run.kind, Kind::Command { .. }) {
            command.env("GOMP_SPINCOUNT", SPINS);
        }
        if let Kind::Command {
            criterion: true, ..
        } = run.kind
        {
            if criterion.exists() {
                fs::remove_dir_all(&criterion).with_context(|| criterion.display().to_string())?;
            }
            command.env("CRITERION_HOME", &criterion);
        }
        // The test program looks for these where cargo does not run it.
        if let Some(hae) = self.programs.get("hae") {
            command
                .env("CARGO_BIN_EXE_hae", hae)
                .env("CARGO_MANIFEST_DIR", self.root);
        }
        command.envs(&run.env).stdin(Stdio::null());
        command.stdout(File::create(&stdout).with_context(|| stdout.display().to_string())?);
        command.stderr(File::create(&stderr).with_context(|| stderr.display().to_string())?);
        let child = command.spawn().with_context(|| line.words[0].clone())?;
        let limit = match &run.kind {
            Kind::Command { limit, .. } => *limit,
            _ => None,
        };
        let ended = wait(child, limit.map(Duration::from_secs));
        let memory = memory.and_then(GpuMemory::stop);
        let log = || {
            let text = fs::read(&stderr).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().rev().take(3).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        let status = ended?;
        let Some(status) = status else {
            bail!(
                "took more than {} s; {}",
                limit.unwrap_or_default(),
                stderr.display()
            );
        };
        ensure!(
            status.success(),
            "{status}; {}\n{}",
            stderr.display(),
            log()
        );
        let text = fs::read(&stdout).with_context(|| stdout.display().to_string())?;
        let mut text = String::from_utf8_lossy(&text).into_owned();
        let mut rows = match &run.kind {
            Kind::Command {
                criterion: true, ..
            } => estimates(&criterion)?,
            Kind::Command { keep, .. } => {
                // compute-sanitizer writes to either.
                text += &String::from_utf8_lossy(&fs::read(&stderr).unwrap_or_default());
                kept(&text, keep)
            }
            _ => text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
        };
        ensure!(
            !rows.is_empty(),
            "printed nothing that can be read; {}",
            stdout.display()
        );
        if let Some(memory) = memory {
            for row in rows.iter_mut().filter_map(Value::as_object_mut) {
                row.insert("gpu_mib_peak".into(), memory.into());
            }
        }
        Ok(done(rows))
    }
}

/// What `hae` sets for itself; `tests/suite/polling.rs` compares.
const SPINS: &str = "10000";

/// Names that stand for programs in a plan, and that of the comparison.
const PROGRAMS: [&str; 5] = ["hae-stock", "hae", "suite", "kv", "controller"];

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+%@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// The programs that a run takes.
pub fn needs(run: &Run) -> Vec<&'static str> {
    match &run.kind {
        Kind::Hae(_) => vec!["hae"],
        Kind::Stock(_) => vec!["hae-stock"],
        Kind::Read => Vec::new(),
        Kind::Command { words, .. } => {
            let named = |name: &&str| {
                words
                    .iter()
                    .any(|word| word.contains(&format!("{{{name}}}")))
            };
            PROGRAMS.into_iter().filter(named).collect()
        }
    }
}

/// Rows of JSON, and other lines with one of these words in them.
fn kept(text: &str, keep: &[String]) -> Vec<Value> {
    let row = |line: &str| match serde_json::from_str::<Value>(line) {
        Ok(value) if value.is_object() => Some(value),
        _ if keep.iter().any(|word| line.contains(word.as_str())) => {
            Some(json!({ "line": line.trim() }))
        }
        _ => None,
    };
    let mut rows: Vec<Value> = Vec::new();
    for row in text.lines().filter_map(row) {
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    rows
}

/// Criterion's medians below a folder, microseconds by name.
fn estimates(folder: &Path) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(dir) = open.pop() {
        let file = dir.join("new/estimates.json");
        if file.is_file() {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let value: Value =
                serde_json::from_str(&text).with_context(|| file.display().to_string())?;
            let ns = value
                .pointer("/median/point_estimate")
                .and_then(Value::as_f64);
            let ns = ns.with_context(|| format!("{}: no median", file.display()))?;
            let name = dir
                .strip_prefix(folder)?
                .to_string_lossy()
                .replace('\\', "/");
            rows.push((name, ns / 1e3));
            continue;
        }
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    // By name, numbers by their size.
    rows.sort_by_key(|(name, _)| {
        let (head, tail) = name.rsplit_once('/').unwrap_or((name, ""));
        (
            head.to_owned(),
            tail.parse::<u64>().unwrap_or(u64::MAX),
            tail.to_owned(),
        )
    });
    Ok(rows
        .into_iter()
        .map(|(name, us)| json!({ "what": name, "us": us }))
        .collect())
}

/// `None`: it was stopped at its limit.
fn wait(mut child: Child, limit: Option<Duration>) -> Result<Option<std::process::ExitStatus>> {
    let Some(limit) = limit else {
        return Ok(Some(child.wait()?));
    };
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Loops that keep processors busy as long as this lives.
struct Busy(Vec<Child>);

impl Busy {
    fn start(n: usize, cpus: Option<&str>) -> Result<Busy> {
        let mut busy = Busy(Vec::new());
        let program = env::current_exe()?;
        for _ in 0..n {
            let mut command = match cpus {
                None => Command::new(&program),
                Some(cpus) => {
                    let mut command = Command::new("taskset");
                    command.args(["-c", cpus]).arg(&program);
                    command
                }
            };
            command.args(["spin", &std::process::id().to_string()]);
            busy.0.push(command.spawn().context("a busy loop")?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended by itself; then there is nothing to do.
            _ = child.kill();
            _ = child.wait();
        }
    }
}

/// Keeps a processor busy as long as the process that began it lives: `cargo xtask spin`.
pub fn spin(parent: u32) {
    while parent_id() == Some(parent) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            std::hint::black_box(start);
        }
    }
}

fn parent_id() -> Option<u32> {
    #[cfg(unix)]
    return Some(std::os::unix::process::parent_id());
    #[cfg(not(unix))]
    None
}

/// What the driver says that is taken of the first GPU, watched by nvidia-smi.
struct GpuMemory {
    child: Child,
    peak: thread::JoinHandle<Option<u64>>,
}

impl GpuMemory {
    fn start() -> Result<GpuMemory> {
        let mut child = Command::new("nvidia-smi")
            .args([
                "--query-gpu=memory.used",
                "--format=csv,noheader,nounits",
                "-lms",
                "20",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("nvidia-smi")?;
        let lines = BufReader::new(child.stdout.take().context("nvidia-smi: no output")?).lines();
        let peak = thread::spawn(|| {
            let used = lines.map_while(Result::ok);
            used.filter_map(|line| line.trim().parse().ok()).max()
        });
        Ok(GpuMemory { child, peak })
    }

    /// MiB at most.
    fn stop(mut self) -> Option<u64> {
        _ = self.child.kill();
        _ = self.child.wait();
        self.peak.join().ok().flatten()
    }
}

#[cfg(test)]
mod tests;
