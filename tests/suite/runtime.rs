//! What `hae run` and `hae demo` print, and where.

use std::io::Read;
use std::process::Stdio;

use hae::policy;
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::model::{PICTURE, STORY, TEXT, VISION, WHERE_ANSWER, goldens_of, repository};

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

/// `hae run` with these words; DEMO is the picture.
fn words(args: &str) -> Vec<String> {
    let words = args.split_whitespace().map(|word| match word {
        "DEMO" => path(PICTURE),
        _ => word.replace('+', " "),
    });
    ["run".to_owned()].into_iter().chain(words).collect()
}

fn run(args: &str) -> String {
    answer(&words(args))
}

fn json(args: &str) -> Value {
    let text = run(&format!("{args} -o json"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn number(json: &Value, pointer: &str) -> f64 {
    json.pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("{pointer} is no number in {json:#}"))
}

/// Of both modalities.
fn total(json: &Value, what: &str) -> f64 {
    number(json, &format!("/{what}/text")) + number(json, &format!("/{what}/vision"))
}

const QUESTION: &str = "--image DEMO --temp 0 -p Where+is+the+pink+heart?";

#[test]
fn stdout_carries_the_answer_alone() {
    let output = hae().args(words(QUESTION)).output().unwrap();
    assert!(output.status.success());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout.trim(), WHERE_ANSWER);
    assert!(stdout.ends_with('\n'), "{stdout}");
    assert_eq!(stdout.lines().count(), 1);
    assert!(
        output.stderr.is_empty(),
        "{:?}",
        String::from_utf8(output.stderr)
    );
    assert_eq!(
        json(QUESTION)["text"].as_str().unwrap(),
        stdout.trim_end_matches('\n')
    );
}

#[test]
fn verbose_shows_llama_cpps_log_on_stderr() {
    let output = hae()
        .args(words(&format!("{QUESTION} -v")))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), run(QUESTION));
    let stderr = String::from_utf8(output.stderr).unwrap();
    for part in ["llama_model_loader", "phi3", "clip"] {
        assert!(stderr.contains(part), "{part} is not in the log");
    }
}

#[test]
fn json_says_everything_about_a_run() {
    let full = json(QUESTION);
    for pointer in [
        "/tokens/prompt/text",
        "/tokens/prompt/vision",
        "/tokens/generated",
        "/kv/cells/live/text",
        "/kv/cells/live/vision",
        "/kv/cells/peak",
        "/kv/bytes_in_use",
        "/kv/bytes_peak",
        "/kv/bytes_allocated",
        "/timings/vision_encode_ms",
        "/timings/prefill_ms",
        "/timings/ttft_ms",
        "/timings/tpot_ms",
        "/context/n_ctx",
        "/load_ms",
    ] {
        assert!(number(&full, pointer) > 0.0, "{pointer}");
    }
    for pointer in [
        "/kv/cells/binned/text",
        "/kv/cells/binned/vision",
        "/kv/cells/evicted/text",
        "/kv/cells/evicted/vision",
        "/kv/cells/restored/text",
        "/kv/cells/restored/vision",
        "/timings/probe_ms",
    ] {
        assert_eq!(number(&full, pointer), 0.0, "{pointer}");
    }
    // Each number against the others.
    let cells = total(&full, "kv/cells/live");
    assert_eq!(
        cells,
        total(&full, "tokens/prompt") + number(&full, "/tokens/generated")
    );
    assert_eq!(number(&full, "/kv/cells/peak"), cells);
    assert_eq!(
        number(&full, "/kv/bytes_in_use"),
        number(&full, "/kv/bytes_peak")
    );
    let per_cell = number(&full, "/kv/bytes_in_use") / cells;
    assert_eq!(
        number(&full, "/kv/bytes_allocated"),
        per_cell * number(&full, "/kv/n_cells")
    );
    assert_eq!(full["tokens"]["images"], serde_json::json!([199]));
    assert_eq!(full["finish"], "eog");
    assert_eq!(full["policy"]["name"], "full");
    assert_eq!(full["context"]["rope_factors"], "short");
    assert_eq!(full["build"]["llama_cpp_sys_2"], "0.1.161");
    assert_eq!(full["build"]["llama_cpp_2"], "0.1.160");
    assert!(!full["build"]["version"].as_str().unwrap().is_empty());
    // As models/SHA256SUMS has them.
    let sums = std::fs::read_to_string(repository("models/SHA256SUMS")).unwrap();
    for file in ["model", "mmproj"] {
        let hash = full[file]["sha256"].as_str().unwrap();
        assert!(hash.len() == 64 && sums.contains(hash), "{hash}");
    }

    let hae = json(&format!(
        "{QUESTION} --kv-policy hae --kv-budget 60 --bin-size 8 -s 5"
    ));
    assert_eq!(hae["policy"]["name"], "hae");
    assert_eq!(
        hae["policy"]["params"]["kv_budget"],
        serde_json::json!({ "cells": 60 })
    );
    assert_eq!(hae["policy"]["params"]["bin_size"], 8);
    assert_eq!(hae["sampling"]["seed"], 5);
    assert!(total(&hae, "kv/cells/evicted") > 0.0);
    let in_use = total(&hae, "kv/cells/live") + total(&hae, "kv/cells/binned");
    assert!(in_use <= 60.0, "{in_use}");
    assert_eq!(
        in_use + total(&hae, "kv/cells/evicted"),
        total(&hae, "tokens/prompt") + number(&hae, "/tokens/generated")
    );
}

#[test]
fn every_policy_answers_within_its_budget() {
    let full = json(&format!("{QUESTION} -n 20"));
    let prompt = total(&full, "tokens/prompt");
    for name in policy::names().filter(|name| *name != "full") {
        let bin = match name {
            "hae" | "ddes" => "--bin-size 8",
            _ => "",
        };
        let report = json(&format!(
            "{QUESTION} -n 20 --kv-policy {name} --kv-budget 0.5 {bin}"
        ));
        assert_eq!(report["policy"]["name"], name);
        assert_eq!(report["policy"]["params"]["kv_budget"]["share"], 0.5);
        assert_eq!(total(&report, "tokens/prompt"), prompt);
        let peak = number(&report, "/kv/peak_decoding");
        assert!(peak <= (prompt / 2.0).round(), "{name}: {peak}");
        let cells = total(&report, "kv/cells/live") + total(&report, "kv/cells/binned");
        let gone = total(&report, "kv/cells/evicted");
        assert!(
            cells <= peak && gone > 0.3 * prompt,
            "{name}: {cells}, {gone}"
        );
        // With what they look at, all find the answer to an easy question. tova, which may drop the
        // question itself, does not find its end.
        let looks = !["random", "random_visual", "streaming_llm", "context_shift"].contains(&name);
        let text = report["text"].as_str().unwrap().trim();
        assert!(!looks || text.starts_with(WHERE_ANSWER), "{name}: {text}");
    }
    // The layers that fastv reads cost nothing of what it drops, by a trial run of them.
    let early = json(&format!(
        "{QUESTION} -n 20 --kv-policy fastv --kv-budget 0.5 --dap-mode early"
    ));
    assert!(number(&early, "/kv/cells/peak") <= (prompt / 2.0).round());
}

#[test]
fn a_chat_goes_on_where_the_context_shifts() {
    let story = "--image DEMO --temp 0 -p Tell+me+a+story -c 256 -n 200";
    let cut = json(story);
    assert_eq!(cut["finish"], "context");
    let report = json(&format!("{story} --kv-policy context_shift"));
    assert!(report["finish"] != "context");
    assert!(number(&report, "/kv/peak_decoding") <= 255.0);
    assert!(number(&report, "/tokens/generated") > number(&cut, "/tokens/generated"));
}

#[test]
fn seeds_decide() {
    let sampled = "--image DEMO -p Tell+me+a+story --temp 1.5 -n 40";
    let with = |seed: u32| run(&format!("{sampled} -s {seed}"));
    assert_eq!(with(7), with(7));
    let texts: std::collections::HashSet<String> = (0..6).map(with).collect();
    assert!(texts.len() > 1, "{texts:?}");
    assert_eq!(run(QUESTION), run(&format!("{QUESTION} -s 99")));
    // A seed from the clock can be used again.
    let drawn = json(sampled);
    let again = json(&format!("{sampled} -s {}", drawn["sampling"]["seed"]));
    assert_eq!(drawn["text"], again["text"]);
}

#[test]
fn a_prompt_from_a_file_and_the_last_of_several_options() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "Where is the pink heart?\n").unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(
        run(&format!("--image DEMO --temp 0 -f {file}")),
        run(QUESTION)
    );
    assert_eq!(
        run(&format!("{QUESTION} -n 1 --temp 2 -n 99 --temp 0")),
        run(QUESTION)
    );
}

#[test]
fn llama_cpps_spellings() {
    let spelled = "--image DEMO --temp 0 -ngl 0 -fa off -ctk f32 -ctv f32 -ub 64 -tb 1 -t 1 -s 3 -sys Be+brief.";
    let long = "--image DEMO --temp 0 --gpu-layers 0 --flash-attn off --cache-type-k f32 --cache-type-v f32 --ubatch-size 64 --threads-batch 1 --threads 1 --seed 3 --system-prompt Be+brief.";
    let [spelled, long] = [spelled, long].map(|args| json(&format!("{args} -p What?")));
    assert_eq!(spelled["text"], long["text"]);
    for key in ["context", "sampling", "tokens", "kv"] {
        assert_eq!(spelled[key], long[key], "{key}");
    }
    assert_eq!(spelled["context"]["type_k"], "f32");
    assert_eq!(spelled["context"]["flash_attention"], "off");
    // -fa alone is on, also before another option.
    for args in ["-fa -p hi -n 2", "-p hi -n 2 -fa"] {
        assert_eq!(json(args)["context"]["flash_attention"], "on");
    }
    let (model, vision) = (path(TEXT), path(VISION));
    assert_eq!(
        run(&format!("{QUESTION} -m {model} -mm {vision}")),
        run(QUESTION)
    );
}

/// The golden prompt with two pictures: which is which changes the answer.
#[test]
fn several_pictures_among_text() {
    let golden = goldens_of("small-phi3v")
        .into_iter()
        .find(|g| g.pictures.len() == 2)
        .unwrap();
    let names = golden.row["images"].as_array().unwrap();
    let image = |i: usize| {
        path(&format!(
            "tests/golden/small-phi3v/{}",
            names[i].as_str().unwrap()
        ))
    };
    let ask = |prompt: &str, first: usize| {
        let (a, b) = (image(first), image(1 - first));
        let args = [
            "run", "--temp", "0", "-o", "json", "--image", &a, "--image", &b, "-p", prompt,
        ];
        let json: Value = serde_json::from_str(&answer(&args)).unwrap();
        assert_eq!(json["tokens"]["images"].as_array().unwrap().len(), 2);
        json
    };
    let prompt = golden.prompt();
    let question = prompt
        .strip_prefix("<|user|>\n")
        .and_then(|p| p.strip_suffix("<|end|>\n<|assistant|>\n"))
        .unwrap();
    let json = ask(question, 0);
    assert_eq!(
        json["text"].as_str().unwrap().trim(),
        golden.row["greedy_text"].as_str().unwrap()
    );
    // Pictures in the other order, named in the other order: the same prompt.
    let swapped = question
        .replace("<|image_1|>", "<|image_x|>")
        .replace("<|image_2|>", "<|image_1|>")
        .replace("<|image_x|>", "<|image_2|>");
    let again = ask(&swapped, 1);
    assert_eq!(again["text"], json["text"]);
    assert_eq!(again["tokens"], json["tokens"]);
    // Text before, between and after.
    ask("First <|image_2|> then <|image_1|> and now?", 0);
}

#[test]
fn without_a_template_the_prompt_goes_in_as_it_is() {
    let raw = "--image DEMO --temp 0 --no-conversation -p";
    let templated = run(QUESTION);
    let by_hand =
        format!("{raw} <|user|>\n<|image_1|>\nWhere+is+the+pink+heart?<|end|>\n<|assistant|>\n");
    let args: Vec<String> = by_hand
        .split(' ')
        .map(|word| match word {
            "DEMO" => path(PICTURE),
            _ => word.replace('+', " "),
        })
        .collect();
    let args: Vec<String> = ["run".to_owned()].into_iter().chain(args).collect();
    assert_eq!(answer(&args), templated);
}

#[test]
fn a_text_model_alone_answers_and_refuses_pictures() {
    let model = path(TEXT);
    let alone = json(&format!("-m {model} -p Hello --temp 0 -n 8"));
    assert_eq!(alone["mmproj"], Value::Null);
    assert_eq!(alone["tokens"]["prompt"]["vision"], 0);
    assert_eq!(alone["tokens"]["generated"], 8);
    let line = refusal(&words(&format!("-m {model} -p Hello --image DEMO")));
    assert!(line.contains("give one with --mmproj"), "{line}");
}

#[test]
fn a_full_context_ends_the_answer_with_a_warning() {
    let story = STORY.replace(' ', "+");
    let args = format!("-c 256 --image DEMO --temp 0 -p {story} -o json");
    let output = hae().args(words(&args)).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(json["finish"], "context");
    assert!(!json["text"].as_str().unwrap().is_empty());
    assert_eq!(json["kv"]["cells"]["peak"], 256);
    assert!(
        stderr.starts_with("hae: the context is full, the answer is cut short"),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let command = hae();
    let mut child = std::process::Command::new(command.get_program())
        .args(words(
            "--image DEMO -p List+every+object+row+by+row. --temp 0 -n 400",
        ))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_table_for_a_file_is_a_hundred_columns_wide() {
    let output = hae()
        .args(["demo", "-p", "List every object row by row.", "-r", "1"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    for line in stdout.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
    for row in [
        "answer",
        "KV cells",
        "KV bytes",
        "TTFT",
        "TPOT",
        "llama.cpp (full)",
        "HAE",
    ] {
        assert!(stdout.contains(row), "{row} is not in\n{stdout}");
    }
}

#[test]
fn help_fits_a_terminal() {
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["run", "-h"],
        &["help", "run"],
        &["help", "policies"],
        &["eval", "--help"],
        &["help", "bench"],
        &["demo", "--help"],
        &["convert", "--help"],
        &["quantize", "--help"],
    ] {
        let help = answer(args);
        for line in help.lines() {
            assert!(line.chars().count() <= 100, "{args:?}: {line}");
        }
    }
    let help = answer(&["run", "--help"]);
    let at = |part: &str| {
        help.find(part)
            .unwrap_or_else(|| panic!("{part} is not in\n{help}"))
    };
    let order = [
        "\nPrompt:",
        "\nModel:",
        "\nContext:",
        "\nKV cache policy:",
        "\nSampling:",
        "\nOutput:",
    ];
    assert!(order.is_sorted_by_key(|part| at(part)), "{help}");
    assert!(at("--kv-policy") > at("\nKV cache policy:"));
}

/// The flags that a help names, without those in its sentences.
fn flags(help: &str) -> Vec<&str> {
    let named = help.lines().filter_map(|line| {
        let line = line.trim_start();
        let line = match line.split_once(", --") {
            Some((short, _)) if short.len() == 2 => &line[4..],
            _ => line,
        };
        line.split(' ').next().filter(|flag| flag.starts_with("--"))
    });
    named.collect()
}

/// Short help is for people, one line a flag on a narrow terminal; the rest is one command away.
#[test]
fn help_comes_in_two_sizes() {
    let wide = |args: &[&str], columns: &str| {
        let output = hae().args(args).env("COLUMNS", columns).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let short = wide(&["run", "--help"], "80");
    assert_eq!(short, wide(&["run", "-h"], "80"));
    let shown = flags(&short);
    assert!((20..=30).contains(&shown.len()), "{shown:?}");
    // Beside the flags: what it does, how it is called, six headings and where the rest is.
    let lines = short.lines().filter(|line| !line.is_empty()).count();
    assert_eq!(lines, shown.len() + 2 + 6 + 1, "a line breaks:\n{short}");
    assert!(short.lines().all(|line| line.len() <= 80), "{short}");
    let last = short.lines().last().unwrap();
    assert!(
        last.contains("hae help run") && last.contains("hae help policies"),
        "{last}"
    );

    let long = wide(&["help", "run"], "80");
    let all = flags(&long);
    assert!(all.len() > 60, "{all:?}");
    assert!(shown.iter().all(|flag| all.contains(flag)), "{long}");

    // Every flag is in the short help, or in that of the policies, or about something else.
    let policies = wide(&["help", "policies"], "80");
    assert_eq!(policies, wide(&["policies"], "80"));
    let tuning = flags(&policies);
    for flag in [
        "--dap-tau",
        "--score-layers",
        "--bin-size",
        "--snapkv-kernel",
        "--calibration",
    ] {
        assert!(tuning.contains(&flag) && !shown.contains(&flag), "{flag}");
    }
    for flag in ["--model", "--temp", "--ubatch-size"] {
        assert!(!tuning.contains(&flag) && all.contains(&flag), "{flag}");
    }
    for name in policy::names() {
        assert!(policies.contains(&format!("\n  {name} ")), "{name}");
    }
    assert!(policies.contains("[default: 8]"));

    // What is hidden works.
    for command in ["eval", "compare", "calibrate", "bench", "demo", "replay"] {
        let short = wide(&[command, "--help"], "80");
        assert!(short.contains(&format!("hae help {command}")), "{short}");
        assert!(!short.contains("--dap-tau"), "{short}");
    }
}
