//! Requests to end: what is under way is finished, what can be kept is kept, and the status says
//! which signal it was.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{first_bytes, hae};
use crate::model::{STORY, TEXT, repository};

const BOTH: [(&str, i32); 2] = [("TERM", 143), ("HUP", 129)];

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(hae().get_program());
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let status = Command::new("kill").args(["-s", name, &pid]).status();
    assert!(status.unwrap().success());
}

/// Waits for a chat's first prompt: its help ends with `/quit`.
fn help(child: &mut Child) {
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("/quit") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0);
    }
    // The line was the last before the prompt.
    std::thread::sleep(Duration::from_millis(300));
}

fn names(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|e| e.unwrap().path()).collect()
}

/// What a run that goes on with a session says of its cache.
fn gone_on(session: &Path) -> Value {
    let model = repository(TEXT);
    let output = hae()
        .args([
            "run", "-o", "json", "--temp", "0", "-n", "2", "-t", "1", "-p", "Hi",
        ])
        .arg("-m")
        .arg(model)
        .arg("--session")
        .arg(session)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_chat_is_kept_at_its_prompt_and_in_an_answer() {
    let model = repository(TEXT);
    for (name, code) in BOTH {
        for answering in [false, true] {
            let dir = TempDir::new().unwrap();
            let session = dir.path().join("s");
            let mut chat = command(&["run", "--temp", "0", "-t", "1", "-m"])
                .arg(&model)
                .arg("--session")
                .arg(&session)
                .spawn()
                .unwrap();
            help(&mut chat);
            let mut stdin = chat.stdin.take().unwrap();
            writeln!(stdin, "{STORY}").unwrap();
            first_bytes(&mut chat);
            let mut text = String::new();
            let mut stdout = BufReader::new(chat.stdout.take().unwrap());
            if !answering {
                signal(&chat, "INT");
                stdout.read_line(&mut text).unwrap();
                std::thread::sleep(Duration::from_millis(300));
            }
            // Standard input stays open: it is the signal that ends the chat.
            signal(&chat, name);
            stdout.read_to_string(&mut text).unwrap();
            let status = chat.wait().unwrap();
            drop(stdin);
            assert_eq!(status.code(), Some(code), "{name}, {answering}");
            assert!(text.ends_with('\n'), "the answer so far: {text:?}");
            let left = names(dir.path());
            assert_eq!(left, std::slice::from_ref(&session), "{name}, {answering}");
            let cells = &gone_on(&session)["kv"]["cells"]["live"]["text"];
            assert!(
                cells.as_u64().unwrap() > 40,
                "the story's question: {cells}"
            );
        }
    }
}

#[test]
fn an_answer_is_cut_short_and_kept() {
    let model = repository(TEXT);
    for (name, code) in BOTH {
        let dir = TempDir::new().unwrap();
        let session = dir.path().join("s");
        let trace = dir.path().join("t");
        let mut run = command(&["run", "--temp", "0", "-t", "1", "-p", STORY, "-m"])
            .arg(&model)
            .arg("--session")
            .arg(&session)
            .arg("--trace")
            .arg(&trace)
            .spawn()
            .unwrap();
        first_bytes(&mut run);
        signal(&run, name);
        let output = run.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(
            output.stdout.ends_with(b"\n") && output.stderr.is_empty(),
            "{output:?}"
        );
        gone_on(&session);
        let trace = hae::trace::Reader::open(&trace, hae::trace::Cut::Refuse);
        let mut trace = trace.unwrap();
        trace.rest().unwrap();
        assert!(trace.is_complete());
    }
}

/// A reader of the answer that goes away takes nothing from the conversation.
#[test]
fn a_conversation_outlives_its_reader() {
    let model = repository(TEXT);
    let dir = TempDir::new().unwrap();
    let session = dir.path().join("s");
    let mut run = command(&["run", "--temp", "0", "-t", "1", "-p", STORY, "-m"])
        .arg(&model)
        .arg("--session")
        .arg(&session)
        .spawn()
        .unwrap();
    first_bytes(&mut run);
    drop(run.stdout.take());
    assert_eq!(run.wait().unwrap().code(), Some(0), "as any filter");
    let cells = &gone_on(&session)["kv"]["cells"]["live"]["text"];
    assert!(cells.as_u64().unwrap() > 40, "{cells}");
}

fn questions(dir: &Path) -> PathBuf {
    let path = dir.join("q.jsonl");
    let line =
        |i| format!("{{\"id\":\"{i}\",\"question\":\"Tell a story, {i}\",\"answer\":\"a\"}}\n");
    std::fs::write(&path, (0..200).map(line).collect::<String>()).unwrap();
    path
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(300), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn long_commands_end_with_what_they_have() {
    let model = repository(TEXT);
    for (name, code) in BOTH {
        let dir = TempDir::new().unwrap();
        let (file, out) = (questions(dir.path()), dir.path().join("r.jsonl"));
        let mut eval = command(&["eval", "-t", "1", "-n", "8", "--kv-policy", "full", "-m"])
            .arg(&model)
            .arg(&file)
            .arg("--out")
            .arg(&out)
            .spawn()
            .unwrap();
        let lines = || {
            std::fs::read_to_string(&out)
                .unwrap_or_default()
                .lines()
                .count()
        };
        wait_until("two answers", || lines() > 2);
        signal(&eval, name);
        drop(eval.stdin.take());
        let output = eval.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let table = String::from_utf8(output.stdout).unwrap();
        assert!(table.contains("full"), "what there is: {table}");
        let (_, answers) = hae::eval::results::read(&out).unwrap();
        assert_eq!(answers.len() + 1, lines());

        let bench = [
            "bench",
            "-t",
            "1",
            "-r",
            "1000",
            "-p",
            "64",
            "-n",
            "0",
            "--kv-policy",
            "full",
            "-o",
            "csv",
        ];
        let bench = command(&bench).arg("-m").arg(&model).spawn().unwrap();
        std::thread::sleep(Duration::from_secs(3));
        signal(&bench, name);
        let output = bench.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");

        let out = dir.path().join("c.json");
        let calibrate = command(&["calibrate", "-t", "1", "-n", "8", "-m"])
            .arg(&model)
            .arg(&file)
            .arg("--out")
            .arg(&out)
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_secs(3));
        signal(&calibrate, name);
        let output = calibrate.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(!out.exists());
        let left = names(dir.path());
        assert!(
            left.iter()
                .all(|path| !path.to_str().unwrap().contains(".hae-")),
            "{left:?}"
        );
    }
}

/// Where nothing can be kept, nothing is left.
#[test]
fn a_conversion_that_is_ended_leaves_nothing() {
    let checkpoint = repository("models/small-phi3v");
    for (name, code) in BOTH.into_iter().chain([("INT", 130)]) {
        let dir = TempDir::new().unwrap();
        let [text, vision] = ["a.gguf", "b.gguf"].map(|name| dir.path().join(name));
        let convert = command(&["convert", "--outtype", "f32", "-o"])
            .arg(&text)
            .arg("--mmproj")
            .arg(&vision)
            .arg(&checkpoint)
            .spawn()
            .unwrap();
        wait_until("a file", || !names(dir.path()).is_empty());
        signal(&convert, name);
        let output: Output = convert.wait_with_output().unwrap();
        // Both may have been there already.
        match output.status.code() {
            Some(0) => {}
            status => {
                assert_eq!(status, Some(code), "{output:?}");
                assert!(
                    names(dir.path())
                        .iter()
                        .all(|path| !path.to_str().unwrap().contains(".hae-"))
                );
            }
        }
    }
}

#[test]
fn every_other_signal_leaves_no_temporary_files_either() {
    for (name, number) in [
        ("QUIT", 3),
        ("USR1", 10),
        ("USR2", 12),
        ("ALRM", 14),
        ("XCPU", 24),
    ] {
        let temp = TempDir::new().unwrap();
        let mut chat = Command::new("bash")
            .args(["-c", "ulimit -c 0; exec \"$@\"", "bash"])
            .arg(hae().get_program())
            .arg("run")
            .env("TMPDIR", temp.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        help(&mut chat);
        assert_eq!(names(temp.path()).len(), 2, "the embedded model is in use");
        signal(&chat, name);
        let status = chat.wait().unwrap();
        if cfg!(target_os = "linux") {
            assert_eq!(status.signal(), Some(number), "{name}: {status:?}");
        }
        assert!(names(temp.path()).is_empty(), "{name}");
    }
}

#[test]
fn what_a_killed_process_leaves_the_next_removes() {
    let temp = TempDir::new().unwrap();
    let chat = || {
        let mut chat = command(&["run"])
            .env("TMPDIR", temp.path())
            .spawn()
            .unwrap();
        help(&mut chat);
        chat
    };
    let mut living = chat();
    let mut killed = chat();
    assert_eq!(names(temp.path()).len(), 4);
    let own: Vec<PathBuf> = names(temp.path());
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(names(temp.path()).len(), 4);
    let mut next = chat();
    let left = names(temp.path());
    assert_eq!(
        left.len(),
        4,
        "its own two, and those of the living: {left:?}"
    );
    assert_eq!(left.iter().filter(|path| own.contains(path)).count(), 2);
    for chat in [&mut living, &mut next] {
        drop(chat.stdin.take());
        assert_eq!(chat.wait().unwrap().code(), Some(0));
    }
    assert!(names(temp.path()).is_empty());
}

/// `nohup`: what was ignored when the program began stays ignored.
#[cfg(target_os = "linux")]
#[test]
fn a_signal_that_is_ignored_stays_so() {
    let mut run = Command::new("bash")
        .args(["-c", "trap '' HUP; exec \"$@\"", "bash"])
        .arg(hae().get_program())
        .args([
            "run", "--temp", "0", "-t", "1", "-n", "40", "-p", STORY, "-m",
        ])
        .arg(repository(TEXT))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    first_bytes(&mut run);
    signal(&run, "HUP");
    signal(&run, "HUP");
    assert_eq!(run.wait_with_output().unwrap().status.code(), Some(0));
}

/// At a terminal, whose line is being edited: the chat ends, and the terminal is as it was.
#[test]
fn a_terminal_is_put_back() {
    let dir = TempDir::new().unwrap();
    let session = dir.path().join("s");
    let pid = dir.path().join("pid");
    let script = format!(
        "bash -c 'echo $$ > {}; exec {} run --temp 0 -t 1 -n 4 -m {} --session {}'; echo status $?; stty -a",
        pid.display(),
        hae().get_program().to_str().unwrap(),
        repository(TEXT).display(),
        session.display()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]).env("TERM", "xterm");
    let mut shell = rexpect::session::spawn_command(command, Some(120_000)).unwrap();
    shell.exp_string("> ").unwrap();
    shell.send_line("Hello").unwrap();
    shell.exp_string("> ").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let pid = std::fs::read_to_string(pid).unwrap();
    let status = Command::new("kill")
        .args(["-s", "TERM", pid.trim()])
        .status();
    assert!(status.unwrap().success());
    shell.exp_string("status 143").unwrap();
    let mode = shell.exp_regex("-?icanon").unwrap().1;
    assert_eq!(mode, "icanon");
    shell.exp_eof().unwrap();
    assert!(session.exists());
}
