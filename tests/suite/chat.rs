//! `hae run` without a prompt: a chat through a pipe and at a terminal, and what signals do.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::bin::{answer, hae};
use crate::model::{PICTURE, STORY, TEXT, WHERE, WHERE_ANSWER, load, repository};

fn picture() -> String {
    repository(PICTURE).to_str().unwrap().to_owned()
}

fn command(args: &[&str]) -> Command {
    let hae = hae();
    let mut command = Command::new(hae.get_program());
    command.arg("run").args(["--temp", "0"]).args(args);
    command
}

/// Enough for answers that the model was trained for; others never end.
const SHORT: [&str; 2] = ["-n", "24"];

/// A chat whose lines come through a pipe, all at once: its answers and what it said beside them.
fn chat(args: &[&str], lines: &[&str]) -> (Vec<String>, String) {
    let mut bytes = lines.join("\n").into_bytes();
    bytes.push(b'\n');
    chat_bytes(args, &bytes)
}

fn chat_bytes(args: &[&str], bytes: &[u8]) -> (Vec<String>, String) {
    let mut child = command(args)
        .args(SHORT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    (
        text.lines().map(str::to_owned).collect(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn one_shot(args: &[&str]) -> String {
    let start = ["run", "--temp", "0"];
    let args: Vec<&str> = start.iter().chain(&SHORT).chain(args).copied().collect();
    answer(&args).trim_end_matches('\n').to_owned()
}

/// The lines of `/stats` that hold `what`.
fn stats<'a>(stderr: &'a str, what: &str) -> Vec<&'a str> {
    stderr
        .lines()
        .filter(|line| line.starts_with(what))
        .collect()
}

/// Tokens that a question adds behind an answer.
fn new_tokens(question: &str) -> usize {
    let model = load(&repository(TEXT));
    let text = format!("<|end|>\n<|user|>\n{question}<|end|>\n<|assistant|>\n");
    model.tokenize(&text, false, true).unwrap().len()
}

#[test]
fn a_second_turn_goes_on_from_the_cache() {
    let picture = picture();
    let (answers, stderr) = chat(
        &["--image", &picture],
        &[
            WHERE,
            "/stats",
            "How many stars are there?",
            "/stats",
            "/quit",
            "never read",
        ],
    );
    assert_eq!(answers.len(), 2, "{answers:?}");
    assert_eq!(answers[0], one_shot(&["--image", &picture, "-p", WHERE]));
    // The picture was shown in the first turn; only the new text goes in.
    let [first, second] = stats(&stderr, "last answer: ")[..] else {
        panic!("{stderr}")
    };
    assert!(first.contains(" text, 199 vision)"), "{first}");
    let new = new_tokens("How many stars are there?");
    assert!(
        second.contains(&format!("({new} text, 0 vision)")),
        "{second}"
    );
    let [first, second] = stats(&stderr, "cells: ")[..] else {
        panic!("{stderr}")
    };
    assert!(
        first.contains("199 vision)") && second.contains("199 vision)"),
        "{stderr}"
    );

    // What is remembered counts: the same question without the picture has another answer.
    let (blind, _) = chat(&[], &["Hello", WHERE]);
    let (seeing, _) = chat(&["--image", &picture], &["Hello", WHERE]);
    assert_ne!(blind[1], seeing[1]);
}

#[test]
fn clear_forgets() {
    let picture = picture();
    let image = format!("/image {picture}");
    let (answers, stderr) = chat(
        &[],
        &[
            "Hello", "/clear", "/stats", &image, WHERE, "/clear", &image, WHERE,
        ],
    );
    let fresh = one_shot(&["--image", &picture, "-p", WHERE]);
    assert_eq!(answers[1..], [fresh.clone(), fresh]);
    assert!(
        stats(&stderr, "cells: ")[0].contains("cells: 0 live"),
        "{stderr}"
    );
    assert!(stats(&stderr, "last answer: ").is_empty(), "{stderr}");
}

#[test]
fn pictures_with_odd_names() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a picture of it.png");
    std::fs::copy(picture(), &path).unwrap();
    let path = path.to_str().unwrap();
    let fresh = one_shot(&["--image", &picture(), "-p", WHERE]);
    for line in [
        format!("/image {path}"),
        format!("/image  '{path}' "),
        format!("/image \"{path}\""),
        format!("/image {}", path.replace(' ', "\\ ")),
        format!("/image file://{}", path.replace(' ', "%20")),
    ] {
        let (answers, _) = chat(&[], &[&line, WHERE]);
        assert_eq!(answers, [fresh.as_str()], "{line}");
    }
}

/// Phi-3.5-vision's processor numbers the pictures of the whole conversation.
#[test]
fn picture_numbers_count_over_the_conversation() {
    let picture = picture();
    let image = format!("/image {picture}");
    let mut all = Vec::new();
    for second in [
        WHERE.to_owned(),
        "<|image_2|>\n".to_owned() + WHERE,
        "<|image_1|>\n".to_owned() + WHERE,
    ] {
        let first = format!("<|image_1|>\n{WHERE}").replace('\n', " ");
        let second = second.replace('\n', " ");
        let (answers, stderr) = chat(&[], &[&image, &first, &image, &second, "/stats"]);
        assert_eq!(answers.len(), 2, "{stderr}");
        assert!(
            stats(&stderr, "cells: ")[0].contains("398 vision)"),
            "{stderr}"
        );
        all.push(answers);
    }
    assert_eq!(all[1], all[2]);
    let (answers, stderr) = chat(&[], &[&image, "<|image_1|> hi", &image, "<|image_3|> hi"]);
    assert_eq!(answers.len(), 1);
    assert!(
        stderr.contains(
            "names <|image_3|>, but 1 pictures were given with this turn and 1 before it"
        ),
        "{stderr}"
    );
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_chat() {
    let image = format!("\u{feff}/image {}\r", picture());
    let question = format!("{WHERE}\r");
    let (answers, stderr) = chat(&[], &[&image, &question]);
    assert_eq!(
        answers,
        [one_shot(&["--image", &picture(), "-p", WHERE])],
        "{stderr}"
    );
}

#[test]
fn mistakes_do_not_end_a_chat() {
    let long = "what ".repeat(600);
    let (answers, stderr) = chat(
        &["-c", "256"],
        &[
            "/image /no/where.png",
            "/image",
            "/bogus",
            "/help",
            "",
            "<|image_1|>?",
            &long,
            "Hello",
        ],
    );
    assert_eq!(answers, [one_shot(&["-p", "Hello"])]);
    for part in [
        "hae: /no/where.png: No such file",
        "hae: /image: expected the path of a picture",
        "hae: /bogus: unknown command",
        "but 0 pictures were given",
        "but the context holds 256",
    ] {
        assert!(stderr.contains(part), "{part} is not in {stderr}");
    }
    assert!(
        stderr.matches("/clear ").count() >= 2,
        "help twice: {stderr}"
    );

    let (answers, stderr) = chat_bytes(&[], b"caf\xe9\nHello\n");
    assert_eq!(answers, [one_shot(&["-p", "Hello"])]);
    assert!(stderr.contains("is not UTF-8"), "{stderr}");

    let model = repository(TEXT);
    let image = format!("/image {}", picture());
    let (answers, stderr) = chat(&["-m", model.to_str().unwrap()], &[&image, "Hello"]);
    assert_eq!(answers.len(), 1);
    assert!(stderr.contains("start with --mmproj"), "{stderr}");
}

#[test]
fn a_picture_that_did_not_fit_can_be_dropped() {
    let picture = picture();
    let image = format!("/image {picture}");
    // Small enough for text, too small for one picture of 199 tokens more.
    let args = ["-c", "256", "--image", &picture];
    let (answers, stderr) = chat(
        &args,
        &[WHERE, &image, WHERE, "What?", "/drop", "/drop", "What?"],
    );
    assert_eq!(answers.len(), 2, "{answers:?} {stderr}");
    let (without, _) = chat(&args, &[WHERE, "What?"]);
    assert_eq!(answers, without);
    let waits = "hae: 1 picture will be shown with the next question, /drop drops it";
    assert_eq!(stderr.matches(waits).count(), 2, "{stderr}");
    assert!(stderr.contains("\n1 picture dropped\n"), "{stderr}");
    assert!(stderr.contains("/drop: no picture waits"), "{stderr}");
    assert!(stderr.contains("\n/drop "), "the help names it: {stderr}");
    // Any other refusal keeps it as well, and says so.
    let (answers, stderr) = chat(&[], &[&image, "<|image_7|>?", WHERE]);
    assert_eq!(answers, [one_shot(&["--image", &picture, "-p", WHERE])]);
    assert!(stderr.contains(waits), "{stderr}");
}

/// A running program and its pipes.
struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
}

impl Running {
    fn start(args: &[&str]) -> Self {
        let mut child = command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running {
            stdin: child.stdin.take(),
            stdout: child.stdout.take().unwrap(),
            child,
        }
    }

    fn line(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits for the start of an answer.
    fn first_bytes(&mut self) -> Vec<u8> {
        let mut bytes = [0; 4];
        self.stdout.read_exact(&mut bytes).unwrap();
        bytes.to_vec()
    }

    fn rest_of_line(&mut self) {
        let mut byte = [0];
        while byte != [b'\n'] {
            self.stdout.read_exact(&mut byte).unwrap();
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(status.unwrap().success());
    }

    fn end(mut self) -> (String, Output) {
        drop(self.stdin.take());
        let mut text = Vec::new();
        self.stdout.read_to_end(&mut text).unwrap();
        (
            String::from_utf8(text).unwrap(),
            self.child.wait_with_output().unwrap(),
        )
    }
}

/// A line without an end: until the context is full, which takes much longer than a signal.
const ENDLESS: [&str; 4] = ["--grammar", r"root ::= [^~\n] root", "-n", "-1"];

#[test]
fn an_interrupted_run_ends_with_the_text_so_far() {
    let picture = picture();
    let args = ["--image", &picture, "-p", STORY, "-t", "1"];
    let mut run = Running::start(&[&args[..], &ENDLESS].concat());
    let mut text = String::from_utf8(run.first_bytes()).unwrap();
    run.signal("INT");
    let (rest, output) = run.end();
    text.push_str(&rest);
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let part = text.trim_end_matches('\n');
    // A token is a byte at least, so that as many tokens and one more are longer.
    let more = (part.len() + 1).to_string();
    let whole = one_shot(&[&args[..], &ENDLESS[..2], &["-n", &more]].concat());
    assert!(
        whole.starts_with(part) && part.len() < whole.len(),
        "{part}"
    );
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn an_interrupted_answer_keeps_the_chat() {
    let picture = picture();
    let args = ["--image", &picture, "-t", "1"];
    let mut run = Running::start(&[&args[..], &ENDLESS].concat());
    for question in [STORY, WHERE] {
        run.line(question);
        run.first_bytes();
        run.signal("INT");
        run.rest_of_line();
        run.line("/stats");
    }
    let (text, output) = run.end();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text, "");
    // Neither of the two answers came to the only end that it has.
    let ends = ["is full", "cut short"];
    assert!(!ends.iter().any(|end| stderr.contains(end)), "{stderr}");
    // The second question went on behind what there was of the story.
    let second = stats(&stderr, "last answer: ")[1];
    let new = new_tokens(WHERE);
    assert!(
        second.contains(&format!("({new} text, 0 vision)")),
        "{second}"
    );
}

#[test]
fn signals_at_the_prompt() {
    for signals in [&["INT", "INT", "INT"][..], &[]] {
        let mut run = Running::start(&SHORT);
        let mut help = BufReader::new(run.child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("/quit") {
            line.clear();
            assert!(
                help.read_line(&mut line).unwrap() > 0,
                "the help ends with /quit"
            );
        }
        // The line was the last before the prompt.
        std::thread::sleep(Duration::from_millis(300));
        for signal in signals {
            run.signal(signal);
            std::thread::sleep(Duration::from_millis(50));
        }
        run.line("Hello");
        let (text, output) = run.end();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(text.trim_end_matches('\n'), one_shot(&["-p", "Hello"]));
    }
}

#[test]
fn a_request_to_end_leaves_no_temporary_files() {
    let temp = TempDir::new().unwrap();
    let left = || std::fs::read_dir(temp.path()).unwrap().count();
    let picture = picture();
    for (signal, code) in [("TERM", 143), ("HUP", 129)] {
        let mut child = command(&["--image", &picture, "-p", STORY, "-t", "1"])
            .env("TMPDIR", temp.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut byte)
            .unwrap();
        assert_eq!(left(), 2, "the embedded model is in use");
        let pid = child.id().to_string();
        Command::new("kill")
            .args(["-s", signal, &pid])
            .status()
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert_eq!(left(), 0);
    }
}

/// At a terminal: Ctrl-C is a key there, until an answer is written.
#[test]
fn a_chat_at_a_terminal() {
    let picture = picture();
    let mut command = command(&["-t", "1"]);
    command.env("TERM", "xterm");
    let mut chat = rexpect::session::spawn_command(command, Some(120_000)).unwrap();
    chat.exp_string("> ").unwrap();
    // Of the pictures that it was trained on: longer than it takes to stop it, mostly.
    chat.send_line("Hello").unwrap();
    chat.exp_string("Hello").unwrap();
    // Five: the line that says "reading the prompt 0s" has four.
    chat.exp_regex("([A-Za-z0-9.:]+ ){5}").unwrap();
    chat.send_control('c').unwrap();
    chat.exp_string("> ").unwrap();
    for _ in 0..2 {
        chat.send_control('c').unwrap();
        chat.exp_string("> ").unwrap();
    }
    chat.send_line("/stats").unwrap();
    let cells = chat.exp_regex("cells: [0-9]+ live").unwrap().1;
    let cells: usize = cells.split(' ').nth(1).unwrap().parse().unwrap();
    assert!((10..1000).contains(&cells), "it was stopped: {cells}");
    chat.exp_string("> ").unwrap();
    chat.send_line("/clear").unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line(&format!("/image {picture}")).unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line(WHERE).unwrap();
    chat.exp_string(WHERE_ANSWER).unwrap();
    chat.exp_string("> ").unwrap();
    chat.send_line("/quit").unwrap();
    chat.exp_eof().unwrap();
}

/// Lines that come faster than they are read, behind a line that is given up and behind another.
#[test]
fn what_is_typed_ahead_at_a_terminal_is_read() {
    let mut command = command(&["-t", "1"]);
    command.env("TERM", "xterm");
    let mut chat = rexpect::session::spawn_command(command, Some(60_000)).unwrap();
    chat.exp_string("> ").unwrap();
    chat.send("given up\u{3}/first\n/second\n").unwrap();
    chat.flush().unwrap();
    chat.exp_string("/first: unknown command").unwrap();
    chat.exp_string("/second: unknown command").unwrap();
    // What was given up is neither asked nor kept for the arrow keys: up, up and Enter are /first.
    chat.send("\u{1b}[A\u{1b}[A\n").unwrap();
    chat.flush().unwrap();
    chat.exp_string("/first: unknown command").unwrap();
    chat.send_line("/quit").unwrap();
    let rest = chat.exp_eof().unwrap();
    assert!(!rest.contains("unknown command"), "{rest}");
}
