//! `hae eval --chunks`, `--kl-divergence` beside llama.cpp's own `llama-perplexity`, and texts that
//! policies go on with.

use std::fs;
use std::path::Path;

use hae::engine::{Batch, Engine, Input, Observation, Token, likeliest};
use hae::eval::log_probs::Reader;
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::model::{TEXT, engine, exact, load, repository};

const SMALLER: &str = "models/small-phi3v-Q4_K_M.gguf";
const GOLDEN: &str = "tests/golden/perplexity";
/// What llama-perplexity wrote.
const BASE: &str = "tests/golden/perplexity/q8_0.base";

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

fn golden() -> Value {
    let text = fs::read(repository(GOLDEN).join("golden.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    let all = value.as_array().unwrap();
    all.iter().map(|x| x.as_f64().unwrap()).collect()
}

/// What `hae eval` says in JSON; arguments are split at spaces. llama-perplexity's figures are those of a processor, and so
/// are these where there is a GPU as well.
fn eval(args: &str) -> Value {
    let args = format!("eval -t 1 -o json --device none {args}");
    let args: Vec<&str> = args.split(' ').filter(|word| !word.is_empty()).collect();
    serde_json::from_str(&answer(&args)).unwrap()
}

fn of(row: &Value, key: &str) -> f64 {
    let at = key.split('.').fold(row, |value, key| &value[key]);
    at.as_f64().unwrap_or_else(|| panic!("{key} in {row}"))
}

/// Numbers that other processors round otherwise.
fn near(what: &str, found: f64, expected: f64, share: f64, least: f64) {
    let bound = share * expected.abs() + least;
    assert!(
        (found - expected).abs() <= bound,
        "{what}: {found}, expected {expected}"
    );
}

#[test]
fn perplexity_and_divergence_are_llama_perplexitys() {
    let golden = golden();
    let dir = TempDir::new().unwrap();
    let base = dir.path().join("base");
    let (model, text) = (path(TEXT), path(&format!("{GOLDEN}/text.txt")));
    let read = |args: &str| {
        let all = eval(&format!(
            "-m {model} --text {text} --kv-policy full -c 128 {args}"
        ));
        all["summary"][0].clone()
    };
    let row = read(&format!(
        "--batched --chunks -1 --save-all-logits {}",
        base.display()
    ));
    let expected = &golden["c128"];
    let chunks = numbers(&expected["chunks"]);
    assert_eq!(
        (of(&row, "tokens"), numbers(&row["ppl_so_far"]).len()),
        (5.0 * 63.0, 5)
    );
    for (found, expected) in numbers(&row["ppl_so_far"]).into_iter().zip(chunks) {
        near("chunk", found, expected, 0.005, 1e-4);
    }
    let last = numbers(&expected["final"]);
    near("PPL", of(&row, "ppl"), last[0], 0.005, 0.0);
    near("error", of(&row, "ppl_error"), last[1], 0.01, 0.0);
    // Token by token, as an answer is decoded, and fewer chunks.
    let slowly = read("--chunks 2");
    near(
        "token by token",
        of(&slowly, "ppl"),
        numbers(&row["ppl_so_far"])[1],
        0.01,
        0.0,
    );
    assert_eq!((of(&slowly, "cells"), of(&row, "cells")), (127.0, 128.0));

    let all = eval(&format!(
        "-m {} --kl-divergence --kl-divergence-base {} --kv-policy full --batched",
        path(SMALLER),
        base.display()
    ));
    let (row, expected) = (&all["summary"][0], &golden["c128_q4_k_m"]);
    let check = |key: &str, name: &str, scale: f64, share: f64, least: f64| {
        let expected = numbers(&expected[name]);
        match row[key].is_object() {
            true => {
                near(
                    name,
                    scale * of(row, &format!("{key}.value")),
                    expected[0],
                    share,
                    least,
                );
                near(
                    name,
                    scale * of(row, &format!("{key}.error")),
                    expected[1],
                    2.0 * share,
                    least,
                );
            }
            false => near(name, scale * of(row, key), expected[0], share, least),
        }
    };
    // Room for other processors, and for some of these as much as their value: the formulas themselves are held to
    // fixed rows in src/eval/divergence/tests.rs.
    check("ppl", "Mean PPL(Q)", 1.0, 0.01, 0.0);
    check("ppl_base", "Mean PPL(base)", 1.0, 0.005, 0.0);
    check("ppl_ratio", "Mean PPL(Q)/PPL(base)", 1.0, 0.01, 0.0);
    check("ln_ratio", "Mean ln(PPL(Q)/PPL(base))", 1.0, 0.05, 0.006);
    check("ppl_difference", "Mean PPL(Q)-PPL(base)", 1.0, 0.05, 0.02);
    check(
        "correlation",
        "Cor(ln(PPL(Q)), ln(PPL(base)))",
        100.0,
        0.01,
        0.0,
    );
    check("kl", "Mean KLD", 1.0, 0.1, 0.0);
    for (key, name) in [
        ("max", "Maximum"),
        ("p99_9", "99.9%"),
        ("p99", "99.0%"),
        ("p95", "95.0%"),
        ("p90", "90.0%"),
        ("median", "Median"),
        ("p1", "1.0%"),
        ("min", "Minimum"),
    ] {
        let (kl, dp) = (format!("kl_quantiles.{key}"), format!("dp_quantiles.{key}"));
        check(&kl, &format!("{name} KLD"), 1.0, 0.15, 1e-5);
        check(&dp, &format!("{name} Δp"), 100.0, 0.15, 0.3);
    }
    check("dp", "Mean Δp", 100.0, 0.1, 0.1);
    check("dp_rms", "RMS Δp", 100.0, 0.1, 0.0);
    check("top1", "Same top p", 100.0, 0.01, 0.0);
    // The first line is of the first chunk by itself.
    let first = numbers(&expected["chunks"][0]);
    assert_eq!(all["windows"].as_array().unwrap().len(), 5);
    near(
        "first chunk",
        of(&all["windows"][0], "ppl"),
        first[0],
        0.01,
        0.0,
    );
    near("its KLD", of(&all["windows"][0], "kl"), first[4], 0.1, 1e-5);
}

#[test]
fn a_file_of_llama_perplexitys_is_read_and_written_alike() {
    let golden = golden();
    let expected = numbers(&golden["c16"]["final"]);
    let (model, base) = (path(TEXT), path(BASE));
    let all = eval(&format!(
        "-m {model} --kl-divergence --kl-divergence-base {base} -c 0 --kv-policy full,streaming_llm --kv-budget 0.5"
    ));
    let names: Vec<&Value> = (0..2).map(|i| &all["summary"][i]["contender"]).collect();
    assert_eq!(names, ["full", "streaming_llm@0.5"]);
    for row in all["summary"].as_array().unwrap() {
        // What the file says itself, to its last digit.
        near(
            "PPL(base)",
            of(row, "ppl_base.value"),
            expected[0],
            0.0,
            5.1e-5,
        );
        near("error", of(row, "ppl_base.error"), expected[1], 0.0, 5e-5);
        assert_eq!((of(row, "tokens"), of(row, "windows")), (21.0, 3.0));
    }
    let (full, evicting) = (&all["summary"][0], &all["summary"][1]);
    near("full", of(full, "kl.value"), 0.0, 0.0, 2e-3);
    assert_eq!(of(full, "top1.value"), 1.0);
    assert!(of(evicting, "kl.value") > 0.05, "{evicting}");
    assert!(of(evicting, "cells") < 9.0);
    assert_eq!(evicting["policy"], "streaming_llm");
    assert_eq!(evicting["budget"]["share"], 0.5);
    assert_eq!(full["type_k"], "f16");

    // Caches, lookups and the gate.
    let flags =
        "--kv-policy full -ctk q4_0 -ctv q4_0 -fa on --attend-text 2 --attend-recent 2 --limit 2";
    let all = eval(&format!(
        "-m {model} --kl-divergence --kl-divergence-base {base} {flags}"
    ));
    let row = &all["summary"][0];
    assert_eq!(
        (of(row, "windows"), &row["type_v"]),
        (2.0, &Value::from("q4_0"))
    );
    assert_eq!(row["attend"]["text"]["cells"], 2);
    assert!(of(row, "attended") < 0.95 && of(row, "kl.value") > of(full, "kl.value"));
    let gate = format!(
        "eval -t 1 -m {model} --kl-divergence --kl-divergence-base {base} {flags} --max-kl 0.000001"
    );
    let missed = hae().args(gate.split(' ')).output().unwrap();
    assert_eq!(missed.status.code(), Some(1));

    // What is written from the same text is the same file but for rounding.
    let dir = TempDir::new().unwrap();
    let own = dir.path().join("own");
    eval(&format!(
        "-m {model} --text {} -c 16 --chunks 3 --batched --kv-policy full --kl-divergence-base {}",
        path(&format!("{GOLDEN}/text.txt")),
        own.display()
    ));
    let (mut own, mut theirs) = (
        Reader::open(&own).unwrap(),
        Reader::open(Path::new(&base)).unwrap(),
    );
    assert_eq!(own.shape(), theirs.shape());
    for chunk in 0..3 {
        assert_eq!(own.chunk(chunk).unwrap(), theirs.chunk(chunk).unwrap());
        for _ in 0..own.shape().scored() {
            let (own, theirs) = (own.read().unwrap(), theirs.read().unwrap());
            for (own, theirs) in own.iter().zip(theirs.iter()) {
                // Rounding moves what is unlikely most.
                near(
                    "log probability",
                    f64::from(own),
                    f64::from(theirs),
                    0.02,
                    0.05,
                );
            }
        }
    }
}

/// What was measured before an error is printed, and the error says where it came.
#[test]
fn an_error_leaves_what_was_measured() {
    let dir = TempDir::new().unwrap();
    let damaged = dir.path().join("damaged");
    let mut bytes = fs::read(repository(BASE)).unwrap();
    // The scale of the third chunk's first row: 20 bytes, 3 chunks of 16 tokens, 14 rows of 1,024.
    let at = 20 + 4 * 3 * 16 + 14 * (8 + 2 * 1024);
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&damaged, bytes).unwrap();
    let args = format!(
        "eval -t 1 -o json -m {} --kl-divergence --kl-divergence-base {} --kv-policy full,streaming_llm \
         --kv-budget 0.5",
        path(TEXT),
        damaged.display()
    );
    let output = hae().args(args.split_whitespace()).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let windows: Vec<f64> = (0..2).map(|i| of(&all["summary"][i], "windows")).collect();
    assert_eq!(windows, [2.0, 2.0]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains("chunk 3, full: ") && stderr.contains("scale NaN"),
        "{stderr}"
    );
}

/// llama.cpp tokenizes the file's bytes but for one line feed at the end.
#[test]
fn chunks_are_cut_from_the_bytes_of_a_file() {
    let dir = TempDir::new().unwrap();
    let (text, base) = (dir.path().join("text"), dir.path().join("base"));
    let golden = fs::read_to_string(repository(GOLDEN).join("text.txt")).unwrap();
    let written = format!("\u{feff}{}\r\n\n", golden[..400].replace(' ', "\r\n"));
    fs::write(&text, &written).unwrap();
    eval(&format!(
        "-m {} --text {} -c 16 --chunks -1 --batched --kv-policy full --kl-divergence-base {}",
        path(TEXT),
        text.display(),
        base.display()
    ));
    let model = load(&repository(TEXT));
    let tokens = model
        .tokenize(&written[..written.len() - 1], true, false)
        .unwrap();
    let mut reader = Reader::open(&base).unwrap();
    let n_chunks = reader.shape().n_chunks;
    assert_eq!(n_chunks, tokens.len() / 16);
    for (number, chunk) in tokens.chunks_exact(16).enumerate() {
        assert_eq!(reader.chunk(number).unwrap(), chunk);
    }
}

#[test]
fn rows_of_several_runs_say_what_they_ran_under() {
    let (model, text) = (path(TEXT), path(&format!("{GOLDEN}/text.txt")));
    let args = format!(
        "eval -t 1 -m {model} --text {text} --text-prompt 64 --text-predict 8 --limit 2 -o jsonl \
         --kv-policy h2o --kv-budget 0.5 -fa on -ctk q8_0 -ctv q8_0 --reference-type f16"
    );
    let args: Vec<&str> = args.split_whitespace().collect();
    let row: Value = serde_json::from_str(answer(&args).trim()).unwrap();
    assert_eq!(row["model"]["file"], Value::from(model));
    for (key, value) in [("policy", "h2o"), ("type_k", "q8_0"), ("type_v", "q8_0")] {
        assert_eq!(row[key], value, "{row}");
    }
    assert_eq!(row["reference"]["type_v"], "f16");
    assert_eq!(
        (&row["budget"]["share"], &row["prompt"]),
        (&Value::from(0.5), &Value::from(64))
    );
    assert!(row["params"].is_object() && row["attend"].is_null());
    for interval in ["kl_interval", "top1_interval", "ppl_ratio_interval"] {
        assert!(of(&row, &format!("{interval}.low")) <= of(&row, &format!("{interval}.high")));
    }
}

/// The likeliest tokens behind a prompt, one by one.
fn greedy(prompt: &[Token], n: usize) -> Vec<Token> {
    let model = load(&repository(TEXT));
    let mut engine = engine(&model, exact(256));
    let mut tokens: Vec<Token> = prompt.to_vec();
    for i in 0..prompt.len() + n - 1 {
        let batch = Batch {
            seq: 0,
            input: Input::Tokens(&tokens[i..=i]),
            pos: &[i32::try_from(i).unwrap()],
            queries: &[],
            logits: true,
            lookup: None,
        };
        let mut seen = Observation::default();
        engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
        if i + 1 >= prompt.len() {
            tokens.push(likeliest(engine.logits().unwrap()).unwrap());
        }
    }
    tokens.split_off(prompt.len())
}

#[test]
fn policies_go_on_with_a_text() {
    let (model, text) = (path(TEXT), path(&format!("{GOLDEN}/text.txt")));
    let all = eval(&format!(
        "-m {model} --text {text} --text-prompt 96 --text-predict 32 --text-generate 24 --limit 3 -fa off -c 256 \
         -ctk f32 -ctv f32 --kv-policy full,h2o --kv-budget 0.4"
    ));
    let windows = all["windows"].as_array().unwrap();
    let (full, h2o) = (&all["summary"][0], &all["summary"][1]);
    assert_eq!(
        (windows.len(), of(full, "windows"), of(h2o, "windows")),
        (6, 3.0, 3.0)
    );
    assert_eq!((of(full, "equal.hits"), of(full, "kl_max")), (3.0, 0.0));
    assert_eq!(of(full, "same_mean"), of(full, "tokens"));
    assert!(
        of(h2o, "equal.hits") < 3.0 && of(h2o, "kl_mean") > 0.0,
        "{h2o}"
    );
    assert!(of(h2o, "same_mean") < of(full, "same_mean"));
    for pair in windows.chunks(2) {
        let [own, other] = pair else {
            panic!("{pair:?}")
        };
        assert_eq!(own["distance"]["first_differing"], Value::Null);
        // A policy says the same up to where it would have predicted something else.
        match other["distance"]["first_differing"].as_u64() {
            Some(first) => assert_eq!(other["same"], first),
            None => assert_eq!(other["equal"], true),
        }
        assert_eq!(other["equal"], own["text"] == other["text"]);
    }
    // By hand, of the second window.
    let model = load(&repository(TEXT));
    let tokens = model
        .tokenize(&fs::read_to_string(&text).unwrap(), false, false)
        .unwrap();
    let front = model.tokenize("", true, false).unwrap();
    let own = 96 - front.len();
    let prompt = [&front[..], &tokens[own + 32..2 * own + 32]].concat();
    let said = greedy(&prompt, 24);
    let mut bytes = Vec::new();
    let vocabulary: &dyn hae::engine::Vocabulary = &model;
    let end = said.iter().position(|&token| vocabulary.is_eog(token));
    for &token in &said[..end.unwrap_or(24)] {
        vocabulary.piece(token, &mut bytes).unwrap();
    }
    assert_eq!(windows[2]["text"], String::from_utf8(bytes).unwrap());
    assert_eq!(windows[2]["ended"], end.is_some());
    assert_eq!(
        of(&windows[2], "tokens"),
        end.map_or(24.0, |end| end as f64 + 1.0)
    );
}

#[test]
fn what_cannot_be_read_in_chunks_is_refused() {
    let dir = TempDir::new().unwrap();
    let text = path(&format!("{GOLDEN}/text.txt"));
    let cut = dir.path().join("cut");
    fs::write(&cut, &fs::read(repository(BASE)).unwrap()[..4000]).unwrap();
    let other = dir.path().join("other");
    // A vocabulary of two tokens.
    let mut bytes = b"_logits_".to_vec();
    for n in [4i32, 2, 1, 0, 1, 0, 1] {
        bytes.extend(n.to_le_bytes());
    }
    bytes.extend([0; 12]);
    fs::write(&other, bytes).unwrap();
    // Nothing but a length: a chunk of a million tokens.
    let long = dir.path().join("long");
    let mut bytes = b"_logits_".to_vec();
    for n in [1i32 << 20, 1024, 1] {
        bytes.extend(n.to_le_bytes());
    }
    fs::write(&long, bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&long).unwrap();
    file.set_len(20 + 4 * (1 << 20) + ((1 << 19) - 1) * (8 + 2 * 1024))
        .unwrap();
    let (cut, other, base) = (cut.display(), other.display(), path(BASE));
    let long = long.display();
    for (args, reason) in [
        ("--chunks 3".to_owned(), "--text: is missing"),
        (format!("--kl-divergence-base {cut}"), "--text: is missing"),
        (
            format!("--text {text} --chunks 1 -c 3"),
            "-c: 3 tokens of a chunk, expected at least 4",
        ),
        (
            format!("--text {text} --chunks 1 -c 4000"),
            "tokens, a window has 4000",
        ),
        (
            format!("--text {text} --kl-divergence-base {text}"),
            "is the same file as",
        ),
        (
            format!("--kl-divergence --kl-divergence-base {text}"),
            "does not begin with _logits_",
        ),
        (
            format!("--kl-divergence --kl-divergence-base {cut}"),
            "has 4000 bytes for 3 chunks of 16 tokens of 1024, expected 43388",
        ),
        (
            format!("--kl-divergence --kl-divergence-base {other}"),
            "2 tokens of vocabulary, the model has 1024",
        ),
        (
            format!("--kl-divergence --kl-divergence-base {long}"),
            "-c: is missing: chunks have 1048576 tokens, the model was trained on",
        ),
        (
            format!("--text {text} --batched"),
            "--batched: is for chunks, expected --chunks, --kl-divergence-base or --kl-divergence",
        ),
        (
            format!("--kl-divergence --kl-divergence-base {base} -c 8"),
            "-c: 8 cells, a window has 16 tokens",
        ),
        (
            format!("--text {text} --text-prompt 96 --text-generate 64 -c 128"),
            "-c: 128 cells, a window has 160 tokens",
        ),
    ] {
        let all: Vec<&str> = ["eval"].into_iter().chain(args.split(' ')).collect();
        let line = refusal(&all);
        assert!(line.contains(reason), "{args}: {line}");
    }
    for (args, reason) in [
        ("--kl-divergence", "--kl-divergence-base"),
        ("--text a --chunks 0", "expected a number of chunks, or -1"),
        ("--text a --chunks 1 --text-prompt 9", "cannot be used with"),
        (
            "--text a --batched --text-generate 9",
            "cannot be used with",
        ),
        (
            "--text a --kl-divergence --kl-divergence-base b",
            "cannot be used with",
        ),
        ("questions.jsonl --text a", "cannot be used with"),
        ("--text a --num-crops 4", "cannot be used with"),
        ("--text a --chat-template chatml", "cannot be used with"),
        ("--text a --no-conversation", "cannot be used with"),
        (
            "--kl-divergence --kl-divergence-base a --no-conversation",
            "cannot be used with",
        ),
        (
            "questions.jsonl --kl-divergence-base a",
            "cannot be used with",
        ),
    ] {
        let output = hae().arg("eval").args(args.split(' ')).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args}");
        assert!(stderr.contains(reason), "{args}: {stderr}");
    }
}
