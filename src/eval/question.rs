//! A question, wherever it comes from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::image::{self, Limits, Picture};

/// One question, or a chat of several about the same pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Unique in its file.
    pub id: String,
    /// Where it stands in its file, for messages: `line 3`, `question n12`.
    pub place: String,
    /// Shown with the first turn.
    pub images: Vec<Image>,
    /// Crops that the pictures are cut into at most; `None`: what the vision file says.
    pub num_crops: Option<u32>,
    /// At least one.
    pub turns: Vec<Turn>,
}

/// One thing that is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// What kind of question it is; results are told by task.
    pub task: String,
    /// What a user says; the chat template goes around it. `<|image_k|>` says where pictures go.
    pub text: String,
    /// The whole prompt as the model takes it, for runs without a chat template.
    pub raw: Option<String>,
    /// What the answer is scored by.
    pub expected: Expected,
}

/// What the answer should be.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// Nobody knows.
    Nothing,
    /// One of these, word for word after normalisation.
    Words(Vec<String>),
    /// An answer that holds one of these, before any that is wrong: [`crate::eval::held`].
    Held {
        /// What counts as right.
        right: Vec<String>,
        /// What must not come first: the keys of others, for instance.
        wrong: Vec<String>,
    },
    /// Nearly one of these: [`crate::eval::anls`].
    Near(Vec<String>),
    /// The option of this number, by its letter or its text.
    Choice {
        /// In the order of their letters.
        options: Vec<String>,
        /// The number of the right one, from 0.
        answer: usize,
    },
    /// A story that makes these statements.
    Facts(Vec<Fact>),
}

/// A statement that a story has to make.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Fact {
    /// Of the thing that it is about.
    pub name: String,
    /// What it says of the thing.
    pub attribute: String,
    /// What that is.
    pub value: String,
    /// How often.
    pub mentions: usize,
}

/// A picture of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// A file of its own.
    File(PathBuf),
    /// Inside the question file; the name is the file's, `#` and that of the row.
    Inside {
        /// What messages and results call it.
        name: String,
        /// The file's bytes, not decoded.
        bytes: Arc<[u8]>,
    },
}

impl Image {
    /// A file that is there.
    ///
    /// # Errors
    /// [`Error::File`] of the question file, when it is not.
    pub(super) fn file(questions: &Path, place: &str, path: PathBuf) -> Result<Self> {
        match path.is_file() {
            true => Ok(Image::File(path)),
            false => {
                let reason = format!("{place}: there is no picture {}", path.display());
                Err(Error::file(questions, reason))
            }
        }
    }

    /// What reports call it.
    pub fn name(&self) -> String {
        match self {
            Image::File(path) => path.display().to_string(),
            Image::Inside { name, .. } => name.clone(),
        }
    }

    /// # Errors
    /// As [`image::load`].
    pub fn load(&self, num_crops: Option<u32>) -> Result<Picture> {
        let limits = Limits::default();
        let picture = match self {
            Image::File(path) => image::load(path, &limits),
            Image::Inside { name, bytes } => image::decode(Path::new(name), bytes, &limits),
        }?;
        Ok(Picture {
            num_crops,
            ..picture
        })
    }
}

impl Question {
    /// The pictures' names, in the order in which they are shown.
    pub fn image_names(&self) -> Vec<String> {
        self.images.iter().map(Image::name).collect()
    }
}

impl Expected {
    /// Every answer that counts as right, for reports.
    pub fn shown(&self) -> Vec<String> {
        match self {
            Expected::Nothing | Expected::Facts(_) => Vec::new(),
            Expected::Words(words) | Expected::Near(words) => words.clone(),
            Expected::Held { right, .. } => right.clone(),
            Expected::Choice { options, answer } => vec![
                letter(*answer).to_string(),
                options.get(*answer).cloned().unwrap_or_default(),
            ],
        }
    }
}

/// The most options that have a letter.
pub const MOST_OPTIONS: usize = 26;

/// A, B, C, ...; at most [`MOST_OPTIONS`] of them.
pub fn letter(option: usize) -> char {
    u8::try_from(option)
        .ok()
        .filter(|&n| usize::from(n) < MOST_OPTIONS)
        .map_or('?', |n| char::from(b'A' + n))
}

/// A multiple-choice question as it is asked: the options by letter, then what is wanted.
pub(super) fn with_options(question: &str, options: &[String]) -> String {
    let mut text = question.trim_end().to_owned();
    for (i, option) in options.iter().enumerate() {
        text.push_str(&format!("\n{}. {}", letter(i), option.trim()));
    }
    text + "\nAnswer with the option's letter from the given choices directly."
}
