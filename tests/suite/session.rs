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

/// Two questions in two processes, and in one chat: the same answers. What the second one reports.
pub fn assert_goes_on(args: &[&str]) -> Value {
    assert_goes_on_from(FIRST, args)
}

/// The same with another first question.
pub fn assert_goes_on_from(question: &str, args: &[&str]) -> Value {
    use std::io::Write;
    use std::process::{Command, Stdio};

    let dir = TempDir::new().unwrap();
    let file = dir.path().join("chat.session");
    let picture = picture();
    let with_picture: Vec<&str> = ["--image", &picture].iter().chain(args).copied().collect();
    let first = ask(&file, question, &with_picture).unwrap();
    let second = ask(&file, SECOND, args).unwrap();

    let mut chat = Command::new(hae().get_program())
        .args(["run", "--temp", "0", "-n", "24", "-t", "1"])
        .args(&with_picture)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = format!("{question}\n{SECOND}\n");
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
    refused(&["--rope-factors", "long"], "--rope-factors short");
    for (flags, expected) in [
        (
            &["-ctk", "q8_0"][..],
            "was made with -ctk f16, this run has -ctk q8_0: give -ctk f16",
        ),
        (
            &["-ctv", "q8_0"],
            "was made with -ctv f16, this run has -ctv q8_0: give -ctv f16",
        ),
        (
            &["-fa", "off"],
            "was made with -fa auto, this run has -fa off: give -fa auto",
        ),
        (
            &["-ctk", "f32", "-fa", "off"],
            "-ctk f16 -fa auto, this run has -ctk f32 -fa off: give -ctk f16 -fa auto",
        ),
    ] {
        refused(flags, expected);
    }
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
            9 => "expected 4",
            _ => "checksum",
        };
        damaged(&bytes, expected);
    }
    damaged(&bytes[..bytes.len() / 2], "checksum");
    damaged(b"HAE-", "too short");
}

/// Flags that a session cannot follow are refused, those that it agrees with are not.
#[test]
fn flags_of_the_conversation_are_the_sessions() {
    let dir = TempDir::new().unwrap();
    let session = |name: &str, args: &[&str]| {
        let file = dir.path().join(name);
        ask(&file, "Hello", args).unwrap();
        file
    };
    let plain = session("plain", &[]);
    let french = session("french", &["-sys", "French."]);
    let chatml = session("chatml", &["--chat-template", "chatml"]);
    let raw = session("raw", &["-no-cnv"]);
    for (file, args, expected) in [
        (
            &plain,
            &["-sys", "French."][..],
            "-sys: the session began without a system prompt",
        ),
        (
            &plain,
            &["--chat-template", "chatml"],
            "--chat-template: the session was made with",
        ),
        (
            &plain,
            &["-no-cnv"],
            "-no-cnv: the session goes through a chat template",
        ),
        (
            &french,
            &["-sys", "German."],
            "another one (\"French.\"), expected that or none",
        ),
        (
            &chatml,
            &["--chat-template", "llama3"],
            "another one (\"chatml\"), expected that",
        ),
        (&chatml, &["-no-cnv"], "-no-cnv: "),
        (
            &raw,
            &["--chat-template", "chatml"],
            "was made with -no-cnv, expected the same",
        ),
        (
            &raw,
            &["-sys", "French."],
            "-sys: the session began without",
        ),
    ] {
        let bytes = std::fs::read(file).unwrap();
        let error = ask(file, "Hello", args).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(std::fs::read(file).unwrap(), bytes, "the file is untouched");
    }
    for (file, own) in [
        (&french, &["-sys", "French."][..]),
        (&chatml, &["--chat-template", "chatml"]),
        (&raw, &["-no-cnv"]),
    ] {
        let copy = dir.path().join("copy");
        std::fs::copy(file, &copy).unwrap();
        let told = ask(file, "Hello", own).unwrap();
        let untold = ask(&copy, "Hello", &[]).unwrap();
        assert_eq!(told["text"], untold["text"], "{own:?}");
        assert_eq!(told["tokens"]["prompt"], untold["tokens"]["prompt"]);
    }
}

/// What a repeat penalty looks back on is a part of the conversation.
#[test]
fn the_repeat_penalty_looks_back_over_processes() {
    use std::io::Write;
    use std::process::{Command, Stdio};

    let args = [
        "-no-cnv",
        "--repeat-penalty",
        "1.3",
        "--repeat-last-n",
        "-1",
    ];
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("s");
    let [first, second] = [(); 2].map(|()| ask(&file, "Once upon", &args).unwrap());
    let mut chat = Command::new(hae().get_program())
        .args(["run", "--temp", "0", "-n", "24", "-t", "1"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = chat.stdin.take().unwrap();
    stdin.write_all(b"Once upon\nOnce upon\n").unwrap();
    drop(stdin);
    let output = chat.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let texts = [&first, &second].map(|report| report["text"].as_str().unwrap());
    assert_eq!(said, format!("{}\n{}\n", texts[0], texts[1]));
    // And does change what is said.
    let alone = dir.path().join("alone");
    ask(&alone, "Once upon", &args).unwrap();
    let off = ["-no-cnv", "--repeat-penalty", "1.3", "--repeat-last-n", "0"];
    let without = ask(&alone, "Once upon", &off).unwrap();
    assert_ne!(without["text"], second["text"]);
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
