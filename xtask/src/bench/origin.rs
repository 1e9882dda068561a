//! What measured: the commit, and how its programs were built.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::process::output;

/// What figures depend on: the program, the crates below it, and what is fed. The plans do not
/// belong to it, since a result carries its arguments.
const MEASURED: [&str; 8] = [
    "src",
    "patches",
    "vendor/pin",
    "benches",
    ":(exclude)benches/*.toml",
    "Cargo.toml",
    "Cargo.lock",
    ".cargo",
];

/// Where programs came from; lies beside them as `build.json` when they are carried elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The last commit that touched what is measured, abbreviated. A later one changed other things.
    pub commit: String,
    /// A digest of what was changed after it and not committed.
    pub dirty: Option<String>,
    pub build: Build,
}

/// How the programs were compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    pub profile: String,
    /// Beside the default ones.
    pub features: String,
    pub rustc: String,
    pub rustflags: String,
    /// Of llama.cpp.
    pub cc: String,
    /// Variables that reach llama.cpp's build.
    pub env: BTreeMap<String, String>,
}

impl Origin {
    /// Of what cargo builds here and now.
    pub fn here(root: &Path, features: &str) -> Result<Origin> {
        let log = [
            &["log", "-1", "--abbrev=7", "--format=%h", "--"],
            &MEASURED[..],
        ]
        .concat();
        let commit = git(root, &log).unwrap_or_default();
        let diff = git(root, &[&["diff", "HEAD", "--"], &MEASURED[..]].concat());
        let status = git(
            root,
            &[&["status", "--porcelain", "--"], &MEASURED[..]].concat(),
        );
        let changed = status.filter(|list| !list.is_empty());
        Ok(Origin {
            commit: match commit.is_empty() {
                true => "unknown".to_owned(),
                false => commit,
            },
            dirty: changed.map(|list| digest(&format!("{list}{}", diff.unwrap_or_default()))),
            build: Build::here(root, features)?,
        })
    }

    /// Of programs that were built elsewhere.
    ///
    /// # Errors
    /// When `build.json` is there and cannot be read.
    pub fn carried(programs: &Path) -> Result<Origin> {
        let path = programs.join(BUILD_FILE);
        if !path.exists() {
            eprintln!("{}: missing, so the rows name no commit", path.display());
            let unknown = || "unknown".to_owned();
            return Ok(Origin {
                commit: unknown(),
                dirty: None,
                build: Build {
                    profile: unknown(),
                    features: unknown(),
                    rustc: unknown(),
                    rustflags: String::new(),
                    cc: unknown(),
                    env: BTreeMap::new(),
                },
            });
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, programs: &Path) -> Result<()> {
        let path = programs.join(BUILD_FILE);
        let text = serde_json::to_string_pretty(self)?;
        fs::write(&path, text + "\n").with_context(|| path.display().to_string())
    }

    /// The commit as tables name it.
    pub fn words(&self) -> String {
        match self.dirty {
            None => format!("commit `{}`", self.commit),
            Some(_) => format!(
                "commit `{}` with changes that were not committed",
                self.commit
            ),
        }
    }
}

const BUILD_FILE: &str = "build.json";

impl Build {
    fn here(root: &Path, features: &str) -> Result<Build> {
        let cc = env::var("CC").unwrap_or("cc".to_owned());
        let first = |text: Option<String>| {
            let text = text.unwrap_or_default();
            text.lines().next().unwrap_or("unknown").to_owned()
        };
        // As vendor/llama-cpp-sys-2/build.rs hands them on.
        let reaches = |name: &str| {
            ["GGML_", "CMAKE_", "LLAMA_"]
                .iter()
                .any(|head| name.starts_with(head))
                && !name.contains("LAUNCHER")
        };
        Ok(Build {
            profile: "release".to_owned(),
            features: features.to_owned(),
            rustc: first(output(
                &env::var("RUSTC").unwrap_or("rustc".into()),
                &["--version"],
            )),
            rustflags: rustflags(root)?,
            cc: first(output(&cc, &["--version"])),
            env: env::vars().filter(|(name, _)| reaches(name)).collect(),
        })
    }

    /// In words, for the line below a table.
    pub fn words(&self) -> String {
        let mut parts = vec![self.profile.clone()];
        if !self.features.is_empty() {
            parts.push(format!("features {}", self.features));
        }
        parts.push(self.rustc.clone());
        if !self.rustflags.is_empty() {
            parts.push(format!("`{}`", self.rustflags));
        }
        parts.push(self.cc.clone());
        parts.extend(
            self.env
                .iter()
                .map(|(name, value)| format!("`{name}={value}`")),
        );
        parts.join(", ")
    }
}

/// What cargo hands to rustc: the environment's flags, else those of `.cargo/config.toml`.
fn rustflags(root: &Path) -> Result<String> {
    if let Ok(flags) = env::var("CARGO_ENCODED_RUSTFLAGS") {
        return Ok(flags.replace('\x1f', " "));
    }
    if let Ok(flags) = env::var("RUSTFLAGS") {
        return Ok(flags);
    }
    let path = root.join(".cargo/config.toml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let config: toml::Table = text.parse().with_context(|| path.display().to_string())?;
    let flags = config
        .get("build")
        .and_then(|build| build.get("rustflags")?.as_array());
    let flags = flags.into_iter().flatten().filter_map(|flag| flag.as_str());
    Ok(flags.collect::<Vec<_>>().join(" "))
}

/// Commits behind `commit` that touched what is measured, the newest first; each one line.
///
/// # Errors
/// When this is no clone with that commit in it.
pub fn since(root: &Path, commit: &str) -> Result<Vec<String>> {
    let word = commit.chars().all(|c| c.is_ascii_hexdigit()) && commit.len() >= 4;
    ensure!(word, "`{commit}` is no commit");
    let range = format!("{commit}..HEAD");
    let log = git(
        root,
        &[&["log", "--format=%h %s", &range, "--"], &MEASURED[..]].concat(),
    );
    let log = log.with_context(|| format!("`{commit}` is in no history that is here"))?;
    Ok(log.lines().map(str::to_owned).collect())
}

fn git(root: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(args)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

/// A digest short enough to read aloud.
pub fn digest(text: &str) -> String {
    let hash = Sha256::digest(text.as_bytes());
    hash.iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn origin(commit: &str) -> Origin {
        Origin {
            commit: commit.to_owned(),
            dirty: None,
            build: Build {
                profile: "release".into(),
                features: String::new(),
                rustc: "rustc 1.90.0".into(),
                rustflags: "-C target-cpu=native".into(),
                cc: "cc 13".into(),
                env: BTreeMap::new(),
            },
        }
    }

    /// A repository with one commit of `src/a`, and one of `docs/b` behind it.
    fn repository(dir: &Path) {
        let run = |args: &[&str]| {
            let who = ["-c", "user.name=a", "-c", "user.email=a@example.org"];
            git(dir, &[&who, args].concat()).unwrap_or_else(|| panic!("git {args:?}"));
        };
        run(&["init", "-q"]);
        for folder in ["src", "docs", "benches", ".cargo"] {
            fs::create_dir(dir.join(folder)).unwrap();
        }
        for name in ["src/a", "docs/b", ".cargo/config.toml"] {
            fs::write(dir.join(name), "").unwrap();
            run(&["add", "."]);
            run(&["commit", "-qm", name]);
        }
    }

    #[test]
    fn other_files_and_plans_leave_the_commit_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        repository(dir.path());
        let at = |dir: &Path| Origin::here(dir, "").unwrap();
        let before = at(dir.path());
        assert_eq!(before.dirty, None);
        assert_eq!(
            since(dir.path(), &before.commit).unwrap(),
            Vec::<String>::new()
        );
        fs::write(dir.path().join("docs/b"), "more").unwrap();
        fs::write(dir.path().join("benches/cpu.toml"), "more").unwrap();
        assert_eq!(at(dir.path()), before);
        fs::write(dir.path().join("benches/kv.rs"), "more").unwrap();
        let changed = at(dir.path());
        assert_eq!(changed.commit, before.commit);
        assert!(changed.dirty.is_some());
        fs::write(dir.path().join("src/a"), "more").unwrap();
        assert_ne!(at(dir.path()).dirty, changed.dirty);
    }

    #[test]
    fn commits_behind_a_figure_are_counted_where_they_touch_it() {
        let dir = tempfile::tempdir().unwrap();
        repository(dir.path());
        let first = git(dir.path(), &["log", "--format=%h", "--reverse"]).unwrap();
        let first = first.lines().next().unwrap();
        let since = |commit: &str| since(dir.path(), commit);
        let later = since(first).unwrap();
        assert_eq!(later.len(), 1, "{later:?}");
        assert!(later[0].ends_with(".cargo/config.toml"), "{later:?}");
        assert!(since("0123456").is_err());
        assert!(since("--all").is_err());
    }

    #[test]
    fn what_was_built_elsewhere_says_so_itself() {
        let dir = tempfile::tempdir().unwrap();
        let made = origin("abcdef0");
        made.write(dir.path()).unwrap();
        assert_eq!(Origin::carried(dir.path()).unwrap(), made);
        fs::remove_file(dir.path().join(BUILD_FILE)).unwrap();
        assert_eq!(Origin::carried(dir.path()).unwrap().commit, "unknown");
        fs::write(dir.path().join(BUILD_FILE), "{").unwrap();
        assert!(Origin::carried(dir.path()).is_err());
    }
}
