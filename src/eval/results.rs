//! The file that results are saved to as they come, and read again when a run goes on.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::record::{Answer, Header, Record, VERSION};
use crate::error::{Error, Result};
use crate::outfile::Claim;
use crate::text::without_bom;

/// An open results file.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    file: File,
    /// Answers that are in it.
    n: usize,
    /// Two runs that add to one file would both ask what is left of the questions.
    _claim: Claim,
}

/// What names an answer in its file.
pub type Key = (String, usize, String);

impl Results {
    /// Begins a file, or goes on with one that was begun with the same header. Gives the answers
    /// that are there already.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when another run writes it, it is no results file, is damaged
    /// before its last line, or was made with something else, which the message names.
    pub fn open(path: &Path, header: &Header) -> Result<(Self, Vec<Answer>)> {
        let io = |e| Error::io(path, e);
        // What is no regular file, a device or a pipe, holds nothing to go on with.
        let regular = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
        let claim = Claim::take(path)?;
        let mut begun = Vec::new();
        if regular {
            let mut file = File::open(path).map_err(io)?;
            file.read_to_end(&mut begun).map_err(io)?;
        }
        // An interrupted write leaves part of a line.
        let whole = begun
            .iter()
            .rposition(|&b| b == b'\n')
            .map_or(0, |at| at + 1);
        let ours = without_bom(&begun).starts_with(b"{\"record\":\"header\"");
        if whole == 0 && !begun.is_empty() && !ours {
            return Err(Error::file(
                path,
                "is there and no results file of hae, expected a new name",
            ));
        }
        let answers = match whole {
            0 => Vec::new(),
            _ => {
                let (found, answers) = parse(path, &begun[..whole])?;
                if let Some(reason) = mismatch(&found, header) {
                    return Err(Error::file(path, reason));
                }
                answers
            }
        };
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(io)?;
        if regular && whole < begun.len() {
            file.set_len(whole as u64).map_err(io)?;
        }
        if whole == 0 {
            write(
                path,
                &mut file,
                &Record::Header(Box::new(header.clone())),
                0,
            )?;
        }
        let n = answers.len();
        let path = path.to_owned();
        let results = Results {
            path,
            file,
            n,
            _claim: claim,
        };
        Ok((results, answers))
    }

    /// Adds one answer; it is on its way to the disk when this returns.
    ///
    /// # Errors
    /// [`Error::File`] that says why, and how many answers are saved.
    pub fn add(&mut self, answer: &Answer) -> Result<()> {
        let record = Record::Answer(Box::new(answer.clone()));
        write(&self.path, &mut self.file, &record, self.n)?;
        self.n += 1;
        Ok(())
    }

    /// What messages say about what is in it.
    pub fn saved(&self) -> String {
        format!("{} in {}", saved_answers(self.n), self.path.display())
    }
}

fn saved_answers(n: usize) -> String {
    match n {
        1 => "1 answer is saved".into(),
        n => format!("{n} answers are saved"),
    }
}

/// One line in one write, so that a full disk leaves at most part of one.
fn write(path: &Path, file: &mut File, record: &Record, saved: usize) -> Result<()> {
    let fail =
        |cause: String| Error::file(path, format!("{cause}; {} in it", saved_answers(saved)));
    let mut line = serde_json::to_string(record).map_err(|e| fail(e.to_string()))?;
    line.push('\n');
    file.write_all(line.as_bytes())
        .map_err(|e| fail(e.to_string()))
}

/// Reads a whole results file.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] that names the line and what was expected. A file without
/// answers is no error here.
pub fn read(path: &Path) -> Result<(Header, Vec<Answer>)> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let whole = bytes
        .iter()
        .rposition(|&b| b == b'\n')
        .map_or(0, |at| at + 1);
    parse(path, &bytes[..whole])
}

fn parse(path: &Path, bytes: &[u8]) -> Result<(Header, Vec<Answer>)> {
    let wrong = |line: usize, reason: String| Error::file(path, format!("line {line}: {reason}"));
    let mut header: Option<Header> = None;
    let mut answers: Vec<Answer> = Vec::new();
    let mut keys: HashSet<Key> = HashSet::new();
    let lines = without_bom(bytes).split(|&b| b == b'\n').enumerate();
    for (i, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
        let record = serde_json::from_slice(line).map_err(|e| {
            let what = if i == 0 { "a header" } else { "an answer" };
            wrong(i + 1, format!("{e}, expected {what} of hae's results"))
        })?;
        match (record, &header) {
            (Record::Header(found), None) if found.version <= VERSION => header = Some(*found),
            (Record::Header(found), None) => {
                let version = found.version;
                let reason = format!("results of version {version}, expected at most {VERSION}");
                return Err(wrong(i + 1, reason));
            }
            (Record::Header(_), Some(_)) => {
                return Err(wrong(i + 1, "a second header, expected an answer".into()));
            }
            (Record::Answer(_), None) => {
                return Err(wrong(i + 1, "an answer, expected the header first".into()));
            }
            (Record::Answer(answer), Some(_)) => {
                if !keys.insert(key(&answer)) {
                    let reason = format!("{} under {} is there twice", answer.id, answer.contender);
                    return Err(wrong(i + 1, reason));
                }
                answers.push(*answer);
            }
        }
    }
    match header {
        Some(header) => Ok((header, answers)),
        None => Err(Error::file(path, "is empty, expected hae's results")),
    }
}

/// What tells an answer from all others of its file.
pub fn key(answer: &Answer) -> Key {
    (answer.id.clone(), answer.turn, answer.contender.clone())
}

/// What another run did differently, by the first field that is not the same.
fn mismatch(found: &Header, header: &Header) -> Option<String> {
    // When it was begun does not matter, nor where the program and the files lay.
    let fields = |header: &Header| {
        let mut value = serde_json::to_value(header).unwrap_or(Value::Null);
        if let Some(fields) = value.as_object_mut() {
            fields.remove("time");
            for file in ["model", "mmproj", "questions"] {
                if let Some(Value::Object(id)) = fields.get_mut(file) {
                    id.remove("file");
                }
            }
        }
        value
    };
    let (was, is) = (fields(found), fields(header));
    let (was, is) = (was.as_object()?, is.as_object()?);
    let (name, then, now) = first_difference(was, is)?;
    let (name, then, now) = inner(name, then, now);
    Some(format!(
        "was begun with {name} {then}, this run has {now}: expected the same, or another `out`"
    ))
}

/// The first field that is not the same, of which either may have none.
fn first_difference<'a>(
    was: &'a Map<String, Value>,
    is: &'a Map<String, Value>,
) -> Option<(&'a str, &'a Value, &'a Value)> {
    let mut names = is.keys().chain(was.keys());
    let name = names.find(|&name| was.get(name) != is.get(name))?;
    let [then, now] = [was, is].map(|side| side.get(name).unwrap_or(&Value::Null));
    Some((name, then, now))
}

/// The field inside that differs, if they are objects.
fn inner(name: &str, was: &Value, is: &Value) -> (String, String, String) {
    if let (Value::Object(was), Value::Object(is)) = (was, is)
        && let Some((field, then, now)) = first_difference(was, is)
    {
        return inner(&format!("{name}.{field}"), then, now);
    }
    if let (Value::Array(was), Value::Array(is)) = (was, is) {
        let names = |list: &[Value]| {
            let names = list
                .iter()
                .map(|v| v["name"].as_str().unwrap_or("?").to_owned());
            names.collect::<Vec<_>>().join(",")
        };
        let (then, now) = (names(was), names(is));
        if then != now {
            return (name.to_owned(), then, now);
        }
        if let Some((was, is)) = was.iter().zip(is).find(|(was, is)| was != is) {
            let one = was["name"].as_str().unwrap_or(name);
            return inner(one, was, is);
        }
    }
    (name.to_owned(), was.to_string(), is.to_string())
}
