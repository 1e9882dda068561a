//! MMMU (Yue et al. 2023): a parquet file for each subject, pictures inside.
//!
//! <https://huggingface.co/datasets/MMMU/MMMU>. Columns `id`, `question`, `options` (a Python list
//! as text), `answer`, `question_type`, `image_1` to `image_7`, each with `bytes`. `<image k>` in
//! a question or an option says where a picture goes; pictures that are not named beside others
//! that are, are not shown, and a question that names none has all of them in front. The task is
//! the subject, the middle of the id. Open questions are scored word for word, which is stricter
//! than the authors' own scoring.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::{Field, Row};

use super::Source;
use crate::error::{Error, Result};
use crate::eval::question::{Expected, Image, Question, Turn, letter, with_options};
use crate::guard::guarded;

const MOST_IMAGES: usize = 7;

pub(super) fn read(source: &Source) -> Result<Vec<Question>> {
    let path = &source.path;
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // What the reader says of a damaged file speaks of its own inside, and it may panic.
    let reader = guarded(|| SerializedFileReader::new(Whole(file))).and_then(|reader| reader.ok());
    let Some(reader) = reader else {
        let reason = "is no parquet file, or its footer is damaged: expected MMMU's as published";
        return Err(Error::file(path, reason));
    };
    let damaged = |number: usize| {
        let reason = "is damaged, expected MMMU's columns as published";
        source.wrong(&format!("row {number}"), reason)
    };
    let rows = guarded(|| reader.get_row_iter(None)).and_then(|rows| rows.ok());
    let mut rows = rows.ok_or_else(|| damaged(1))?;
    let mut questions = Vec::new();
    loop {
        let number = questions.len() + 1;
        match guarded(|| rows.next()) {
            Some(None) => return Ok(questions),
            Some(Some(Ok(row))) => questions.push(question(source, number, &row)?),
            Some(Some(Err(_))) | None => return Err(damaged(number)),
        }
    }
}

/// A file whose end is an error. parquet skips what lies behind it two thousand million times, if a page's header says
/// that there is so much.
struct Whole(File);

impl Length for Whole {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Whole {
    type T = BufReader<ToItsEnd>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let inside = self.0.get_read(start)?.into_inner();
        Ok(BufReader::new(ToItsEnd(inside)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        // It takes memory for what is asked.
        if start.saturating_add(length as u64) > self.len() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.0.get_bytes(start, length)
    }
}

struct ToItsEnd(File);

impl Read for ToItsEnd {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self.0.read(to)? {
            0 if !to.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            n => Ok(n),
        }
    }
}

fn question(source: &Source, number: usize, row: &Row) -> Result<Question> {
    let place = format!("row {number}");
    let wrong = |reason: String| source.wrong(&place, reason);
    let field = |name: &str| {
        row.get_column_iter()
            .find(|(n, _)| *n == name)
            .map(|(_, f)| f)
    };
    let text = |name: &str| match field(name) {
        Some(Field::Str(text)) => Ok(text.as_str()),
        Some(other) => Err(wrong(format!("{name} is {other}, expected text"))),
        None => Err(wrong(format!(
            "has no column {name}, expected MMMU's columns"
        ))),
    };
    let id = text("id")?.to_owned();
    let options = python_list(text("options")?).map_err(|e| wrong(format!("options: {e}")))?;
    let given = text("answer")?.trim().to_owned();
    let (expected, asked) = if text("question_type")? == "multiple-choice" {
        let found = (0..options.len()).find(|&i| given == letter(i).to_string());
        let answer = found.ok_or_else(|| {
            let n = options.len();
            wrong(format!(
                "the answer {given:?} is none of its {n} options, expected a letter"
            ))
        })?;
        let asked = with_options(text("question")?, &options);
        (Expected::Choice { options, answer }, asked)
    } else {
        let words = match given.starts_with('[') {
            true => python_list(&given).map_err(|e| wrong(format!("answer: {e}")))?,
            false => vec![given],
        };
        let asked =
            text("question")?.to_owned() + "\nAnswer the question using a single word or phrase.";
        (Expected::Words(words), asked)
    };
    let mut found = Vec::new();
    for k in 1..=MOST_IMAGES {
        let bytes = match field(&format!("image_{k}")) {
            Some(Field::Group(image)) => bytes_of(image),
            _ => None,
        };
        if let Some(bytes) = bytes {
            let name = format!("{}#{id}/image_{k}", source.path.display());
            found.push((k, Image::Inside { name, bytes }));
        }
    }
    let (text, images) = placed(&asked, found).map_err(wrong)?;
    Ok(Question {
        images,
        num_crops: None,
        turns: vec![Turn {
            task: subject(&id),
            text,
            raw: None,
            expected,
        }],
        id,
        place,
    })
}

fn bytes_of(image: &Row) -> Option<Arc<[u8]>> {
    image
        .get_column_iter()
        .find_map(|(name, field)| match field {
            Field::Bytes(bytes) if name == "bytes" => Some(Arc::from(bytes.data())),
            _ => None,
        })
}

/// `validation_Art_Theory_12` is about `Art_Theory`.
fn subject(id: &str) -> String {
    let middle = id
        .split_once('_')
        .and_then(|(_, rest)| rest.rsplit_once('_'));
    middle.map_or("mmmu", |(subject, _)| subject).to_owned()
}

/// Our marks for theirs: `<image k>` becomes `<|image_i|>` of the pictures that are there. A text
/// that names none gets them in front.
fn placed(asked: &str, found: Vec<(usize, Image)>) -> Result<(String, Vec<Image>), String> {
    let mut text = asked.to_owned();
    let mut images = Vec::new();
    let named = |k: usize| asked.contains(&format!("<image {k}>"));
    let any = (1..=MOST_IMAGES).any(named);
    for (k, image) in found {
        if any && !named(k) {
            continue;
        }
        images.push(image);
        text = text.replace(
            &format!("<image {k}>"),
            &format!("<|image_{}|>", images.len()),
        );
    }
    if let Some(k) = (1..=MOST_IMAGES).find(|k| text.contains(&format!("<image {k}>"))) {
        return Err(format!("names <image {k}>, but there is no image_{k}"));
    }
    Ok((text, images))
}

/// The items of a list of strings as Python prints it.
fn python_list(text: &str) -> Result<Vec<String>, String> {
    let bad = || format!("{text:?}, expected a list such as ['one', 'two']");
    let inner = text
        .trim()
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'));
    let mut rest = inner.ok_or_else(bad)?.trim_start();
    let mut items = Vec::new();
    while let Some(quote) = rest.chars().next() {
        if quote != '\'' && quote != '"' {
            return Err(bad());
        }
        let mut item = String::new();
        let mut chars = rest[1..].char_indices();
        let end = loop {
            match chars.next() {
                None => return Err(bad()),
                Some((at, c)) if c == quote => break 1 + at + c.len_utf8(),
                Some((_, '\\')) => match chars.next() {
                    Some((_, 'n')) => item.push('\n'),
                    Some((_, 't')) => item.push('\t'),
                    Some((_, c @ ('\\' | '\'' | '"'))) => item.push(c),
                    // Python keeps what it does not know; so does this.
                    Some((_, c)) => item.extend(['\\', c]),
                    None => return Err(bad()),
                },
                Some((_, c)) => item.push(c),
            }
        };
        items.push(item);
        rest = rest[end..].trim_start();
        match rest.strip_prefix(',') {
            Some(more) => rest = more.trim_start(),
            None if rest.is_empty() => {}
            None => return Err(bad()),
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python's ast.literal_eval makes of them.
    #[test]
    fn python_lists_are_read_as_python_reads_them() {
        let list = |text| python_list(text).unwrap();
        assert_eq!(list("[]"), Vec::<String>::new());
        assert_eq!(list("['a', 'b c']"), ["a", "b c"]);
        assert_eq!(
            list(r#"["it's", 'say "x"', 'it\'s', ]"#),
            ["it's", "say \"x\"", "it's"]
        );
        assert_eq!(
            list(r"['$\\frac{1}{2}$', 'x\ny']"),
            [r"$\frac{1}{2}$", "x\ny"]
        );
        for bad in ["", "a", "['a'", "['a]", "['a' 'b']", "[1]", "['a',, 'b']"] {
            assert!(python_list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn marks_follow_the_pictures_that_are_there() {
        let image = |k: usize| {
            let inside = Image::Inside {
                name: k.to_string(),
                bytes: Arc::from([]),
            };
            (k, inside)
        };
        let (text, images) = placed(
            "Is <image 3> like <image 1>?",
            vec![image(1), image(2), image(3)],
        )
        .unwrap();
        assert_eq!(text, "Is <|image_2|> like <|image_1|>?");
        assert_eq!(images, [image(1).1, image(3).1]);
        let (text, images) = placed("Why?", vec![image(1)]).unwrap();
        assert_eq!((text.as_str(), images.len()), ("Why?", 1));
        assert!(
            placed("<image 2>", vec![image(1)])
                .unwrap_err()
                .contains("<image 2>")
        );
    }

    #[test]
    fn the_subject_is_the_middle_of_the_id() {
        assert_eq!(subject("validation_Art_Theory_12"), "Art_Theory");
        assert_eq!(subject("x"), "mmmu");
    }
}
