//! Pictures below the folder that was opened for them.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// The same for all that cannot be had, so that nobody learns which files there are elsewhere.
const NOT_THERE: &str = "no such file below the media folder";

/// The file that `path` names: in the folder, or with its whole path. Links that lead out of it do not
/// count.
pub(super) fn below(folder: Option<&Path>, path: &str) -> Result<PathBuf, String> {
    let Some(folder) = folder else {
        return Err("files are not read here: send the picture as data".into());
    };
    let path = percent_encoding::percent_decode_str(path).decode_utf8();
    let path = path.map_err(|_| NOT_THERE)?;
    let path = Path::new(&*path);
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(NOT_THERE.into());
    }
    let folder = folder.canonicalize().map_err(|_| NOT_THERE)?;
    let inner: PathBuf = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect();
    let there = |path: &Path| {
        let path = path.canonicalize().ok()?;
        // A pipe would never end, and a folder has no bytes.
        (path.starts_with(&folder) && path.is_file()).then_some(path)
    };
    there(&folder.join(inner))
        .or_else(|| path.is_absolute().then(|| there(path))?)
        .ok_or_else(|| NOT_THERE.into())
}

/// Its bytes, where they are no more than `most`.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|_| NOT_THERE)?;
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    match bytes.len() as u64 > most {
        true => Err(format!(
            "has more than {most} bytes, the limit for a picture"
        )),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_what_lies_in_the_folder_is_found() {
        let outside = tempfile::tempdir().unwrap();
        let folder = outside.path().join("media");
        fs::create_dir_all(folder.join("deep er")).unwrap();
        fs::write(folder.join("a.png"), b"a").unwrap();
        fs::write(folder.join("deep er/b.png"), b"b").unwrap();
        fs::write(outside.path().join("secret.png"), b"s").unwrap();
        fs::create_dir_all(outside.path().join("media-too")).unwrap();
        fs::write(outside.path().join("media-too/c.png"), b"c").unwrap();

        let whole = folder.join("a.png");
        for path in [
            "a.png",
            "/a.png",
            "//a.png",
            "./a.png",
            whole.to_str().unwrap(),
        ] {
            let found = below(Some(&folder), path).unwrap();
            assert_eq!(fs::read(found).unwrap(), b"a", "{path}");
        }
        for path in ["deep er/b.png", "deep%20er/b.png", "/deep er//b.png"] {
            assert!(below(Some(&folder), path).is_ok(), "{path}");
        }
        let secret = outside.path().join("secret.png");
        let beside = outside.path().join("media-too/c.png");
        for path in [
            "../secret.png",
            "%2e%2e/secret.png",
            "deep er/../../secret.png",
            "deep er/../a.png",
            secret.to_str().unwrap(),
            beside.to_str().unwrap(),
            "nothing.png",
            "deep er",
            "",
            "%ff.png",
            "a.png\0",
        ] {
            assert_eq!(below(Some(&folder), path), Err(NOT_THERE.into()), "{path}");
        }
        assert!(below(None, "a.png").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_lead_out() {
        use std::os::unix::fs::symlink;

        let outside = tempfile::tempdir().unwrap();
        let folder = outside.path().join("media");
        fs::create_dir_all(folder.join("in")).unwrap();
        fs::write(outside.path().join("secret.png"), b"s").unwrap();
        fs::write(folder.join("in/a.png"), b"a").unwrap();
        symlink(outside.path().join("secret.png"), folder.join("file.png")).unwrap();
        symlink(outside.path(), folder.join("folder")).unwrap();
        symlink(folder.join("in/a.png"), folder.join("inner.png")).unwrap();
        assert!(below(Some(&folder), "file.png").is_err());
        assert!(below(Some(&folder), "folder/secret.png").is_err());
        assert!(below(Some(&folder), "inner.png").is_ok());
    }

    #[test]
    fn large_files_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, [0; 10]).unwrap();
        assert_eq!(read(&path, 10).unwrap().len(), 10);
        assert!(read(&path, 9).unwrap_err().contains("more than 9 bytes"));
    }
}
