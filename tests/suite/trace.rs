//! Traces of the real model: what `hae run --trace` writes, `hae replay` and `hae report` read.

use std::path::{Path, PathBuf};

use hae::image::hd::{Layout, Place, View};
use hae::image::{self, Picture};
use hae::llama::Vision;
use hae::replay::tapes;
use hae::trace::{self, Cut, Record};
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::fixture::json;
use crate::model::{PICTURE, STORY, converted, load, load_vision, repository};
use crate::npz::golden;

const STEPS: usize = 60;

/// A story with its trace, and what the program said.
fn told(folder: &TempDir, policy: &[&str]) -> (PathBuf, String) {
    let path = folder.path().join("a.trace");
    let picture = repository(PICTURE);
    let start = [
        "run",
        "--image",
        picture.to_str().unwrap(),
        "-p",
        STORY,
        "--temp",
        "0",
        "-t",
        "1",
        "-n",
        "61",
        "--trace",
        path.to_str().unwrap(),
    ];
    let text = answer(&[&start[..], policy].concat());
    (path, text)
}

fn replayed(args: &[&str]) -> Value {
    let args = [&["replay", "-o", "json"], args].concat();
    serde_json::from_str(&answer(&args)).unwrap()
}

#[test]
fn full_is_recorded_for_every_other_policy() {
    let folder = TempDir::new().unwrap();
    let (path, text) = told(&folder, &["--kv-policy", "full"]);
    let (header, records) = trace::read(&path, Cut::Refuse).unwrap();
    assert_eq!(header.layers, (0..header.n_layer).collect::<Vec<_>>());

    // Every token's text is there, and every row of attention is a whole one.
    let mut words = Vec::new();
    let mut rows = 0;
    for record in &records {
        match record {
            Record::Text { bytes, .. } => words.extend(bytes.iter()),
            Record::Observed { queries, sum, .. } => {
                let mass: f32 = sum.iter().sum();
                let n = queries.len() as f32;
                assert!((mass - n).abs() < 4e-3 * n, "{mass} of {n} rows");
                rows += queries.len();
            }
            _ => {}
        }
    }
    let words = String::from_utf8(words).unwrap();
    let (said, _) = text.trim_end().rsplit_once(' ').unwrap();
    assert!(
        words.ends_with(said) || words.contains(said),
        "{words:?} {said:?}"
    );
    let tapes = tapes(&path, &header, &records).unwrap();
    assert_eq!((tapes.len(), tapes[0].steps()), (1, STEPS));
    assert_eq!(rows, tapes[0].len());

    let path = path.to_str().unwrap();
    let policies = "full,hae@0.5,ddes@0.5,h2o@0.5,tova@0.5,snapkv@0.7,streaming_llm@0.5,random@0.5,context_shift@0.9";
    let all = replayed(&[path, "--kv-policy", policies]);
    let rows = all["traces"].as_array().unwrap();
    assert_eq!(rows.len(), 9);
    for row in rows {
        let lost = row["lost"]["total"].as_f64().unwrap();
        let full = row["policy"] == "full";
        assert_eq!(row["steps"], STEPS as u64, "{row}");
        assert!(full == (lost == 0.0) && lost < STEPS as f64, "{row}");
    }
    // A policy that looks at one layer only is not replayed on the mean of all.
    let line = refusal(&["replay", path, "--kv-policy", "fastv@0.5"]);
    assert!(
        line.contains("--score-layers: fastv scores by layers [1]"),
        "{line}"
    );
}

#[test]
fn a_policy_is_held_against_its_own_decisions() {
    for policy in [
        &["--kv-policy", "hae", "--kv-budget", "0.5"][..],
        &[
            "--kv-policy",
            "hae",
            "--dap-mode",
            "early",
            "--kv-budget",
            "0.5",
        ],
        &["--kv-policy", "snapkv", "--kv-budget", "0.6"],
        &[
            "--kv-policy",
            "random",
            "--kv-budget",
            "0.5",
            "--kv-seed",
            "7",
        ],
        &["--kv-policy", "context_shift", "--kv-budget", "0.9"],
    ] {
        let folder = TempDir::new().unwrap();
        let (path, text) = told(&folder, policy);
        // Recording changes nothing.
        let picture = repository(PICTURE);
        let start = ["run", "--image", picture.to_str().unwrap(), "-p", STORY];
        let rest = ["--temp", "0", "-t", "1", "-n", "61"];
        assert_eq!(
            answer(&[&start[..], &rest, policy].concat()),
            text,
            "{policy:?}"
        );
        let path = path.to_str().unwrap();
        let checked = replayed(&[path]);
        let verified = &checked[0]["verified"];
        let steps = verified["steps"].as_u64().unwrap();
        // Some stories end early.
        assert!((20..=STEPS as u64).contains(&steps), "{policy:?}");
        assert_eq!(verified["plans"], steps + 1);
        let line = refusal(&["replay", path, "--kv-policy", "h2o"]);
        assert!(line.contains("a.trace: was recorded under"), "{line}");
        // A cut file is refused, or taken as far as it goes.
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 5]).unwrap();
        let line = refusal(&["replay", path]);
        assert!(line.contains("a.trace: is cut off in block"), "{line}");
        let partial = replayed(&[path, "--partial"]);
        assert!(partial[0]["verified"]["plans"].as_u64().unwrap() > 0);
    }
}

#[test]
fn bins_of_several_sizes_are_held_against_none() {
    let folder = TempDir::new().unwrap();
    let (path, _) = told(&folder, &["--kv-policy", "full"]);
    let path = path.to_str().unwrap();
    let args = ["--kv-policy", "ddes@0.6", "--bin-sizes", "1-64*2"];
    let all = replayed(&[&[path][..], &args].concat());
    let summary = all["summary"].as_array().unwrap();
    assert_eq!(summary.len(), 8);
    for row in summary {
        // The peak is the budget, whatever the bin takes of it.
        assert_eq!(row["peak_decoding"], summary[0]["peak_decoding"]);
        let compared = row["setting"] != "ddes@0.6 greedy";
        assert_eq!(row["less_than_greedy"].is_u64(), compared);
    }
    // With as many live cells as the greedy policy, a bin is more of everything.
    let live = replayed(&[&[path, "--against", "live"][..], &args].concat());
    for row in &live["summary"].as_array().unwrap()[2..] {
        assert_eq!(row["less_than_greedy"], 1, "{row}");
    }
    let table = answer(&[&["replay", path][..], &args].concat());
    assert_eq!(table.lines().count(), 10, "{table}");
    let csv = answer(&[&["replay", path, "-o", "csv"][..], &args].concat());
    assert_eq!(csv.lines().count(), 9, "{csv}");
}

#[test]
fn a_report_is_one_page() {
    let folder = TempDir::new().unwrap();
    let (path, text) = told(&folder, &["--kv-policy", "hae", "--kv-budget", "0.4"]);
    let page = folder.path().join("report.html");
    let (path, out) = (path.to_str().unwrap(), page.to_str().unwrap());
    assert_eq!(answer(&["report", "--trace", path, "-o", out]), "");
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("data:image/jpeg;base64,") && html.contains("2 x 2 crops"));
    assert!(html.contains("class=\"pruned\"") && html.contains("Cells of the cache"));
    let first = text.split_whitespace().next().unwrap();
    assert!(html.contains(first), "{first}");
}

#[test]
fn what_cannot_be_shown_or_replayed() {
    let folder = TempDir::new().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (page, other) = (file("a.html"), file("other"));
    std::fs::write(&other, "{}\n").unwrap();
    let line = refusal(&["report", "-o", &page]);
    assert!(line.contains("report: nothing to show"), "{line}");
    // The header of results without a single answer.
    let empty = file("empty.jsonl");
    let header = serde_json::json!({
        "record": "header", "version": 1, "command": "eval", "time": 0, "build": {},
        "model": { "file": "m", "sha256": "" }, "mmproj": null,
        "questions": {
            "file": "q", "sha256": "", "format": "jsonl", "part": null, "every": 1,
            "limit": null, "n": 0,
        },
        "context": {}, "seed": 0, "n_predict": null, "distance": false, "contenders": [],
    });
    std::fs::write(&empty, format!("{header}\n")).unwrap();
    let line = refusal(&["report", &empty, "-o", &page]);
    assert!(
        line.ends_with("empty.jsonl: holds no results, expected at least one"),
        "{line}"
    );
    let line = refusal(&["report", &other, "-o", &page]);
    assert!(line.contains("other: line 1: "), "{line}");
    let line = refusal(&["report", "--trace", &other, "-o", &page]);
    assert!(line.ends_with("other: is no trace of hae"), "{line}");
    let line = refusal(&["report", "--trace", &file("none"), "-o", &page]);
    assert!(line.contains("none: "), "{line}");
    assert!(!Path::new(&page).exists());

    let line = refusal(&["replay", &other]);
    assert!(line.ends_with("other: is no trace of hae"), "{line}");
    let line = refusal(&["replay", &other, "--kv-policy", "best"]);
    assert!(
        line.contains("--kv-policy: \"best\": expected one of full, hae"),
        "{line}"
    );
    let line = refusal(&["replay", &other, "--kv-policy", "h2o", "--bin-sizes", "4"]);
    assert!(
        line.contains("--bin-sizes: no policy with a recycle bin"),
        "{line}"
    );
    let line = refusal(&["replay", &other, "--bin-sizes", "4"]);
    assert!(line.contains("--kv-policy: is not given"), "{line}");
    let missing = file("no/a.trace");
    let line = refusal(&["run", "-p", "hi", "-n", "1", "--trace", &missing]);
    assert!(line.contains("a.trace: "), "{line}");
    let line = refusal(&["run", "-p", "hi", "--trace", &page, "--score-layers", "99"]);
    assert!(line.contains("--score-layers: layer 99"), "{line}");
    let line = refusal(&["run", "-p", "hi", "--trace", &page, "--bin-size", "2"]);
    assert!(
        line.contains("--bin-size: the policy full does not read it"),
        "{line}"
    );
}

/// A disk that is full costs the trace, not the answer.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk() {
    let args = [
        "run",
        "-p",
        "hi",
        "-n",
        "4",
        "--temp",
        "0",
        "--trace",
        "/dev/full",
    ];
    let output = hae().args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("/dev/full: ") && stderr.lines().count() == 1,
        "{stderr}"
    );
}

#[test]
fn the_layout_is_the_ports() {
    let index = json(&golden("hd/index.json"));
    let cut = load_cut();
    for row in index["pictures"].as_array().unwrap() {
        let number = |name: &str| row[name].as_u64().unwrap() as u32;
        let layout = Layout {
            width: number("width"),
            height: number("height"),
            cut,
        };
        let page = layout.page().unwrap();
        assert_eq!(
            (page.rows, page.cols),
            (number("rows"), number("cols")),
            "{row}"
        );
        assert_eq!(layout.places().len(), number("tokens") as usize, "{row}");
    }
}

/// The sizes of the tiny model's crops, as its vision file says.
fn load_cut() -> hae::image::hd::Cut {
    let (text, vision) = converted("f32");
    let model = load(text);
    let vision = load_vision(vision, &model);
    let picture = blank(100, 100);
    vision.hd_layout(&picture).unwrap().cut
}

fn blank(width: u32, height: u32) -> Picture {
    Picture {
        width,
        height,
        rgb: vec![255; (width * height * 3) as usize],
        num_crops: None,
    }
}

/// What the vision tower makes of a patch changes most where the layout says that the patch lies:
/// for wide and tall pictures, with margins, in both views.
#[test]
fn patches_lie_where_the_layout_says() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    for name in ["500x200.png", "200x500.png", "640x480.png"] {
        let picture = image::load(&golden(&format!("hd/{name}")), &image::Limits::default());
        let picture = picture.unwrap();
        let layout = vision.hd_layout(&picture).unwrap();
        let (page, places) = (layout.page().unwrap(), layout.places());
        let before = embeddings(&mut vision, &picture);
        let width = before.len() / places.len();
        // Some patches that lie on the picture, all over it.
        let inside = |place: &Place| match place {
            Place::Patch(View::Crops, rect) => {
                let own = page.picture;
                rect.x >= own.x
                    && rect.y >= own.y
                    && rect.x + rect.width <= own.x + own.width
                    && rect.y + rect.height <= own.y + own.height
            }
            _ => false,
        };
        let patches: Vec<usize> = (0..places.len()).filter(|&i| inside(&places[i])).collect();
        for &patch in patches.iter().step_by(patches.len() / 5) {
            let Place::Patch(_, rect) = places[patch] else {
                unreachable!()
            };
            let mut painted = picture.clone();
            // From the page to the picture's own pixels.
            let scale = f64::from(picture.width) / page.picture.width;
            let from = |at: f64, origin: f64| ((at - origin) * scale).round().max(0.0) as u32;
            let (x0, y0) = (from(rect.x, page.picture.x), from(rect.y, page.picture.y));
            let x1 = from(rect.x + rect.width, page.picture.x).min(picture.width);
            let y1 = from(rect.y + rect.height, page.picture.y).min(picture.height);
            for y in y0..y1 {
                for x in x0..x1 {
                    let at = (y * picture.width + x) as usize * 3;
                    for value in &mut painted.rgb[at..at + 3] {
                        *value = value.wrapping_add(128);
                    }
                }
            }
            let after = embeddings(&mut vision, &painted);
            let change = |i: usize| -> f64 {
                let row = i * width..(i + 1) * width;
                let pairs = before[row.clone()].iter().zip(&after[row]);
                pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum()
            };
            let most = |view: View| {
                let own = (0..places.len())
                    .filter(|&i| matches!(places[i], Place::Patch(of, _) if of == view));
                own.max_by(|&a, &b| change(a).total_cmp(&change(b)))
                    .unwrap()
            };
            assert_eq!(most(View::Crops), patch, "{name}");
            let Place::Patch(_, whole) = places[most(View::Whole)] else {
                unreachable!()
            };
            let (x, y) = (rect.x + rect.width / 2.0, rect.y + rect.height / 2.0);
            // The centre of the patch, or a neighbour where it lies at an edge between two.
            let near =
                |at: f64, start: f64, size: f64| at > start - size * 0.3 && at < start + size * 1.3;
            assert!(
                near(x, whole.x, whole.width) && near(y, whole.y, whole.height),
                "{name}: {rect:?} {whole:?}"
            );
        }
    }
}

fn embeddings(vision: &mut Vision, picture: &Picture) -> Vec<f32> {
    let pieces = vision
        .tokenize(&[hae::llama::Part::Picture(picture)], true)
        .unwrap();
    let image = pieces.into_iter().find_map(|piece| match piece {
        hae::llama::Piece::Image(image) => Some(image),
        hae::llama::Piece::Text(_) => None,
    });
    vision.encode(&image.unwrap()).unwrap().data
}
