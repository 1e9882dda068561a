mod seen;

use std::path::Path;

use serde_bytes::ByteBuf;

use super::*;
use crate::cache::{Cell, Pos};
use crate::controller::{After, Origin};
use crate::image::hd::{Cut as Crops, Layout};
use crate::policy::{Limits, PolicyOptions};
use crate::trace::{Jpeg, Record};

/// Text before the picture.
const BEFORE: usize = 2;
const VISUAL: usize = 199;

fn inserted(from: usize, n: usize, origin: Origin) -> Record {
    Record::Inserted {
        cells: (from as Cell..(from + n) as Cell).collect(),
        pos: (from as Pos..(from + n) as Pos).collect(),
        origin,
    }
}

fn planned(after: After, bin: &[usize], evict: &[usize]) -> Record {
    let cells = |of: &[usize]| of.iter().map(|&cell| cell as Cell).collect();
    Record::Planned {
        after,
        bin: cells(bin),
        restore: Vec::new(),
        evict: cells(evict),
        shift: None,
    }
}

fn text(pos: usize, bytes: &[u8]) -> Record {
    Record::Text {
        pos: pos as Pos,
        bytes: ByteBuf::from(bytes),
    }
}

/// A picture of 336 x 336 pixels in the small model's crops, a question, and an answer.
fn records(evict: &[usize], answer: &[&[u8]], last: Record) -> Vec<Record> {
    let layout = Layout {
        width: 336,
        height: 336,
        cut: Crops {
            side: 168,
            tokens: 6,
            max_crops: 4,
        },
    };
    let jpeg = Jpeg {
        width: 336,
        height: 336,
        bytes: ByteBuf::from(vec![0xff]),
    };
    let mut records = vec![
        Record::Shown {
            image: 0,
            jpeg,
            layout: Some(layout),
        },
        Record::Turn,
        text(0, b"<script>"),
        text(1, b"&"),
        text(BEFORE + VISUAL, b" why?"),
        inserted(0, BEFORE, Origin::TEXT),
        inserted(BEFORE, VISUAL, Origin::picture(0)),
        inserted(BEFORE + VISUAL, 1, Origin::TEXT),
        planned(After::Prompt { pruned: false }, &[], evict),
    ];
    for (i, bytes) in answer.iter().enumerate() {
        let pos = BEFORE + VISUAL + 1 + i;
        records.push(inserted(pos, 1, Origin::TEXT));
        records.push(text(pos, bytes));
        records.push(planned(After::Step, &[], &[]));
    }
    *records.last_mut().unwrap() = last;
    records
}

fn page_of(records: &[Record]) -> String {
    let limits = Limits {
        n_layer: 2,
        n_cells: 512,
    };
    let options = PolicyOptions::default();
    let name = "a <b>".to_owned();
    let header = crate::trace::Header::new(
        name,
        limits,
        &crate::policy::PolicySpec::new("hae", options),
        vec![0],
    );
    let traced = Traced {
        path: "x&y.trace".into(),
        header,
        stories: stories(Path::new("x"), records).unwrap(),
        complete: true,
    };
    html(&[], &[traced]).unwrap()
}

/// The rectangles of a class, view by view.
fn rectangles(page: &str, class: &str) -> Vec<Vec<[f64; 4]>> {
    let views = page.split("<svg class=\"picture\"").skip(1);
    let start = format!("<rect class=\"{class}\" ");
    views
        .map(|view| {
            let view = view.split("</svg>").next().unwrap();
            let number = |rect: &str, name: &str| -> f64 {
                let value = rect.split(&format!("{name}=\"")).nth(1).unwrap();
                value.split('"').next().unwrap().parse().unwrap()
            };
            let rects = view.split(&start).skip(1);
            rects
                .map(|rect| ["x", "y", "width", "height"].map(|name| number(rect, name)))
                .collect()
        })
        .collect()
}

#[test]
fn an_evicted_patch_darkens_its_rectangle() {
    // Row 3, column 5 of the 12 x 12 patches of the crops; row 2, column 4 of the whole view.
    let crops = BEFORE + 3 * 13 + 5;
    let whole = BEFORE + 12 * 13 + 1 + 2 * 7 + 4;
    let last = planned(After::Step, &[BEFORE + 13], &[BEFORE]);
    let page = page_of(&records(&[crops, whole], &[b"a", b"b"], last));
    assert_eq!(
        rectangles(&page, "pruned"),
        [
            vec![[140.0, 84.0, 28.0, 28.0]],
            vec![[224.0, 112.0, 56.0, 56.0]]
        ]
    );
    assert_eq!(
        rectangles(&page, "binned"),
        [vec![[0.0, 28.0, 28.0, 28.0]], vec![]]
    );
    assert_eq!(
        rectangles(&page, "evicted"),
        [vec![[0.0, 0.0, 28.0, 28.0]], vec![]]
    );
    let kept: Vec<usize> = rectangles(&page, "kept").iter().map(Vec::len).collect();
    assert_eq!(kept, [144 - 3, 36 - 1]);
    let ends: Vec<usize> = rectangles(&page, "kept end").iter().map(Vec::len).collect();
    assert_eq!(ends, [12, 6]);
}

#[test]
fn words_are_dimmed_and_escaped() {
    let last = planned(After::Step, &[1], &[0]);
    // A character in two tokens stays one.
    let page = page_of(&records(&[], &[b" caf\xc3", b"\xa9", b"!"], last));
    assert!(
        page.contains("<span class=\"evicted\">&lt;script&gt;</span>"),
        "{page}"
    );
    assert!(page.contains("<span class=\"binned\">&amp;</span>"));
    assert!(page.contains("picture 1: 199 tokens"));
    assert!(page.contains(" caf\u{e9}!"));
    assert!(page.contains("x&amp;y.trace") && page.contains("a &lt;b&gt;"));
}

/// Nothing is fetched, and nothing runs.
#[test]
fn the_page_stands_alone() {
    let last = planned(After::Step, &[], &[5]);
    let page = page_of(&records(&[6, 7], &[b"a", b"b", b"c"], last));
    let outside = page.matches("http").count();
    assert_eq!(outside, page.matches("http://www.w3.org/2000/svg").count());
    for word in ["<script", "<link", "@import", "url(", "src=\"/", "<iframe"] {
        assert!(!page.contains(word), "{word}");
    }
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
}

#[test]
fn tokens_that_never_went_in_have_their_places() {
    // The first row of patches was pruned before the prompt went in.
    let mut records = records(&[], &[b"a"], planned(After::Step, &[], &[]));
    let Some(Record::Inserted { cells, pos, .. }) = records.get_mut(6) else {
        panic!("{records:?}")
    };
    cells.drain(..12);
    pos.drain(..12);
    let skipped = (BEFORE as Pos..BEFORE as Pos + 12).collect();
    records.insert(8, Record::Skipped(skipped));
    let page = page_of(&records);
    let pruned = rectangles(&page, "pruned");
    let expected: Vec<[f64; 4]> = (0..12)
        .map(|i| [28.0 * f64::from(i), 0.0, 28.0, 28.0])
        .collect();
    assert_eq!(pruned, [expected, vec![]]);
}

#[test]
fn a_picture_that_is_not_as_its_layout_says_is_shown_plain() {
    let mut records = records(&[], &[b"a"], planned(After::Step, &[], &[]));
    records[6] = inserted(BEFORE, VISUAL - 1, Origin::picture(0));
    records[7] = inserted(BEFORE + VISUAL, 1, Origin::TEXT);
    let page = page_of(&records);
    assert!(page.contains("198 visual tokens; where they lie"), "{page}");
}

fn results(right: &[(&str, [bool; 4])]) -> Results {
    let contender = |name: &str| {
        let (policy, budget) = name.split_once('@').unwrap_or((name, ""));
        let budget: Option<f64> = budget.parse().ok();
        serde_json::json!({
            "name": name, "policy": policy, "params": {},
            "budget": budget.map(|share| serde_json::json!({ "share": share })),
        })
    };
    let contenders: Vec<_> = right.iter().map(|(name, _)| contender(name)).collect();
    let header = serde_json::json!({
        "version": 1, "command": "eval", "time": 0, "build": { "version": "0.1.0" },
        "model": { "file": "m.gguf", "sha256": "" }, "mmproj": null,
        "questions": {
            "file": "q.jsonl", "sha256": "", "format": "jsonl", "part": null, "every": 1,
            "limit": null, "n": 4,
        },
        "context": {}, "seed": 1, "n_predict": null, "distance": false,
        "contenders": contenders,
    });
    let counts = serde_json::json!({ "text": 10, "vision": 20 });
    let answers = right.iter().enumerate().flat_map(|(i, (name, right))| {
        let contender = contender(name);
        let (counts, scale) = (&counts, 1 + 3 / (i as u64 + 1));
        right.iter().enumerate().map(move |(q, &right)| {
            let answer = serde_json::json!({
                "id": format!("q{q}"), "turn": 0, "task": if q < 2 { "where" } else { "count" },
                "contender": contender["name"], "policy": contender["policy"],
                "budget": contender["budget"], "images": [], "num_crops": null, "prompt": "?",
                "expected": ["a"], "answer": "a", "right": right, "chosen": null, "facts": null,
                "finish": "eog",
                "tokens": { "prompt": counts, "images": [20], "generated": 3 },
                "kv": {
                    "cells": {
                        "live": counts, "binned": counts, "evicted": counts, "restored": counts,
                        "recalled": counts, "peak": 60,
                    },
                    "peak_decoding": 50, "n_cells": 256, "bytes_per_cell": 1000,
                    "bytes_in_use": scale << 20, "bytes_peak": scale << 21,
                    "bytes_peak_decoding": scale << 20, "bytes_allocated": 1 << 22,
                    "bytes_allocated_peak": 1 << 22,
                },
                "timings": {
                    "vision_encode_ms": 1.0, "probe_ms": 0.0, "prefill_ms": 20.0,
                    "ttft_ms": 21.0, "tpot_ms": 2.5, "decode_ms": 9.0,
                },
                "evicted": {
                    "after_prefill": 1, "in_decoding": 2, "flushes": 1, "restores": 0,
                    "recalled": 0,
                },
                "distance": null, "trace": format!("t{q}.trace"),
            });
            serde_json::from_value(answer).unwrap()
        })
    });
    Results {
        path: "results & more.jsonl".into(),
        header: serde_json::from_value(header).unwrap(),
        answers: answers.collect(),
    }
}

#[test]
fn results_are_a_table_and_charts() {
    let results = results(&[
        ("full", [true; 4]),
        ("hae@0.4", [true, true, true, false]),
        ("random@0.4", [true, false, false, false]),
    ]);
    assert_eq!(results.traces().count(), 4, "each once");
    let page = html(&[results], &[]).unwrap();
    assert!(page.contains("results &amp; more.jsonl"));
    for (policy, right, mib) in [("full", "100.0", "4.00"), ("hae@0.4", "75.0", "2.00")] {
        let row = page.split("<tr>").find(|row| row.contains(policy)).unwrap();
        assert!(row.contains(&format!("<td>{right}</td>")), "{row}");
        assert!(row.contains(&format!("<td>{mib}</td>")), "{row}");
    }
    // One dot for each contender, in its colour, and bars for both times.
    assert_eq!(page.matches("<circle").count(), 3);
    assert_eq!(page.matches("<svg class=\"chart\"").count(), 3);
    for ink in 0..3 {
        assert!(page.contains(&format!("fill=\"var(--c{ink})\"")), "{ink}");
    }
    // By task: all of "where", half of "count".
    let tasks = page.split("Right answers by task").nth(1).unwrap();
    let row = tasks
        .split("<tr>")
        .find(|row| row.contains("hae@0.4"))
        .unwrap();
    assert!(row.contains("<td>50.0</td><td>100.0</td>"), "{row}");
}
