//! `--poll`: how threads wait for each other, which changes times and nothing else.

use crate::bin::{answer, hae};
use crate::model::{PICTURE, repository};

fn asked(args: &[&str]) -> String {
    let picture = repository(PICTURE);
    let question = [
        "run",
        "--temp",
        "0",
        "-n",
        "8",
        "-p",
        "Where is the red triangle?",
    ];
    let shown = ["--image", picture.to_str().unwrap(), "--num-crops", "4"];
    answer(&[&question[..], &shown, args].concat())
}

#[test]
fn answers_are_the_same_however_threads_wait() {
    // More threads than tests should have to themselves, and not as many for the prompt: trial
    // runs and what follows share them.
    let pruned = ["--kv-policy", "hae", "-t", "2", "-tb", "3"];
    let expected = asked(&[&pruned[..], &["-t", "1", "-tb", "1"]].concat());
    for level in ["0", "50", "100"] {
        let found = asked(&[&pruned[..], &["--poll", level]].concat());
        assert_eq!(found, expected, "--poll {level}");
    }
}

#[test]
fn levels_go_from_0_to_100() {
    for command in ["run", "demo", "bench", "compare", "eval", "calibrate"] {
        for level in ["101", "-1", "x", ""] {
            let output = hae()
                .args([command, &format!("--poll={level}")])
                .output()
                .unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command} {level}: {stderr}");
            assert!(
                stderr.contains("expected 0 to 100"),
                "{command} {level}: {stderr}"
            );
        }
    }
}

/// GCC's library reads its environment when it is loaded, so that the program has to start itself
/// with what it wants to be read.
#[cfg(all(feature = "openmp", target_os = "linux", target_env = "gnu"))]
mod libgomp {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use hae::llama::Poll;

    use super::hae;

    /// The variables of OpenMP that a chat runs with, once it has this many.
    fn environment(args: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
        let mut chat = Command::new(hae().get_program())
            .arg("run")
            .args(args)
            .env_remove("GOMP_SPINCOUNT")
            .env_remove("OMP_WAIT_POLICY")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let file = format!("/proc/{}/environ", chat.id());
        let start = Instant::now();
        let found = loop {
            let text = String::from_utf8_lossy(&std::fs::read(&file).unwrap()).into_owned();
            let mut found: Vec<String> = (text.split('\0'))
                .filter(|v| v.starts_with("GOMP_") || v.starts_with("OMP_"))
                .map(str::to_owned)
                .collect();
            found.sort();
            // The model is mapped or read by then: whatever was to happen before has happened.
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", chat.id())).unwrap();
            if maps.contains("small-phi3v") || start.elapsed() > Duration::from_secs(100) {
                break found;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        drop(chat.stdin.take());
        assert!(chat.wait().unwrap().success());
        found
    }

    #[test]
    fn the_program_sets_what_its_user_did_not() {
        let spins = |n: u64| format!("GOMP_SPINCOUNT={n}");
        let default = || spins(Poll::DEFAULT.spins());
        assert_eq!(environment(&[], &[]), [default()]);
        assert_eq!(environment(&["--poll", "0"], &[]), [spins(0)]);
        let own = [("GOMP_SPINCOUNT", "7")];
        assert_eq!(environment(&[], &own), [spins(7)]);
        assert_eq!(environment(&["--poll", "50"], &own), [default()]);
        let passive = [("OMP_WAIT_POLICY", "passive")];
        assert_eq!(environment(&[], &passive), ["OMP_WAIT_POLICY=passive"]);
    }

    /// So that benchmarks, which are no `hae`, wait as it does.
    #[test]
    fn benchmarks_wait_as_the_program_does() {
        let runner = include_str!("../../xtask/src/bench/runner.rs");
        let line = format!("const SPINS: &str = \"{}\";", Poll::DEFAULT.spins());
        assert!(runner.lines().any(|l| l == line), "{line}");
        // Whoever runs the tests may have set a value, but there is one.
        assert!(std::env::var_os("GOMP_SPINCOUNT").is_some());
    }
}
