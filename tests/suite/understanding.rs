//! Questions about pictures of the small model's test set, answered by the quantized files.
//!
//! Every fifth question of each task, so that the suite stays quick. The whole set, chats and
//! stories are scored by `models/train/score_gguf.py`, whose scores are kept in
//! `models/train/results`; the last test holds the documents to them.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use hae::controller::Controller;
use hae::engine::Engine;
use hae::generate::{Finish, Segment, Session};
use hae::image::{self, Picture};
use hae::llama::{CacheType, FlashAttention, Piece};
use hae::policy::{self, Limits, Observe, PolicyOptions};
use hae::prompt;
use hae::turn::segment;
use serde_json::Value;

use crate::fixture::json;
use crate::model::{TEXT, VISION, engine, exact, load, load_vision, quiet, repository};

const SET: &str = "tests/eval/small-phi3v/test";
const EVERY: usize = 5;
const N_CTX: u32 = 2048;

/// The rows that are asked, and how many of them PyTorch answers right.
fn questions() -> (Vec<Value>, usize) {
    let text = std::fs::read_to_string(repository(&format!("{SET}/understanding.jsonl"))).unwrap();
    let mut asked_of: HashMap<String, usize> = HashMap::new();
    let mut rows: Vec<Value> = Vec::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let asked = asked_of.entry(row["task"].to_string()).or_default();
        if asked.is_multiple_of(EVERY) {
            rows.push(row);
        }
        *asked += 1;
    }
    assert_eq!(asked_of.values().sum::<usize>(), 657);
    assert_eq!(asked_of.len(), 25, "tasks");
    for num_crops in [4, 6, 9, 12, 16] {
        assert!(
            rows.iter().any(|r| r["num_crops"] == num_crops),
            "{num_crops} crops"
        );
    }
    let scores = json(&repository(&format!("{SET}/scores.json")));
    let wrong = scores["understanding"]["wrong"].as_array().unwrap();
    let right = rows
        .iter()
        .filter(|row| !wrong.contains(&row["id"]))
        .count();
    (rows, right)
}

/// A picture's embeddings, which depend on nothing else: questions share them, and so do the text
/// models, which all have one vision file.
fn encoded(key: String, encode: impl FnOnce() -> Segment) -> Segment {
    type Known = HashMap<String, Arc<OnceLock<Segment>>>;
    static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);
    let cell = Arc::clone(KNOWN.lock().unwrap().entry(key).or_default());
    cell.get_or_init(encode).clone()
}

/// How many of `rows` a text model answers word for word.
fn right(rows: &[Value], text: &str, policy: &str) -> usize {
    let model = load(&repository(text));
    let mut vision = load_vision(&repository(VISION), &model);
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: N_CTX as usize,
    };
    let created = policy::create(policy, &PolicyOptions::default(), limits).unwrap();
    let mut context = exact(N_CTX);
    context.type_k = CacheType::F16;
    context.type_v = CacheType::F16;
    context.flash_attention = FlashAttention::Auto;
    if let Observe::Layers { layers, .. } = created.observe() {
        context.score_layers = layers;
    }
    let engine = engine(&model, context);
    let controller = Controller::new(created, engine.n_cells());
    let mut session = Session::new(engine, controller);

    let mut right = 0;
    for row in rows {
        let names: Vec<&str> = row["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_str().unwrap())
            .collect();
        let num_crops = row["num_crops"].as_u64().map(|n| n as u32);
        let picture = |name: &&str| {
            let path = repository(&format!("{SET}/{name}"));
            let picture = image::load(&path, &image::Limits::default()).unwrap();
            Picture {
                num_crops,
                ..picture
            }
        };
        let pictures: Vec<Picture> = names.iter().map(picture).collect();
        let (text, order) =
            prompt::place_pictures(row["prompt"].as_str().unwrap(), 0, pictures.len(), true)
                .unwrap();
        let ordered: Vec<_> = order.iter().map(|&i| &pictures[i]).collect();
        let pieces = prompt::tokenize(&model, Some(&vision), &text, &ordered, true).unwrap();
        let mut shown = order.iter().map(|&i| names[i]).zip(0..);
        let segments: Vec<Segment> = pieces
            .into_iter()
            .map(|piece| match piece {
                Piece::Text(tokens) => Segment::Tokens(tokens),
                Piece::Image(tokens) => {
                    let (name, number) = shown.next().unwrap();
                    encoded(format!("{number} {name}"), || {
                        segment(vision.encode(&tokens).unwrap(), number)
                    })
                }
            })
            .collect();
        session.engine.clear();
        session.controller.clear();
        session.forget();
        let answer = quiet(|hooks| session.generate(&segments, Some(256), hooks)).unwrap();
        let same = answer.text.trim() == row["answer"].as_str().unwrap();
        right += usize::from(same && answer.finish == Finish::Eog);
    }
    right
}

/// Right answers of a text model and of PyTorch. `--nocapture` shows them.
fn score(text: &str, policy: &str) -> (usize, usize) {
    let (rows, pytorch) = questions();
    let ours = right(&rows, text, policy);
    println!(
        "{text}, {policy}: {ours} of {}, PyTorch {pytorch}",
        rows.len()
    );
    (ours, pytorch)
}

#[test]
fn q8_0_understands_as_pytorch_does() {
    let (ours, pytorch) = score(TEXT, "full");
    assert!(ours.abs_diff(pytorch) <= 1);
}

#[test]
fn q4_k_m_understands_as_pytorch_does() {
    let (ours, pytorch) = score("models/small-phi3v-Q4_K_M.gguf", "full");
    assert!(ours.abs_diff(pytorch) <= 3);
}

/// With the defaults most of the visual tokens are gone before the first token of the answer, and
/// no answer is lost by it (docs/quality.md).
#[test]
fn hae_understands_as_pytorch_does() {
    let (ours, pytorch) = score(TEXT, "hae");
    assert!(ours.abs_diff(pytorch) <= 1);
}

/// The figures of the documents are those of the kept scores, and these were measured on the kept
/// files and the whole set.
#[test]
fn the_documents_say_what_was_scored() {
    let text = |path: &str| std::fs::read_to_string(repository(path)).unwrap();
    let sums = text("models/SHA256SUMS");
    let (readme, models) = (text("README.md"), text("models/README.md"));
    let quality = text("docs/quality.md");
    let mut columns = vec![json(&repository(&format!("{SET}/scores.json")))];
    for (name, file) in [
        ("Q8_0", "small-phi3v-Q8_0.gguf"),
        ("Q4_K_M", "small-phi3v-Q4_K_M.gguf"),
        ("Q8_0-hae", "small-phi3v-Q8_0.gguf"),
    ] {
        let scores = json(&repository(&format!("models/train/results/{name}.json")));
        for (key, file) in [("model", file), ("mmproj", "mmproj-small-phi3v-F16.gguf")] {
            let line = format!("{}  {file}\n", scores[key].as_str().unwrap());
            assert!(sums.contains(&line), "{name}: {file} is another one");
        }
        columns.push(scores);
    }
    let percent = |x: f64| {
        let text = format!("{:.1}", 100.0 * x);
        text.trim_end_matches(".0").to_owned()
    };
    let number = |x: &Value| x.as_f64().unwrap();
    for (row, part, n) in [
        ("**all questions** (657)", "/understanding", 657),
        ("**chat turns** (128)", "/chat", 128),
    ] {
        let cells: Vec<String> = columns
            .iter()
            .map(|scores| {
                let share = scores.pointer(part).unwrap();
                assert_eq!(share["n"], n);
                // What is kept is rounded.
                let hits = (number(&share["accuracy"]) * f64::from(n)).round();
                let mean = percent(hits / f64::from(n));
                let [low, high] = ["low", "high"].map(|key| percent(number(&share[key])));
                format!("{mean} ({low} to {high})")
            })
            .collect();
        let expected = format!("| {row} | {} |", cells.join(" | "));
        assert!(models.contains(&expected), "models/README.md: {expected}");
        for cell in &cells[1..] {
            assert!(quality.contains(cell.as_str()), "docs/quality.md: {cell}");
        }
    }
    let held = json(&repository("models/train/results/Q8_0-hae-budget.json"));
    for (kind, n) in [("story", 20), ("saga", 8)] {
        let alone = percent(number(&held["story"][kind]["recall"]));
        assert!(
            quality.contains(&alone) && models.contains(&alone),
            "{alone}"
        );
        let full = percent(number(&columns[1]["story"][kind]["recall"]));
        assert!(quality.contains(&full), "docs/quality.md: {full}");
        for key in ["recall", "precision"] {
            let cells: Vec<String> = columns
                .iter()
                .map(|scores| {
                    assert_eq!(scores["story"][kind]["n"], n);
                    percent(number(&scores["story"][kind][key]))
                })
                .collect();
            let expected = format!("| {} |", cells.join(" | "));
            assert!(
                models.contains(&expected),
                "models/README.md: {kind} {key} {expected}"
            );
        }
    }
    // The README repeats the full cache's right answers and facts.
    let full = &columns[1];
    let right = (number(&full["understanding"]["accuracy"]) * 657.0).round() / 657.0;
    let facts = number(&full["story"]["story"]["recall"]);
    let row = format!(
        "| `full` | {} | {} | 1 | 1 |",
        percent(right),
        percent(facts)
    );
    assert!(readme.contains(&row), "README.md: {row}");
}
