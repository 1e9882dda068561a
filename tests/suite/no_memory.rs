//! No memory, at any moment between the start and the answer: one line that says what did not fit
//! and which flags need less, and exit code 2. Never a signal, nor an exception that nobody catches.

use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;

use crate::model::{PICTURE, repository};

const MIB: u64 = 1 << 20;

/// Runs the program with so much address space.
fn within(bytes: u64, args: &[&str]) -> Output {
    Command::new("prlimit")
        .arg(format!("--as={bytes}"))
        .arg(cargo_bin("hae"))
        .args(args)
        .env("LC_ALL", "C")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap()
}

/// The least address space that a run needs, to a MiB.
fn least(args: &[&str]) -> u64 {
    let (mut low, mut high) = (16 * MIB, 4096 * MIB);
    assert!(within(high, args).status.success());
    while high - low > MIB {
        let middle = (low + high) / 2;
        match within(middle, args).status.success() {
            true => high = middle,
            false => low = middle,
        }
    }
    high
}

/// The lines of a run with less and less address space, down to where the model cannot be loaded.
fn lines(args: &[&str]) -> Vec<String> {
    let least = least(args);
    let mut lines = Vec::new();
    for mib in (0..48).map(|i| i * 2 + 1) {
        let output = within(least - mib * MIB, args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            continue;
        }
        assert_eq!(output.status.code(), Some(2), "{mib} MiB: {output:?}");
        assert_eq!(stderr.lines().count(), 1, "{mib} MiB: {stderr}");
        assert!(stderr.contains("memory"), "{mib} MiB: {stderr}");
        lines.push(stderr);
    }
    lines
}

#[test]
fn a_run_without_memory_ends_with_one_line() {
    let picture = repository(PICTURE);
    let picture = picture.to_str().unwrap();
    let fixed = ["run", "-n", "2", "--temp", "0", "-t", "1"];
    let prompt = ["--image", picture, "--num-crops", "16"];
    let lines = lines(&[&fixed[..], &prompt, &["-p", "What?", "-c", "2048"]].concat());
    let said = |line: &String| line.contains("picture") && line.contains("give ");
    assert!(lines.iter().any(said), "{lines:#?}");
}

#[test]
fn a_long_text_without_memory_ends_with_one_line() {
    let text = "the red square is left of the blue circle and ".repeat(130);
    let fixed = ["run", "-n", "2", "--temp", "0", "-t", "1", "-p", &text];
    let lines = lines(&[&fixed[..], &["-c", "4096", "-b", "2048", "-ub", "2048"]].concat());
    let said = |line: &String| line.contains("context") && line.contains("give ");
    assert!(lines.iter().any(said), "{lines:#?}");
}
