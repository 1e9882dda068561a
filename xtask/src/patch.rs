//! Numbered patches, applied in memory.
//!
//! A patch changes one crate and its paths start with the crate's name. Text before the first
//! `---` line is its header. A hunk may have moved by some lines, but each of its lines has to
//! be found exactly: there is no fuzz.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use diffy::Patch;
use diffy::patch_set::{FileOperation, ParseOptions, PatchSet};

use crate::layout::{File, Tree};

/// A patch file, read but not parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchFile {
    /// `<crate>/NNNN-title.patch`, for messages.
    pub name: String,
    pub text: Vec<u8>,
}

/// The patches in `patches/<crate>`, in the order of their numbers; none if there is no such
/// folder.
///
/// # Errors
/// When a file is not named `NNNN-title.patch`, or the numbers are not 1, 2, 3 and so on.
pub fn read(dir: &Path, krate: &str) -> Result<Vec<PatchFile>> {
    let dir = dir.join(krate);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    in_order(names)
        .with_context(|| dir.display().to_string())?
        .into_iter()
        .map(|name| {
            let path = dir.join(&name);
            let text = fs::read(&path).with_context(|| path.display().to_string())?;
            Ok(PatchFile {
                name: format!("{krate}/{name}"),
                text,
            })
        })
        .collect()
}

fn in_order(names: Vec<String>) -> Result<Vec<String>> {
    let mut numbered = Vec::new();
    for name in names {
        let number = name
            .strip_suffix(".patch")
            .and_then(|n| n.split_once('-'))
            .filter(|(digits, title)| digits.len() == 4 && !title.is_empty())
            .and_then(|(digits, _)| digits.parse::<usize>().ok());
        let number = number.with_context(|| format!("{name}: expected NNNN-title.patch"))?;
        numbered.push((number, name));
    }
    numbered.sort();
    for (n, (number, name)) in numbered.iter().enumerate() {
        ensure!(
            *number == n + 1,
            "{name}: expected number {:04} here",
            n + 1
        );
    }
    Ok(numbered.into_iter().map(|(_, name)| name).collect())
}

/// Applies one patch to a crate's files.
///
/// # Errors
/// Names the patch, the file and the hunk that does not apply; `tree` is then half patched and
/// not to be used.
pub fn apply(tree: &mut Tree, krate: &str, patch: &PatchFile) -> Result<()> {
    apply_files(tree, krate, &patch.text).with_context(|| format!("patch {}", patch.name))
}

fn apply_files(tree: &mut Tree, krate: &str, text: &[u8]) -> Result<()> {
    each_file(krate, text, &mut |path, patch, change| {
        apply_file(tree, path, patch, change).with_context(|| format!("{krate}/{path}"))
    })
}

/// What becomes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Create,
    Delete,
    Edit,
}

/// Told the path below the crate, the hunks, and the change.
type OnFile<'f> = dyn FnMut(&str, &Patch<'_, [u8]>, Change) -> Result<()> + 'f;

/// Hands over what a patch does to each file: its path below the crate, the hunks, the change.
///
/// # Errors
/// Those of `f`; when the patch cannot be read, or changes anything but files of the crate.
pub fn each_file(krate: &str, text: &[u8], f: &mut OnFile<'_>) -> Result<()> {
    let mut hunks = 0;
    for file in PatchSet::parse_bytes(text, ParseOptions::unidiff()) {
        let file = file?;
        let (path, change) = match file.operation() {
            FileOperation::Create(path) => (path, Change::Create),
            FileOperation::Delete(path) => (path, Change::Delete),
            FileOperation::Modify { original, modified } if original == modified => {
                (original, Change::Edit)
            }
            _ => bail!("a file is renamed or copied: delete and create it instead"),
        };
        let path = std::str::from_utf8(path).context("a path is not UTF-8")?;
        let below = path
            .strip_prefix(krate)
            .and_then(|p| p.strip_prefix('/'))
            .with_context(|| format!("{path}: expected a path that starts with {krate}/"))?;
        let patch = file
            .patch()
            .as_text()
            .with_context(|| format!("{path}: a binary patch"))?;
        ensure!(!patch.hunks().is_empty(), "{path}: no hunk");
        hunks += patch.hunks().len();
        // Without Git's /dev/null a new file shows by its only hunk, which replaces nothing.
        let from_nothing = |h: &diffy::Hunk<'_, [u8]>| {
            let old = h.old_range();
            old.is_empty() && old.start() == 0
        };
        let change = match change {
            Change::Edit if patch.hunks().iter().all(from_nothing) => Change::Create,
            change => change,
        };
        f(below, patch, change)?;
    }
    // The parser skips what it takes for text between two files; a hunk must not get lost there.
    let written = text
        .split(|b| *b == b'\n')
        .filter(|line| line.starts_with(b"@@ "))
        .count();
    ensure!(
        written == hunks,
        "{written} hunks are written but {hunks} could be read"
    );
    Ok(())
}

fn apply_file(tree: &mut Tree, path: &str, patch: &Patch<'_, [u8]>, change: Change) -> Result<()> {
    let old = before(tree, path, change)?;
    let new = diffy::apply_bytes(&old, patch).map_err(|e| match failing_hunk(&e, patch) {
        Some((n, line)) => anyhow::anyhow!("hunk {n} (line {line}) does not apply"),
        None => anyhow::anyhow!("{e}"),
    })?;
    if change == Change::Delete {
        ensure!(
            new.is_empty(),
            "is to be deleted but {} bytes of it would be left",
            new.len()
        );
        tree.remove(path);
    } else {
        let executable = tree.get(path).is_some_and(|f| f.executable);
        tree.insert(
            path.to_owned(),
            File {
                bytes: new,
                executable,
            },
        );
    }
    Ok(())
}

/// The file as it is before a change.
///
/// # Errors
/// When it is there and should not, or the other way round.
pub fn before(tree: &Tree, path: &str, change: Change) -> Result<Vec<u8>> {
    match (tree.get(path), change) {
        (Some(_), Change::Create) => bail!("is to be created but is already there"),
        (None, Change::Create) => Ok(Vec::new()),
        (Some(file), _) => Ok(file.bytes.clone()),
        (None, _) => bail!("is to be changed but is not there"),
    }
}

/// The hunk that an error of diffy means, counted from 1, and the line it starts at. The error
/// keeps the number in its message only.
fn failing_hunk(error: &diffy::ApplyError, patch: &Patch<'_, [u8]>) -> Option<(usize, usize)> {
    let n: usize = error.to_string().rsplit_once('#')?.1.parse().ok()?;
    let hunk = patch.hunks().get(n.checked_sub(1)?)?;
    Some((n, hunk.old_range().start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n";

    fn tree() -> Tree {
        Tree::from([(
            "src/a.rs".to_owned(),
            File {
                bytes: OLD.into(),
                executable: true,
            },
        )])
    }

    fn patched(text: &str) -> Result<Tree> {
        let mut tree = tree();
        let patch = PatchFile {
            name: "k/0001-x.patch".into(),
            text: text.into(),
        };
        apply(&mut tree, "k", &patch)?;
        Ok(tree)
    }

    fn failure(text: &str) -> String {
        format!("{:#}", patched(text).unwrap_err())
    }

    #[test]
    fn patches_are_read_by_number() {
        let names = |list: &[&str]| in_order(list.iter().map(|s| (*s).to_owned()).collect());
        let sorted = names(&["0002-b.patch", "0010-c.patch", "0001-z.patch"]);
        assert_eq!(
            sorted.unwrap_err().to_string(),
            "0010-c.patch: expected number 0003 here"
        );
        let sorted = names(&["0002-a.patch", "0003-b.patch", "0001-z.patch"]).unwrap();
        assert_eq!(sorted, ["0001-z.patch", "0002-a.patch", "0003-b.patch"]);
        for bad in [
            "0001.patch",
            "1-a.patch",
            "0001-a.diff",
            "0001-.patch",
            "notes.txt",
        ] {
            let error = names(&[bad]).unwrap_err().to_string();
            assert_eq!(error, format!("{bad}: expected NNNN-title.patch"));
        }
        assert!(names(&["0001-a.patch", "0001-b.patch"]).is_err());
    }

    #[test]
    fn later_patches_see_what_earlier_ones_did() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("k")).unwrap();
        let change = |from, to| {
            format!(
                "Title\n\n--- k/src/a.rs\n+++ k/src/a.rs\n@@ -1,2 +1,2 @@\n-{from}\n+{to}\n two\n"
            )
        };
        fs::write(dir.path().join("k/0002-b.patch"), change("uno", "ein")).unwrap();
        fs::write(dir.path().join("k/0001-a.patch"), change("one", "uno")).unwrap();
        let mut tree = tree();
        for patch in read(dir.path(), "k").unwrap() {
            apply(&mut tree, "k", &patch).unwrap();
        }
        assert!(tree["src/a.rs"].bytes.starts_with(b"ein\ntwo\n"));
        assert!(tree["src/a.rs"].executable);
        assert_eq!(read(dir.path(), "no-such-crate").unwrap(), []);
    }

    #[test]
    fn files_are_created_and_deleted() {
        let new = patched("--- k/b.rs\n+++ k/b.rs\n@@ -0,0 +1,2 @@\n+x\n+y\n").unwrap();
        assert_eq!(new["b.rs"].bytes, b"x\ny\n");
        let new =
            patched("--- /dev/null\n+++ k/b.rs\n@@ -0,0 +1 @@\n+x\n\\ No newline at end of file\n")
                .unwrap();
        assert_eq!(new["b.rs"].bytes, b"x");
        let gone: String = OLD.lines().map(|l| format!("-{l}\n")).collect();
        let text = format!("--- k/src/a.rs\n+++ /dev/null\n@@ -1,10 +0,0 @@\n{gone}");
        assert!(patched(&text).unwrap().is_empty());
    }

    #[test]
    fn a_failure_names_patch_file_and_hunk() {
        let text = "--- k/src/a.rs\n+++ k/src/a.rs\n@@ -1,2 +1,2 @@\n-one\n+1\n two\n@@ -8,2 +8,2 @@\n-acht\n+8\n nine\n";
        assert_eq!(
            failure(text),
            "patch k/0001-x.patch: k/src/a.rs: hunk 2 (line 8) does not apply"
        );
        let text = "--- k/src/b.rs\n+++ k/src/b.rs\n@@ -1,2 +1,2 @@\n-one\n+1\n two\n";
        assert_eq!(
            failure(text),
            "patch k/0001-x.patch: k/src/b.rs: is to be changed but is not there"
        );
        let text = "--- k/src/a.rs\n+++ k/src/a.rs\n@@ -0,0 +1 @@\n+1\n";
        assert_eq!(
            failure(text),
            "patch k/0001-x.patch: k/src/a.rs: is to be created but is already there"
        );
        let text = "--- a/k/src/a.rs\n+++ a/k/src/a.rs\n@@ -1 +1 @@\n-one\n+1\n";
        assert!(failure(text).ends_with("a/k/src/a.rs: expected a path that starts with k/"));
        assert!(failure("no diff in here\n").starts_with("patch k/0001-x.patch: "));
    }

    #[test]
    fn context_has_to_fit_exactly_but_may_have_moved() {
        let moved = "--- k/src/a.rs\n+++ k/src/a.rs\n@@ -1,3 +1,3 @@\n four\n-five\n+5\n six\n";
        assert!(patched(moved).is_ok());
        let fuzzy = "--- k/src/a.rs\n+++ k/src/a.rs\n@@ -4,3 +4,3 @@\n vier\n-five\n+5\n six\n";
        assert!(failure(fuzzy).ends_with("hunk 1 (line 4) does not apply"));
    }

    #[test]
    fn a_hunk_behind_stray_text_is_not_lost() {
        let text = "--- k/src/a.rs\n+++ k/src/a.rs\n@@ -1,2 +1,2 @@\n-one\n+1\n two\n\nstray\n@@ -8,2 +8,2 @@\n-eight\n+8\n nine\n";
        assert!(failure(text).ends_with("2 hunks are written but 1 could be read"));
    }
}
