//! `hae eval` and `hae compare` on the embedded model: what they save and print, that they go on
//! where they were interrupted, and what they refuse.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal, refusal_of};
use crate::model::{PICTURE, TEXT, VISION, repository};

fn set(file: &str) -> String {
    path(&format!("tests/eval/small-phi3v/dev/{file}"))
}

fn path(name: &str) -> String {
    repository(name).to_str().unwrap().to_owned()
}

/// The command line, split at spaces; `OUT` is a file in the folder.
fn words(args: &str, out: &Path) -> Vec<String> {
    let word = |word: &str| match word {
        "QUESTIONS" => set("understanding.jsonl"),
        "CHATS" => set("chat.jsonl"),
        "STORIES" => set("story.jsonl"),
        "PICTURE" => path(PICTURE),
        "TEXT" => path(TEXT),
        "VISION" => path(VISION),
        "OUT" => out.join("r.jsonl").to_str().unwrap().to_owned(),
        "TRACES" => out.join("traces").to_str().unwrap().to_owned(),
        "PAGE" => out.join("page.html").to_str().unwrap().to_owned(),
        word => word.to_owned(),
    };
    let words = args.split_whitespace().map(word);
    words.chain(["-t".to_owned(), "1".to_owned()]).collect()
}

fn records(out: &Path) -> (Value, Vec<Value>) {
    let text = fs::read_to_string(out.join("r.jsonl")).unwrap();
    let mut lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    (lines.next().unwrap(), lines.collect())
}

fn run(args: &str, out: &Path) -> Value {
    serde_json::from_str(&answer(&words(&format!("{args} -o json"), out))).unwrap()
}

fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("{pointer} of {value}"))
}

fn row<'v>(printed: &'v Value, contender: &str) -> &'v Value {
    let rows = printed["summary"]["rows"].as_array().unwrap();
    let found = rows
        .iter()
        .find(|r| r["contender"] == contender && r["task"] == "all");
    found.unwrap_or_else(|| panic!("{contender} in {printed}"))
}

#[test]
fn questions_are_scored_and_saved() {
    let folder = TempDir::new().unwrap();
    let out = folder.path();
    let args = "eval QUESTIONS --limit 6 --kv-policy full,hae,random --kv-budget 0.3,0.6 --distance --out OUT";
    let printed = run(args, out);
    let (header, answers) = records(out);
    assert_eq!(header["record"], "header");
    assert_eq!(header["command"], "eval");
    assert_eq!(header["questions"]["n"], 6);
    let names: Vec<&str> = header["contenders"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["full", "hae@0.3", "hae@0.6", "random@0.3", "random@0.6"]
    );
    assert_eq!(answers.len(), 30);
    for a in &answers {
        let prompt = number(a, "/tokens/prompt/text") + number(a, "/tokens/prompt/vision");
        let peak = number(a, "/kv/peak_decoding");
        match a["budget"]["share"].as_f64() {
            Some(share) => assert!(peak <= (share * prompt).round(), "{a}"),
            None => assert!(peak >= prompt, "{a}"),
        }
        let per_cell = number(a, "/kv/bytes_per_cell");
        assert_eq!(number(a, "/kv/bytes_peak_decoding"), per_cell * peak);
        assert!(number(a, "/kv/bytes_in_use") <= number(a, "/kv/bytes_allocated"));
        assert!(number(a, "/timings/ttft_ms") >= number(a, "/timings/vision_encode_ms"));
        assert_eq!(a["images"][0], set("images/u000.png"));
        assert!(!a["prompt"].as_str().unwrap().contains("<|"), "{a}");
        assert_eq!(a["expected"].as_array().unwrap().len(), 1);
        assert_eq!(
            a["right"] == true,
            a["answer"].as_str().unwrap().trim() == a["expected"][0]
        );
        let kl: Vec<f64> = a["distance"]["kl"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect();
        let mean = kl.iter().sum::<f64>() / kl.len() as f64;
        assert!((number(a, "/distance/kl_mean") - mean).abs() < 1e-6 * (1.0 + mean));
        if a["contender"] == "full" {
            assert!(kl.iter().all(|&kl| kl == 0.0), "{a}");
            assert_eq!(a["right"], true, "{a}");
        }
    }
    assert_eq!(number(row(&printed, "full"), "/accuracy"), 1.0);
    assert_eq!(number(row(&printed, "full"), "/kl_mean"), 0.0);
    assert!(number(row(&printed, "random@0.3"), "/kl_mean") > 0.0);
    assert!(number(row(&printed, "hae@0.3"), "/kv_of_first") < 0.31);
    let compared = |list: &str| printed["summary"][list].as_array().unwrap().len();
    assert_eq!((compared("against_first"), compared("at_budget")), (4, 2));

    // Asked again with the same file, nothing is asked; cut off, what is missing is.
    let whole = fs::read(out.join("r.jsonl")).unwrap();
    assert_eq!(run(args, out)["summary"], printed["summary"]);
    assert_eq!(fs::read(out.join("r.jsonl")).unwrap(), whole);
    let lines: Vec<&[u8]> = whole.split_inclusive(|&b| b == b'\n').collect();
    let mut cut = lines[..18].concat();
    cut.extend(&lines[18][..99]);
    fs::write(out.join("r.jsonl"), cut).unwrap();
    let again = run(args, out);
    let (_, second) = records(out);
    assert_eq!(second.len(), 30);
    let said = |answers: &[Value]| {
        let mut said: Vec<String> = answers
            .iter()
            .map(|a| {
                format!(
                    "{} {} {} {}",
                    a["id"], a["contender"], a["answer"], a["distance"]["kl_mean"]
                )
            })
            .collect();
        said.sort();
        said
    };
    assert_eq!(said(&second), said(&answers));
    assert_eq!(
        row(&again, "hae@0.3")["right"],
        row(&printed, "hae@0.3")["right"]
    );

    // Something else is another file's.
    let error = refusal(&words(
        "eval QUESTIONS --limit 6 --kv-policy full --out OUT",
        out,
    ));
    assert!(error.contains("r.jsonl: was begun with contenders full,hae@0.3,hae@0.6,random@0.3,random@0.6, this run has full"), "{error}");
    // So are answers of the same policies that looked at something else.
    let error = refusal(&words(&format!("{args} --attend 0.5"), out));
    let expected =
        r#"r.jsonl: was begun with full.cache.attend null, this run has {"vision":{"share":0.5},"#;
    assert!(error.contains(expected), "{error}");
}

/// Every answer names a trace: of decisions that hold, of the full cache for others to replay, and
/// for a report, which shows it with the results.
#[test]
fn questions_are_traced() {
    let folder = TempDir::new().unwrap();
    let out = folder.path();
    let asked = "eval QUESTIONS --limit 2 --kv-policy full,hae,random --kv-budget 0.5 --out OUT";
    let plain = run(asked, out);
    fs::remove_file(out.join("r.jsonl")).unwrap();
    let traced = run(&format!("{asked} --trace TRACES"), out);
    let (_, answers) = records(out);
    assert_eq!(answers.len(), 6);
    let mut files = std::collections::BTreeSet::new();
    for a in &answers {
        let path = a["trace"].as_str().unwrap();
        assert!(files.insert(path.to_owned()), "{path} twice");
        let replayed = |args: &[&str]| -> Value {
            let args = [&["replay", "-o", "json", path], args].concat();
            serde_json::from_str(&answer(&args)).unwrap()
        };
        match a["policy"].as_str().unwrap() {
            "full" => {
                let lost = replayed(&["--kv-policy", "random@0.5"]);
                assert!(number(&lost, "/summary/0/lost_mean") > 0.0, "{lost}");
            }
            _ => {
                // One decision after the prompt, and one after each token that went in.
                let verified = replayed(&[]);
                let last = f64::from(u8::from(a["finish"] == "length"));
                let steps = number(a, "/tokens/generated") - last;
                assert_eq!(number(&verified[0], "/verified/steps"), steps, "{a}");
                assert_eq!(number(&verified[0], "/verified/plans"), steps + 1.0, "{a}");
            }
        }
    }
    // Recording changes no answer.
    let said = |printed: &Value| {
        let rows = printed["summary"]["rows"].as_array().unwrap();
        let right: Vec<Value> = rows.iter().map(|row| row["right"].clone()).collect();
        right
    };
    assert_eq!(said(&plain), said(&traced));
    answer(&words("report OUT -o PAGE", out)[..4]);
    let page = fs::read_to_string(out.join("page.html")).unwrap();
    for file in files {
        let name = Path::new(&file).file_name().unwrap().to_str().unwrap();
        assert!(page.contains(name), "{name}");
    }
    let no_results = refusal_line("eval QUESTIONS --limit 1 --trace TRACES", out);
    assert!(no_results.contains("--out"), "{no_results}");
}

/// What clap says to a command line that it does not take.
fn refusal_line(args: &str, out: &Path) -> String {
    let output = hae().args(words(args, out)).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// The same as two processes: parts of a file that have nothing in common.
#[test]
fn parts_do_not_overlap() {
    let folder = TempDir::new().unwrap();
    let ids = |part: &str| -> Vec<String> {
        let out = folder.path().join(part);
        fs::create_dir(&out).unwrap();
        let args =
            format!("eval QUESTIONS --part {part} --every 40 --kv-policy full -n 1 --out OUT");
        run(&args, &out);
        let (header, answers) = records(&out);
        assert_eq!(header["questions"]["part"], format!("{part}:0.5"));
        answers
            .iter()
            .map(|a| a["images"][0].as_str().unwrap().to_owned())
            .collect()
    };
    let (tune, test) = (ids("tune"), ids("test"));
    assert!(tune.len() > 10 && test.len() > 10);
    assert!(tune.iter().all(|image| !test.contains(image)));
}

#[test]
fn chats_and_stories_are_asked() {
    let folder = TempDir::new().unwrap();
    let out = folder.path();
    let printed = run(
        "eval CHATS --limit 1 --kv-policy full,hae --kv-budget 0.5 --out OUT",
        out,
    );
    let (_, answers) = records(out);
    let turns = |policy: &str| -> Vec<u64> {
        let own = answers.iter().filter(|a| a["policy"] == policy);
        own.map(|a| a["turn"].as_u64().unwrap()).collect()
    };
    assert_eq!(turns("full"), (0..8).collect::<Vec<u64>>());
    assert_eq!(turns("hae"), (0..8).collect::<Vec<u64>>());
    assert_eq!(number(row(&printed, "full"), "/right"), 8.0);
    // Later questions go in behind the first, whose picture they do not repeat.
    let full: Vec<&Value> = answers.iter().filter(|a| a["policy"] == "full").collect();
    assert_eq!(number(full[1], "/tokens/prompt/vision"), 0.0);
    assert!(number(full[1], "/kv/cells/live/vision") > 100.0);

    let out = &folder.path().join("stories");
    fs::create_dir(out).unwrap();
    let printed = run("eval STORIES --limit 1 --kv-policy full --out OUT", out);
    let (_, answers) = records(out);
    let facts = &answers[0]["facts"];
    assert_eq!(facts["required"], facts["made"]);
    assert_eq!(
        (&facts["said"], &answers[0]["right"]),
        (&facts["true"], &Value::Bool(true))
    );
    assert_eq!(number(row(&printed, "full"), "/recall"), 1.0);
    assert_eq!(number(row(&printed, "full"), "/stories_whole"), 1.0);
    assert!(row(&printed, "full")["accuracy"].is_null());
}

#[test]
fn a_missed_threshold_is_exit_code_1() {
    let exit = |args: &str| {
        let output = hae().args(words(args, Path::new("."))).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.stdout.is_empty());
        (output.status.code(), stderr)
    };
    let asked = "eval QUESTIONS --limit 4 --kv-policy full,random --kv-budget 0.15";
    let (code, stderr) = exit(&format!("{asked} --min-accuracy 1 --max-kl 0"));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("hae: random@0.15: its mean KL is ") && stderr.contains("above --max-kl 0"),
        "{stderr}"
    );
    assert!(!stderr.contains("full:"), "{stderr}");
    let (code, stderr) =
        exit("eval QUESTIONS --limit 4 --kv-policy full --min-accuracy 1 --max-kl 0");
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
}

#[test]
fn prompts_are_compared() {
    let folder = TempDir::new().unwrap();
    let mut args: Vec<String> = words(
        "compare --image PICTURE -r 2 --kv-policy full,hae,tova --kv-budget 0.5 --out OUT -o json",
        folder.path(),
    );
    args.extend(["-p".into(), "Where is the pink heart?".into()]);
    let printed: Value = serde_json::from_str(&answer(&args)).unwrap();
    let answers = printed["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["answer"], " Row 3, column 4");
    assert_eq!(answers[0]["distance"]["kl_mean"], 0.0);
    assert!(answers.iter().all(|a| a["right"].is_null()));
    let (_, mut saved) = records(folder.path());
    let names: Vec<&Value> = answers.iter().map(|a| &a["contender"]).collect();
    assert_eq!(names, ["full", "hae@0.5", "tova@0.5"]);
    // Policies run by turns, and are saved as they come.
    let place = |a: &Value| names.iter().position(|&name| *name == a["contender"]);
    saved.sort_by_key(place);
    let said =
        |answers: &[Value]| -> Vec<Value> { answers.iter().map(|a| a["answer"].clone()).collect() };
    assert_eq!(said(&saved), said(answers));

    args.retain(|word| {
        !["--out", "-o", "json"].contains(&word.as_str()) && !word.ends_with("r.jsonl")
    });
    let table = answer(&args);
    for text in [
        "Row 3, column 4",
        "| hae@0.5 ",
        "KV / full",
        "KL mean",
        "TTFT ms",
    ] {
        assert!(table.contains(text), "{text} in:\n{table}");
    }

    // A file of prompts, none with an answer.
    let file = folder.path().join("p.jsonl");
    fs::write(
        &file,
        "{\"question\": \"Hello\"}\n{\"question\": \"Who are you?\"}\n",
    )
    .unwrap();
    let args = format!(
        "compare -f {} -n 8 -r 1 --kv-policy full,streaming_llm --kv-budget 22 -o csv",
        file.display()
    );
    let text = answer(&words(&args, folder.path()));
    let mut table = csv::Reader::from_reader(text.as_bytes());
    let columns = table.headers().unwrap().clone();
    let at = |name: &str| columns.iter().position(|c| c == name).unwrap();
    let rows: Vec<csv::StringRecord> = table.records().map(Result::unwrap).collect();
    assert_eq!(&rows[0][at("contender")], "full");
    assert_eq!(&rows[1][at("contender")], "streaming_llm@22");
    assert_eq!((&rows[1][at("budget")], &rows[1][at("n")]), ("22", "2"));
    assert_eq!(&rows[0][at("kl_mean")], "0.0");
}

fn questions(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("q.jsonl");
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn bad_input_is_named() {
    let folder = TempDir::new().unwrap();
    let out = folder.path();
    let refuses = |args: &str, expected: &str| {
        let line = refusal(&words(args, out));
        assert!(
            line.starts_with("hae: ") && line.contains(expected),
            "{args}: expected \"{expected}\" in: {line}"
        );
    };
    refuses(
        "eval QUESTIONS --kv-policy full,nothing",
        "--kv-policy: \"nothing\": expected names of full, hae",
    );
    refuses(
        "eval QUESTIONS --kv-policy full,full",
        "--kv-policy: full is in the list twice",
    );
    refuses(
        "eval QUESTIONS --kv-policy full --kv-budget 0.5",
        "--kv-budget: the policy full does not read it",
    );
    for (budget, expected) in [
        (
            "0.0",
            "--kv-budget: a share of 0, expected more than 0, up to 1",
        ),
        ("0.5,1.5", "--kv-budget: a share of 1.5"),
        ("3", "--kv-budget: 3 cells, expected at least"),
        ("0.5,0.5", "--kv-budget: 0.5 is in the list twice"),
        (
            "99999",
            "--kv-budget: 99999 cells, but the context holds 4096",
        ),
    ] {
        refuses(&format!("eval QUESTIONS --kv-budget {budget}"), expected);
        refuses(&format!("compare -p hi --kv-budget {budget}"), expected);
    }
    refuses(
        "eval QUESTIONS --min-accuracy 95",
        "--min-accuracy: 95, expected a share from 0 to 1",
    );
    refuses(
        "eval QUESTIONS --max-kl -1",
        "--max-kl: -1, expected a number of at least 0",
    );
    refuses("eval QUESTIONS -n 0", "-n: 0 tokens");
    refuses("eval none.jsonl", "none.jsonl: No such file");
    refuses(
        "eval QUESTIONS --limit 1 --out none/r.jsonl",
        "none/r.jsonl: No such file",
    );
    refuses(
        "compare --image none.png -p hi",
        "--image: there is no picture none.png",
    );

    let good = "{\"question\": \"Hello\", \"answer\": \"Hello\"}\n";
    for (line, expected) in [
        (
            "{\"question\": \"Hello\", \"answer\": ",
            "q.jsonl: line 2: column 32: EOF while parsing",
        ),
        (
            "{\"image\": \"x.png\", \"question\": \"Why?\", \"answer\": \"x\"}",
            "line 2: there is no picture ",
        ),
        (
            "{\"question\": \"Why?\", \"answer\": \"\"}",
            "line 2: the answer is empty, expected text",
        ),
    ] {
        let path = questions(out, &format!("{good}{line}\n"));
        refuses(&format!("eval {}", path.display()), expected);
    }
    let path = questions(out, "");
    refuses(
        &format!("eval {}", path.display()),
        "q.jsonl: holds no question",
    );
    let path = questions(out, good);
    refuses(
        &format!("eval {} --part tune:0.0001", path.display()),
        "--part: leaves none of 1 questions",
    );
    // Found out when it is asked, with what was saved before.
    let path = questions(
        out,
        &format!(
            "{good}{{\"question\": \"{}\", \"answer\": \"x\"}}\n",
            "word ".repeat(600)
        ),
    );
    refuses(
        &format!(
            "eval {} --kv-policy full -c 256 -n 4 --out OUT",
            path.display()
        ),
        "line 2, question 2 under full: prompt needs ",
    );
    let (_, answers) = records(out);
    assert_eq!(answers.len(), 1);
    let file = out.join("r.jsonl");
    fs::write(&file, "hello\n").unwrap();
    refuses(
        &format!("eval {} --kv-policy full --out OUT", path.display()),
        "r.jsonl: line 1: ",
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "hello\n");
}

#[test]
fn a_broken_picture_is_named_with_its_question() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("x.png"), "no picture").unwrap();
    let path = questions(
        folder.path(),
        "{\"id\": \"a\", \"image\": \"x.png\", \"question\": \"Why?\", \"answer\": \"x\"}\n",
    );
    let line = refusal(&words(&format!("eval {}", path.display()), folder.path()));
    assert!(
        line.contains("line 1, question a: ") && line.contains("x.png: is no picture"),
        "{line}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_run_and_says_what_is_saved() {
    let line = refusal(&words(
        "eval QUESTIONS --limit 2 --kv-policy full --out /dev/full",
        Path::new("."),
    ));
    assert!(
        line.contains("/dev/full: No space left on device")
            && line.contains("; 0 answers are saved in it"),
        "{line}"
    );

    // A limit on the size of files, of 512 bytes each: the disk is full after some answers.
    let folder = TempDir::new().unwrap();
    let args = words(
        "eval QUESTIONS -m TEXT --mmproj VISION --limit 8 --kv-policy full --out OUT",
        folder.path(),
    );
    let script = "trap '' XFSZ; ulimit -f 12; exec \"$0\" \"$@\"";
    let program = assert_cmd::cargo::cargo_bin("hae");
    let output = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(&program)
        .args(&args)
        .output()
        .unwrap();
    let line = refusal_of(&output);
    let saved: usize = line
        .split("; ")
        .last()
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        line.contains("r.jsonl: File too large") && saved > 0,
        "{line}"
    );
    let text = fs::read(folder.path().join("r.jsonl")).unwrap();
    assert_eq!(text.iter().filter(|&&b| b == b'\n').count(), saved + 1);
    // With room again, it goes on.
    run(&args[..args.len() - 2].join(" "), folder.path());
    assert_eq!(records(folder.path()).1.len(), 8);
}
