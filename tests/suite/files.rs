//! Files that are read and written: nothing is written over what is read, nothing is left behind,
//! and modes and links stay.
#![cfg(unix)]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::bin::{answer, hae, refusal, refusal_of};
use crate::model::{PICTURE, TEXT, VISION, repository};

/// A folder with one of each file that commands read.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Files(TempDir::new().unwrap());
        std::fs::create_dir(files.folder()).unwrap();
        for (name, from) in [("m.gguf", TEXT), ("v.gguf", VISION), ("p.png", PICTURE)] {
            std::fs::copy(repository(from), files.at(name)).unwrap();
        }
        std::fs::write(files.at("prompt.txt"), "Hello").unwrap();
        // Enough that a share of the pictures is some.
        let mut lines = String::new();
        for name in ["q", "a", "b", "c", "d", "e", "f", "g"] {
            std::fs::copy(repository(PICTURE), files.at(&format!("{name}.png"))).unwrap();
            lines += &format!(
                "{{\"images\":[\"{name}.png\"],\"question\":\"What?\",\"answer\":\"a\"}}\n"
            );
        }
        std::fs::write(files.at("q.jsonl"), lines).unwrap();
        files
    }

    /// Of a name that is always the same: the part of a question hangs on it.
    fn folder(&self) -> PathBuf {
        self.0.path().join("set")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// Words of a command line; those that begin with `@` are files of the folder.
    fn words(&self, line: &str) -> Vec<String> {
        let word = |word: &str| match word.strip_prefix('@') {
            Some(name) => self.at(name).to_str().unwrap().to_owned(),
            None => word.to_owned(),
        };
        line.split_whitespace().map(word).collect()
    }

    fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(self.folder()).unwrap();
        let mut all: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        all.sort();
        let read = |path: PathBuf| (std::fs::read(&path).unwrap_or_default(), path);
        all.into_iter()
            .map(read)
            .map(|(bytes, path)| (path, bytes))
            .collect()
    }
}

#[test]
fn no_output_is_an_input() {
    let files = Files::new();
    let model = "-m @m.gguf --mmproj @v.gguf";
    answer(&files.words(&format!(
        "run {model} -p Hello -n 2 -t 1 --temp 0 --session @s.session --trace @t.trace"
    )));
    answer(&files.words(&format!(
        "compare {model} -p Hello -n 2 -t 1 -r 1 --no-distance --kv-policy full --out @r.jsonl -o csv"
    )));
    symlink("m.gguf", files.at("link.gguf")).unwrap();
    std::fs::hard_link(files.at("m.gguf"), files.at("hard.gguf")).unwrap();
    let before = files.contents();
    let run = format!("run {model} -n 1 -p Hello");
    let ask = format!("{model} -n 1 -t 1");
    let checkpoint = repository("models/tiny-phi3v").display().to_string();
    for (line, expected) in [
        (format!("{run} --trace @m.gguf"), "--trace: "),
        (
            format!("{run} --trace @link.gguf"),
            "link.gguf is the same file as -m",
        ),
        (
            format!("{run} --trace @hard.gguf"),
            "is the same file as -m",
        ),
        (
            format!("{run} --trace @v.gguf"),
            "is the same file as --mmproj",
        ),
        (format!("{run} --image @p.png --trace @p.png"), "as --image"),
        (format!("{run} --session @m.gguf"), "--session: "),
        (
            format!("{run} --image @p.png --session @p.png"),
            "as --image",
        ),
        (
            format!("{run} --session @s.session --trace @s.session"),
            "as --session",
        ),
        (format!("{run} --session @new --trace @new"), "as --session"),
        (
            format!("run {model} -f @prompt.txt --trace @prompt.txt"),
            "as -f",
        ),
        (
            format!("run {model} -f @prompt.txt --session @prompt.txt"),
            "as -f",
        ),
        (
            format!("{run} --kv-policy hae --calibration @q.jsonl --trace @q.jsonl"),
            "as --calibration",
        ),
        (
            format!("eval @q.jsonl {ask} --out @q.jsonl"),
            "as the file of the questions",
        ),
        (
            format!("eval @q.jsonl {ask} --out @q.png"),
            "as a picture of a question",
        ),
        (format!("eval @q.jsonl {ask} --out @link.gguf"), "as -m"),
        (
            format!("compare -f @q.jsonl {ask} --out @q.jsonl"),
            "as the file of the questions",
        ),
        (
            format!("compare -p Hi --image @p.png {ask} --out @p.png"),
            "as a picture of a",
        ),
        (
            format!("calibrate @q.jsonl {ask} --out @q.jsonl"),
            "as the file of the questions",
        ),
        (
            format!("calibrate @q.jsonl {ask} --out @hard.gguf"),
            "as -m",
        ),
        ("quantize @m.gguf @m.gguf COPY".into(), "as the input"),
        ("quantize @m.gguf @link.gguf COPY".into(), "as the input"),
        ("quantize @m.gguf @hard.gguf COPY".into(), "as the input"),
        (
            format!("convert {checkpoint} -o @out --mmproj {checkpoint}/config.json"),
            "as a file of the model",
        ),
        (
            format!("convert {checkpoint} -o @out --mmproj @out"),
            "as --output",
        ),
        ("report @r.jsonl -o @r.jsonl".into(), "as one that is shown"),
        (
            "report --trace @t.trace -o @t.trace".into(),
            "as one that is shown",
        ),
        // Not read, but of another kind: more likely a slip than an order.
        (
            format!("{run} --trace @q.jsonl"),
            "is there and no trace of hae",
        ),
    ] {
        let said = refusal(&files.words(&line));
        assert!(said.contains(expected), "{line}: {said}");
    }
    // One of many traces leads to an input.
    std::fs::create_dir(files.at("traces")).unwrap();
    let id = std::fs::read_to_string(files.at("q.jsonl")).unwrap();
    assert!(!id.contains("\"id\""));
    let eval = files.words(&format!(
        "eval @q.jsonl {ask} --kv-policy full --out @new --trace @traces"
    ));
    let name = traced_name(&files);
    symlink(files.at("m.gguf"), files.at("traces").join(name)).unwrap();
    let said = refusal(&eval);
    assert!(
        said.contains("--trace: ") && said.contains("is the same file as -m"),
        "{said}"
    );
    assert!(!files.at("new").exists());
    std::fs::remove_dir_all(files.at("traces")).unwrap();
    assert!(files.contents() == before, "every file is as it was");
}

/// What the trace of the second question under `full` is called.
fn traced_name(files: &Files) -> String {
    let source = hae::eval::files::Source {
        path: files.at("q.jsonl"),
        ..Default::default()
    };
    let (_, questions) = source.read().unwrap();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let id: String = questions[1].id.chars().take(40).map(plain).collect();
    format!("00001-{id}-full.trace")
}

/// A command under a limit of the size of files, in KiB.
fn limited(kib: u32, args: &[String]) -> Output {
    let script = format!("ulimit -f {kib}; exec \"$@\"");
    Command::new("bash")
        .args(["-c", &script, "bash"])
        .arg(hae().get_program())
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn a_file_that_may_not_grow_is_an_ordinary_error() {
    let files = Files::new();
    let before = files.contents();
    let model = "-m @m.gguf --mmproj @v.gguf";
    let run = format!("run {model} --image @p.png -p Hello -n 2 -t 1 --temp 0");
    for (line, what) in [
        (format!("{run} --session @s"), "s: File too large"),
        (
            format!("{run} --trace @t --kv-policy full"),
            "t: File too large",
        ),
        ("quantize @m.gguf @q.gguf COPY".into(), "m.gguf: "),
    ] {
        let output = limited(4, &files.words(&line));
        let stderr = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}: {output:?}");
        assert!(stderr.contains(what), "{line}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{line}: {stderr}");
        // Of a trace there is what went in.
        let _ = std::fs::remove_file(files.at("t"));
        assert!(
            files.contents() == before,
            "{line}: {:?}",
            names(&files.folder())
        );
    }
    let tiny = repository("models/tiny-phi3v").display().to_string();
    let line = format!("convert {tiny} -o @c.gguf --mmproj @d.gguf");
    let said = refusal_of(&limited(4, &files.words(&line)));
    assert!(said.contains("File too large"), "{said}");
    assert!(files.contents() == before, "{:?}", names(&files.folder()));
    // The model inside the program needs a file, too.
    let temp = TempDir::new().unwrap();
    let output = Command::new("bash")
        .args(["-c", "ulimit -f 64; exec \"$@\"", "bash"])
        .arg(hae().get_program())
        .args(["run", "-p", "Hello", "-n", "1"])
        .env("TMPDIR", temp.path())
        .output()
        .unwrap();
    let said = refusal_of(&output);
    assert!(said.contains("File too large"), "{said}");
    assert!(names(temp.path()).is_empty());
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn modes_and_links_stay() {
    let files = Files::new();
    let other = TempDir::new().unwrap();
    let run = "run -m @m.gguf -p Hello -n 2 -t 1 --temp 0";
    let kept = |line: &str, name: &str, new: Option<u32>| {
        let path = files.at(name);
        answer(&files.words(line));
        if let Some(new) = new {
            assert_eq!(mode(&path), new, "{line}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let target = other.path().join(name);
        std::fs::rename(&path, &target).unwrap();
        symlink(&target, &path).unwrap();
        let before = std::fs::metadata(&target).unwrap().modified().unwrap();
        answer(&files.words(line));
        assert!(path.is_symlink() && !target.is_symlink(), "{line}");
        assert_eq!(mode(&target), 0o640, "{line}");
        let after = std::fs::metadata(&target).unwrap().modified().unwrap();
        assert!(after > before, "{line}: the target is written");
    };
    // What was said and shown is its owner's alone.
    kept(
        &format!("{run} --session @s.session"),
        "s.session",
        Some(0o600),
    );
    kept(&format!("{run} --trace @t.trace"), "t.trace", Some(0o600));
    kept("report --trace @t.trace -o @r.html", "r.html", None);
    kept("quantize @m.gguf @c.gguf COPY", "c.gguf", None);
    let tiny = repository("models/tiny-phi3v").display().to_string();
    kept(
        &format!("convert {tiny} -o @o.gguf --mmproj @w.gguf"),
        "o.gguf",
        None,
    );
    assert!(
        names(&files.folder())
            .iter()
            .all(|name| !name.starts_with(".hae-"))
    );
    assert!(
        names(other.path())
            .iter()
            .all(|name| !name.starts_with(".hae-"))
    );
    // No device is replaced by a file.
    for line in [
        "report --trace @t.trace -o /dev/null",
        "quantize @m.gguf /dev/null COPY",
    ] {
        let said = refusal(&files.words(line));
        assert!(said.contains("/dev/null: is a device or a pipe"), "{said}");
    }
}

#[test]
fn an_empty_file_is_a_new_session() {
    let files = Files::new();
    std::fs::write(files.at("s"), "").unwrap();
    let first = files.words("run -m @m.gguf -p Hello -n 4 -t 1 --temp 0 --session @s");
    let text = answer(&first);
    let alone = files.words("run -m @m.gguf -p Hello -n 4 -t 1 --temp 0");
    assert_eq!(text, answer(&alone));
    assert!(std::fs::metadata(files.at("s")).unwrap().len() > 1000);
    // It goes on from there.
    assert_ne!(answer(&first), text);
}
