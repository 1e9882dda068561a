//! A folder of files in memory, and how a folder on disk differs from it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// Files by their path below the folder, `/` between the parts on every system.
pub type Tree = BTreeMap<String, File>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub bytes: Vec<u8>,
    pub executable: bool,
}

/// One way in which a folder is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    Missing(String),
    Edited(String),
    Extra(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Missing(path) => write!(f, "missing {path}"),
            Difference::Edited(path) => write!(f, "edited  {path}"),
            Difference::Extra(path) => write!(f, "extra   {path}"),
        }
    }
}

/// Compares `dir` with `tree`, contents only. A folder that does not exist misses every file.
///
/// # Errors
/// When something in `dir` cannot be read.
pub fn compare(tree: &Tree, dir: &Path) -> Result<Vec<Difference>> {
    let mut present = Vec::new();
    list(dir, "", &mut present).with_context(|| dir.display().to_string())?;
    present.sort();

    let mut differences = Vec::new();
    for (path, file) in tree {
        if present.binary_search(path).is_err() {
            differences.push(Difference::Missing(path.clone()));
        } else if !same(file, &dir.join(path))
            .with_context(|| dir.join(path).display().to_string())?
        {
            differences.push(Difference::Edited(path.clone()));
        }
    }
    differences.extend(
        present
            .into_iter()
            .filter(|p| !tree.contains_key(p))
            .map(Difference::Extra),
    );
    Ok(differences)
}

/// Everything below `dir` that is not a folder: files, and links, which are never expected.
fn list(dir: &Path, prefix: &str, out: &mut Vec<String>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if prefix.is_empty() && e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{path}/"), out)?;
        } else {
            out.push(path);
        }
    }
    Ok(())
}

fn same(file: &File, path: &Path) -> io::Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    Ok(meta.is_file() && meta.len() == file.bytes.len() as u64 && fs::read(path)? == file.bytes)
}

/// Makes `dir` equal to `tree`, given what [`compare`] found. A folder that does not exist yet appears in one step; in an
/// existing one only the files that differ are touched, each replaced in one step, so that
/// the times of all others, and with them the build of llama.cpp, stay as they are. What was
/// edited or extra is moved to `aside` and not lost.
///
/// # Errors
/// When a file cannot be written.
pub fn make_equal(tree: &Tree, dir: &Path, differences: &[Difference], aside: &Path) -> Result<()> {
    if differences.is_empty() {
        return Ok(());
    }
    let parent = dir.parent().context("the folder to fill has no parent")?;
    fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    let staging = tempfile::Builder::new()
        .prefix(".laying-out-")
        .tempdir_in(parent)
        .with_context(|| parent.display().to_string())?;

    if !dir.exists() {
        let fresh = staging.path().join("fresh");
        for (path, file) in tree {
            write(file, &fresh.join(path))?;
        }
        fs::rename(&fresh, dir).with_context(|| dir.display().to_string())?;
        return Ok(());
    }

    // All new contents are on disk before the first old file is touched.
    for (n, difference) in differences.iter().enumerate() {
        if let Difference::Missing(path) | Difference::Edited(path) = difference {
            write(&tree[path], &staging.path().join(n.to_string()))?;
        }
    }
    // What is in the way goes first: an extra file may lie where a folder has to be.
    for difference in differences {
        if let Difference::Edited(path) | Difference::Extra(path) = difference {
            rename(&dir.join(path), &aside.join(path))?;
            remove_empty(dir, path);
        }
    }
    for (n, difference) in differences.iter().enumerate() {
        if let Difference::Missing(path) | Difference::Edited(path) = difference {
            rename(&staging.path().join(n.to_string()), &dir.join(path))?;
        }
    }
    Ok(())
}

fn write(file: &File, path: &Path) -> Result<()> {
    let put = || -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut out = fs::File::create(path)?;
        out.write_all(&file.bytes)?;
        #[cfg(unix)]
        if file.executable {
            use std::os::unix::fs::PermissionsExt;
            out.set_permissions(fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    };
    put().with_context(|| path.display().to_string())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    let put = || -> io::Result<()> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(from, to)
    };
    put().with_context(|| format!("{} to {}", from.display(), to.display()))
}

/// Removes the folders that `path` leaves empty; `remove_dir` refuses all others.
fn remove_empty(dir: &Path, path: &str) {
    let mut path = Path::new(path);
    while let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        if fs::remove_dir(dir.join(parent)).is_err() {
            return;
        }
        path = parent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Tree {
        files
            .iter()
            .map(|(path, text)| {
                (
                    (*path).to_owned(),
                    File {
                        bytes: text.as_bytes().to_vec(),
                        executable: false,
                    },
                )
            })
            .collect()
    }

    fn equal(tree: &Tree, dir: &Path, aside: &Path) {
        make_equal(tree, dir, &compare(tree, dir).unwrap(), aside).unwrap();
    }

    #[test]
    fn edited_missing_and_extra_files_are_told_apart() {
        let temp = tempfile::tempdir().unwrap();
        let (dir, aside) = (temp.path().join("crate"), temp.path().join("aside"));
        let tree = tree(&[("a", "one"), ("b/c", "two"), ("b/d", "three")]);
        assert_eq!(compare(&tree, &dir).unwrap().len(), 3);
        equal(&tree, &dir, &aside);
        assert_eq!(compare(&tree, &dir).unwrap(), []);

        fs::write(dir.join("a"), "One").unwrap();
        fs::remove_file(dir.join("b/c")).unwrap();
        fs::create_dir(dir.join("new")).unwrap();
        fs::write(dir.join("new/e"), "").unwrap();
        assert_eq!(
            compare(&tree, &dir).unwrap(),
            [
                Difference::Edited("a".into()),
                Difference::Missing("b/c".into()),
                Difference::Extra("new/e".into()),
            ]
        );

        equal(&tree, &dir, &aside);
        assert_eq!(compare(&tree, &dir).unwrap(), []);
        assert!(
            !dir.join("new").exists(),
            "the emptied folder goes with its file"
        );
        assert_eq!(
            fs::read_to_string(aside.join("a")).unwrap(),
            "One",
            "an edit is kept aside"
        );
        assert_eq!(
            fs::read_dir(temp.path()).unwrap().count(),
            2,
            "nothing temporary is left"
        );
    }

    #[test]
    fn files_that_do_not_change_keep_their_times() {
        let temp = tempfile::tempdir().unwrap();
        let (dir, aside) = (temp.path().join("crate"), temp.path().join("aside"));
        equal(&tree(&[("kept", "x"), ("changed", "y")]), &dir, &aside);
        let long_ago =
            std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        for name in ["kept", "changed"] {
            let file = fs::File::options()
                .write(true)
                .open(dir.join(name))
                .unwrap();
            file.set_modified(long_ago).unwrap();
        }
        equal(&tree(&[("kept", "x"), ("changed", "z")]), &dir, &aside);
        let time = |name| fs::metadata(dir.join(name)).unwrap().modified().unwrap();
        assert_eq!(time("kept"), long_ago);
        assert_ne!(time("changed"), long_ago);
    }

    #[test]
    fn a_file_gives_way_to_a_folder() {
        let temp = tempfile::tempdir().unwrap();
        let (dir, aside) = (temp.path().join("crate"), temp.path().join("aside"));
        equal(&tree(&[("a", "file")]), &dir, &aside);
        equal(&tree(&[("a/b", "below")]), &dir, &aside);
        assert_eq!(fs::read_to_string(dir.join("a/b")).unwrap(), "below");
    }
}
