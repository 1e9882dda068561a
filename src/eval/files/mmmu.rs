//! MMMU (Yue et al. 2023): a parquet file for each subject, pictures inside.
//!
//! <https://huggingface.co/datasets/MMMU/MMMU>. Columns `id`, `question`, `options` (a Python list
//! as text), `answer`, `question_type`, `image_1` to `image_7`, each with `bytes`. `<image k>` in
//! a question or an option says where a picture goes; pictures that are not named beside others
//! that are, are not shown, and a question that names none has all of them in front. The task is
//! the subject, the middle of the id. Open questions are scored word for word, which is stricter
//! than the authors' own scoring.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use parquet::basic::{Repetition, Type as Physical};
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};

use super::Source;
use crate::error::{Error, Result};
use crate::eval::question::{Expected, Image, Question, Turn, letter, with_options};
use crate::guard::guarded;

/// Columns of text.
const TEXTS: [&str; 5] = ["id", "question", "options", "answer", "question_type"];
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
    let schema = reader.metadata().file_metadata().schema();
    let rows = guarded(|| reader.get_row_iter(Some(columns(schema)?)).ok());
    let mut rows = rows.flatten().ok_or_else(|| damaged(1))?;
    let (mut questions, mut ids) = (Vec::new(), HashSet::new());
    loop {
        let number = questions.len() + 1;
        match guarded(|| rows.next()) {
            Some(None) => return Ok(questions),
            Some(Some(Ok(row))) => {
                let question = question(source, number, &row)?;
                // At once: a few bytes say that a row is there thousands of millions of times.
                source.once(&mut ids, &question)?;
                questions.push(question);
            }
            Some(Some(Err(_))) | None => return Err(damaged(number)),
        }
    }
}

/// What is read of a file: texts, and the bytes of pictures, one value a row. Other columns may claim lists of any
/// length without holding anything. `None` if parquet cannot say it.
fn columns(schema: &Type) -> Option<Type> {
    let mut columns = Vec::new();
    for column in schema.get_fields() {
        if TEXTS.contains(&column.name()) && is_one_text(column) {
            columns.push(column.clone());
        }
        let is_picture = (1..=MOST_IMAGES).any(|k| column.name() == format!("image_{k}"));
        if is_picture && column.is_group() && is_one(column) {
            let mut inside = column.get_fields().iter();
            let Some(bytes) = inside.find(|f| f.name() == "bytes" && is_one_text(f)) else {
                continue;
            };
            let group = Type::group_type_builder(column.name())
                .with_repetition(column.get_basic_info().repetition())
                .with_fields(vec![bytes.clone()]);
            columns.push(Arc::new(group.build().ok()?));
        }
    }
    let rows = Type::group_type_builder(schema.name()).with_fields(columns);
    rows.build().ok()
}

/// Not a list.
fn is_one(column: &TypePtr) -> bool {
    column.get_basic_info().repetition() != Repetition::REPEATED
}

fn is_one_text(column: &TypePtr) -> bool {
    let text = column.is_primitive() && column.get_physical_type() == Physical::BYTE_ARRAY;
    text && is_one(column)
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
    use parquet::data_type::{BoolType, ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

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

    const MESSAGE: &str = "message schema {
        required binary id (UTF8); optional binary question (UTF8); optional binary options (UTF8);
        optional binary answer (UTF8); optional binary question_type (UTF8);";

    fn schema(more: &str) -> Type {
        parse_message_type(&format!("{MESSAGE} {more} }}")).unwrap()
    }

    #[test]
    fn only_single_texts_and_the_bytes_of_pictures_are_read() {
        let more = "optional group image_1 { optional binary bytes; optional binary path; }";
        let wanted = "optional group image_1 { optional binary bytes; }";
        assert_eq!(columns(&schema(more)).unwrap(), schema(wanted));
        for more in [
            "repeated boolean flags;",
            "optional group flags (LIST) { repeated group list { optional boolean element; } }",
            "repeated group image_2 { optional binary bytes; }",
            "optional group image_2 { repeated binary bytes; }",
            "optional group image_2 { optional boolean bytes; }",
            "optional group image_2 { optional binary path; }",
            "optional binary image_2;",
            "optional group image_8 { optional binary bytes; }",
        ] {
            assert_eq!(columns(&schema(more)).unwrap(), schema(""), "{more}");
        }
        let lists =
            parse_message_type("message schema { repeated binary id; required int32 answer; }");
        assert_eq!(columns(&lists.unwrap()).unwrap().get_fields().len(), 0);
    }

    /// Rows of texts, and a column of booleans that nobody asked for.
    fn file(rows: &[[&str; 5]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let schema = Arc::new(schema("required boolean more;"));
        let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
        let mut group = file.next_row_group().unwrap();
        for i in 0..TEXTS.len() {
            let texts: Vec<ByteArray> = rows.iter().map(|row| row[i].into()).collect();
            let levels = vec![1; rows.len()];
            let mut column = group.next_column().unwrap().unwrap();
            let values = column.typed::<ByteArrayType>();
            // The id is there in every row.
            let levels = (i > 0).then_some(&levels[..]);
            values.write_batch(&texts, levels, None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        let values = column.typed::<BoolType>();
        values
            .write_batch(&vec![true; rows.len()], None, None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
        file.close().unwrap();
        bytes
    }

    #[test]
    fn an_id_that_is_there_twice_ends_the_reading() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.parquet");
        let read = |rows: &[[&str; 5]]| {
            std::fs::write(&path, file(rows)).unwrap();
            super::read(&Source {
                path: path.clone(),
                ..Source::default()
            })
        };
        let (a, b) = (
            ["a_b_1", "What?", "['x', 'y']", "A", "multiple-choice"],
            ["a_b_2", "What?", "[]", "z", "open"],
        );
        let bad = ["a_b_3", "What?", "no list", "z", "open"];
        assert_eq!(read(&[a, b]).unwrap().len(), 2);
        let error = read(&[a, b, bad]).unwrap_err().to_string();
        assert!(error.contains("row 3: options"), "{error}");
        // What follows is not looked at.
        let error = read(&[a, a, bad]).unwrap_err().to_string();
        assert!(
            error.contains("row 2: the id \"a_b_1\" is there twice"),
            "{error}"
        );
    }

    #[test]
    fn the_subject_is_the_middle_of_the_id() {
        assert_eq!(subject("validation_Art_Theory_12"), "Art_Theory");
        assert_eq!(subject("x"), "mmmu");
    }
}
