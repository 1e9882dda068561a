//! `hae eval --text`: what it says of a text against probabilities that are summed up here.

use std::fs;

use hae::engine::{Batch, Engine, Input, Observation, Token};
use hae::llama::{CacheType, ContextOptions, Model};
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::model::{TEXT, converted_of, engine, exact, load, repository};

const PROMPT: usize = 96;
const PREDICT: usize = 32;

/// A text in the small model's words, longer than two windows.
fn text() -> String {
    let places = ["Row 1, column 2", "Row 3, column 4", "Row 2, column 2"];
    let line = |i: usize| format!("Where is the red heart? {}. ", places[i % 3]);
    (0..28).map(line).collect()
}

/// The sum of the logarithms of the probabilities of the tokens behind a prompt, one at a time.
fn log_probs(model: &Model, tokens: &[Token]) -> f64 {
    let options = ContextOptions {
        type_k: CacheType::F16,
        type_v: CacheType::F16,
        ..exact(1024)
    };
    let mut engine = engine(model, options);
    let mut sum = 0.0;
    for (pos, pair) in (0..).zip(tokens.windows(2)) {
        let batch = Batch {
            seq: 0,
            input: Input::Tokens(&pair[..1]),
            pos: &[pos],
            queries: &[],
            logits: true,
            lookup: None,
        };
        let mut seen = Observation::default();
        engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
        if pos as usize + 1 < PROMPT {
            continue;
        }
        let logits = engine.logits().unwrap();
        let exp: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        sum += f64::from(logits[pair[1] as usize]) - exp.ln();
    }
    sum
}

#[test]
fn perplexity_is_that_of_the_tokens_themselves() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("text.txt");
    // As some editors write it: the mark is no part of the text.
    fs::write(&file, format!("\u{feff}{}", text())).unwrap();
    // F32: activations beside quantized weights are rounded to eight bits, and where a sum falls decides which.
    let (f32_model, _) = converted_of("small-phi3v", "f32");
    let read = |flags: &str| -> Value {
        let args = format!(
            "eval -m {} --text {} --text-prompt {PROMPT} --text-predict {PREDICT} -t 1 -fa off -c 1024 -o json {flags}",
            f32_model.display(),
            file.display()
        );
        let args: Vec<&str> = args.split_whitespace().collect();
        serde_json::from_str(&answer(&args)).unwrap()
    };

    let all = read("--kv-policy full,h2o,streaming_llm --kv-budget 0.4");
    let rows = all["summary"].as_array().unwrap();
    let names: Vec<&str> = rows
        .iter()
        .map(|r| r["contender"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["full", "h2o@0.4", "streaming_llm@0.4"]);

    let model = load(f32_model);
    let tokens = model.tokenize(&text(), false, false).unwrap();
    let front = model.tokenize("", true, false).unwrap();
    let own = PROMPT - front.len();
    let windows: Vec<Vec<Token>> = tokens
        .chunks_exact(own + PREDICT)
        .map(|window| [&front, window].concat())
        .collect();
    assert!(windows.len() >= 2);
    assert_eq!(all["header"]["windows"], windows.len());
    let n = (windows.len() * PREDICT) as f64;
    let sum: f64 = windows.iter().map(|window| log_probs(&model, window)).sum();
    let expected = (-sum / n).exp();
    let ppl = rows[0]["ppl"].as_f64().unwrap();
    assert!(
        (ppl / expected - 1.0).abs() < 1e-3,
        "{ppl}, expected {expected}"
    );

    let of = |row: &Value, key: &str| row[key].as_f64().unwrap();
    let full = &rows[0];
    assert_eq!((of(full, "kl_max"), of(full, "top1")), (0.0, 1.0));
    assert_eq!(of(full, "ppl_ratio"), 1.0);
    // The last token that is predicted does not go in.
    assert_eq!(of(full, "cells"), (PROMPT + PREDICT - 1) as f64);
    assert!(full["attended"].is_null());
    for row in &rows[1..] {
        assert_eq!(of(row, "tokens"), n);
        assert!(of(row, "kl_mean") > 1e-4, "{row}");
        let ratio = of(row, "ppl") / ppl;
        assert!((ratio - of(row, "ppl_ratio")).abs() < 1e-9);
        assert!(of(row, "cells") < 0.6 * PROMPT as f64);
        assert!(of(row, "kl_median") <= of(row, "kl_p99"));
        assert!(of(row, "kl_p99") <= of(row, "kl_max"));
    }

    // Lookups are measured against a cache that is attended to in full.
    let all = read("--kv-policy full --attend-text 4 --attend-recent 4 --limit 2 -fa on");
    let row = &all["summary"][0];
    assert_eq!(of(row, "windows"), 2.0);
    assert!(of(row, "kl_mean") > 0.0);
    let attended = of(row, "attended");
    assert!(0.5 < attended && attended < 0.95, "{attended}");

    // A quantized cache is none from itself, and some from f16.
    let quantized = "--kv-policy full --limit 2 -fa on -ctk q4_0 -ctv q4_0";
    let all = read(quantized);
    assert_eq!(all["header"]["reference"]["type_k"], "q4_0");
    for (reference, differs) in [("q4_0", false), ("f16", true)] {
        let all = read(&format!("{quantized} --reference-type {reference}"));
        assert_eq!(all["header"]["reference"]["type_k"], reference);
        assert_eq!(all["header"]["reference"]["type_v"], reference);
        assert_eq!(of(&all["summary"][0], "kl_mean") > 0.0, differs);
    }
}

/// Two windows of the same tokens: what draws by lot draws anew for each.
#[test]
fn policies_that_draw_do_so_anew_in_each_window() {
    let line = "Where is the red heart? Row 1, column 2. ";
    let model = load(&repository(TEXT));
    let count = |n: usize| model.tokenize(&line.repeat(n), false, false).unwrap().len();
    let period = count(5) - count(4);
    let front = model.tokenize("", true, false).unwrap().len();
    let own = 6 * period;
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("text.txt");
    fs::write(&file, line.repeat(20)).unwrap();
    let (path, prompt) = (file.display(), own - 16 + front);
    for flags in ["--text-predict 16", "--text-predict 16 --text-generate 16"] {
        let args = format!(
            "eval --text {path} --text-prompt {prompt} {flags} --limit 3 -t 1 -fa off -c 512 -o json \
             --kv-policy streaming_llm,random --kv-budget 0.3"
        );
        let args: Vec<&str> = args.split_whitespace().collect();
        let all: Value = serde_json::from_str(&answer(&args)).unwrap();
        let of = |policy: &str| -> Vec<f64> {
            let windows = all["windows"].as_array().unwrap().iter();
            let own = windows.filter(|w| w["contender"].as_str().unwrap().starts_with(policy));
            own.map(|w| w["distance"]["kl_mean"].as_f64().unwrap())
                .collect()
        };
        let (fixed, drawn) = (of("streaming_llm"), of("random"));
        assert_eq!((fixed.len(), drawn.len()), (3, 3));
        assert_eq!(fixed[1], fixed[2], "{flags}: the windows differ");
        assert_ne!(drawn[1], drawn[2], "{flags}");
    }
}

#[test]
fn texts_that_cannot_be_read_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (short, bytes, long) = (path("short"), path("bytes"), path("long"));
    fs::write(&short, "Where?").unwrap();
    fs::write(&bytes, [0xff, 0xfe, b'a']).unwrap();
    fs::write(&long, text()).unwrap();
    let missing = path("missing");
    for (args, reason) in [
        (vec![&short[..]], "tokens, a window has 1280"),
        (vec![&bytes], "is UTF-16, expected UTF-8"),
        (vec![&missing], "No such file"),
        (vec![&long, "--text-prompt", "128", "-c", "140"], "-c: "),
        (
            vec![
                &long,
                "--text-prompt",
                "96",
                "--text-predict",
                "8",
                "-o",
                "csv",
            ],
            "-o: csv, expected md, json or jsonl with --text",
        ),
    ] {
        let line = refusal(&[&["eval", "--text"], &args[..]].concat());
        assert!(line.contains(reason), "{line}");
    }
    let line = refusal(&["eval"]);
    assert!(line.contains("FILE: is missing"), "{line}");
}

#[test]
fn lists_of_types_and_amounts_give_what_single_runs_give() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("text.txt");
    fs::write(&file, text()).unwrap();
    let args = |flags: &str| -> Vec<String> {
        let args = format!(
            "eval --text {} --text-prompt {PROMPT} --text-predict {PREDICT} --limit 1 -t 1 -c 1024 -o json {flags}",
            file.display()
        );
        args.split_whitespace().map(String::from).collect()
    };
    let read = |flags: &str| -> Vec<Value> {
        let all: Value = serde_json::from_str(&answer(&args(flags))).unwrap();
        all["summary"].as_array().unwrap().clone()
    };
    let lists =
        "--kv-policy full,h2o --kv-budget 0.6 --cache-types f16,q8_0 --attend-texts 0.2,1.0";
    let rows = read(lists);
    let names = rows.iter().map(|row| row["contender"].as_str().unwrap());
    let of = |policy| {
        let types = ["f16", "q8_0"].into_iter();
        types.flat_map(move |t| ["0.2", "1.0"].map(|text| format!("{policy}@{t}@text{text}")))
    };
    let expected: Vec<String> = of("full").chain(of("h2o@0.6")).collect();
    assert_eq!(names.collect::<Vec<_>>(), expected);
    for (row, flags) in [
        (1, "--kv-policy full"),
        (2, "--kv-policy full -ctk q8_0 -ctv q8_0 --attend-text 0.2"),
        (3, "--kv-policy full -ctk q8_0 -ctv q8_0"),
        (
            6,
            "--kv-policy h2o --kv-budget 0.6 -ctk q8_0 -ctv q8_0 --attend-text 0.2",
        ),
    ] {
        let single = &read(&format!("{flags} --reference-type f16"))[0];
        for key in ["ppl", "kl_mean", "type_k", "type_v", "attended", "cells"] {
            assert_eq!(rows[row][key], single[key], "{key}, {flags}");
        }
    }
    assert_ne!(rows[1]["ppl"], rows[3]["ppl"]);

    let mut compare = args(lists);
    compare[0] = "compare".into();
    let all: Value = serde_json::from_str(&answer(&compare)).unwrap();
    assert_eq!(all["summary"].as_array(), Some(&rows));
    compare.extend(["-p".into(), "hi".into()]);
    let with_questions = [&args(lists)[..], &["questions.jsonl".into()]].concat();
    for args in [compare, with_questions] {
        let output = hae().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            stderr.contains("'--text <FILE>' cannot be used with"),
            "{stderr}"
        );
    }

    for (flags, expected) in [
        (
            "--cache-types f16,f16",
            "--cache-types: f16 is in the list twice",
        ),
        (
            "--attend-texts 0.2,0.2",
            "--attend-texts: 0.2 is in the list twice",
        ),
        ("--cache-types f15", "--cache-types"),
        ("--attend-texts 2,,3", "--attend-texts"),
    ] {
        let line = refusal(&args(flags));
        assert!(line.contains(expected), "{line}");
    }
}
