//! `hae inspect` and `hae tokenize` say what is there, whatever it is.

use std::path::{Path, PathBuf};

use hae::calibrate::file::Calibration;
use hae::eval::results::Results;
use hae::llama::gguf::{Gguf, Value as Meta};
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal, refusal_of};
use crate::model::{PICTURE, TEXT, VISION, repository};
use crate::remake::Remake;

fn json(path: &Path) -> Value {
    let text = answer(&["inspect", "--json", path.to_str().unwrap()]);
    serde_json::from_str(&text).unwrap()
}

fn text(path: &Path) -> String {
    answer(&["inspect", path.to_str().unwrap()])
}

/// What a token takes is what the cache of a run takes for it.
#[test]
fn a_text_model_and_the_bytes_of_its_tokens() {
    let path = repository(TEXT);
    let found = json(&path);
    assert_eq!(found["kind"], "text_model");
    assert_eq!(found["bytes"], std::fs::metadata(&path).unwrap().len());
    for (name, value) in [
        ("blocks", 8),
        ("heads", 4),
        ("vocabulary", 1024),
        ("context", 131_072),
    ] {
        assert_eq!(found["facts"][name], value, "{name}");
    }
    let kv = found["kv"].as_array().unwrap();
    assert_eq!(kv.len(), 3);
    for (of, kind) in kv.iter().zip(["f16", "q8_0", "q4_0"]) {
        assert_eq!(of["type"], kind);
        assert_eq!(of["bytes_beside"], 0);
        let args =
            format!("run -p hi -n 1 --temp 0 -t 1 -c 256 -o json -ctk {kind} -ctv {kind} -m");
        let args: Vec<&str> = args.split(' ').chain(path.to_str()).collect();
        let run: Value = serde_json::from_str(&answer(&args)).unwrap();
        assert_eq!(of["bytes_per_token"], run["kv"]["bytes_per_cell"], "{kind}");
    }
    let gguf = Gguf::open(&path).unwrap();
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), gguf.tensors().len());
    for (shown, own) in tensors.iter().zip(gguf.tensors()) {
        assert_eq!(shown["name"], *own.name);
        assert_eq!(shown["type"], own.kind.name());
        assert_eq!(shown["shape"], serde_json::json!(own.dims));
        assert_eq!(shown["bytes"], own.bytes);
    }
    let of_types = found["types"].as_array().unwrap().iter();
    let sum: u64 = of_types.map(|of| of["bytes"].as_u64().unwrap()).sum();
    assert_eq!(sum, gguf.tensors().iter().map(|t| t.bytes).sum::<u64>());
    let keys = found["metadata"].as_array().unwrap();
    assert!(
        keys.iter()
            .map(|one| &one["key"])
            .eq(gguf.keys().iter().map(|key| key.as_str()))
    );
    let tokens = keys
        .iter()
        .find(|one| one["key"] == "tokenizer.ggml.tokens")
        .unwrap();
    assert_eq!(
        (&tokens["len"], &tokens["type"]),
        (&1024.into(), &"str".into())
    );
    assert_eq!(tokens["value"].as_array().unwrap().len(), 32);
    let shown = text(&path);
    for line in [
        "architecture: phi3",
        "| q8_0    |  4352 |",
        "str[1024] | [<unk>, <s>, </s>, <0x00>, …]",
    ] {
        assert!(shown.contains(line), "{line}:\n{shown}");
    }
}

#[test]
fn the_other_kinds() {
    let found = json(&repository(VISION));
    assert_eq!(found["kind"], "vision_file");
    assert_eq!(found["facts"]["projector"], "phi3v");
    assert_eq!(found["facts"]["patches of a picture"], 144);
    assert!(found["kv"].as_array().unwrap().is_empty());

    let found = json(&repository("models/small-phi3v/model.safetensors"));
    assert_eq!(found["kind"], "safetensors");
    assert_eq!(found["tensors"][0]["name"], "lm_head.weight");
    assert_eq!(found["tensors"][0]["shape"], serde_json::json!([1024, 256]));

    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let [session, trace] = ["s", "t"].map(at);
    let words = "run -p hi -n 2 --temp 0 -t 1 -c 512 --image"
        .split(' ')
        .map(PathBuf::from);
    let rest = [
        repository(PICTURE),
        "--session".into(),
        session.clone(),
        "--trace".into(),
        trace.clone(),
    ];
    answer(&words.chain(rest).collect::<Vec<_>>());
    let found = json(&session);
    assert_eq!(
        (&found["kind"], &found["facts"]["pictures"]),
        (&"session".into(), &1.into())
    );
    let found = json(&trace);
    assert_eq!(found["kind"], "trace");
    assert_eq!(found["facts"]["policy"], "full");
    assert_eq!(found["facts"]["came to its end"], true);
    // One that was cut short says so.
    let bytes = std::fs::read(&trace).unwrap();
    std::fs::write(&trace, &bytes[..bytes.len() - 7]).unwrap();
    assert_eq!(json(&trace)["facts"]["came to its end"], false);

    let (model, _) = crate::calibration::made_up(dir.path());
    let calibration = Calibration::beside(&model);
    let found = json(&calibration);
    assert_eq!(found["kind"], "calibration");
    let own = Calibration::read(&calibration).unwrap();
    assert_eq!(found["facts"]["model"], own.model.file);

    let results = at("r.jsonl");
    let header = crate::eval_files::header(&[("full", None), ("hae", Some(0.5))]);
    let (mut file, _) = Results::open(&results, &header).unwrap();
    file.add(&crate::eval_files::answer(1, "full", None, true))
        .unwrap();
    let found = json(&results);
    assert_eq!(found["kind"], "results");
    assert_eq!(
        (&found["facts"]["contenders"], &found["facts"]["answers"]),
        (&2.into(), &1.into())
    );

    for (name, bytes) in [
        ("none", &b"hello"[..]),
        ("empty", b""),
        ("m.safetensors", b"\x05"),
    ] {
        std::fs::write(at(name), bytes).unwrap();
        let line = refusal(&["inspect", at(name).to_str().unwrap()]);
        assert!(line.contains(name), "{line}");
    }
    assert!(refusal(&["inspect", dir.path().to_str().unwrap()]).contains("holds neither"));
    assert!(refusal(&["inspect", "nowhere"]).contains("nowhere: No such file"));
}

/// All five formats of questions, and a results file that is called as one.
#[test]
fn questions_of_every_format() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let lines = "{\"id\": \"a\", \"question\": \"Q?\", \"answer\": \"x\"}\n\
        {\"id\": \"b\", \"turns\": [{\"question\": \"Q?\", \"answer\": \"x\"}, {\"question\": \"R?\"}]}\n";
    let gqa = "{\"7\": {\"question\": \"Is it?\", \"imageId\": \"1\", \"answer\": \"yes\"}}";
    let science = "{\"1\": {\"question\": \"Which?\", \"choices\": [\"a\", \"b\"], \"answer\": 1, \"hint\": \"\", \
        \"image\": null, \"split\": \"test\"}}";
    // Looked for, and not opened.
    std::fs::create_dir(dir.path().join("images")).unwrap();
    at("images/1.jpg", "");
    let bench = format!(
        "index\tquestion\tA\tB\tanswer\timage\n1\tWhich?\ta\tb\tA\t{}\n",
        "iVBO".repeat(30)
    );
    for (path, format, questions, turns, unanswered) in [
        (at("q.jsonl", lines), "jsonl", 2, 3, 1),
        (at("g.json", gqa), "gqa", 1, 1, 0),
        (at("s.json", science), "scienceqa", 1, 1, 0),
        (at("b.tsv", &bench), "mmbench", 1, 1, 0),
        (repository("tests/data/mmmu.parquet"), "mmmu", 3, 3, 0),
    ] {
        let found = json(&path);
        assert_eq!(found["kind"], "questions", "{format}");
        for (name, value) in [
            ("format", Value::from(format)),
            ("questions", questions.into()),
            ("turns", turns.into()),
            ("without an answer", unanswered.into()),
        ] {
            assert_eq!(found["facts"][name], value, "{format}: {name}");
        }
    }
    for (name, text) in [
        ("q.jsonl", "{\n"),
        ("b.tsv", "index\n"),
        ("p.parquet", "PAR1"),
    ] {
        let line = refusal(&["inspect", at(name, text).to_str().unwrap()]);
        assert!(line.contains(name), "{line}");
    }
}

#[test]
fn a_checkpoint() {
    let found = json(&repository("models/small-phi3v"));
    assert_eq!(found["kind"], "checkpoint");
    assert_eq!(found["facts"]["vocabulary"], 1024);
    assert!(found["obstacle"].is_null());
    let file = json(&repository("models/small-phi3v/model.safetensors"));
    for name in ["tensors", "parameters"] {
        assert_eq!(found["facts"][name], file["facts"][name]);
    }
    // Of another kind: its weights are shown, and why it cannot be converted.
    let dir = TempDir::new().unwrap();
    let copy = |name: &str| {
        let from = repository("models/small-phi3v").join(name);
        std::fs::copy(from, dir.path().join(name)).unwrap();
    };
    copy("model.safetensors");
    std::fs::write(
        dir.path().join("config.json"),
        "{\"model_type\": \"llama\"}",
    )
    .unwrap();
    let found = json(dir.path());
    assert_eq!(found["facts"]["tensors"], file["facts"]["tensors"]);
    let obstacle = found["obstacle"].as_str().unwrap();
    assert!(obstacle.contains("config.json"), "{obstacle}");
}

/// Kinds of damage that their own readers find.
#[test]
fn damaged_files_are_one_line() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("cut");
    for good in [TEXT, VISION, "models/small-phi3v/model.safetensors"] {
        let bytes = std::fs::read(repository(good)).unwrap();
        for len in [9, 100, 5000, bytes.len() / 2] {
            std::fs::write(&file, &bytes[..len]).unwrap();
            let line = refusal(&["inspect", file.to_str().unwrap()]);
            assert!(line.contains("cut: "), "{line}");
        }
    }
    for bytes in [
        &b"HAE-SESS"[..],
        b"HAE-SLOT\x01\0\0\0",
        b"HAE-TRAC\x04\0\0\0",
        b"{}",
        b"{\"record\":\"header\"}\n",
    ] {
        std::fs::write(&file, bytes).unwrap();
        refusal(&["inspect", file.to_str().unwrap()]);
    }
}

#[test]
fn models_that_cannot_be_run_are_shown() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let mut remake = Remake::read(&repository(TEXT));
    remake.set_text("general.architecture", "gpt9");
    remake.set_u32("gpt9.block_count", 8);
    remake.write(&path);
    let found = json(&path);
    assert_eq!(found["facts"]["architecture"], "gpt9");
    let obstacle = found["obstacle"].as_str().unwrap();
    assert!(
        obstacle.contains("unknown model architecture: 'gpt9'"),
        "{obstacle}"
    );
    assert_eq!(found["tensors"].as_array().unwrap().len(), 53);
    assert!(text(&path).contains("It cannot be run here: "));
    // llama.cpp asserts on this one: what there is is shown before that.
    let mut remake = Remake::read(&repository(TEXT));
    for (key, value) in remake.keys.clone() {
        if let Some(rest) = key.strip_prefix("phi3.") {
            remake.set(&format!("smallthinker.{rest}"), value);
        }
    }
    remake.set_text("general.architecture", "smallthinker");
    remake.write(&path);
    let output = hae()
        .args(["inspect", path.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("architecture: smallthinker"), "{shown}");
    assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);
}

/// What a stranger writes into a file does nothing to the terminal.
#[test]
fn texts_of_a_file_are_shown_and_not_obeyed() {
    let evil = "\x1b]0;title\x07\x1b[2J\r\n\u{9b}31m\u{202e}\u{7f}";
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let mut remake = Remake::read(&repository(TEXT));
    remake.set_text("general.name", evil);
    remake.set_text(&format!("key{evil}"), evil);
    remake.set("list", Meta::Array(vec![Meta::Text(evil.into()); 3]));
    remake.set_text("general.architecture", evil);
    remake.tensors[0].name = format!("t{evil}");
    remake.write(&path);
    for args in [&["inspect"][..], &["inspect", "--json"]] {
        let output = hae().args(args).arg(&path).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let shown = String::from_utf8(output.stdout).unwrap();
        let acts = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!shown.contains(acts), "{shown:?}");
        assert!(shown.contains("title"), "{shown}");
    }
    assert_eq!(json(&path)["facts"]["name"], evil);
}

fn ids(args: &[&str]) -> Vec<i32> {
    let args = [&["tokenize", "--ids"], args].concat();
    serde_json::from_str(&answer(&args)).unwrap()
}

#[test]
fn a_text_and_its_tokens() {
    let model = crate::model::load(&repository(TEXT));
    let said = "Where is it?<|end|>\n é";
    assert_eq!(
        ids(&["-p", said]),
        model.tokenize(said, true, true).unwrap()
    );
    assert_eq!(
        ids(&["-p", said, "--no-bos"]),
        model.tokenize(said, false, true).unwrap()
    );
    assert_eq!(
        ids(&["-p", said, "--no-parse-special"]),
        model.tokenize(said, true, false).unwrap()
    );
    assert_eq!(
        ids(&["-p", "a\\nb"]),
        model.tokenize("a\nb", true, true).unwrap()
    );
    assert_eq!(
        ids(&["-p", "a\\nb", "--no-escape"]),
        model.tokenize("a\\nb", true, true).unwrap()
    );
    assert_eq!(ids(&["-p", ""]), model.tokenize("", true, true).unwrap());
    // Every byte of a file, its last newline too.
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("f");
    std::fs::write(&file, "\u{feff}a\r\n\n").unwrap();
    let whole = model.tokenize("\u{feff}a\r\n\n", true, true).unwrap();
    assert_eq!(ids(&["-f", file.to_str().unwrap()]), whole);
    for args in [
        &["tokenize", "--ids"][..],
        &["tokenize", "--ids", "--stdin"],
        &["tokenize", "--ids", "-f", "-"],
    ] {
        let output = hae()
            .args(args)
            .write_stdin("\u{feff}a\r\n\n")
            .output()
            .unwrap();
        let list = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            serde_json::from_str::<Vec<i32>>(&list).unwrap(),
            whole,
            "{args:?}"
        );
    }
    let tokens = model.tokenize(said, true, true).unwrap();
    let shown = answer(&["tokenize", "-p", said, "--show-count"]);
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), tokens.len() + 1, "{shown}");
    assert_eq!(lines[0], "     1 -> '<s>'");
    assert_eq!(
        lines[tokens.len()],
        format!("Total number of tokens: {}", tokens.len())
    );
    let found: Value = serde_json::from_str(&answer(&["tokenize", "-p", said, "--json"])).unwrap();
    assert_eq!(found["count"], tokens.len());
    let pieces = found["tokens"].as_array().unwrap();
    assert!(pieces.iter().map(|one| &one["id"]).eq(tokens.iter()));
    let bytes: Vec<u8> = pieces
        .iter()
        .flat_map(|one| match one.get("bytes") {
            Some(bytes) => serde_json::from_value(bytes.clone()).unwrap(),
            None => one["piece"].as_str().unwrap().as_bytes().to_vec(),
        })
        .collect();
    assert_eq!(
        String::from_utf8(bytes).unwrap(),
        "<s> Where is it?<|end|> é"
    );
    std::fs::write(&file, b"caf\xe9").unwrap();
    let line = refusal(&["tokenize", "-f", file.to_str().unwrap()]);
    assert!(line.contains("is not UTF-8 at byte 3"), "{line}");
    let output = hae()
        .args(["tokenize", "-m", "nowhere.gguf"])
        .write_stdin("a")
        .output()
        .unwrap();
    assert!(refusal_of(&output).contains("nowhere.gguf: No such file"));
}

/// Files without a single tensor, as llama.cpp's tests of tokenizers have them.
#[test]
fn a_vocabulary_alone_is_enough() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("vocab.gguf");
    let mut remake = Remake::read(&repository(TEXT));
    remake.tensors.clear();
    remake.drop_key("phi3.block_count");
    remake.write(&path);
    let path = path.to_str().unwrap();
    assert_eq!(ids(&["-m", path, "-p", "Hello"]), ids(&["-p", "Hello"]));
    let found = json(path.as_ref());
    assert_eq!(found["facts"]["tensors"], 0);
    assert!(found["obstacle"].is_string());
    refusal(&["run", "-p", "hi", "-m", path]);
}

/// What llama.cpp asserts on, or refuses by the name of a function inside.
#[test]
fn vocabularies_that_cannot_be() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("v.gguf");
    let texts = |text: &str, n: usize| Meta::Array(vec![Meta::Text(text.into()); n]);
    let ints = |n: usize, of: i64| Meta::Array(vec![Meta::Signed(of); n]);
    let tokens = "tokenizer.ggml.tokens";
    for (key, value, expected) in [
        (
            tokens,
            texts("a", 1024),
            "has \"a\" at 0 and at 1, expected each text once",
        ),
        (tokens, ints(1024, 1), "no array of strings"),
        (tokens, Meta::Array(Vec::new()), "no array of strings"),
        (
            tokens,
            texts("", 1024),
            "lacks </s>, which Phi-3 models have",
        ),
        (
            "tokenizer.ggml.scores",
            ints(3, 1),
            "array of 3 i32, expected f32 or i32, one for each of 1024",
        ),
        (
            "tokenizer.ggml.scores",
            Meta::Unsigned(1),
            "scores is u32, expected an array",
        ),
        (
            "tokenizer.ggml.token_type",
            Meta::Array(vec![Meta::Float(1.0); 1024]),
            "of 1024 f32, expected i32",
        ),
        (
            "tokenizer.ggml.model",
            Meta::Text("bert".into()),
            "with tokens of type 6",
        ),
    ] {
        let mut remake = Remake::read(&repository(TEXT));
        remake.set("general.name", Meta::Text("Phi-3".into()));
        remake.set(key, value);
        remake.write(&path);
        let path = path.to_str().unwrap();
        for args in [
            &["tokenize", "-p", "hi", "-m", path][..],
            &["run", "-p", "hi", "-m", path],
        ] {
            let line = refusal(args);
            assert!(
                line.contains("v.gguf: ") && line.contains(expected),
                "{expected}: {line}"
            );
        }
    }
    let mut remake = Remake::read(&repository(TEXT));
    remake.set_u32("phi3.attention.key_length", 65);
    remake.write(&path);
    let line = refusal(&["run", "-p", "hi", "-m", path.to_str().unwrap()]);
    assert!(
        line.contains("key_length is 65 and phi3.attention.value_length 64, expected the same"),
        "{line}"
    );
}
