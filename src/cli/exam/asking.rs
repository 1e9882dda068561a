//! What every command needs that asks a model questions: the flags, the model made ready, and what
//! reports say of both.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::load::{self, Files};
use crate::cli::options::{ContextArgs, ModelArgs};
use crate::cli::output::{ContextReport, FileReport};
use hae::Error;
use hae::asker::{Asker, Entrant};
use hae::build::build;
use hae::eval::question::{Expected, Image, Question};
use hae::eval::record::{FileId, Header, QuestionSet, VERSION};
use hae::llama::{ContextOptions, Model, Vision};
use hae::open;
use hae::outfile::FilesInUse;
use hae::policy::{Amount, PolicySpec};

/// Tokens of an answer at most, and of a story.
const N_PREDICT: usize = 256;
const N_PREDICT_STORY: usize = 1536;

#[derive(Debug, clap::Args)]
pub struct AskArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub context: ContextArgs,
    /// Most tokens of an answer
    ///
    /// [default: 256, for stories 1536]
    #[arg(
        short,
        long,
        alias = "predict",
        value_name = "N",
        help_heading = "Context"
    )]
    n_predict: Option<u32>,
    /// Name or text of a chat template that llama.cpp knows [default: the model's own]
    #[arg(
        long,
        value_name = "TEMPLATE",
        hide_short_help = true,
        help_heading = "Context"
    )]
    chat_template: Option<String>,
    /// -no-cnv: use no chat template. Prompts go in as they are
    #[arg(
        long,
        alias = "no-cnv",
        hide_short_help = true,
        help_heading = "Context",
        conflicts_with = "chat_template"
    )]
    no_conversation: bool,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

/// A loaded model that can be asked.
pub struct Ready {
    pub model: Model,
    /// That of `full`.
    pub context: ContextOptions,
    pub asker: Asker,
}

/// Questions, and how they are asked.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub questions: &'a [Question],
    /// Of pictures whose question does not say.
    pub num_crops: Option<u32>,
    pub n_predict: Option<usize>,
    /// Whether distances to the full cache are measured.
    pub distance: bool,
    pub repetitions: usize,
}

impl Asked<'_> {
    /// Tokens of each turn's answer at most.
    pub fn n_predict(&self, question: &Question) -> Vec<usize> {
        let limit = |expected: &Expected| match (self.n_predict, expected) {
            (Some(n), _) => n,
            (None, Expected::Facts(_)) => N_PREDICT_STORY,
            (None, _) => N_PREDICT,
        };
        question.turns.iter().map(|t| limit(&t.expected)).collect()
    }

    pub fn turns(&self) -> usize {
        self.questions.iter().map(|q| q.turns.len()).sum()
    }

    pub fn pictures(&self, question: &Question) -> hae::Result<Vec<hae::image::Picture>> {
        let crops = question.num_crops.or(self.num_crops);
        let images = question.images.iter();
        images.map(|image| image.load(crops)).collect()
    }
}

impl AskArgs {
    /// What is wrong without a look at any file. Shows llama.cpp's log from here on, if it is
    /// wanted.
    pub fn check(&self) -> Result<()> {
        if self.verbose {
            crate::cli::show_log();
        }
        match self.n_predict {
            Some(0) => Err(Error::option("-n", "0 tokens, expected at least 1").into()),
            _ => Ok(()),
        }
    }

    /// The files that are read: the model's, that of the questions, and their pictures.
    pub fn in_use(&self, file: Option<&Path>, questions: &[Question]) -> FilesInUse {
        let mut files = self.model.in_use();
        if let Some(path) = file {
            files.reads("the file of the questions", path);
        }
        for image in questions.iter().flat_map(|question| &question.images) {
            if let Image::File(path) = image {
                files.reads("a picture of a question", path);
            }
        }
        files
    }

    pub fn n_predict(&self) -> Option<usize> {
        self.n_predict.map(|n| n as usize)
    }

    /// Loads the model and hands it to `f`. All that can be refused before the first question is
    /// refused here.
    pub fn ready<'q, R>(
        &self,
        files: &Files,
        questions: impl Iterator<Item = &'q Question>,
        num_crops: Option<u32>,
        f: impl FnOnce(Ready) -> Result<R>,
    ) -> Result<R> {
        let n_threads = self.context.n_threads()?;
        let model = load::load_model(files, &self.model)?;
        let vision = load::load_vision(files, &self.model, n_threads, &model)?;
        check_pictures(questions, num_crops, vision.as_ref())?;
        let chosen = load::template(self.chat_template.as_deref(), self.no_conversation);
        load::warn_about_template(&model, &chosen);
        let template = chosen.of(&model, None)?;
        let context = open::sized(&self.context.options()?, &model)?;
        let rope = self.model.rope_factors;
        f(Ready {
            context,
            asker: Asker::new(&model, vision, template, rope),
            model,
        })
    }

    /// What all answers of a run have in common.
    pub fn header(
        &self,
        (command, set, distance, seed): (&str, &QuestionSet, bool, u64),
        files: &Files,
        ready: &Ready,
        entrants: &[Entrant],
    ) -> Result<Header> {
        let id = |FileReport { file, sha256 }| FileId { file, sha256 };
        let context = &ready.context;
        // Chosen for each question by how far it reaches.
        let rope = match ready.model.long_rope_from() {
            Some(_) => self.model.rope_factors.name(),
            None => "none",
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Header {
            version: VERSION,
            command: command.into(),
            time: now.unwrap_or_default().as_secs(),
            build: serde_json::to_value(build())?,
            model: id(files.model_report()?),
            mmproj: files.mmproj_report()?.map(id),
            questions: set.clone(),
            context: serde_json::to_value(ContextReport::new(context, rope))?,
            seed,
            n_predict: self.n_predict(),
            distance,
            contenders: entrants.iter().map(|e| e.contender.clone()).collect(),
        })
    }
}

impl Ready {
    /// A policy that is to be asked, checked against the model.
    pub fn entrant(
        &self,
        name: String,
        policy: PolicySpec,
        budget: Option<Amount>,
    ) -> Result<Entrant> {
        Ok(self.asker.entrant(name, policy, budget, &self.context)?)
    }
}

/// Pictures and numbers of crops that the model cannot take are better refused now.
fn check_pictures<'q>(
    questions: impl Iterator<Item = &'q Question>,
    num_crops: Option<u32>,
    vision: Option<&Vision>,
) -> Result<()> {
    let mut checked = HashSet::new();
    for question in questions.filter(|q| !q.images.is_empty()) {
        let Some(vision) = vision else {
            let reason = "pictures need a vision file, give one with --mmproj";
            return Err(Error::option("--mmproj", reason).into());
        };
        let crops = question.num_crops.or(num_crops);
        if let Some(n) = crops.filter(|&n| checked.insert(n)) {
            vision
                .check_num_crops(n)
                .map_err(|e| anyhow!("{}: {e}", question.place))?;
        }
    }
    Ok(())
}

/// A bar with the time that is left, for so many answers of which some are there.
pub fn bar(answers: usize, done: usize) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed}, {eta} left, {msg}")?;
    let bar = ProgressBar::new(answers as u64)
        .with_style(style)
        .with_position(done as u64);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
