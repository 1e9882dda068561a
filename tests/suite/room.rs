//! What of a prompt finds room in the cache, as the program decides it: budgets where no length
//! was asked for, and prompts that fit once they are pruned.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::bin::{answer, hae, refusal};
use crate::model::{PICTURE, WHERE, WHERE_ANSWER, repository};

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

fn report(args: &[&str]) -> Value {
    let start = ["run", "-o", "json", "--temp", "0"];
    let args: Vec<&str> = start.iter().chain(args).copied().collect();
    serde_json::from_str(&answer(&args)).unwrap()
}

/// The answers of a chat, and what it said beside them.
fn chat(args: &[&str], lines: &[&str]) -> (Vec<String>, String) {
    let mut child = Command::new(hae().get_program())
        .args(["run", "--temp", "0"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let text = lines.join("\n") + "\n";
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (
        stdout.lines().map(|line| line.trim().to_owned()).collect(),
        stderr,
    )
}

/// How far the short rope factors reach is no answer's length.
#[test]
fn a_budget_without_a_length_leaves_room_for_none() {
    let picture = path(PICTURE);
    for policy in ["snapkv", "dap", "fastv", "mustdrop"] {
        let flags = [
            "--image",
            &picture,
            "--kv-policy",
            policy,
            "--kv-budget",
            "0.3",
        ];
        let ask = |factors: &str| {
            let mut args = flags.to_vec();
            args.extend(["-p", WHERE, "--rope-factors", factors]);
            report(&args)
        };
        let (auto, long) = (ask("auto"), ask("long"));
        assert_eq!(auto["context"]["rope_factors"], "short");
        assert_eq!(long["context"]["rope_factors"], "long");
        let evicted = |report: &Value| report["evicted"]["after_prefill"].as_u64().unwrap();
        assert_eq!(evicted(&auto), evicted(&long), "{policy}");
        let prompt = &auto["tokens"]["prompt"];
        let rows = prompt["text"].as_u64().unwrap() + prompt["vision"].as_u64().unwrap();
        let left = rows - evicted(&auto);
        assert_eq!(left, (0.3 * rows as f64).round() as u64, "{policy}");
        assert_eq!(
            auto["text"].as_str().unwrap().trim(),
            WHERE_ANSWER,
            "{policy}"
        );

        let (answers, stderr) = chat(&flags, &[WHERE, "/stats"]);
        assert_eq!(answers, [WHERE_ANSWER]);
        let evicted = format!(" {} evicted", evicted(&auto));
        assert!(stderr.contains(&evicted), "{policy}: {stderr}");
    }
}

#[test]
fn a_prompt_that_fits_once_it_is_pruned_is_taken() {
    let picture = path("models/demo.png");
    let ask = [
        "--image",
        &picture,
        "--num-crops",
        "16",
        "-p",
        "Where is the red triangle?",
    ];
    let few = ["-c", "512", "--dap-keep", "64", "--score-layers", "0-3"];
    for mode in ["early", "midway"] {
        for policy in ["hae", "fastv", "mustdrop", "dap"] {
            let how = ["--kv-policy", policy, "--dap-mode", mode, "-n", "12"];
            let report = report(&[&ask[..], &few, &how].concat());
            let cells = &report["kv"]["cells"];
            assert_eq!(cells["live"]["vision"], 64, "{policy} {mode}");
            assert!(cells["peak"].as_u64().unwrap() < 100, "{policy} {mode}");
        }
    }
    // What does not fit even so says what of it was too much.
    let refused = |more: &[&str]| refusal(&[&["run"][..], &ask[..], &few, more].concat());
    let all = "prompt needs 657 cells but the context holds 512";
    assert!(refused(&["--kv-policy", "hae"]).contains(all));
    let most = [
        "--kv-policy",
        "hae",
        "--dap-mode",
        "early",
        "--dap-keep",
        "600",
    ];
    let few = ["-c", "512", "--score-layers", "0-3"];
    let refused = refusal(&[&["run"][..], &ask[..], &few, &most].concat());
    assert!(
        refused.contains("prompt needs 614 cells but the context holds 512"),
        "{refused}"
    );
    // Text alone that does not fit is refused before a picture is encoded.
    let long = "a ".repeat(600);
    let ask = ["run", "--image", &picture, "--num-crops", "16", "-p", &long];
    let refused = refusal(
        &[
            &ask[..],
            &few,
            &["--kv-policy", "hae", "--dap-mode", "early"],
        ]
        .concat(),
    );
    assert!(
        refused.contains("cells but the context holds 512"),
        "{refused}"
    );
}

#[test]
fn later_turns_fit_once_they_are_pruned() {
    let picture = path(PICTURE);
    let show = format!("/image {picture}");
    for mode in ["early", "midway"] {
        let flags = [
            "--num-crops",
            "4",
            "-c",
            "512",
            "-n",
            "16",
            "--kv-policy",
            "hae",
        ];
        let how = [
            "--dap-keep",
            "64",
            "--score-layers",
            "0-3",
            "--dap-mode",
            mode,
        ];
        let turns: Vec<&str> = std::iter::repeat_n([show.as_str(), WHERE], 5)
            .flatten()
            .collect();
        let (answers, stderr) = chat(&[&flags[..], &how].concat(), &turns);
        assert_eq!(answers.len(), 5, "{mode}: {answers:?} {stderr}");
        assert!(!stderr.contains("prompt needs"), "{mode}: {stderr}");
    }
}
