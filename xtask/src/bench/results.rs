//! What was measured, one JSON line a run and round, and what of it is still to be done.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::machine::Machine;
use super::origin::{Origin, digest};
use super::plan::{Kind, Run};

/// One round of one run, whole: a run that broke off has no line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    pub suite: String,
    pub part: String,
    pub run: String,
    /// A digest of the run's arguments and settings.
    pub what: String,
    /// From 0.
    pub round: usize,
    pub threads: usize,
    pub quick: bool,
    pub machine: Machine,
    #[serde(flatten)]
    pub origin: Origin,
    /// The day it was measured, UTC.
    pub date: String,
    /// Wall time, the loading of the model included.
    pub seconds: f64,
    /// The command line.
    pub command: String,
    /// Columns from the plan: `run`, and the values of `each`.
    pub fields: BTreeMap<String, String>,
    /// What the program printed: lines of `hae bench -o jsonl`, or the like.
    pub rows: Vec<Value>,
}

/// What a result depends on beside its own arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub machine: Machine,
    pub origin: Origin,
}

impl Line {
    pub fn is_of(&self, setting: &Setting) -> bool {
        self.machine == setting.machine && self.origin == setting.origin
    }

    pub fn setting(&self) -> Setting {
        Setting {
            machine: self.machine.clone(),
            origin: self.origin.clone(),
        }
    }
}

/// Digest of all that tells one run from another on one machine and build.
pub fn what(run: &Run, threads: usize, quick: bool) -> String {
    let Run {
        part,
        name,
        kind,
        model,
        fields,
        warmup,
        env,
        loops,
        cpus,
        gpu_memory,
    } = run;
    let (program, words): (_, &[String]) = match kind {
        Kind::Hae(args) => ("hae", args),
        Kind::Stock(args) => ("stock", args),
        Kind::Read => ("read", &[]),
        // What is kept of its output is a setting of the table; a new one wants new lines, though.
        Kind::Command { words, keep, .. } => {
            return digest(&format!(
                "{part}\n{name}\n{words:?}{keep:?}{env:?}{threads}{quick}"
            ));
        }
    };
    digest(&format!(
        "{part}\n{name}\n{program}{words:?}{model:?}{fields:?}{warmup}{env:?}{loops}{cpus:?}{gpu_memory}{threads}{quick}"
    ))
}

/// The lines of a results folder.
pub struct Store {
    path: PathBuf,
    pub lines: Vec<Line>,
}

impl Store {
    /// Reads what is there. A last line that was cut off is taken away.
    ///
    /// # Errors
    /// When a line cannot be read, with its number, or the folder cannot be made.
    pub fn open(out: &Path) -> Result<Store> {
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        let path = out.join("results.jsonl");
        let mut text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.with_context(|| path.display().to_string())?,
        };
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            text.truncate(whole);
            let file = OpenOptions::new().write(true).open(&path);
            let cut = file.and_then(|file| file.set_len(whole as u64));
            cut.with_context(|| path.display().to_string())?;
        }
        let lines = text.lines().enumerate().map(|(i, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), i + 1))
        });
        let lines = lines.collect::<Result<_>>()?;
        Ok(Store { path, lines })
    }

    /// Whether this round of a run is there.
    pub fn has(&self, setting: &Setting, what: &str, round: usize) -> bool {
        let mut lines = self.lines.iter();
        lines.any(|line| line.what == what && line.round == round && line.is_of(setting))
    }

    /// # Errors
    /// When the line cannot be written.
    pub fn append(&mut self, line: Line) -> Result<()> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path);
        let written = file.and_then(|mut file: File| {
            file.write_all(format!("{}\n", serde_json::to_string(&line)?).as_bytes())?;
            file.sync_data()
        });
        written.with_context(|| self.path.display().to_string())?;
        self.lines.push(line);
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::super::machine::tests::machine;
    use super::super::origin::tests::origin;
    use super::*;

    pub fn line(run: &str, round: usize, rows: Vec<Value>) -> Line {
        Line {
            suite: "cpu".into(),
            part: "p".into(),
            run: run.into(),
            what: run.into(),
            round,
            threads: 2,
            quick: false,
            machine: machine(),
            origin: origin("abcdef0"),
            date: "2026-01-02".into(),
            seconds: 1.5,
            command: "hae bench".into(),
            fields: BTreeMap::from([("run".to_owned(), run.to_owned())]),
            rows,
        }
    }

    fn run(args: &[&str]) -> Run {
        Run {
            part: "p".into(),
            name: "r".into(),
            kind: Kind::Hae(args.iter().map(|&a| a.to_owned()).collect()),
            model: Some("full".into()),
            fields: Vec::new(),
            warmup: false,
            env: BTreeMap::new(),
            loops: 0,
            cpus: None,
            gpu_memory: false,
        }
    }

    #[test]
    fn a_round_is_done_once_for_its_machine_commit_and_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let what = what(&run(&["-n", "8"]), 2, false);
        let mut done = line("r", 0, vec![json!({})]);
        done.what.clone_from(&what);
        let setting = done.setting();
        assert!(!store.has(&setting, &what, 0));
        store.append(done).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(store.has(&setting, &what, 0));
        assert!(!store.has(&setting, &what, 1));
        for other in [
            super::what(&run(&["-n", "9"]), 2, false),
            super::what(&run(&["-n", "8"]), 4, false),
            super::what(&run(&["-n", "8"]), 2, true),
        ] {
            assert!(!store.has(&setting, &other, 0));
        }
        let mut elsewhere = setting.clone();
        elsewhere.machine.cores = 4;
        assert!(!store.has(&elsewhere, &what, 0));
        let later = Setting {
            origin: origin("0123456"),
            ..setting
        };
        assert!(!store.has(&later, &what, 0));
    }

    #[test]
    fn a_run_that_broke_off_begins_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let mut store = Store::open(dir.path()).unwrap();
        store.append(line("a", 0, vec![])).unwrap();
        store.append(line("b", 0, vec![])).unwrap();
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 10]).unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let setting = store.lines[0].setting();
        assert!(store.has(&setting, "a", 0) && !store.has(&setting, "b", 0));
        store.append(line("b", 0, vec![])).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        assert_eq!(Store::open(dir.path()).unwrap().lines.len(), 2);
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("results.jsonl"), "{}\n").unwrap();
        let error = Store::open(dir.path()).err().unwrap();
        assert!(
            format!("{error:#}").contains("results.jsonl:1: missing field"),
            "{error:#}"
        );
    }
}
