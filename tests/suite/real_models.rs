//! docs/real.md: its commands, as they stand, on small models of the same architectures with made-up
//! weights. What they score means nothing; that every command works, and leaves an answer of each policy
//! to each question, does.
#![cfg(unix)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hae::eval::long_text::{Options, Task, questions};
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::refusal;
use crate::fixture::checkpoint;
use crate::house::root;
use crate::model::{PICTURE, TEXT, repository};
use crate::others::{gemma3, llava_llama, qwen2vl, qwen25vl};

fn page() -> String {
    fs::read_to_string(root().join("docs/real.md")).unwrap()
}

/// The fenced blocks of a language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}");
    let mut all = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if line == fence {
            let block = lines.by_ref().take_while(|line| *line != "```");
            all.push(block.collect::<Vec<_>>().join("\n"));
        } else if line.starts_with("```") {
            // One of another kind.
            lines.by_ref().find(|line| *line == "```");
        }
    }
    all
}

/// A folder with everything that the page names.
struct Stage(TempDir);

impl Stage {
    fn new(page: &str) -> Self {
        let stage = Stage(TempDir::new().unwrap());
        stage.models();
        stage.sets(page);
        stage.program();
        stage
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn models(&self) {
        for entry in fs::read_dir(checkpoint()).unwrap() {
            let from = entry.unwrap().path();
            let name = from.file_name().unwrap().to_str().unwrap();
            fs::copy(&from, self.at(&format!("Phi-3.5-vision-instruct/{name}"))).unwrap();
        }
        for (name, text, pair) in [
            ("qwen2-vl", "qwen2-vl-F16", qwen2vl(1.0)),
            ("qwen2.5-vl", "qwen2.5-vl", qwen25vl()),
            ("gemma-3", "gemma-3", gemma3(1.0)),
            ("llava", "llava", llava_llama()),
        ] {
            fs::copy(pair.file("text.gguf"), self.at(&format!("{text}.gguf"))).unwrap();
            let vision = self.at(&format!("mmproj-{name}.gguf"));
            fs::copy(pair.file("vision.gguf"), vision).unwrap();
        }
        let smollm2 = self.at("models/real/SmolLM2-135M-Instruct.Q4_1.gguf");
        fs::copy(repository(TEXT), smollm2).unwrap();
    }

    fn sets(&self, page: &str) {
        let mmmu = root().join("tests/data/mmmu.parquet");
        fs::copy(mmmu, self.at("mmmu/Math/validation-00000-of-00001.parquet")).unwrap();
        let png = fs::read(repository(PICTURE)).unwrap();
        let gqa = r#"{"1": {"question": "Is it overcast?", "imageId": "n1", "answer": "no", "types": {"structural": "verify"}},
            "2": {"question": "Who?", "imageId": "n1", "answer": "woman", "types": {"structural": "query"}}}"#;
        fs::write(self.at("gqa/testdev_balanced_questions.json"), gqa).unwrap();
        fs::write(self.at("gqa/images/n1.jpg"), &png).unwrap();
        let scienceqa = r#"{"1": {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": "image.png",
            "subject": "natural science", "split": "test"}}"#;
        fs::write(self.at("scienceqa/problems.json"), scienceqa).unwrap();
        fs::write(self.at("scienceqa/images/test/1/image.png"), &png).unwrap();
        let mmbench = format!(
            "index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n1\tWhich?\t\tone\ttwo\tB\tc\t{}\n",
            STANDARD.encode(&png)
        );
        fs::write(self.at("mmbench/mmbench_dev_en.tsv"), mmbench).unwrap();
        // The page's own lines.
        for (lines, name) in blocks(page, "json").iter().zip(["docvqa", "ocr"]) {
            for line in lines.lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                let image = line["image"].as_str().unwrap();
                fs::write(self.at(&format!("{name}/{image}")), &png).unwrap();
            }
            fs::write(self.at(&format!("{name}/{name}.jsonl")), lines).unwrap();
        }
        let prose = "There was nothing to be seen. She went on, and nobody asked. ".repeat(400);
        for tokens in [1024, 4096, 8000] {
            // As long as the stand-in's context allows in no time.
            let options = Options {
                tasks: vec![Task::Turns, Task::List],
                each: 1,
                tokens: 100 + tokens / 40,
                seed: 2,
            };
            let count = |text: &str| Ok(text.split_whitespace().count());
            let lines: Vec<String> = questions(&prose, &options, &count)
                .unwrap()
                .iter()
                .map(|line| serde_json::to_string(line).unwrap())
                .collect();
            fs::write(self.at(&format!("test-{tokens}.jsonl")), lines.join("\n")).unwrap();
        }
    }

    /// The program under its name, which asks one question and lets answers be short.
    fn program(&self) {
        let script = r#"#!/bin/sh
set -eu
command=$1
case "$command $*" in
eval*" -n "*) set -- "$@" -t 1 --limit 1 ;;
eval*) set -- "$@" -t 1 --limit 1 -n 4 ;;
quantize*) set -- "$@" -t 1 ;;
esac
echo "$*" >>commands
exec "$HAE" "$@" >>printed
"#;
        let path = self.at("bin/hae");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn run(&self, block: &str) {
        let folder = self.0.path();
        let path = std::env::var("PATH").unwrap();
        let output = Command::new("sh")
            .args(["-euc", block])
            .current_dir(folder)
            .env("PATH", format!("{}:{path}", folder.join("bin").display()))
            .env("HAE", assert_cmd::cargo::cargo_bin("hae"))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{block}\n{stderr}");
    }
}

/// Every contender of a results file answered every question.
fn is_whole(path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let header = lines.next().unwrap();
    let contenders = header["contenders"].as_array().unwrap().len();
    let n = header["questions"]["n"].as_u64().unwrap() as usize;
    assert!(n > 0 && contenders > 0, "{}", path.display());
    let answers: Vec<Value> = lines.collect();
    assert_eq!(answers.len(), n * contenders, "{}", path.display());
    assert!(answers.iter().all(|answer| answer["right"].is_boolean()));
}

#[test]
fn every_command_of_the_page_works() {
    let page = page();
    let stage = Stage::new(&page);
    let scripts = blocks(&page, "sh");
    assert!(scripts.len() >= 6, "{scripts:?}");
    for block in &scripts {
        stage.run(block);
    }
    let folder = stage.0.path();
    let commands = fs::read_to_string(folder.join("commands")).unwrap();
    let mut outs: BTreeSet<&str> = BTreeSet::new();
    for command in commands.lines().filter(|line| line.starts_with("eval")) {
        let out = command.split(" --out ").nth(1).unwrap();
        assert!(outs.insert(out.split(' ').next().unwrap()), "{command}");
    }
    // 6 sets under eviction, 3 settings, LLaVA twice, 3 models on 3 sets with 4 settings, 3 lengths with 7.
    assert_eq!(outs.len(), 6 + 3 + 2 + 36 + 21);
    for out in outs {
        is_whole(&folder.join(out));
    }
    // DocVQA is scored by how near answers are.
    let text = fs::read_to_string(folder.join("phi-docvqa.jsonl")).unwrap();
    assert!(text.contains("\"anls\":"));
}

/// The page's table says which models refuse eviction; the commands above show that the others do not.
#[test]
fn the_models_that_the_page_names_refuse_eviction() {
    let page = page();
    let stage = Stage::new(&page);
    let rows: Vec<&str> = page
        .lines()
        .filter(|line| line.contains("| none"))
        .collect();
    assert_eq!(rows.len(), 3);
    for row in rows {
        // Between backticks: the two files.
        let files: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        let path = |name: &str| stage.at(name).to_str().unwrap().to_owned();
        let mut args = vec!["eval".to_owned(), path("ocr/ocr.jsonl"), "-m".to_owned()];
        args.extend([path(files[0]), "--mmproj".to_owned(), path(files[1])]);
        let rest = "--kv-policy full,h2o --kv-budget 0.5 -t 1";
        args.extend(rest.split(' ').map(str::to_owned));
        // That one is quantized by the page.
        if files[0] == "qwen2-vl.gguf" {
            args[3] = path("qwen2-vl-F16.gguf");
        }
        let line = refusal(&args);
        let expected = "kv policy h2o cannot serve this model: ";
        assert!(line.contains(expected), "{line}");
    }
}
