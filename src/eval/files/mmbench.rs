//! MMBench (Liu et al. 2023): a table with tabs between its columns, pictures in base64.
//!
//! <https://github.com/open-compass/MMBench>. Columns `index`, `question`, `hint`, `A` to `D` and
//! more, `answer`, `category`, `image`. An `image` that is a number is that of the row with this
//! index, as in the files whose options go round. The splits that are published without answers
//! cannot be scored.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::Source;
use crate::error::{Error, Result};
use crate::eval::question::{Expected, Image, MOST_OPTIONS, Question, Turn, letter, with_options};

/// An `image` that is shorter names a row, as in the authors' own reader.
const LONGEST_INDEX: usize = 64;

/// The columns by name.
struct Columns(HashMap<String, usize>);

impl Columns {
    /// Text of a column; `nan` is how an empty cell was written.
    fn get<'r>(&self, row: &'r csv::StringRecord, name: &str) -> Option<&'r str> {
        let text = row.get(*self.0.get(name)?)?.trim();
        (!text.is_empty() && text != "nan").then_some(text)
    }
}

pub(super) fn read(source: &Source) -> Result<Vec<Question>> {
    let path = &source.path;
    let mut table = csv::ReaderBuilder::new()
        .delimiter(b'\t')
        .from_path(path)
        .map_err(|e| refused(source, e))?;
    let header = table.headers().map_err(|e| refused(source, e))?;
    let columns = Columns(
        header
            .iter()
            .enumerate()
            .map(|(i, name)| (name.trim().to_owned(), i))
            .collect(),
    );
    for name in ["index", "question", "image", "A", "B", "answer"] {
        if !columns.0.contains_key(name) {
            let reason = format!("line 1: has no column {name}");
            let hint = match name {
                "answer" => ", expected a split that is published with answers",
                _ => ", expected MMBench's index, question, image, A, B, answer",
            };
            return Err(Error::file(path, reason + hint));
        }
    }
    // Pictures by index, so that rows can share them.
    let mut pictures: HashMap<String, Image> = HashMap::new();
    let mut questions = Vec::new();
    for row in table.records() {
        let row = row.map_err(|e| refused(source, e))?;
        let line = row.position().map_or(0, csv::Position::line);
        questions.push(question(source, &columns, &row, line, &mut pictures)?);
    }
    Ok(questions)
}

fn question(
    source: &Source,
    columns: &Columns,
    row: &csv::StringRecord,
    line: u64,
    pictures: &mut HashMap<String, Image>,
) -> Result<Question> {
    let place = format!("line {line}");
    let wrong = |reason: String| source.wrong(&place, reason);
    let needed = |name: &str| {
        columns
            .get(row, name)
            .ok_or_else(|| wrong(format!("{name} is empty, expected text")))
    };
    let id = needed("index")?.to_owned();
    let image = needed("image")?;
    let image = if image.len() <= LONGEST_INDEX {
        let of_row = pictures.get(image).cloned();
        of_row.ok_or_else(|| {
            wrong(format!(
                "its picture is that of row {image}, which does not come before it"
            ))
        })?
    } else {
        let bytes = STANDARD
            .decode(image)
            .map_err(|e| wrong(format!("the picture is no base64: {e}")))?;
        let inside = Image::Inside {
            name: format!("{}#{id}", source.path.display()),
            bytes: Arc::from(bytes),
        };
        pictures.insert(id.clone(), inside.clone());
        inside
    };
    let options: Vec<String> = (0..MOST_OPTIONS)
        .map_while(|i| columns.get(row, &letter(i).to_string()))
        .map(str::to_owned)
        .collect();
    let given = needed("answer")?;
    let answer = (0..options.len()).find(|&i| given == letter(i).to_string());
    let answer = answer.ok_or_else(|| {
        let n = options.len();
        wrong(format!(
            "the answer {given:?} is none of its {n} options, expected a letter"
        ))
    })?;
    let asked = needed("question")?;
    let asked = match columns.get(row, "hint") {
        Some(hint) => format!("{hint}\n{asked}"),
        None => asked.to_owned(),
    };
    Ok(Question {
        id,
        images: vec![image],
        num_crops: None,
        turns: vec![Turn {
            task: columns.get(row, "category").unwrap_or("mmbench").to_owned(),
            text: with_options(&asked, &options),
            raw: None,
            expected: Expected::Choice { options, answer },
        }],
        place,
    })
}

fn refused(source: &Source, e: csv::Error) -> Error {
    let path = &source.path;
    let line = e.position().map_or(1, csv::Position::line);
    match e.into_kind() {
        csv::ErrorKind::Io(e) => Error::io(path, e),
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            let reason = format!("line {line}: {len} columns, expected {expected_len}");
            Error::file(path, reason)
        }
        csv::ErrorKind::Utf8 { .. } => Error::file(path, format!("line {line}: is not UTF-8")),
        kind => Error::file(path, format!("line {line}: {kind:?}")),
    }
}
