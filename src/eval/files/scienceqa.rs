//! ScienceQA (Lu et al. 2022): `problems.json`, an object of questions by number, and pictures in
//! `images/<split>/<id>/`.
//!
//! <https://github.com/lupantech/ScienceQA>. The task is the subject; a hint goes before the
//! question. Questions without a picture are asked, too.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::Source;
use crate::error::{Error, Result};
use crate::eval::question::{Expected, Image, Question, Turn, with_options};

#[derive(Deserialize)]
#[serde(expecting = "a problem: an object")]
struct Row {
    question: String,
    choices: Vec<String>,
    answer: usize,
    #[serde(default)]
    hint: String,
    image: Option<String>,
    split: String,
    subject: Option<String>,
}

pub(super) fn read(source: &Source) -> Result<Vec<Question>> {
    let rows: Map<String, Value> = serde_json::from_str(&source.text()?).map_err(|e| {
        Error::file(
            &source.path,
            format!("line {}: {}", e.line(), super::reason(&e)),
        )
    })?;
    let wanted = source.subset.as_deref().unwrap_or("test");
    let folder = source.images("images");
    let mut questions = Vec::new();
    let mut splits: Vec<String> = Vec::new();
    for (id, row) in rows {
        let place = format!("problem {id}");
        let row: Row =
            serde_json::from_value(row).map_err(|e| source.wrong(&place, super::reason(&e)))?;
        if row.split != wanted {
            if !splits.contains(&row.split) {
                splits.push(row.split);
            }
            continue;
        }
        let images = row
            .image
            .iter()
            .filter(|name| !name.is_empty())
            .map(|name| {
                let path = folder.join(&row.split).join(&id).join(name);
                Image::file(&source.path, &place, path)
            })
            .collect::<Result<_>>()?;
        let asked = match row.hint.trim() {
            "" => row.question,
            hint => format!("{hint}\n{}", row.question),
        };
        questions.push(Question {
            images,
            num_crops: None,
            turns: vec![Turn {
                task: row.subject.unwrap_or_else(|| "scienceqa".into()),
                text: with_options(&asked, &row.choices),
                raw: None,
                expected: Expected::Choice {
                    options: row.choices,
                    answer: row.answer,
                },
            }],
            id,
            place,
        });
    }
    if questions.is_empty() && !splits.is_empty() {
        let found = splits.join(", ");
        let reason = format!(
            "has no problem of the split {wanted:?}, expected `subset` with one of {found}"
        );
        return Err(Error::file(&source.path, reason));
    }
    Ok(questions)
}
