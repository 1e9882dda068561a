use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn written(out: OutFile, text: &str) {
    out.file().write_all(text.as_bytes()).unwrap();
    out.commit().unwrap();
}

#[test]
fn an_existing_mode_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    for bits in [0o600, 0o640, 0o644, 0o444] {
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(bits)).unwrap();
        written(OutFile::create(&path).unwrap(), "new");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(mode(&path), bits, "{bits:o}");
        std::fs::remove_file(&path).unwrap();
    }
    written(OutFile::create_private(&path).unwrap(), "new");
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_link_stays_and_its_target_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let (link, second) = (folder.path().join("link"), folder.path().join("second"));
    let target = other.path().join("target");
    symlink(&target, &link).unwrap();
    symlink("link", &second).unwrap();
    // Whether the target is there or not.
    for text in ["one", "two"] {
        written(OutFile::create(&second).unwrap(), text);
        assert!(link.is_symlink() && second.is_symlink() && !target.is_symlink());
        assert_eq!(std::fs::read_to_string(&target).unwrap(), text);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 1);
    symlink("ring", folder.path().join("ring")).unwrap();
    let line = OutFile::create(&folder.path().join("ring")).unwrap_err();
    assert!(line.to_string().ends_with("leads nowhere"), "{line}");
}

#[test]
fn devices_are_not_replaced() {
    let line = OutFile::create(Path::new("/dev/null")).unwrap_err();
    assert!(line.to_string().contains("is a device or a pipe"), "{line}");
}

#[test]
fn what_is_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = at("m-00001-of-00002.gguf");
    for name in ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other"] {
        std::fs::write(at(name), "x").unwrap();
    }
    symlink(&model, at("link")).unwrap();
    std::fs::hard_link(&model, at("hard")).unwrap();
    symlink(at("none"), at("dangling")).unwrap();
    let mut files = FilesInUse::default();
    files.reads_model("model", &model);
    files.writes("session", &at("none")).unwrap();
    let around = at("../")
        .join(folder.path().file_name().unwrap())
        .join("none");
    for (path, what) in [
        (model.clone(), "model"),
        (at("m-00002-of-00002.gguf"), "model"),
        (at("./link"), "model"),
        (at("hard"), "model"),
        (at("none"), "session"),
        (around, "session"),
        (at("dangling"), "session"),
    ] {
        let line = files.writes("trace", &path).unwrap_err().to_string();
        let what = match what {
            "session" => "`session`",
            what => what,
        };
        let expected = format!(" is the same file as {what}, expected another one");
        assert!(
            line.starts_with("`trace`: ") && line.ends_with(&expected),
            "{line}"
        );
    }
    files.writes("trace", &at("other")).unwrap();
    files.writes("trace", Path::new("/dev/null")).unwrap();
    files.writes("out", Path::new("/dev/null")).unwrap();
}
