//! `hae calibrate` on the small model, and what `hae run` makes of the file. Its scores are held
//! against those of `hae eval` with the same flags, which asks every question in another way.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::model::{TEXT, VISION, repository};

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

/// The command line, split at spaces.
fn words(args: &str) -> Vec<String> {
    let word = |word: &str| match word {
        "QUESTIONS" => path("tests/eval/small-phi3v/dev/understanding.jsonl"),
        "CHATS" => path("tests/eval/small-phi3v/dev/chat.jsonl"),
        word => word.to_owned(),
    };
    let words = args.split_whitespace().map(word);
    words.chain(["-t".to_owned(), "1".to_owned()]).collect()
}

/// A copy of the model in a folder, to have something beside it.
fn model(folder: &Path) -> PathBuf {
    let model = folder.join("m.gguf");
    fs::copy(repository(TEXT), &model).unwrap();
    model
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("{pointer} of {value}"))
}

/// The flags of a file's parameters.
fn flags(parameters: &Value) -> String {
    let text = |name: &str| parameters[name].as_str().unwrap();
    let (layers, queries) = (text("score_layers"), text("score_queries"));
    let tau = match &parameters["dap_tau"] {
        Value::Null => String::new(),
        tau => format!("--dap-tau {tau}"),
    };
    let bin = &parameters["bin_size"];
    format!("--score-layers {layers} --score-queries {queries} {tau} --bin-size {bin}")
}

/// That a score is what `hae eval` gives this setting.
fn as_eval(score: &Value, set: &str, parameters: &Value) {
    let args = format!(
        "eval {set} --kv-policy hae --kv-budget 0.3 {} --distance -o json",
        flags(parameters)
    );
    let printed: Value = serde_json::from_str(&answer(&words(&args))).unwrap();
    let row = &printed["summary"]["rows"][0];
    assert_eq!(row["task"], "all");
    assert_eq!(score["right"], row["right"], "{args}");
    assert_eq!(score["asked"], row["scored"], "{args}");
    assert_eq!(score["predictions"], row["predictions"], "{args}");
    let (kl, expected) = (number(score, "/kl_mean"), number(row, "/kl_mean"));
    assert!(
        (kl - expected).abs() <= 1e-9 * (1.0 + expected),
        "{args}: {kl}"
    );
}

fn points(tried: &Value) -> (f64, f64) {
    (
        number(tried, "/score/points"),
        number(tried, "/score/kl_mean"),
    )
}

#[test]
fn a_model_is_calibrated() {
    let folder = TempDir::new().unwrap();
    let model = model(folder.path());
    let vision = path(VISION);
    let asked = format!("-m {} --mmproj {vision}", model.display());
    let args = format!("calibrate QUESTIONS --limit 3 --kv-budget 0.3 {asked}");
    let output = hae().args(words(&args)).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    let file = folder.path().join("m.hae.json");
    let found = read(&file);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);

    // The defaults first, then what the grid says of a model with 8 layers.
    let tried = found["tried"].as_array().unwrap();
    let of = |stage: &str| -> Vec<&Value> {
        let own = tried.iter().filter(|t| t["stage"] == stage);
        own.map(|t| &t["parameters"]).collect()
    };
    let defaults = json!({
        "score_layers": "all", "score_queries": "last", "dap_tau": null, "bin_size": 32
    });
    assert_eq!(of("defaults"), [&defaults]);
    assert_eq!(tried[0]["parameters"], defaults);
    let layers: Vec<&Value> = of("score layers")
        .iter()
        .map(|p| &p["score_layers"])
        .collect();
    assert_eq!(layers, ["0", "1", "2", "4", "6", "7", "4-7", "2-4"]);
    assert_eq!(of("score queries").len(), 1);
    assert_eq!(of("tau").len(), 3);
    assert_eq!(of("bin size").len(), 3);
    // No other setting has more points, nor as many at a smaller distance.
    let best = tried.iter().find(|t| t["parameters"] == found["found"]);
    let best = best.unwrap();
    for t in tried {
        let (new, old) = (points(t), points(best));
        assert!(
            new.0 < old.0 || new.0 == old.0 && new.1 >= old.1,
            "{t} and {best}"
        );
    }
    assert_eq!(best["score"], found["scores"]["tune"]["found"]);

    // Every score once more by `hae eval`: of the search, and of the check.
    let tune = format!("QUESTIONS --limit 3 --part tune {asked}");
    let test = format!("QUESTIONS --limit 3 --part test {asked}");
    let scores = &found["scores"];
    for t in [&tried[0], &tried[1], &tried[9], tried.last().unwrap()] {
        as_eval(&t["score"], &tune, &t["parameters"]);
    }
    as_eval(&scores["held_out"]["defaults"], &test, &defaults);
    as_eval(&scores["held_out"]["found"], &test, &found["found"]);
    assert_eq!(scores["tune"]["full"]["right"], 3);
    assert_eq!(scores["held_out"]["full"]["right"], 3);
    let held_out = |who: &str| {
        let score = &scores["held_out"][who];
        (number(score, "/points"), -number(score, "/kl_mean"))
    };
    let better = held_out("found") > held_out("defaults");
    let (chosen, parameters) = match better {
        true => ("found", &found["found"]),
        false => ("defaults", &defaults),
    };
    assert_eq!(found["chosen"], chosen);
    assert_eq!(&found["parameters"], parameters);
    assert_eq!(found["kv_budget"], json!({ "share": 0.3 }));
    assert_eq!(found["tune"]["part"], "tune:0.5");
    assert_eq!(found["held_out"]["part"], "test:0.5");

    // What stdout and stderr say of it.
    assert!(table.contains("chosen on 3 questions of "), "{table}");
    assert!(table.contains("| hae@0.3 "), "{table}");
    let said = if better {
        "Found and kept"
    } else {
        "The defaults stay"
    };
    assert!(table.contains(said), "{table}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with(&format!("{}: --score-layers ", file.display())),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let run = format!("run {asked} --kv-policy hae -p Hello -n 1 -o json");
    let run: Value = serde_json::from_str(&answer(&words(&run))).unwrap();
    assert_eq!(run["policy"]["calibration"], file.to_str().unwrap());
}

/// Every turn of a chat counts, and what a chat has evicted is not counted turn by turn.
#[test]
fn chats_are_scored_as_eval_scores_them() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("c.json");
    let args = format!(
        "calibrate CHATS --limit 1 --kv-budget 0.3 --out {} -o json",
        out.display()
    );
    let printed: Value = serde_json::from_str(&answer(&words(&args))).unwrap();
    assert_eq!(printed, read(&out));
    let tried = printed["tried"].as_array().unwrap();
    for t in [&tried[0], tried.last().unwrap()] {
        as_eval(&t["score"], "CHATS --limit 1 --part tune", &t["parameters"]);
    }
    let scores = &printed["scores"];
    assert_eq!(scores["tune"]["full"]["asked"], 8);
    // The counts of the last turn are those of the whole chat.
    let results = folder.path().join("r.jsonl");
    let args = format!(
        "eval CHATS --limit 1 --part test --kv-policy hae --kv-budget 0.3 --out {}",
        results.display()
    );
    answer(&words(&args));
    let text = fs::read_to_string(results).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["turn"], 7);
    let after_prefill = number(&last, "/evicted/after_prefill");
    let in_decoding = number(&last, "/evicted/in_decoding");
    let defaults = &scores["held_out"]["defaults"];
    assert_eq!(number(defaults, "/evicted"), after_prefill + in_decoding);
    assert_eq!(number(defaults, "/evicted_in_decoding"), in_decoding);
}

/// A file with parameters that nothing else gives, beside a copy of the model.
fn made_up(folder: &Path) -> (PathBuf, Value) {
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
        "score_layers": "1", "score_queries": "all", "dap_tau": 0.5, "bin_size": 8
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
    let auto = json!("auto");
    let none = Value::Null;
    let share = |x: f64| json!({ "share": x });
    for (flags, layers, queries, rule, budget, bin, named) in [
        // What is chosen for a budget, and the budget itself, is not taken without it.
        ("", json!([1]), "all", &auto, none.clone(), 32, true),
        (
            "--kv-budget 0.5",
            json!([1]),
            "all",
            &auto,
            share(0.5),
            32,
            true,
        ),
        (
            "--kv-budget 0.3",
            json!([1]),
            "all",
            &tau,
            share(0.3),
            8,
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
            8,
            true,
        ),
        (
            "--score-layers 0",
            json!([0]),
            "all",
            &auto,
            none.clone(),
            32,
            true,
        ),
        (
            "--score-queries last",
            json!([1]),
            "last",
            &auto,
            none.clone(),
            32,
            true,
        ),
        (
            "--score-layers 0 --score-queries last",
            json!([0]),
            "last",
            &auto,
            none.clone(),
            32,
            false,
        ),
        (
            "--no-calibration",
            all.clone(),
            "last",
            &auto,
            none.clone(),
            32,
            false,
        ),
        (
            "--kv-preset default",
            all.clone(),
            "last",
            &auto,
            none.clone(),
            32,
            false,
        ),
        (
            "--kv-preset paper",
            json!([0]),
            "all",
            &json!({ "r": 0.0015 }),
            share(1.0),
            32,
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
    let mut other = file.clone();
    other["model"]["sha256"] = json!("0".repeat(64));
    fs::write(&beside, other.to_string()).unwrap();
    let (unused, stderr) = run("--kv-policy hae");
    assert_eq!(unused["params"]["layers"], all);
    assert!(unused["calibration"].is_null());
    let expected = "m.hae.json: was made with another model file, ";
    assert!(
        stderr.contains(expected) && stderr.lines().count() == 1,
        "{stderr}"
    );
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

#[test]
fn bad_input_is_named() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("c.json");
    let refuses = |args: &str, expected: &str| {
        let line = refusal(&words(args));
        assert!(
            line.starts_with("hae: ") && line.contains(expected),
            "{args}: expected \"{expected}\" in: {line}"
        );
        assert!(!out.exists());
        // Nor a part of it.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{args}");
    };
    let to = format!("--out {}", out.display());
    refuses(
        "calibrate QUESTIONS --limit 1",
        "--out: the embedded model has no place beside it",
    );
    refuses(
        &format!("calibrate none.jsonl {to}"),
        "none.jsonl: No such file",
    );
    for (flags, expected) in [
        (
            "--kv-budget 1.0",
            "--kv-budget: a share of 1, expected more than 0, below 1",
        ),
        (
            "--kv-budget 0.0",
            "--kv-budget: a share of 0, expected more",
        ),
        ("--kv-budget 3", "--kv-budget: 3 cells, expected at least"),
        (
            "--kv-budget 99999",
            "--kv-budget: 99999 cells, but the context holds 4096",
        ),
        (
            "--kv-budget 4000",
            "--kv-budget: nothing is evicted on these questions",
        ),
        ("--tune 0", "--tune: 0, expected a share between 0 and 1"),
        ("--tune 1.5", "--tune: 1.5, expected a share"),
        (
            "--tune 0.0001",
            "--tune: 0.0001 leaves none of 657 questions to choose on",
        ),
        (
            "--tune 0.9999",
            "--tune: 0.9999 leaves none of 657 questions to check on",
        ),
        ("--num-crops 0", "--num-crops: 0, expected 1 to 64"),
        ("-n 0", "-n: 0 tokens"),
        ("-m none.gguf", "none.gguf: "),
    ] {
        refuses(
            &format!("calibrate QUESTIONS --limit 1 {to} {flags}"),
            expected,
        );
    }
    let nowhere = folder.path().join("none/c.json");
    refuses(
        &format!("calibrate QUESTIONS --limit 1 --out {}", nowhere.display()),
        "none does not exist",
    );
    // Found before the search, not after it, and what has the name stays.
    let other = TempDir::new().unwrap();
    let model = model(other.path());
    refuses(
        &format!("calibrate QUESTIONS --out {}", model.display()),
        "m.gguf: is there and no calibration of hae, expected a new name",
    );
    assert_eq!(
        fs::read(model).unwrap(),
        fs::read(repository(TEXT)).unwrap()
    );
}

/// A limit on the size of files, of 512 bytes each, stands in for a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let args = words(&format!(
        "calibrate QUESTIONS -m {} --mmproj {} --limit 1 -n 4 --out {}",
        path(TEXT),
        path(VISION),
        folder.path().join("c.json").display()
    ));
    let output = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$0\" \"$@\""])
        .arg(assert_cmd::cargo::cargo_bin("hae"))
        .args(&args)
        .output()
        .unwrap();
    let line = crate::bin::refusal_of(&output);
    assert!(line.contains("c.json: File too large"), "{line}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing() {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let folder = TempDir::new().unwrap();
    let out = folder.path().join("c.json");
    let child = Command::new(assert_cmd::cargo::cargo_bin("hae"))
        .args(words(&format!(
            "calibrate QUESTIONS --out {}",
            out.display()
        )))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    // The file that is to become the calibration; then the model is loaded.
    while fs::read_dir(folder.path()).unwrap().count() == 0 {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(3));
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(output.stdout.is_empty());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr, "interrupted, nothing was written\n");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
