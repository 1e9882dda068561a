//! Runs the built program.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Output};

use assert_cmd::Command;

/// The program, in an environment that no user setting reaches. Its threads go to sleep at once when
/// they wait: tests run beside one another, and what one spins another lacks.
pub fn hae() -> Command {
    let mut command = Command::cargo_bin("hae").unwrap();
    command
        .env("LC_ALL", "C")
        .env_remove("RUST_BACKTRACE")
        .env_remove("RUST_LOG")
        .env("GOMP_SPINCOUNT", "0")
        .env_remove("OMP_WAIT_POLICY");
    command
}

/// Waits until a program that was started with its stdout taken has begun to answer, and gives what it said.
pub fn first_bytes(child: &mut Child) -> [u8; 4] {
    let mut bytes = [0; 4];
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut bytes).unwrap();
    bytes
}

/// Runs it with arguments that have to fail as misuse or bad input: exit code 2, nothing on
/// stdout, and one line on stderr, which is returned.
pub fn refusal<A: AsRef<OsStr>>(args: &[A]) -> String {
    refusal_of(&hae().args(args).output().unwrap())
}

/// The checks of [`refusal`] on what a run left.
pub fn refusal_of(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(!stderr.contains("a bug in hae"), "{stderr}");
    stderr.trim_end().to_owned()
}

/// Runs it with arguments that have to work, and gives stdout.
pub fn answer<A: AsRef<OsStr>>(args: &[A]) -> String {
    let output = hae().args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether the program computes on a GPU: it may have other devices than this process.
pub fn on_gpu() -> bool {
    !answer(&["run", "--list-devices"]).contains("(none)")
}

#[test]
fn the_program_starts() {
    hae().arg("--help").assert().success();
}
