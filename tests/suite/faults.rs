//! Faults on purpose (docs/reliability.md): one line, the right status, and nothing lost that was
//! there before.
#![cfg(target_os = "linux")]

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hae::Error;
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::generate::Session;
use hae::policy::{Amount, Limits, PolicyOptions, create};
use hae::saved::Saved;
use tempfile::TempDir;

use crate::bin::{answer, first_bytes, hae, refusal};
use crate::files::names;
use crate::model::{PICTURE, STORY, TEXT, VISION, repository};
use crate::random::{assert_in_step, prompt};

fn command(line: &str) -> Command {
    let mut command = Command::new(hae().get_program());
    command
        .args(line.split_whitespace())
        .env("GOMP_SPINCOUNT", "0")
        .env("LC_ALL", "C")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(300), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a mapped page gives that its file does not have any more is SIGBUS, at any load. The session
/// is what it was. A model that was read instead of mapped does not care.
#[test]
fn a_model_that_is_cut_while_it_is_used_ends_the_run_with_a_line() {
    let dir = TempDir::new().unwrap();
    let [model, session] = ["m.gguf", "s"].map(|name| dir.path().join(name));
    let common = format!(
        "run -m {} -t 1 --temp 0 --session {}",
        model.display(),
        session.display()
    );
    std::fs::copy(repository(TEXT), &model).unwrap();
    answer(
        &format!("{common} -n 4 -p Hello")
            .split(' ')
            .collect::<Vec<_>>(),
    );
    let before = std::fs::read(&session).unwrap();
    for no_mmap in [false, true] {
        std::fs::copy(repository(TEXT), &model).unwrap();
        let mut run = command(&common);
        run.args(["-n", "400", "-p", STORY]);
        if no_mmap {
            run.arg("--no-mmap");
        }
        let mut run = run.spawn().unwrap();
        first_bytes(&mut run);
        let file = std::fs::File::options().write(true).open(&model).unwrap();
        file.set_len(1).unwrap();
        let output = run.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(names(dir.path()), ["m.gguf", "s"]);
        if no_mmap {
            assert_eq!(output.status.code(), Some(0), "{output:?}");
            assert_ne!(std::fs::read(&session).unwrap(), before);
            continue;
        }
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let line = "hae: the model's file was cut or cannot be read any more while it was in use";
        assert!(stderr.starts_with(line), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert_eq!(std::fs::read(&session).unwrap(), before);
    }
}

/// A run at which a signal arrives at any time, from loading to saving: the session is the old one or
/// the new one, and nothing lies beside it.
#[test]
fn a_session_is_whole_whenever_a_signal_comes() {
    let dir = TempDir::new().unwrap();
    let session = dir.path().join("s");
    let line = format!(
        "run -m {} --mmproj {} --image {} --num-crops 4 -n 16 -t 1 --temp 0 -p What? --session {}",
        repository(TEXT).display(),
        repository(VISION).display(),
        repository(PICTURE).display(),
        session.display()
    );
    let run = || command(&line).spawn().unwrap();
    let start = Instant::now();
    assert!(run().wait_with_output().unwrap().status.success());
    let whole = start.elapsed();
    let before = std::fs::read(&session).unwrap();
    let (mut kept, mut new) = (0, 0);
    for (name, number) in [("INT", 2), ("TERM", 15), ("HUP", 1), ("KILL", 9)] {
        for part in 1..=8 {
            std::fs::write(&session, &before).unwrap();
            let child = run();
            std::thread::sleep(whole * part / 8);
            let pid = child.id().to_string();
            Command::new("kill")
                .args(["-s", name, &pid])
                .status()
                .unwrap();
            let output = child.wait_with_output().unwrap();
            let status = output.status;
            let ended = status.code() == Some(128 + number) || status.signal() == Some(number);
            assert!(ended || status.success(), "{name} {part}/8: {output:?}");
            let lines = String::from_utf8_lossy(&output.stderr).lines().count();
            assert!(lines <= 1, "{name} {part}/8: {output:?}");
            match std::fs::read(&session).unwrap() == before {
                true => kept += 1,
                false => new += 1,
            }
            Saved::read(&session).unwrap_or_else(|e| panic!("{name} {part}/8: {e}"));
            if name != "KILL" {
                assert_eq!(names(dir.path()), ["s"], "{name} {part}/8");
            }
        }
    }
    assert!(kept > 0 && new > 0, "{kept} old, {new} new");
    // What a killed one left is gone behind the next.
    assert!(run().wait_with_output().unwrap().status.success());
    assert_eq!(names(dir.path()), ["s"]);
}

/// Killed in the middle of writing, which is made slow to be hit: the session before is there.
#[test]
fn a_kill_between_any_two_writes_of_a_session_loses_nothing() {
    let dir = TempDir::new().unwrap();
    let session = dir.path().join("s");
    let line = format!(
        "run -m {} -c 4096 -n 2 -t 1 --temp 0 --session {}",
        repository(TEXT).display(),
        session.display()
    );
    // Tens of MiB.
    let long = "the red square is left of the blue circle and ".repeat(150);
    let mut first = command(&line);
    assert!(first.args(["-p", &long]).output().unwrap().status.success());
    let line = format!("{line} -p Hello");
    let before = std::fs::read(&session).unwrap();
    let mut hit = 0;
    for _ in 0..6 {
        let old = names(dir.path());
        let mut child = command(&line).spawn().unwrap();
        // The first new one is a try whether the file can be written at all, and stays empty.
        let is_written = |name: &String| {
            let bytes = std::fs::metadata(dir.path().join(name)).map_or(0, |meta| meta.len());
            !old.contains(name) && name.starts_with(".hae-") && bytes > 0
        };
        while child.try_wait().unwrap().is_none() {
            if names(dir.path()).iter().any(is_written) {
                child.kill().unwrap();
                hit += 1;
                break;
            }
        }
        child.wait().unwrap();
        Saved::read(&session).unwrap();
        std::fs::write(&session, &before).unwrap();
    }
    assert!(hit > 0);
    assert!(command(&line).output().unwrap().status.success());
    assert_eq!(names(dir.path()), ["s"]);
}

#[test]
fn a_session_is_one_runs_at_a_time() {
    let dir = TempDir::new().unwrap();
    let session = dir.path().join("s");
    let model = repository(TEXT);
    let line = format!(
        "run -m {} -t 1 --temp 0 --session {}",
        model.display(),
        session.display()
    );
    let once = format!("{line} -n 2 -p Hello");
    let once: Vec<&str> = once.split(' ').collect();
    for (exists, killed) in [(false, false), (true, true), (true, false)] {
        assert_eq!(session.exists(), exists);
        let mut chat = command(&line).spawn().unwrap();
        let in_use = || {
            names(dir.path())
                .iter()
                .any(|name| name.ends_with("-in-use.part"))
        };
        wait_until("a chat that has the session", in_use);
        let said = refusal(&once);
        assert!(
            said.ends_with("is in use by another run of hae, expected that to end or another name"),
            "{said}"
        );
        if killed {
            chat.kill().unwrap();
        }
        drop(chat.stdin.take());
        assert_eq!(chat.wait().unwrap().success(), !killed);
        answer(&once);
        assert_eq!(names(dir.path()), ["s"]);
        Saved::read(&session).unwrap();
    }
}

#[test]
fn a_trace_is_one_runs_at_a_time() {
    let dir = TempDir::new().unwrap();
    let trace = dir.path().join("t");
    let line = format!(
        "run -m {} -t 1 -c 512 --temp 0 --trace {}",
        repository(TEXT).display(),
        trace.display()
    );
    let mut chat = command(&line).spawn().unwrap();
    wait_until("a chat that has the trace", || trace.exists());
    let begun = std::fs::read(&trace).unwrap();
    let once = format!("{line} -n 2 -p Hello");
    let once: Vec<&str> = once.split(' ').collect();
    let said = refusal(&once);
    assert!(said.contains("is in use by another run of hae"), "{said}");
    assert!(std::fs::read(&trace).unwrap().starts_with(&begun));
    drop(chat.stdin.take());
    assert!(chat.wait().unwrap().success());
    answer(&once);
    assert_eq!(names(dir.path()), ["t"]);
}

#[test]
fn a_results_file_is_one_runs_at_a_time() {
    let dir = TempDir::new().unwrap();
    let [file, out] = ["q.jsonl", "r.jsonl"].map(|name| dir.path().join(name));
    let line =
        |i| format!("{{\"id\":\"{i}\",\"question\":\"Tell a story, {i}\",\"answer\":\"a\"}}\n");
    std::fs::write(&file, (0..40_000).map(line).collect::<String>()).unwrap();
    let line = format!(
        "eval {} -m {} -t 1 -n 8 --kv-policy full --out {}",
        file.display(),
        repository(TEXT).display(),
        out.display()
    );
    let child = command(&line).spawn().unwrap();
    let lines = || {
        std::fs::read_to_string(&out)
            .unwrap_or_default()
            .lines()
            .count()
    };
    wait_until("an answer", || lines() > 1);
    let said = refusal(&line.split(' ').collect::<Vec<_>>());
    assert!(said.contains("is in use by another run of hae"), "{said}");
    let pid = child.id().to_string();
    Command::new("kill")
        .args(["-s", "TERM", &pid])
        .status()
        .unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    let (_, answers) = hae::eval::results::read(&out).unwrap();
    assert_eq!(answers.len() + 1, lines());
    assert_eq!(names(dir.path()), ["q.jsonl", "r.jsonl"]);
}

/// Runs a command with `disk` mounted over a folder, and says what is left there. `None` where nobody
/// may mount anything.
fn mounted(folder: &Path, options: &str, line: &str) -> Option<(Output, Vec<String>)> {
    let script = r#"mount -t tmpfs -o "$1" none "$2" || exit 99
        folder=$2; shift 2; "$@"; code=$?; ls -A "$folder" >left; exit $code"#;
    let elsewhere = TempDir::new().unwrap();
    let output = Command::new("unshare")
        .args(["-Urm", "sh", "-c", script, "sh", options])
        .arg(folder)
        .arg(hae().get_program())
        .args(line.split_whitespace())
        .env("LC_ALL", "C")
        .current_dir(elsewhere.path())
        .output()
        .ok()?;
    let left = std::fs::read_to_string(elsewhere.path().join("left")).ok()?;
    Some((output, left.lines().map(str::to_owned).collect()))
}

/// Every command that writes, onto a disk that is full and onto one that is read-only: one line, and
/// no file that is not whole, but for those that grow as a run goes on.
#[test]
fn disks_that_are_full_or_read_only_are_ordinary_errors() {
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let model = repository(TEXT).display().to_string();
    let questions = "{\"question\":\"What?\",\"answer\":\"a\"}\n".repeat(8);
    std::fs::write(at("q.jsonl"), questions).unwrap();
    let run = format!("run -m {model} -n 2 -t 1 --temp 0 -p Hello");
    answer(
        &format!("{run} --trace {}", at("t.trace"))
            .split(' ')
            .collect::<Vec<_>>(),
    );
    // Enough of a trace for more than a page.
    let shown = format!(
        "{run} --mmproj {} --image {} --num-crops 1",
        repository(VISION).display(),
        repository(PICTURE).display()
    );
    let eval = format!(
        "eval {} -m {model} -n 2 -t 1 --kv-policy full",
        at("q.jsonl")
    );
    let tiny = repository("models/tiny-phi3v").display().to_string();
    let disk_at = |name: &str| disk.join(name).display().to_string();
    for (line, grows) in [
        (format!("{run} --session {}", disk_at("s")), ""),
        (format!("{shown} --trace {}", disk_at("t")), "t"),
        (format!("{eval} --out {}", disk_at("r")), "r"),
        (
            format!("report --trace {} -o {}", at("t.trace"), disk_at("r.html")),
            "",
        ),
        (format!("quantize {model} {} COPY", disk_at("q.gguf")), ""),
        (
            format!(
                "convert {tiny} -o {} --mmproj {}",
                disk_at("a"),
                disk_at("b")
            ),
            "",
        ),
    ] {
        for (options, expected) in [
            ("size=4k", "No space left on device"),
            ("size=4k,ro", "Read-only file system"),
        ] {
            let Some((output, left)) = mounted(&disk, options, &line) else {
                // Without such a right RLIMIT_FSIZE is what is tried (files.rs).
                return;
            };
            let stderr = String::from_utf8(output.stderr.clone()).unwrap();
            assert_eq!(
                output.status.code(),
                Some(2),
                "{options}: {line}: {output:?}"
            );
            assert_eq!(stderr.lines().count(), 1, "{options}: {line}: {stderr}");
            // llama.cpp's stream does not say why it failed.
            let says = stderr.contains(expected) || line.starts_with("quantize");
            assert!(says, "{options}: {line}: {stderr}");
            let whole = left.iter().all(|name| name == grows);
            assert!(whole, "{options}: {line}: {left:?}");
            assert!(options == "size=4k" || left.is_empty());
        }
    }
}

/// A pass of the model that fails, each of a conversation in turn: the books are the cache's, and
/// what is tried again goes on as if nothing had happened.
#[test]
fn a_pass_that_fails_takes_nothing_with_it() {
    for policy in ["full", "hae", "h2o", "streaming_llm"] {
        let run = |fails: Option<usize>| {
            let n_cells = 96;
            let options = PolicyOptions {
                kv_budget: Some(Amount::Cells(40)),
                ..PolicyOptions::default()
            };
            let options = if policy == "full" {
                PolicyOptions::default()
            } else {
                options
            };
            let policy = create(
                policy,
                &options,
                Limits {
                    n_layer: 1,
                    n_cells,
                },
            )
            .unwrap();
            let engine = Scripted::new(n_cells, 8).patched();
            let mut engine = engine.with_attention(|q, k| hashed(3, q, k));
            if let Some(pass) = fails {
                engine = engine.with_failure(pass);
            }
            let mut session = Session::new(engine, Controller::new(policy, n_cells));
            let mut failures = 0;
            let mut failed = |result: Result<(), Error>, session: &Session<Scripted>| {
                assert_in_step(session);
                let Err(error) = result else { return false };
                assert!(
                    error.to_string().contains("a failure of the script"),
                    "{error}"
                );
                failures += 1;
                true
            };
            for (turn, rows) in [
                [(false, 5), (true, 20), (false, 4)],
                [(true, 9), (false, 3), (false, 2)],
            ]
            .iter()
            .enumerate()
            {
                let segments = prompt(rows, 10 * turn as u32);
                while failed(
                    session
                        .prefill(&segments, &|| false)
                        .map(|whole| assert!(whole)),
                    &session,
                ) {}
                for token in 0..6 {
                    while failed(session.step(3 + token), &session) {}
                }
            }
            let entries = session.controller.ledger().entries();
            let mut held: Vec<_> = entries.map(|e| (e.pos, e.state)).collect();
            held.sort_by_key(|&(pos, _)| pos);
            (held, failures, session.engine.passes)
        };
        let (expected, failures, passes) = run(None);
        assert!(failures == 0 && passes > 16, "{policy}: {passes}");
        for pass in 0..passes {
            let (held, failures, n) = run(Some(pass));
            assert_eq!(failures, 1, "{policy}, pass {pass}");
            assert!(n > passes, "{policy}, pass {pass}");
            assert_eq!(held, expected, "{policy}, pass {pass}");
        }
    }
}

/// Bytes that come in pieces, as pipes and slow disks give them.
#[test]
fn short_reads_change_nothing() {
    let picture = std::fs::read(repository(PICTURE)).unwrap();
    let line = format!(
        "run -m {} --mmproj {} --num-crops 1 -n 4 -t 1 --temp 0 -p What?",
        repository(TEXT).display(),
        repository(VISION).display()
    );
    let expected = answer(
        &format!("{line} --image {}", repository(PICTURE).display())
            .split(' ')
            .collect::<Vec<_>>(),
    );
    for cut in [false, true] {
        let mut run = command(&format!("{line} --image -")).spawn().unwrap();
        let mut stdin = run.stdin.take().unwrap();
        let bytes = if cut {
            &picture[..picture.len() / 2]
        } else {
            &picture[..]
        };
        for piece in bytes.chunks(picture.len() / 40 + 1) {
            std::io::Write::write_all(&mut stdin, piece).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(stdin);
        let output = run.wait_with_output().unwrap();
        if cut {
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);
        } else {
            assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        }
    }
}
