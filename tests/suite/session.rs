//! `--session`: a conversation that goes on in another process.

use std::path::Path;

use hae::llama::gguf::Gguf;
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::hae;
use crate::model::{PICTURE, TEXT, VISION, WHERE as FIRST, repository};

const SECOND: &str = "How many stars are there?";

fn ask(session: &Path, prompt: &str, args: &[&str]) -> Result<Value, String> {
    let output = hae()
        .args(["run", "-o", "json", "--temp", "0", "-n", "24", "-t", "1"])
        .args(["-p", prompt, "--session"])
        .arg(session)
        .args(args)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    match output.status.code() {
        Some(0) => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        Some(2) => Err(stderr),
        code => panic!("{code:?}: {stderr}"),
    }
}

fn picture() -> String {
    repository(PICTURE).to_str().unwrap().to_owned()
}

/// Two questions in two processes, and in one chat: the same answers.
fn assert_goes_on(args: &[&str]) -> Value {
    use std::io::Write;
    use std::process::{Command, Stdio};

    let dir = TempDir::new().unwrap();
    let file = dir.path().join("chat.session");
    let picture = picture();
    let with_picture: Vec<&str> = ["--image", &picture].iter().chain(args).copied().collect();
    let first = ask(&file, FIRST, &with_picture).unwrap();
    let second = ask(&file, SECOND, args).unwrap();

    let mut chat = Command::new(hae().get_program())
        .args(["run", "--temp", "0", "-n", "24", "-t", "1"])
        .args(&with_picture)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = format!("{FIRST}\n{SECOND}\n");
    let mut stdin = chat.stdin.take().unwrap();
    stdin.write_all(lines.as_bytes()).unwrap();
    drop(stdin);
    let output = chat.wait_with_output().unwrap();
    let answers: Vec<&str> = std::str::from_utf8(&output.stdout)
        .unwrap()
        .lines()
        .collect();
    let texts = [&first, &second].map(|report| report["text"].as_str().unwrap());
    assert_eq!(answers, texts);
    second
}

#[test]
fn a_conversation_goes_on_in_another_process() {
    let second = assert_goes_on(&[]);
    let cells = &second["kv"]["cells"];
    assert_eq!(cells["live"]["vision"], 199, "{cells}");
    assert_eq!(cells["evicted"]["vision"], 0);
}

#[cfg(feature = "kv-patches")]
#[test]
fn what_was_evicted_comes_back_in_another_process() {
    let second = assert_goes_on(&["--kv-policy", "hae", "--dap-keep", "40"]);
    let cells = &second["kv"]["cells"];
    assert_eq!(cells["live"]["vision"], 40, "{cells}");
    assert_eq!(cells["evicted"]["vision"], 159);
    // The second question judged the whole picture, not what the first had left of it.
    assert_eq!(cells["recalled"]["vision"], 159);
}

#[test]
fn a_session_that_does_not_fit_is_refused() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("chat.session");
    let picture = picture();
    ask(&file, FIRST, &["--image", &picture, "--image", &picture]).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let refused = |args: &[&str], expected: &str| {
        let error = ask(&file, SECOND, args).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(expected), "{error}");
        assert_eq!(
            std::fs::read(&file).unwrap(),
            bytes,
            "the file is untouched"
        );
    };
    // llama.cpp as it comes has no choice of factors to refuse.
    #[cfg(feature = "kv-patches")]
    refused(&["--rope-factors", "long"], "--rope-factors short");
    refused(&["-ctk", "q8_0"], "does not fit this run");
    refused(&["-c", "256"], "the context 256");
    // A model of the same shape and size, with other weights.
    let mut weights = std::fs::read(repository(TEXT)).unwrap();
    let first = Gguf::open(&repository(TEXT)).unwrap().tensors()[0].offset as usize;
    weights[first] ^= 1;
    let (other, mmproj) = (dir.path().join("other.gguf"), repository(VISION));
    std::fs::write(&other, weights).unwrap();
    let files = [&other, &mmproj].map(|path| path.to_str().unwrap());
    refused(
        &["-m", files[0], "--mmproj", files[1]],
        "was made with another model (phi3 of 8 layers, ",
    );

    let damaged = |bytes: &[u8], expected: &str| {
        std::fs::write(&file, bytes).unwrap();
        let error = ask(&file, SECOND, &[]).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(expected), "{error}");
    };
    for at in [0, 9, 20, bytes.len() / 2, bytes.len() - 1] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        let expected = match at {
            0 => "is no session",
            9 => "expected 2",
            _ => "checksum",
        };
        damaged(&bytes, expected);
    }
    damaged(&bytes[..bytes.len() / 2], "checksum");
    damaged(b"", "too short");
}

#[test]
fn a_session_that_cannot_be_written_is_refused_before_the_answer() {
    let dir = TempDir::new().unwrap();
    let nowhere = dir.path().join("none/chat.session");
    let answer = hae()
        .args(["run", "-p", "Hello", "-n", "1", "--session"])
        .arg(&nowhere)
        .output()
        .unwrap();
    assert_eq!(answer.status.code(), Some(2));
    assert!(answer.stdout.is_empty(), "{answer:?}");
    let stderr = String::from_utf8(answer.stderr).unwrap();
    assert!(stderr.ends_with("none does not exist\n"), "{stderr}");
}
