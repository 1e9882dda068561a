//! Reads the golden arrays.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use npyz::npz::NpzArchive;

/// A row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Array {
    /// Row `i` of the first axis.
    pub fn row(&self, i: usize) -> &[f32] {
        let n = self.data.len() / self.shape[0];
        &self.data[i * n..(i + 1) * n]
    }
}

/// All float32 arrays of a file below `tests/golden/`, by name.
pub fn read(name: &str) -> BTreeMap<String, Array> {
    let path = golden(name);
    let file = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut archive = NpzArchive::new(BufReader::new(file)).unwrap();
    let names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    names
        .into_iter()
        .map(|name| {
            let array = archive.by_name(&name).unwrap().unwrap();
            assert_eq!(array.order(), npyz::Order::C, "{name}");
            let shape = array
                .shape()
                .iter()
                .map(|&n| usize::try_from(n).unwrap())
                .collect();
            let data = array.into_vec().unwrap();
            (name, Array { shape, data })
        })
        .collect()
}

/// A path below `tests/golden/`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// The largest absolute difference, for two slices of one length.
pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |max, (a, b)| {
        let diff = (a - b).abs();
        // A NaN must not hide behind a comparison that is false.
        if diff.is_nan() {
            f32::INFINITY
        } else {
            diff.max(max)
        }
    })
}

#[test]
fn golden_arrays_have_the_shapes_that_the_index_says() {
    for model in ["tiny-phi3v", "small-phi3v"] {
        let index = std::fs::read_to_string(golden(&format!("{model}/index.json"))).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let file = |row: &serde_json::Value, what: &str| {
            let name = row[what].as_str()?;
            Some(read(&format!("{model}/{name}")))
        };
        for prompt in index["prompts"].as_array().unwrap() {
            let logits = &file(prompt, "logits").unwrap()["logits"];
            let best =
                (0..logits.data.len()).max_by(|&a, &b| logits.data[a].total_cmp(&logits.data[b]));
            assert_eq!(
                best.unwrap() as u64,
                prompt["greedy_ids"][0].as_u64().unwrap()
            );
            let spans = prompt["image_spans"].as_array().unwrap();
            let length = |span: &serde_json::Value| span["length"].as_u64().unwrap() as usize;
            if let Some(scores) = file(prompt, "scores") {
                let n = spans.iter().map(length).sum();
                assert_eq!(scores["text"].shape, [8, n]);
                assert_eq!(scores["last"].shape, [8, n]);
            }
            let Some(embeddings) = file(prompt, "embeddings") else {
                continue;
            };
            for span in spans {
                let array = &embeddings[&format!("image_{}", span["image"])];
                assert_eq!(array.shape, [length(span), 256]);
                assert_eq!(array.row(1).len(), 256);
            }
        }
    }
}

#[test]
fn differences_see_nan() {
    assert_eq!(max_abs_diff(&[1.0, 2.0], &[1.0, 4.0]), 2.0);
    assert_eq!(max_abs_diff(&[f32::NAN, 2.0], &[1.0, 4.0]), f32::INFINITY);
}
