//! Runs the built program.

use assert_cmd::Command;

/// The program, in an environment that no user setting reaches.
pub fn hae() -> Command {
    let mut command = Command::cargo_bin("hae").unwrap();
    command
        .env("LC_ALL", "C")
        .env_remove("RUST_BACKTRACE")
        .env_remove("RUST_LOG");
    command
}

/// Runs it with arguments that have to fail as misuse or bad input: exit code 2, nothing on
/// stdout, and one line on stderr, which is returned.
#[allow(dead_code)]
pub fn refusal(args: &[&str]) -> String {
    let output = hae().args(args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: {stderr}");
    stderr.trim_end().to_owned()
}

#[test]
fn the_program_starts() {
    hae().arg("--help").assert().success();
}
