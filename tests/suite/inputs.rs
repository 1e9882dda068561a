//! Prompts, pictures and flags as people give them: files of other systems, names that terminals
//! write, what llama.cpp's users type, and text that only looks like something else.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal, refusal_of};
use crate::fixture::Copy;
use crate::model::{PICTURE, TEXT, WHERE, repository};

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> String {
    let file = dir.path().join(name);
    std::fs::write(&file, bytes).unwrap();
    file.to_str().unwrap().to_owned()
}

const SHORT: [&str; 6] = ["run", "-n", "4", "--temp", "0", "-ojson"];

fn report(args: &[&str]) -> Value {
    serde_json::from_str(&answer(&[&SHORT[..], args].concat())).unwrap()
}

/// Text tokens of the prompt, and the answer.
fn asked(args: &[&str]) -> (u64, String) {
    let report = report(args);
    let text = report["text"].as_str().unwrap().to_owned();
    (report["tokens"]["prompt"]["text"].as_u64().unwrap(), text)
}

#[test]
fn files_of_other_systems_hold_the_same_prompt() {
    let dir = TempDir::new().unwrap();
    let plain = asked(&["-p", "Where is it?\nSay it."]);
    for (name, bytes) in [
        ("lf", &b"Where is it?\nSay it.\n"[..]),
        ("crlf", b"Where is it?\r\nSay it.\r\n"),
        ("bom", b"\xef\xbb\xbfWhere is it?\r\nSay it."),
    ] {
        assert_eq!(asked(&["-f", &write(&dir, name, bytes)]), plain, "{name}");
    }
    for (name, bytes) in [
        ("mark", &b"\xef\xbb\xbf"[..]),
        ("end", b"\r\n"),
        ("both", b"\xef\xbb\xbf\r\n"),
    ] {
        let line = refusal(&["run", "-f", &write(&dir, name, bytes)]);
        assert!(line.ends_with("is empty, expected a prompt"), "{line}");
    }
    let utf16 = write(&dir, "utf16", b"\xff\xfeh\0i\0");
    let line = refusal(&["run", "-f", &utf16]);
    assert!(line.ends_with("utf16: is UTF-16, expected UTF-8"), "{line}");
}

#[test]
fn question_files_of_other_systems_are_read() {
    let dir = TempDir::new().unwrap();
    std::fs::copy(repository(PICTURE), dir.path().join("a.png")).unwrap();
    let line = r#"{"image":"a.png","question":"Where is it?","answer":"here"}"#;
    let jsonl = format!("\u{feff}{line}\r\n\r\n");
    let file = write(&dir, "q.jsonl", jsonl.as_bytes());
    let out = dir.path().join("r.jsonl");
    let out = out.to_str().unwrap();
    let eval = [
        "eval",
        &file,
        "--kv-policy",
        "full",
        "-n",
        "2",
        "--out",
        out,
    ];
    let first = answer(&eval);
    // What was saved goes on, too, after an editor wrote it back.
    let saved = std::fs::read_to_string(out).unwrap();
    std::fs::write(out, format!("\u{feff}{}", saved.replace('\n', "\r\n"))).unwrap();
    assert_eq!(answer(&eval), first);
    let page = dir.path().join("page.html");
    answer(&["report", out, "-o", page.to_str().unwrap()]);
}

#[test]
fn a_prompt_and_a_picture_may_come_through_a_pipe() {
    let picture = path(PICTURE);
    let plain = asked(&["--image", &picture, "-p", WHERE]);
    let piped = |args: &[&str], bytes: &[u8]| {
        let output = hae()
            .args(SHORT)
            .args(args)
            .write_stdin(bytes)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["text"].as_str().unwrap().to_owned()
    };
    let prompt = format!("{WHERE}\n");
    assert_eq!(
        piped(&["--image", &picture, "-f", "-"], prompt.as_bytes()),
        plain.1
    );
    let bytes = std::fs::read(&picture).unwrap();
    assert_eq!(piped(&["--image", "-", "-p", WHERE], &bytes), plain.1);
    for args in [
        &["run", "--image", "-"][..],
        &["run", "--image", "-", "-f", "-"],
        &["run", "--image", "-", "--image", "-", "-p", "hi"],
    ] {
        let line = refusal_of(&hae().args(args).write_stdin("x").output().unwrap());
        assert!(
            line.starts_with("hae: --image: - is standard input"),
            "{line}"
        );
    }
}

#[test]
fn escapes_are_read_as_in_llama_cpp() {
    let dir = TempDir::new().unwrap();
    let plain = asked(&["-p", "Where\nis \\it?"]);
    assert_eq!(asked(&["-p", r"Where\nis \\it?"]), plain);
    assert_eq!(asked(&["-e", "-p", r"Where\x0ais \it?"]), plain);
    let file = write(&dir, "p", br"Where\nis \it?");
    assert_eq!(asked(&["-f", &file]), plain);
    let literal = asked(&["--no-escape", "-p", r"Where\nis \it?"]);
    assert_ne!(literal, plain);
    assert_eq!(asked(&["-p", r"Where\\nis \\it?"]), literal);
    for (text, expected) in [
        (r"\xff", "-p: \\x names bytes that are no UTF-8"),
        (r"a\x00", "-p: \\x names a NUL"),
    ] {
        let line = refusal(&["run", "-p", text]);
        assert!(line.contains(expected), "{line}");
    }
}

#[test]
fn several_pictures_may_share_a_flag() {
    let dir = TempDir::new().unwrap();
    let picture = path(PICTURE);
    let comma = dir.path().join("a,b.png");
    std::fs::copy(&picture, &comma).unwrap();
    let images = |value: &str| report(&["--image", value, "-p", "hi"])["tokens"]["images"].clone();
    let one = images(&picture);
    let n = one[0].clone();
    assert_eq!(
        images(&format!("{picture},{picture}")),
        Value::from(vec![n.clone(), n])
    );
    assert_eq!(images(comma.to_str().unwrap()), one);
    let quoted = format!("\"{}\",{picture}", comma.to_str().unwrap());
    assert_eq!(images(&quoted).as_array().unwrap().len(), 2);
    let address = format!("file://{picture}");
    assert_eq!(images(&address), one);
    let line = refusal(&["run", "-p", "hi", "--image", &format!("{picture},none.png")]);
    assert!(line.contains("none.png: No such file"), "{line}");
}

#[test]
fn spellings_of_llama_cpp_are_taken() {
    let plain = asked(&["-p", "hi"]);
    for args in [
        &["-fa", "1"][..],
        &["-fa", "auto"],
        &["-fa", "-1"],
        &["-ctk", "F16"],
        &["--temperature", "0"],
        &["--predict", "4"],
        &["--n_predict", "4"],
        &["--repeat_last_n=64"],
        &["--no-mmap"],
        &["-e"],
    ] {
        assert_eq!(asked(&[&["-p", "hi"], args].concat()), plain, "{args:?}");
    }
    let all = ["run", "-p", WHERE, "--temp", "0", "--image", &path(PICTURE)];
    let endless = answer(&[&all[..], &["-n", "-1"]].concat());
    assert_eq!(answer(&[&all[..], &["-n", "-2"]].concat()), endless);
}

#[test]
fn flags_of_llama_cpp_that_are_not_here_are_answered_in_a_line() {
    for (args, expected) in [
        (
            &["-mu", "x/y"][..],
            "hae: -mu: is not there: give a repository",
        ),
        (
            &["--docker-repo", "x/y"],
            "hae: --docker-repo: is not there: give a repository",
        ),
        (&["-np", "4"], "hae: --parallel: changes nothing here"),
        (&["--chatml"], "hae: --chatml: give the template's name"),
        (&["-cnv"], "hae: -cnv: without -p it is a chat"),
        (&["--color"], "hae: --color: changes nothing here"),
        (&["-i"], "hae: -i: without -p it is a chat"),
        (&["-st"], "hae: -st: with -p it ends after one answer"),
        (&["--model_url=x/y"], "hae: --model-url: is not there"),
        (
            &["--rope-scaling", "yarn"],
            "hae: --rope-scaling: is not there",
        ),
        (
            &["--reasoning-format", "none"],
            "hae: --reasoning-format: is not there",
        ),
        (
            &["--spec-draft-n-max", "4"],
            "hae: --spec-...: no draft model",
        ),
        (&["-ngld", "9"], "hae: -ngld: no draft model"),
        (
            &["--override-kv", "a=b"],
            "hae: --override-kv: the model's metadata",
        ),
    ] {
        for command in ["run", "bench"] {
            let line = refusal(&[&[command], args].concat());
            assert!(line.starts_with(expected), "{line}");
        }
    }
}

/// As llama-cli is called.
#[test]
fn flags_without_a_command_are_answered_in_a_line() {
    let line = refusal(&["-m", "model.gguf", "-p", "hi"]);
    assert!(line.starts_with("hae: a command: is missing"), "{line}");
    assert!(line.contains("hae run"), "{line}");
}

#[test]
fn a_prompt_that_equals_a_flag_is_a_prompt() {
    for text in ["-ngl=99 means what?", "-sys", "-hf", "--jinja"] {
        let file = TempDir::new().unwrap();
        let file = write(&file, "p", text.as_bytes());
        let plain = asked(&["-f", &file]);
        assert_eq!(asked(&["-p", text]), plain, "{text}");
    }
    let system = ["-p", "hi", "-sys", "-fa"];
    assert!(asked(&system).0 > asked(&["-p", "hi"]).0);
}

/// Also without a vision file, beside a picture, and in every command.
#[test]
fn text_that_looks_like_a_place_can_be_asked_about() {
    let (text, picture) = (path(TEXT), path(PICTURE));
    for prompt in ["What is <|image_pad|>?", "What is <__media__>?"] {
        let alone = asked(&["-m", &text, "-p", prompt]);
        assert_eq!(asked(&["-p", prompt]), alone);
        // <|end|>\n<|system|>\n is more than this.
        let system = asked(&["-p", "hi", "-sys", prompt]);
        assert!(system.0 > asked(&["-p", "hi"]).0 + 5);
    }
    let seen = ["--image", &picture];
    let beside = [
        &seen[..],
        &["-p", WHERE, "-sys", "Never write <__media__>."],
    ]
    .concat();
    assert_eq!(
        report(&beside)["tokens"]["images"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let named = [&seen[..], &["-p", "<|image_1|>What is <__media__>?"]].concat();
    assert_eq!(
        report(&named)["tokens"]["images"].as_array().unwrap().len(),
        1
    );
    // As many as there are pictures are places, as in llama.cpp.
    let first = asked(&[&seen[..], &["-p", "<|image_1|> hi"]].concat());
    assert_eq!(
        asked(&[&seen[..], &["-p", "<__media__> hi"]].concat()),
        first
    );
    let table = answer(&[
        "compare",
        "-p",
        "What is <__media__>?",
        "--kv-policy",
        "full",
        "-r",
        "1",
        "-n",
        "2",
        "-m",
        &text,
    ]);
    assert!(table.contains("full"), "{table}");
    let dir = TempDir::new().unwrap();
    let line = r#"{"question":"What is <|image_pad|> or <__media__>?","answer":"x"}"#;
    let file = write(&dir, "q.jsonl", line.as_bytes());
    let table = answer(&["eval", &file, "--kv-policy", "full", "-n", "2"]);
    assert!(table.contains("full"), "{table}");
}

fn converts(from: &Path, to: &TempDir) -> (PathBuf, String) {
    let text = to.path().join("t.gguf");
    let output = hae()
        .arg("convert")
        .arg(from)
        .arg("-o")
        .arg(&text)
        .arg("--mmproj")
        .arg(to.path().join("v.gguf"))
        .args(["--outtype", "q8_0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    (text, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_model_without_a_template_is_told_aloud() {
    let copy = Copy::new();
    copy.edit("tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let dir = TempDir::new().unwrap();
    let (model, stderr) = converts(copy.0.path(), &dir);
    assert!(stderr.contains("note: no chat template in"), "{stderr}");
    let model = model.to_str().unwrap();
    let run = |args: &[&str]| {
        let output = hae()
            .args(["run", "-m", model, "-p", "hi", "-n", "1"])
            .args(args)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(
        run(&[]).contains("t.gguf: has no chat template"),
        "{}",
        run(&[])
    );
    for args in [&["-no-cnv"][..], &["--chat-template", "phi3"]] {
        assert_eq!(run(args), "", "{args:?}");
    }
    let compared = hae()
        .args(["compare", "-m", model, "-p", "hi", "-n", "1", "-r", "1"])
        .args(["--kv-policy", "full"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(compared.stderr).unwrap();
    assert!(stderr.contains("t.gguf: has no chat template"), "{stderr}");
    // The one inside the program has one.
    let output = hae().args(["run", "-p", "hi", "-n", "1"]).output().unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// Whatever is broken in it: a line that names the file, and nothing of what read it.
#[test]
fn damaged_mmmu_files_are_refused_in_their_own_words() {
    let dir = TempDir::new().unwrap();
    let whole = std::fs::read(repository("tests/data/mmmu.parquet")).unwrap();
    let mut places = 0;
    // Steps that hit pages, their headers and the footer.
    for at in (0..whole.len()).step_by(whole.len() / 60) {
        let mut bytes = whole.clone();
        let end = (at + 4).min(bytes.len());
        bytes[at..end].fill(0xff);
        let file = write(&dir, "x.parquet", &bytes);
        let output = hae()
            .args(["eval", &file, "-m", "/no/such/model"])
            .output()
            .unwrap();
        let line = refusal_of(&output);
        let inside = [
            "panicked",
            "memory",
            "snappy",
            "Parquet error",
            "External",
            "EOF",
        ];
        assert!(
            !inside.iter().any(|word| line.contains(word)),
            "{at}: {line}"
        );
        places += usize::from(line.contains("x.parquet: "));
    }
    assert!(places > 10, "{places}");
}
