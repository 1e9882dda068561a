//! Misuse and bad input on the command line: one line that names the value, exit code 2, nothing
//! on stdout, no file left behind.

use std::path::Path;

use image::{ImageFormat, Rgb, RgbImage};
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal, refusal_of};
use crate::fixture::{Copy, checkpoint};
use crate::model::{PICTURE, TEXT, VISION, repository};

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

/// `hae run` with these arguments, split at spaces, is refused with a line that holds `expected`.
fn refuses(args: &str, expected: &str) {
    let line = refusal(&words(args));
    assert!(
        line.starts_with("hae: ") && line.contains(expected),
        "{args}: expected \"{expected}\" in: {line}"
    );
}

fn words(args: &str) -> Vec<String> {
    let start = ["run", "-p", "hi", "-n", "2"];
    let start = start.iter().map(|&s| s.to_owned());
    start
        .chain(args.split_whitespace().map(|word| match word {
            "DEMO" => path(PICTURE),
            "TEXT" => path(TEXT),
            _ => word.to_owned(),
        }))
        .collect()
}

/// What clap itself finds: exit code 2 as well, but it may add how the command is used.
fn usage_error(args: &str, expected: &str) {
    let output = hae().args(words(args)).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args}: {stderr}");
    assert!(output.stdout.is_empty(), "{args}");
    assert!(
        stderr.contains(expected),
        "{args}: expected \"{expected}\" in: {stderr}"
    );
}

#[test]
fn flags_that_would_do_nothing() {
    for (args, expected) in [
        (
            "--kv-policy hae --dap-alpha 0.1",
            "--dap-alpha: has no threshold to add to, expected --dap-tau or --dap-r",
        ),
        (
            "--kv-policy h2o --bin-mib 4",
            "--bin-mib: wants a policy that calls evicted tokens back",
        ),
        (
            "--kv-policy hae --no-recall --bin-store ram",
            "--bin-store: wants a policy",
        ),
    ] {
        refuses(args, expected);
    }
}

#[test]
fn numbers_out_of_range() {
    for (args, expected) in [
        ("-n -3", "-n: -3, expected -1 or more"),
        ("-t 0", "-t: 0 threads, expected 1 to 512"),
        ("-t -1", "-t: -1 threads"),
        ("-t 65535", "-t: 65535 threads"),
        ("-tb 0", "-tb: 0 threads"),
        ("-b 0", "-b, -ub: 0 rows"),
        ("-ub 0", "-b, -ub: 0 rows"),
        ("-c 1073741824", "-c: 1073741824 cells, expected at most"),
        ("-c 4294967295", "-c: 4294967295 cells, expected at most"),
        ("-s -2", "-s: -2, expected -1 to 4294967295"),
        ("-s 4294967296", "-s: 4294967296"),
        ("--temp nan", "--temp: NaN"),
        ("--temp -1", "--temp: -1, expected a number of at least 0"),
        ("--temp inf", "--temp: inf"),
        ("--top-p nan", "--top-p: NaN"),
        ("--min-p -0.5", "--min-p: -0.5"),
        ("--repeat-penalty nan", "--repeat-penalty: NaN"),
        ("--repeat-penalty 0", "--repeat-penalty: 0"),
        ("--repeat-last-n -5", "--repeat-last-n: -5"),
        ("--num-crops 0", "--num-crops: 0, expected 1 to 64"),
        ("--num-crops -4", "--num-crops: -4, expected 1 to 64"),
        ("--num-crops 65 --image DEMO", "--num-crops: 65"),
    ] {
        refuses(args, expected);
    }
    for (args, expected) in [
        ("-c -5", "--ctx-size"),
        ("-c many", "--ctx-size"),
        ("--num-crops few", "--num-crops"),
        ("-ctk q9", "expected f32, f16"),
        ("-ngl some", "expected a number of layers"),
        ("-o xml", "possible values: text, json"),
        ("-fa maybe", "possible values: on, off, auto"),
        ("--nonsense", "--nonsense"),
        ("-f FILE", "cannot be used with"),
        ("-no-cnv -sys x", "cannot be used with"),
        (
            "--kv-policy hae --dap-tau 1 --dap-keep 3",
            "cannot be used with",
        ),
        (
            "--kv-policy hae --dap-alpha 0.1 --dap-spread 2",
            "cannot be used with",
        ),
        (
            "--kv-policy hae --no-dap --dap-r 0.1",
            "cannot be used with",
        ),
        ("--kv-policy hae --score-layers 3-1", "runs backwards"),
        ("--kv-policy hae --kv-budget lots", "expected a number"),
    ] {
        usage_error(args, expected);
    }
}

#[test]
fn policies_and_their_parameters() {
    for (args, expected) in [
        (
            "--kv-policy lru",
            "--kv-policy: \"lru\", expected one of full, hae",
        ),
        (
            "--kv-policy hae --kv-preset best",
            "\"best\", expected one of default, paper",
        ),
        (
            "--kv-budget 100",
            "--kv-budget: the policy full does not read it",
        ),
        (
            "--kv-policy hae --h2o-recent 0.5",
            "--h2o-recent: the policy hae does not read it",
        ),
        (
            "--kv-policy hae --kv-budget 21",
            "21 cells, expected at least 22: 4 sinks + 16 recent + 1 + the next token",
        ),
        (
            "--kv-policy hae --kv-budget 600 -c 512",
            "600 cells, but the context holds 512",
        ),
        ("--kv-policy hae --kv-budget 0", "--kv-budget: 0 cells"),
        (
            "--kv-policy hae --kv-budget 1.5",
            "--kv-budget: a share of 1.5",
        ),
        (
            "--kv-policy hae --bin-size 0 --kv-budget 99",
            "--bin-size: 0 cells",
        ),
        (
            "--kv-policy hae --score-layers 8",
            "layer 8, but the model's layers are 0 to 7",
        ),
        ("--kv-policy hae --dap-keep 0", "--dap-keep: 0 cells"),
        ("--kv-policy hae --dap-tau nan", "--dap-tau: NaN"),
        ("--kv-policy hae --dap-spread=-1", "--dap-spread: -1"),
        ("--kv-policy hae --score-decay 2", "--score-decay: 2"),
        (
            "-ctv q8_0 -fa off",
            "needs flash attention, which -fa off switches off",
        ),
        (
            "--kv-policy hae -ctv q8_0 -fa off",
            "needs flash attention, which -fa off switches off",
        ),
    ] {
        refuses(args, expected);
    }
}

#[test]
fn prompts_that_cannot_be() {
    let dir = TempDir::new().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        file.to_str().unwrap().to_owned()
    };
    for (name, bytes, expected) in [
        ("nul", &b"a\0b"[..], "nul: byte 1 is NUL, expected text"),
        ("latin1", b"caf\xe9", "latin1: is not UTF-8 at byte 3"),
        ("empty", b"", "empty: is empty, expected a prompt"),
        ("newline", b"\n", "newline: is empty"),
    ] {
        for template in [&[][..], &["--no-conversation"]] {
            let file = file(name, bytes);
            let mut args = vec!["run", "-f", &file];
            args.extend(template);
            let line = refusal(&args);
            assert!(
                line.ends_with(expected) || line.contains(expected),
                "{line}"
            );
        }
    }
    let missing = dir.path().join("a\nb");
    let line = refusal(&["run", "-f", missing.to_str().unwrap()]);
    assert!(line.contains(r"a\nb: No such file"), "{line}");
    assert!(refusal(&["run", "-f", dir.path().to_str().unwrap()]).contains("directory"));
    assert!(refusal(&["run", "-p", ""]).contains("-p: is empty"));
    assert!(refusal(&["run", "-o", "json"]).contains("-o: json needs a prompt"));
    assert!(refusal(&["compare"]).contains("-p: is missing, expected a prompt, or a file"));
    refuses(
        "--chat-template nonsense",
        "--chat-template: llama.cpp does not know",
    );
}

#[test]
fn a_prompt_longer_than_the_context() {
    let long = "what ".repeat(600);
    let line = refusal(&["run", "-c", "256", "-p", &long]);
    assert!(
        line.contains("cells but the context holds 256: give a larger -c"),
        "{line}"
    );
    // One picture fits, two do not.
    answer(&words("-c 256 --temp 0 --image DEMO"));
    refuses(
        "-c 256 --image DEMO --image DEMO",
        "cells but the context holds 256",
    );
    refuses(
        "-c 256 --image DEMO --image DEMO --kv-policy hae",
        "cells but the context holds 256",
    );
}

#[test]
fn pictures_that_cannot_be_shown() {
    let dir = TempDir::new().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let save = |name: &str, width, height| {
        let picture = RgbImage::from_pixel(width, height, Rgb([200, 30, 30]));
        picture.save(dir.path().join(name)).unwrap();
        file(name)
    };
    let shown = |name: &str| refusal(&["run", "-p", "hi", "-n", "2", "--image", name]);
    // Too narrow to be cut up, or too small to be seen.
    for (name, width, height) in [("1x1.png", 1, 1), ("1x5000.png", 1, 5000)] {
        let line = shown(&save(name, width, height));
        assert!(
            line.contains(name) && line.contains(&format!("{width}x{height}")),
            "{line}"
        );
    }
    let line = shown(&save("wide.png", 40_000, 8));
    assert!(
        line.contains("wide.png") && line.contains("40000"),
        "{line}"
    );
    std::fs::write(file("none.jpg"), "no picture at all").unwrap();
    let line = shown(&file("none.jpg"));
    assert!(
        line.contains("none.jpg: is no picture that can be read, expected PNG, JPEG"),
        "{line}"
    );
    let mut cut = std::fs::read(repository(PICTURE)).unwrap();
    cut.truncate(cut.len() / 2);
    std::fs::write(file("cut.png"), cut).unwrap();
    assert!(shown(&file("cut.png")).contains("cut.png: "));
    std::fs::write(file("void.png"), "").unwrap();
    assert!(shown(&file("void.png")).contains("void.png: "));
    assert!(shown(&file("nowhere.png")).contains("nowhere.png: No such file"));
    let line = shown(dir.path().to_str().unwrap());
    assert!(
        line.contains("is a folder, expected a picture file"),
        "{line}"
    );

    // The name does not matter, the content does.
    let jpeg = dir.path().join("jpeg.png");
    let picture = RgbImage::from_pixel(64, 64, Rgb([9, 99, 9]));
    picture.save_with_format(&jpeg, ImageFormat::Jpeg).unwrap();
    answer(&[
        "run",
        "-p",
        "hi",
        "-n",
        "2",
        "--temp",
        "0",
        "--image",
        jpeg.to_str().unwrap(),
    ]);
}

#[test]
fn pictures_and_places_must_match() {
    refuses(
        "-p <|image_1|>",
        "--image: the prompt names <|image_1|>, but 0 pictures were given",
    );
    refuses(
        "-p <|image_2|> --image DEMO",
        "<|image_2|>, but 1 pictures were given",
    );
    refuses(
        "-p <__media__><__media__> --image DEMO",
        "places for 2 pictures, but 1 were given",
    );
    refuses(
        "-m TEXT --image DEMO",
        "--image: pictures need a vision file, give one with --mmproj",
    );
    refuses(
        "-m TEXT --num-crops 4",
        "--num-crops: pictures need a vision file, give one with --mmproj",
    );
    refuses("--mmproj TEXT", "--mmproj: belongs to a text model");
}

/// Names in a folder.
fn left(dir: &Path) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|e| e.unwrap().file_name()).collect()
}

#[test]
fn conversion_leaves_nothing_behind() {
    let converts = |from: &Path, out: &Path| {
        let (text, vision) = (out.join("t.gguf"), out.join("v.gguf"));
        let output = hae()
            .args(["convert", "--outtype", "f16"])
            .arg(from)
            .arg("-o")
            .arg(text)
            .arg("--mmproj")
            .arg(vision)
            .output()
            .unwrap();
        refusal_of(&output)
    };
    let out = TempDir::new().unwrap();
    let empty = TempDir::new().unwrap();
    assert!(converts(empty.path(), out.path()).contains("config.json"));
    let copy = Copy::new();
    copy.edit_tensors(|t| drop(t.remove("model.layers.2.self_attn.qkv_proj.weight")));
    let line = converts(copy.0.path(), out.path());
    assert!(
        line.contains("model.layers.2.self_attn.qkv_proj.weight"),
        "{line}"
    );
    let copy = Copy::new();
    copy.edit_tensors(|t| {
        t.get_mut("model.norm.weight").unwrap().1 = vec![2, 128];
    });
    let line = converts(copy.0.path(), out.path());
    assert!(line.contains("model.norm.weight"), "{line}");
    assert!(left(out.path()).is_empty(), "{:?}", left(out.path()));

    // Where nothing can be written.
    let file = out.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for target in [out.path().join("no/where"), file.clone()] {
        let line = converts(&checkpoint(), &target);
        assert!(line.contains("does not exist"), "{line}");
    }
    assert_eq!(left(out.path()), ["file"]);
}

#[test]
fn quantization_leaves_nothing_behind() {
    let out = TempDir::new().unwrap();
    let target = out.path().join("q.gguf");
    let target = target.to_str().unwrap();
    let q8_0 = path(TEXT);
    let line = refusal(&["quantize", &q8_0, target, "Q4_K_M"]);
    assert!(line.contains("is quantized already"), "{line}");
    let line = refusal(&["quantize", &path("models/demo.png"), target, "Q8_0"]);
    assert!(line.contains("demo.png: starts with"), "{line}");
    let vision = path(VISION);
    let nowhere = out.path().join("no/where.gguf");
    let line = refusal(&["quantize", &vision, nowhere.to_str().unwrap(), "Q8_0"]);
    assert!(line.contains("does not exist"), "{line}");
    assert!(left(out.path()).is_empty());
    let output = hae()
        .args(["quantize", &q8_0, target, "Q99"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(left(out.path()).is_empty());
}

#[test]
fn temporary_files_go_with_the_program() {
    let temp = TempDir::new().unwrap();
    for (args, code) in [("--temp 0", 0), ("--kv-policy hae --score-layers 99", 2)] {
        let output = hae()
            .args(words(args))
            .env("TMPDIR", temp.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert!(left(temp.path()).is_empty(), "{:?}", left(temp.path()));
    }
}
