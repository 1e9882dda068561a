//! Which file of questions, and which of them: the flags of the commands that score answers.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cli::crops::CropArgs;
use crate::cli::named::named;
use crate::cli::output::FileReport;
use hae::Error;
use hae::eval::files::{self, Source};
use hae::eval::question::{Expected, Question};
use hae::eval::record::{FileId, QuestionSet};
use hae::eval::split::{Part, Selection};
use hae::image::Picture;

/// Tokens of an answer at most, and of a story.
const N_PREDICT: usize = 256;
const N_PREDICT_STORY: usize = 1536;

#[derive(Debug, clap::Args)]
pub struct QuestionArgs {
    /// Questions with known answers
    #[arg(value_name = "FILE")]
    questions: Option<PathBuf>,
    /// jsonl, gqa, scienceqa, mmbench or mmmu
    ///
    /// [default: told by the file]
    #[arg(long, value_parser = named::<files::Format>(), hide_possible_values = true, value_name = "NAME")]
    format: Option<files::Format>,
    /// Folder of the pictures
    ///
    /// [default: where the format has them]
    #[arg(long, value_name = "DIR")]
    image_dir: Option<PathBuf>,
    /// ScienceQA: train, val or test [default: test]
    #[arg(long, value_name = "NAME")]
    subset: Option<String>,
    /// Ask every N-th question of each task
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    every: u32,
    /// Ask the first N of what is left
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    limit: Option<u32>,
    #[command(flatten)]
    pub crops: CropArgs,
}

/// A question file that was read and checked.
pub struct QuestionFile {
    id: FileId,
    format: files::Format,
    pub all: Vec<Question>,
}

impl QuestionArgs {
    pub fn path(&self) -> Result<&Path> {
        let reason = "is missing, expected a file of questions";
        let path = self.questions.as_deref();
        Ok(path.ok_or_else(|| Error::option("FILE", reason))?)
    }

    /// The most questions, or windows of a text.
    pub fn limit(&self) -> Option<usize> {
        self.limit.map(|n| n as usize)
    }

    pub fn read(&self) -> Result<QuestionFile> {
        let path = self.path()?;
        let source = Source {
            path: path.to_owned(),
            format: self.format,
            image_dir: self.image_dir.clone(),
            subset: self.subset.clone(),
            unanswered: false,
        };
        let (format, all) = source.read()?;
        let FileReport { file, sha256 } = FileReport::read(path, &path.display().to_string())?;
        Ok(QuestionFile {
            id: FileId { file, sha256 },
            format,
            all,
        })
    }

    /// The questions of a part, and how reports name them.
    pub fn select(&self, file: &QuestionFile, part: Option<Part>) -> (QuestionSet, Vec<Question>) {
        let selection = Selection {
            part,
            every: self.every as usize,
            limit: self.limit(),
        };
        let questions = selection.of(file.all.clone());
        let set = QuestionSet {
            file: file.id.clone(),
            format: file.format.name().into(),
            part: part.map(|part| part.to_string()),
            every: selection.every,
            limit: selection.limit,
            n: questions.iter().map(|q| q.turns.len()).sum(),
        };
        (set, questions)
    }
}

/// Questions, and what the command line says of all of them.
#[derive(Clone, Copy)]
pub struct Questions<'a> {
    pub all: &'a [Question],
    /// Of pictures whose question does not say.
    pub num_crops: Option<u32>,
    /// Tokens of an answer at most, where that was chosen.
    pub n_predict: Option<usize>,
}

impl Questions<'_> {
    /// Tokens of each turn's answer at most.
    pub fn n_predict(&self, question: &Question) -> Vec<usize> {
        let limit = |expected: &Expected| match (self.n_predict, expected) {
            (Some(n), _) => n,
            (None, Expected::Facts(_)) => N_PREDICT_STORY,
            (None, _) => N_PREDICT,
        };
        question.turns.iter().map(|t| limit(&t.expected)).collect()
    }

    /// Answers that one policy gives to all of them.
    pub fn turns(&self) -> usize {
        self.all.iter().map(|q| q.turns.len()).sum()
    }

    /// The pictures of a question, decoded.
    pub fn pictures(&self, question: &Question) -> hae::Result<Vec<Picture>> {
        let crops = question.num_crops.or(self.num_crops);
        let images = question.images.iter();
        images.map(|image| image.load(crops)).collect()
    }
}
