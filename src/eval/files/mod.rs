//! Question files: our own JSON lines, and the local files of published benchmarks.
//!
//! | format | what is read | pictures |
//! |---|---|---|
//! | `jsonl` | one question, chat or story a line | paths, relative to the file |
//! | `gqa` | `testdev_balanced_questions.json` and its like | `images/<imageId>.jpg` |
//! | `scienceqa` | `problems.json` | `images/<split>/<id>/<image>` |
//! | `mmbench` | `mmbench_dev_en.tsv` and its like | base64 in the table |
//! | `mmmu` | `validation-00000-of-00001.parquet` of a subject | bytes in the table |
//!
//! All of a file is checked before anything is asked. A mistake is named with its file and its
//! line or record.

mod gqa;
mod jsonl;
mod mmbench;
#[cfg(feature = "parquet")]
mod mmmu;
mod scienceqa;

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::held::{is_bare, same};
use super::question::{Expected, MOST_OPTIONS, Question};
use crate::error::{Error, Result};

/// How a question file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Our own: an object a line.
    Jsonl,
    /// GQA's object of questions.
    Gqa,
    /// ScienceQA's object of problems.
    ScienceQa,
    /// MMBench's table.
    MmBench,
    /// MMMU's parquet file of a subject.
    Mmmu,
}

impl Format {
    /// Each of them once.
    pub const ALL: [Format; 5] = [
        Format::Jsonl,
        Format::Gqa,
        Format::ScienceQa,
        Format::MmBench,
        Format::Mmmu,
    ];

    /// As `--format` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Jsonl => "jsonl",
            Format::Gqa => "gqa",
            Format::ScienceQa => "scienceqa",
            Format::MmBench => "mmbench",
            Format::Mmmu => "mmmu",
        }
    }

    /// What a file seems to be, by its name and its first bytes.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when neither says it.
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        match extension.to_ascii_lowercase().as_str() {
            "jsonl" => Ok(Format::Jsonl),
            "tsv" => Ok(Format::MmBench),
            "parquet" => Ok(Format::Mmmu),
            "json" => {
                let mut head = Vec::new();
                let file = File::open(path).map_err(|e| Error::io(path, e))?;
                let read = file.take(1 << 16).read_to_end(&mut head);
                read.map_err(|e| Error::io(path, e))?;
                let head = String::from_utf8_lossy(&head);
                match (head.contains("\"imageId\""), head.contains("\"choices\"")) {
                    (true, false) => Ok(Format::Gqa),
                    (false, true) => Ok(Format::ScienceQa),
                    _ => Err(unknown(path)),
                }
            }
            _ => Err(unknown(path)),
        }
    }
}

fn unknown(path: &Path) -> Error {
    let known = Format::ALL.map(Format::name).join(", ");
    Error::file(
        path,
        format!("cannot tell its format, expected `format` with one of {known}"),
    )
}

/// What to read of a file.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// The question file.
    pub path: PathBuf,
    /// `None`: told by the file.
    pub format: Option<Format>,
    /// Where pictures are, if not where the format has them.
    pub image_dir: Option<PathBuf>,
    /// ScienceQA: `train`, `val` or `test`; `None`: `test`.
    pub subset: Option<String>,
    /// Whether questions without a known answer are allowed.
    pub unanswered: bool,
}

impl Source {
    /// Reads and checks all questions.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] that names the line or record and what was expected.
    pub fn read(&self) -> Result<(Format, Vec<Question>)> {
        let format = match self.format {
            Some(format) => format,
            None => Format::of(&self.path)?,
        };
        let questions = match format {
            Format::Jsonl => jsonl::read(self),
            Format::Gqa => gqa::read(self),
            Format::ScienceQa => scienceqa::read(self),
            Format::MmBench => mmbench::read(self),
            #[cfg(feature = "parquet")]
            Format::Mmmu => mmmu::read(self),
            #[cfg(not(feature = "parquet"))]
            Format::Mmmu => Err(Error::file(
                &self.path,
                "is a parquet file, which a build without the feature parquet cannot read",
            )),
        }?;
        self.check(&questions)?;
        Ok((format, questions))
    }

    /// What holds for every format.
    fn check(&self, questions: &[Question]) -> Result<()> {
        if questions.is_empty() {
            return Err(Error::file(
                &self.path,
                "holds no question, expected at least one",
            ));
        }
        let mut ids = HashSet::new();
        for question in questions {
            let place = &question.place;
            self.once(&mut ids, question)?;
            for turn in &question.turns {
                self.check_expected(place, &turn.expected)?;
                if turn.text.trim().is_empty() {
                    return Err(self.wrong(place, "the question is empty, expected text"));
                }
                let texts = [Some(&turn.text), turn.raw.as_ref()];
                if texts.iter().flatten().any(|text| text.contains('\0')) {
                    return Err(self.wrong(place, "the question holds a NUL, expected text"));
                }
            }
        }
        Ok(())
    }

    /// That the file names no other question so.
    fn once(&self, ids: &mut HashSet<String>, question: &Question) -> Result<()> {
        let Question { id, place, .. } = question;
        match ids.insert(id.clone()) {
            true => Ok(()),
            false => Err(self.wrong(place, format!("the id {id:?} is there twice"))),
        }
    }

    fn check_expected(&self, place: &str, expected: &Expected) -> Result<()> {
        let empty = |text: &String| text.trim().is_empty();
        let none = |words: &[String]| words.is_empty() || words.iter().any(empty);
        match expected {
            Expected::Nothing if self.unanswered => Ok(()),
            Expected::Nothing => Err(self.wrong(
                place,
                "has no answer, expected \"answer\", \"answers\" or \"facts\"",
            )),
            Expected::Words(words) | Expected::Near(words) if none(words) => {
                Err(self.wrong(place, "the answer is empty, expected text"))
            }
            Expected::Held { right, .. } if none(right) => {
                Err(self.wrong(place, "the answer is empty, expected text"))
            }
            Expected::Held { right, wrong } => {
                if wrong.iter().any(empty) {
                    return Err(self.wrong(place, "a wrong answer is empty, expected text"));
                }
                if let Some(word) = right.iter().chain(wrong).find(|word| is_bare(word)) {
                    return Err(self.wrong(place, format!("{word:?} is nothing to look for")));
                }
                let is_wrong = |word: &&String| wrong.iter().any(|other| same(word, other));
                match right.iter().find(is_wrong) {
                    Some(word) => Err(self.wrong(place, format!("{word:?} is right and wrong"))),
                    None => Ok(()),
                }
            }
            Expected::Choice { options, answer } => {
                let n = options.len();
                if !(2..=MOST_OPTIONS).contains(&n) {
                    let reason = format!("{n} options, expected 2 to {MOST_OPTIONS}");
                    return Err(self.wrong(place, reason));
                }
                if options.iter().any(empty) {
                    return Err(self.wrong(place, "an option is empty, expected text"));
                }
                match *answer < n {
                    true => Ok(()),
                    false => {
                        let reason = format!("the answer is option {answer} of {n}, from 0");
                        Err(self.wrong(place, reason))
                    }
                }
            }
            Expected::Facts(facts) if facts.is_empty() => {
                Err(self.wrong(place, "no facts, expected at least one"))
            }
            Expected::Facts(facts) => match facts.iter().find(|fact| fact.mentions == 0) {
                Some(fact) => {
                    let name = &fact.name;
                    Err(self.wrong(place, format!("a fact about {name} with 0 mentions")))
                }
                None => Ok(()),
            },
            Expected::Words(_) | Expected::Near(_) => Ok(()),
        }
    }

    fn wrong(&self, place: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("{place}: {reason}"))
    }

    /// The folder of the file itself.
    fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(folder) => folder,
            None => Path::new(""),
        }
    }

    /// Where pictures are: as was said, or the folder of this name beside the file.
    fn images(&self, usual: &str) -> PathBuf {
        match &self.image_dir {
            Some(folder) => folder.clone(),
            None => self.folder().join(usual),
        }
    }

    /// The whole file as text.
    fn text(&self) -> Result<String> {
        // GQA's largest question file that anyone scores has some 100 MB.
        const MOST: u64 = 1 << 30;
        let path = &self.path;
        let io = |e| Error::io(path, e);
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(Error::file(path, "is a folder, expected a question file"));
        }
        let mut bytes = Vec::new();
        file.take(MOST + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MOST {
            return Err(Error::file(path, format!("has more than {MOST} bytes")));
        }
        crate::text::decode(path, bytes)
    }
}

/// serde_json's message without its own line number.
fn reason(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let at = format!(" at line {} column {}", e.line(), e.column());
    match text.strip_suffix(&at) {
        Some(text) if e.column() > 0 => format!("column {}: {text}", e.column()),
        _ => text,
    }
}

#[cfg(test)]
mod tests;
