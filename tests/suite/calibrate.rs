//! `hae calibrate` on the small model. Its scores are held against those of `hae eval` with the same
//! flags, which asks every question in another way.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::model::{TEXT, VISION, repository};

pub fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

/// The command line, split at spaces.
pub fn words(args: &str) -> Vec<String> {
    let word = |word: &str| match word {
        "QUESTIONS" => path("tests/eval/small-phi3v/dev/understanding.jsonl"),
        "CHATS" => path("tests/eval/small-phi3v/dev/chat.jsonl"),
        word => word.to_owned(),
    };
    let words = args.split_whitespace().map(word);
    words.chain(["-t".to_owned(), "1".to_owned()]).collect()
}

/// A copy of the model in a folder, to have something beside it.
pub fn model(folder: &Path) -> PathBuf {
    let model = folder.join("m.gguf");
    fs::copy(repository(TEXT), &model).unwrap();
    model
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

pub fn number(value: &Value, pointer: &str) -> f64 {
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
        "score_layers": "all", "score_queries": "last", "dap_tau": null, "bin_size": 8
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
    consistent(&found, &table);
    assert_eq!(found["kv_budget"], json!({ "share": 0.3 }));
    assert_eq!(found["tune"]["part"], "tune:0.5");
    assert_eq!(found["held_out"]["part"], "test:0.5");

    // What stdout and stderr say of it.
    assert!(table.contains("chosen on 3 questions of "), "{table}");
    assert!(table.contains("| hae@0.3 "), "{table}");
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

/// What is better on the held-out questions was chosen, and the table says so.
fn consistent(found: &Value, table: &str) {
    let held_out = |who: &str| {
        let score = &found["scores"]["held_out"][who];
        (number(score, "/points"), -number(score, "/kl_mean"))
    };
    let better = held_out("found") > held_out("defaults");
    let (chosen, said) = match better {
        true => ("found", "Found and kept"),
        false => ("defaults", "The defaults stay"),
    };
    assert_eq!(found["chosen"], chosen);
    let parameters = match better {
        true => &found["found"],
        false => &found["tried"][0]["parameters"],
    };
    assert_eq!(&found["parameters"], parameters);
    assert!(table.contains(said), "{table}");
}

/// At budgets that leave next to nothing chance decides, and either may come out.
#[test]
fn the_better_one_is_kept() {
    let folder = TempDir::new().unwrap();
    for budget in ["0.15", "0.2"] {
        let out = folder.path().join(budget);
        let args = format!(
            "calibrate QUESTIONS --limit 2 --kv-budget {budget} --out {}",
            out.display()
        );
        let table = answer(&words(&args));
        consistent(&read(&out), &table);
    }
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
