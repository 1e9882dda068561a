//! What `hae run` makes of the file that `hae calibrate` wrote.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::calibrate::{model, path, words};
use crate::model::VISION;

/// A file with parameters that nothing else gives, beside a copy of the model.
pub fn made_up(folder: &Path) -> (PathBuf, Value) {
    let model = model(folder);
    let out = folder.join("any.json");
    let args = format!(
        "calibrate QUESTIONS --limit 1 -n 4 --kv-budget 0.3 -m {} --mmproj {} --out {} -o json",
        model.display(),
        path(VISION),
        out.display()
    );
    let mut file: Value = serde_json::from_str(&answer(&words(&args))).unwrap();
    fs::remove_file(out).unwrap();
    file["parameters"] = json!({
        "score_layers": "1", "score_queries": "all", "dap_tau": 0.5, "bin_size": 24
    });
    fs::write(folder.join("m.hae.json"), file.to_string()).unwrap();
    (model, file)
}

#[test]
fn run_takes_what_no_flag_says() {
    let folder = TempDir::new().unwrap();
    let (model, file) = made_up(folder.path());
    let beside = folder.path().join("m.hae.json");
    let base = format!("run -m {} -p Hello -n 1", model.display());
    // The policy as it was, and stderr.
    let run = |flags: &str| -> (Value, String) {
        let output = hae()
            .args(words(&format!("{base} {flags} -o json")))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{flags}: {output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (
            report["policy"].clone(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let policy = |flags: &str| {
        let (policy, stderr) = run(flags);
        assert_eq!(stderr, "", "{flags}");
        policy
    };
    let tau = json!({ "tau": 0.5 });
    let name = json!(beside);
    // Flags, then layers, queries, rule, budget, size of the bin, and whether the file is named.
    let all = json!([0, 1, 2, 3, 4, 5, 6, 7]);
    // What stays without a rule and a budget, and under a budget alone.
    let spread = json!({ "spread": { "times": 2.0, "least": { "share": 0.25 } } });
    let auto = json!("auto");
    let none = Value::Null;
    let share = |x: f64| json!({ "share": x });
    for (flags, layers, queries, rule, budget, bin, named) in [
        // What is chosen for a budget, and the budget itself, is not taken without it.
        ("", json!([1]), "all", &spread, none.clone(), 8, true),
        (
            "--kv-budget 0.5",
            json!([1]),
            "all",
            &auto,
            share(0.5),
            8,
            true,
        ),
        (
            "--kv-budget 0.3",
            json!([1]),
            "all",
            &tau,
            share(0.3),
            24,
            true,
        ),
        (
            "--kv-budget 0.3 --bin-size 4",
            json!([1]),
            "all",
            &tau,
            share(0.3),
            4,
            true,
        ),
        (
            "--kv-budget 0.3 --dap-keep 9",
            json!([1]),
            "all",
            &json!({ "keep": { "cells": 9 } }),
            share(0.3),
            24,
            true,
        ),
        (
            "--score-layers 0",
            json!([0]),
            "all",
            &spread,
            none.clone(),
            8,
            true,
        ),
        (
            "--score-queries last",
            json!([1]),
            "last",
            &spread,
            none.clone(),
            8,
            true,
        ),
        (
            "--score-layers 0 --score-queries last",
            json!([0]),
            "last",
            &spread,
            none.clone(),
            8,
            false,
        ),
        (
            "--no-calibration",
            all.clone(),
            "last",
            &spread,
            none.clone(),
            8,
            false,
        ),
        (
            "--kv-preset default",
            all.clone(),
            "last",
            &spread,
            none.clone(),
            8,
            false,
        ),
        (
            "--kv-preset paper",
            json!([0]),
            "all",
            &json!({ "r": 0.0015 }),
            share(1.0),
            8,
            false,
        ),
    ] {
        let policy = policy(&format!("--kv-policy hae {flags}"));
        let params = &policy["params"];
        assert_eq!(params["layers"], layers, "{flags}");
        assert_eq!(params["queries"], queries, "{flags}");
        assert_eq!(&params["dap"]["rule"], rule, "{flags}");
        assert_eq!(params["kv_budget"], budget, "{flags}");
        assert_eq!(params["bin_size"], bin, "{flags}");
        let expected = if named { &name } else { &none };
        assert_eq!(&policy["calibration"], expected, "{flags}");
    }
    for other in ["--kv-policy full", "--kv-policy dap", "--kv-policy h2o"] {
        assert!(policy(other)["calibration"].is_null(), "{other}");
    }

    // In text, stderr names it; a chat does so when it is asked.
    let args = words(&format!("{base} --kv-policy hae --score-layers 0"));
    let output = hae().args(args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        stderr,
        format!("{}: --score-queries all\n", beside.display())
    );
    let chat = words(&format!("run -m {} --kv-policy hae", model.display()));
    let output = hae().args(chat).write_stdin("/stats\n").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains(&format!("calibration: {}\n", beside.display())),
        "{stderr}"
    );

    // Of another model: a warning, unless the command line names the file.
    let with = |fingerprint: Option<&str>, sha256: Option<&str>| {
        let mut json = file.clone();
        json["fingerprint"] = json!(fingerprint);
        if let Some(sha256) = sha256 {
            json["model"]["sha256"] = json!(sha256);
        }
        json.to_string()
    };
    let zeros = "0".repeat(64);
    fs::write(&beside, with(Some(&zeros), None)).unwrap();
    let (unused, stderr) = run("--kv-policy hae");
    assert_eq!(unused["params"]["layers"], all);
    assert!(unused["calibration"].is_null());
    let expected = "m.hae.json: was made with another model file, ";
    assert!(
        stderr.contains(expected) && stderr.lines().count() == 1,
        "{stderr}"
    );
    // Files that have no fingerprint yet are known by the whole model's hash.
    fs::write(&beside, with(None, None)).unwrap();
    assert_eq!(policy("--kv-policy hae")["calibration"], name);
    fs::write(&beside, with(None, Some(&zeros))).unwrap();
    assert!(run("--kv-policy hae").1.contains(expected));
    let elsewhere = folder.path().join("e.json");
    fs::rename(&beside, &elsewhere).unwrap();
    let named = format!("--kv-policy hae --calibration {}", elsewhere.display());
    let line = refusal(&words(&format!("{base} {named}")));
    assert!(
        line.contains("e.json: was made with another model file, "),
        "{line}"
    );

    // The right one by its name, for the model inside the program, too: it is the same file.
    fs::write(&elsewhere, file.to_string()).unwrap();
    assert_eq!(policy(&named)["calibration"], json!(elsewhere));
    let embedded = words(&format!("run -p Hello -n 1 -o json {named}"));
    let report: Value = serde_json::from_str(&answer(&embedded)).unwrap();
    assert_eq!(report["policy"]["params"]["layers"], json!([1]));
}

#[test]
fn a_damaged_file_is_named() {
    let folder = TempDir::new().unwrap();
    let (model, file) = made_up(folder.path());
    let beside = folder.path().join("m.hae.json");
    let base = format!("run -m {} -p Hello -n 1 --kv-policy hae", model.display());
    let refuses = |text: &str, expected: &str| {
        fs::write(&beside, text).unwrap();
        let line = refusal(&words(&base));
        assert!(
            line.contains("m.hae.json: ") && line.contains(expected),
            "{expected}: {line}"
        );
        answer(&words(&format!("{base} --no-calibration")));
    };
    let changed = |pointer: &str, value: Value| {
        let mut changed = file.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        changed.to_string()
    };
    let text = file.to_string();
    refuses(&text[..text.len() - 9], "is no calibration of hae: EOF");
    refuses("", "; --no-calibration goes on without it");
    refuses(&" ".repeat(3 << 20), "expected at most 1048576 bytes");
    refuses(
        &changed("/version", json!(9)),
        "is of version 9, expected 1",
    );
    refuses(
        &changed("/parameters/bin_size", json!(0)),
        "--bin-size: 0 cells",
    );
    refuses(&changed("/parameters/dap_tau", json!("x")), "invalid type");
    refuses(
        &changed("/parameters/score_layers", json!("8")),
        "--score-layers: layer 8, but the model's layers are 0 to 7",
    );
}
