//! GQA (Hudson and Manning 2019): an object of questions by number, pictures by `imageId`.
//!
//! <https://cs.stanford.edu/people/dorarad/gqa/download.html>. The tasks are the structural types
//! (`verify`, `query`, `choose`, `compare`, `logical`).

use serde::Deserialize;
use serde_json::{Map, Value};

use super::Source;
use crate::error::{Error, Result};
use crate::eval::question::{Expected, Image, Question, Turn};

#[derive(Deserialize)]
#[serde(expecting = "a question: an object")]
struct Row {
    question: String,
    #[serde(rename = "imageId")]
    image_id: String,
    answer: String,
    types: Option<Types>,
}

#[derive(Deserialize)]
#[serde(expecting = "types: an object")]
struct Types {
    structural: Option<String>,
}

pub(super) fn read(source: &Source) -> Result<Vec<Question>> {
    let rows: Map<String, Value> = serde_json::from_str(&source.text()?).map_err(|e| {
        Error::file(
            &source.path,
            format!("line {}: {}", e.line(), super::reason(&e)),
        )
    })?;
    let folder = source.images("images");
    rows.into_iter()
        .map(|(id, row)| {
            let place = format!("question {id}");
            let row: Row =
                serde_json::from_value(row).map_err(|e| source.wrong(&place, super::reason(&e)))?;
            let path = folder.join(format!("{}.jpg", row.image_id));
            Ok(Question {
                images: vec![Image::file(&source.path, &place, path)?],
                num_crops: None,
                turns: vec![Turn {
                    task: row
                        .types
                        .and_then(|types| types.structural)
                        .unwrap_or_else(|| "gqa".into()),
                    text: format!(
                        "{}\nAnswer the question using a single word or phrase.",
                        row.question
                    ),
                    raw: None,
                    expected: Expected::Words(vec![row.answer]),
                }],
                id,
                place,
            })
        })
        .collect()
}
