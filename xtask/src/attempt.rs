//! `cargo xtask vendor --try`: which patches apply to another release of the pinned crates.
//!
//! Every patch is tried, also behind one that does not apply: its hunks that fit are made, so that
//! each patch is judged by its own lines, not by those of the one before it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use diffy::{Hunk, Line, Patch};

use crate::layout::{self, File, Tree};
use crate::patch::{self, Change, PatchFile};
use crate::{pin, sanitize, steps};

/// What became of a patch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    patch: String,
    /// The furthest that a hunk has moved, in lines.
    moved: usize,
    /// Where it does not apply.
    failed: Vec<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.failed[..], self.moved) {
            ([], 0) => write!(f, "applies"),
            ([], 1) => write!(f, "applies, moved by a line"),
            ([], n) => write!(f, "applies, moved by up to {n} lines"),
            (failed, _) => write!(f, "fails: {}", failed.join("; ")),
        }
    }
}

/// Fetches the newest releases that are not above `version` (`NEWEST`: any), tries every patch on
/// them and prints a table. 0: all apply, and with `test` the tests of the cache pass on them.
///
/// # Errors
/// When the releases cannot be had, or a file cannot be written.
pub fn run(root: &Path, version: &str, test: bool) -> Result<u8> {
    let folder = root.join("target/try").join(folder_name(version)?);
    let manifest = resolve(&folder, version)?;
    let pins = pin::read(&folder.join("pin/Cargo.lock"))?;
    let old = pin::read(&root.join("vendor/pin/Cargo.lock"))?;
    let mut outcomes = Vec::new();
    let mut trees = Vec::new();
    println!("| patch | on {} |\n|---|---|", titles(&pins));
    for pin in &pins {
        let mut tree = pin::files(pin, &manifest)?;
        for patch in patch::read(&root.join("patches"), &pin.name)? {
            let outcome = attempt(&mut tree, &pin.name, &patch);
            println!(
                "| `{}` | {outcome} |",
                outcome.patch.trim_end_matches(".patch")
            );
            outcomes.push(outcome);
        }
        trees.push((pin.clone(), tree));
    }
    let count = |is: fn(&Outcome) -> bool| outcomes.iter().filter(|o| is(o)).count();
    let fail = count(|o| !o.failed.is_empty());
    let moved = count(|o| o.failed.is_empty() && o.moved > 0);
    eprintln!(
        "{}: {} patches apply, {moved} of them moved; {fail} fail{}",
        titles(&pins),
        outcomes.len() - fail,
        if pins == old { " (as pinned)" } else { "" },
    );
    match (fail, test) {
        (0, false) => Ok(0),
        (0, true) => run_tests(root, &folder, &old, &trees),
        _ => Ok(1),
    }
}

/// A folder of its own for each version, whatever somebody types.
fn folder_name(version: &str) -> Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-+".contains(c);
    let is_one = version == "NEWEST" || version.starts_with(|c: char| c.is_ascii_digit());
    ensure!(
        is_one && version.chars().all(plain),
        "--try {version}: expected a version such as 0.1.160, or NEWEST"
    );
    Ok(version)
}

fn titles(pins: &[pin::Pin]) -> String {
    let titles = pins
        .iter()
        .map(|pin| format!("{} {}", pin.name, pin.version));
    titles.collect::<Vec<_>>().join(", ")
}

/// Lets cargo choose the releases; gives the manifest that names them.
fn resolve(folder: &Path, version: &str) -> Result<PathBuf> {
    let wanted = match version {
        "NEWEST" => "*".to_owned(),
        version => format!("<={version}"),
    };
    let dir = folder.join("pin");
    let at = |path: &Path| path.display().to_string();
    fs::create_dir_all(dir.join("src")).with_context(|| at(&dir))?;
    let mut text = String::from(
        "[package]\nname = \"hae-try\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[workspace]\n\n[dependencies]\n",
    );
    for name in pin::CRATES {
        text += &format!("{name} = \"{wanted}\"\n");
    }
    let manifest = dir.join("Cargo.toml");
    fs::write(&manifest, text).with_context(|| at(&manifest))?;
    fs::write(dir.join("src/lib.rs"), "").with_context(|| at(&dir))?;
    // What was the newest may not be any more.
    let _ = fs::remove_file(dir.join("Cargo.lock"));
    let args = ["generate-lockfile", "--manifest-path"];
    let status = Command::new(pin::cargo())
        .args(args)
        .arg(&manifest)
        .status()
        .context("cannot run cargo")?;
    ensure!(
        status.success(),
        "no releases of {} that are {wanted}",
        pin::CRATES.join(" and ")
    );
    Ok(manifest)
}

/// Makes the hunks of a patch that fit.
fn attempt(tree: &mut Tree, krate: &str, patch: &PatchFile) -> Outcome {
    let mut outcome = Outcome {
        patch: patch.name.clone(),
        moved: 0,
        failed: Vec::new(),
    };
    let read = patch::each_file(krate, &patch.text, &mut |path, patch, change| {
        let old = match patch::before(tree, path, change) {
            Ok(old) => old,
            Err(e) => {
                outcome.failed.push(format!("{path} {e}"));
                return Ok(());
            }
        };
        let (new, moved, failed) = make(&old, patch);
        outcome.moved = outcome.moved.max(moved);
        let failed = failed
            .iter()
            .map(|(n, line)| format!("{path}: hunk {n} (line {line})"));
        outcome.failed.extend(failed);
        if change == Change::Delete && new.is_empty() {
            tree.remove(path);
        } else {
            let executable = tree.get(path).is_some_and(|file| file.executable);
            let file = File {
                bytes: new,
                executable,
            };
            tree.insert(path.to_owned(), file);
        }
        Ok(())
    });
    if let Err(e) = read {
        outcome.failed.push(format!("{e:#}"));
    }
    outcome
}

/// The file after the hunks that fit, how far one of them has moved at most, and those that do not:
/// their numbers from 1 on, and the lines that they should begin at.
fn make(old: &[u8], patch: &Patch<'_, [u8]>) -> (Vec<u8>, usize, Vec<(usize, usize)>) {
    // What a hunk has made is no place for another.
    let mut lines: Vec<(&[u8], bool)> = old
        .split_inclusive(|&b| b == b'\n')
        .map(|l| (l, false))
        .collect();
    let (mut moved, mut failed) = (0, Vec::new());
    // Lines that hunks which failed would have added, less those that they would have removed.
    let mut missing = 0_isize;
    for (n, hunk) in patch.hunks().iter().enumerate() {
        let [before, after] = [false, true].map(|new| side(hunk, new));
        let start = hunk.new_range().start().saturating_sub(1);
        let expected = start.saturating_add_signed(-missing).min(lines.len());
        let fits = |at: &usize| {
            let there = lines.get(*at..*at + before.len());
            there.is_some_and(|there| {
                there
                    .iter()
                    .zip(&before)
                    .all(|((line, made), old)| !made && line == old)
            })
        };
        let mut near: Vec<usize> = (0..=lines.len()).collect();
        near.sort_by_key(|at| at.abs_diff(expected));
        match near.into_iter().find(fits) {
            Some(at) => {
                moved = moved.max(at.abs_diff(expected));
                let made = after.iter().map(|line| (*line, true));
                lines.splice(at..at + before.len(), made);
            }
            None => {
                failed.push((n + 1, hunk.old_range().start()));
                missing += after.len().cast_signed() - before.len().cast_signed();
            }
        }
    }
    let new = lines.iter().flat_map(|(line, _)| line.iter().copied());
    (new.collect(), moved, failed)
}

/// A hunk's lines before it or after it.
fn side<'a>(hunk: &Hunk<'a, [u8]>, new: bool) -> Vec<&'a [u8]> {
    let lines = hunk.lines().iter();
    let of_it = |line: &Line<'a, [u8]>| match *line {
        Line::Context(line) => Some(line),
        Line::Delete(line) => (!new).then_some(line),
        Line::Insert(line) => new.then_some(line),
    };
    lines.filter_map(of_it).collect()
}

/// Builds a copy of the repository on the other release and runs the tests of the cache.
fn run_tests(
    root: &Path,
    folder: &Path,
    old: &[pin::Pin],
    trees: &[(pin::Pin, Tree)],
) -> Result<u8> {
    let copy = folder.join("repository");
    let vendored: Vec<PathBuf> = trees
        .iter()
        .map(|(pin, _)| Path::new("vendor").join(&pin.name))
        .collect();
    let files = tracked(root)?;
    for path in &files {
        let (from, to) = (root.join(path), copy.join(path));
        // Those that are as they were keep their times, and with them what was built of them.
        let bytes = fs::read(&from).with_context(|| from.display().to_string())?;
        if fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        let parent = to.parent().context("a file has a folder")?;
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        fs::write(&to, bytes).with_context(|| to.display().to_string())?;
    }
    for ((_, tree), dir) in trees.iter().zip(&vendored) {
        let to = copy.join(dir);
        let differences = layout::compare(tree, &to)?;
        layout::make_equal(tree, &to, &differences, &folder.join("replaced"))?;
    }
    let manifest = copy.join("Cargo.toml");
    let text = fs::read_to_string(root.join("Cargo.toml")).context("Cargo.toml")?;
    let text = trees
        .iter()
        .zip(old)
        .try_fold(text, |text, ((new, _), old)| {
            with_version(&text, &new.name, &old.version, &new.version)
        })?;
    fs::write(&manifest, text).with_context(|| manifest.display().to_string())?;
    let mut args = vec!["test", "--release", "--test", "suite", "--"];
    args.extend(sanitize::TESTS);
    eprintln!("$ cd {}", copy.display());
    let status = steps::cargo(&copy, &args)?;
    Ok(u8::from(!status.success()))
}

/// A manifest with another version of a crate.
fn with_version(text: &str, name: &str, old: &str, new: &str) -> Result<String> {
    let [old, new] = [old, new].map(|v| format!("{name} = {{ version = \"={v}\""));
    ensure!(text.contains(&old), "Cargo.toml does not have {old}");
    Ok(text.replace(&old, &new))
}

fn tracked(root: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .context("cannot run git ls-files")?;
    if !output.status.success() {
        bail!(
            "git ls-files: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    let files = names.split_terminator('\0').map(PathBuf::from);
    Ok(files.filter(|file| root.join(file).is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n";

    fn tree(text: &str) -> Tree {
        let file = File {
            bytes: text.into(),
            executable: true,
        };
        Tree::from([("a.rs".to_owned(), file)])
    }

    fn tried(text: &str, patch: &str) -> (Tree, Outcome) {
        let mut tree = tree(text);
        let patch = PatchFile {
            name: "k/0001-x.patch".into(),
            text: patch.into(),
        };
        let outcome = attempt(&mut tree, "k", &patch);
        (tree, outcome)
    }

    const TWO: &str = "Title\n\n--- k/a.rs\n+++ k/a.rs\n@@ -2,2 +2,3 @@\n two\n-three\n+3\n+3b\n@@ -8,2 +9,2 @@\n-eight\n+8\n nine\n";

    #[test]
    fn a_patch_that_fits_is_made_as_the_vendoring_makes_it() {
        let (made, outcome) = tried(OLD, TWO);
        assert_eq!(outcome.to_string(), "applies");
        let mut expected = tree(OLD);
        let patch = PatchFile {
            name: "k/0001-x.patch".into(),
            text: TWO.into(),
        };
        patch::apply(&mut expected, "k", &patch).unwrap();
        assert_eq!(made, expected);
    }

    #[test]
    fn hunks_that_moved_and_hunks_that_fail_are_told_apart() {
        let (made, outcome) = tried(&format!("zero\n{OLD}"), TWO);
        assert_eq!(outcome.to_string(), "applies, moved by a line");
        assert!(String::from_utf8_lossy(&made["a.rs"].bytes).contains("two\n3\n3b\nfour"));
        let (made, outcome) = tried(&OLD.replace("three", "drei"), TWO);
        assert_eq!(outcome.to_string(), "fails: a.rs: hunk 1 (line 2)");
        let text = String::from_utf8_lossy(&made["a.rs"].bytes).into_owned();
        assert!(
            text.contains("drei\nfour") && text.contains("seven\n8\nnine"),
            "{text}"
        );
        // The second is where it belongs: the lines that the first did not add are not missed.
        assert_eq!(outcome.moved, 0);
        let (_, outcome) = tried("", TWO);
        assert_eq!(outcome.failed.len(), 2);
        let other = TWO.replace("a.rs", "b.rs");
        let (_, outcome) = tried(OLD, &other);
        assert_eq!(
            outcome.to_string(),
            "fails: b.rs is to be changed but is not there"
        );
        let (_, outcome) = tried(OLD, "no diff\n");
        assert!(outcome.to_string().starts_with("fails: "), "{outcome}");
        let (made, outcome) = tried(OLD, "--- k/b.rs\n+++ k/b.rs\n@@ -0,0 +1 @@\n+x\n");
        assert_eq!(
            (outcome.to_string().as_str(), &*made["b.rs"].bytes),
            ("applies", &b"x\n"[..])
        );
        let (_, outcome) = tried(OLD, "--- k/a.rs\n+++ k/a.rs\n@@ -0,0 +1 @@\n+x\n");
        assert_eq!(
            outcome.to_string(),
            "fails: a.rs is to be created but is already there"
        );
    }

    #[test]
    fn only_versions_name_folders() {
        for good in ["NEWEST", "0.1.160", "1.0.0-rc.1"] {
            assert_eq!(folder_name(good).unwrap(), good);
        }
        for bad in ["", "newest", "../x", "0.1/2", "0.1 || 2", "^1"] {
            assert!(folder_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_manifest_names_the_other_version_and_nothing_else_changes() {
        let manifest = "a = { version = \"=1\", x }\nllama = { version = \"=0.1\", y }\n";
        let new = with_version(manifest, "llama", "0.1", "0.2").unwrap();
        assert_eq!(new, manifest.replace("\"=0.1\"", "\"=0.2\""));
        assert!(with_version(manifest, "llama", "0.3", "0.4").is_err());
    }

    /// The patches of the repository, on what they are made for, where that has been fetched.
    #[test]
    fn the_patches_of_the_repository_apply_where_they_were_made() {
        let root = crate::root();
        let manifest = root.join("vendor/pin/Cargo.toml");
        let pins = pin::read(&root.join("vendor/pin/Cargo.lock")).unwrap();
        for pin in pins {
            let tree = pin::files(&pin, &manifest).unwrap();
            let (mut tried, mut expected) = (tree.clone(), tree);
            for patch in patch::read(&root.join("patches"), &pin.name).unwrap() {
                let outcome = attempt(&mut tried, &pin.name, &patch);
                assert!(outcome.failed.is_empty(), "{}: {outcome}", patch.name);
                patch::apply(&mut expected, &pin.name, &patch).unwrap();
            }
            assert!(tried == expected, "{}", pin.name);
        }
    }
}
