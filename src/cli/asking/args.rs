//! The model that is asked: its flags, how it is loaded, and what reports say of both.

use std::collections::HashSet;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};

use crate::cli::load::{self, Files};
use crate::cli::options::{ContextArgs, ModelArgs, TemplateArgs};
use crate::cli::output::{ContextReport, FileReport};
use hae::Error;
use hae::asker::{Asker, Contender};
use hae::build::build;
use hae::eval::question::{Image, Question};
use hae::eval::record::{FileId, Header, QuestionSet, VERSION};
use hae::llama::{CacheType, ContextOptions, Model, Vision};
use hae::open;
use hae::outfile::FilesInUse;
use hae::policy::{Amount, PolicySpec};

#[derive(Debug, clap::Args)]
pub struct InferenceArgs {
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
    #[command(flatten, next_help_heading = "Context")]
    template: TemplateArgs,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

/// A policy as it is to be asked.
#[derive(Clone, Debug)]
pub struct Choice {
    pub name: String,
    pub policy: PolicySpec,
    pub budget: Option<Amount>,
    /// Of K and V, where a list said so.
    pub types: Option<CacheType>,
    /// Text that a layer looks at, likewise.
    pub text: Option<Amount>,
}

/// A loaded model that can be asked.
pub struct Loaded {
    pub model: Model,
    /// That of `full`.
    pub context: ContextOptions,
    pub asker: Asker,
}

impl InferenceArgs {
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

    /// Loads the model. All that can be refused before the first question is refused here.
    pub fn load<'q>(
        &self,
        files: &Files,
        questions: impl Iterator<Item = &'q Question>,
        num_crops: Option<u32>,
    ) -> Result<Loaded> {
        let n_threads = self.context.n_threads()?;
        let chosen = self.template.template()?;
        let model = load::load_model(files, &self.model)?;
        let vision = load::load_vision(files, &self.model, n_threads, &model)?;
        check_pictures(questions, num_crops, vision.as_ref())?;
        let template = chosen.of(&model)?;
        load::warn_about_template(&model, &chosen, template.as_ref());
        let context = open::sized(&self.context.options()?, &model)?;
        let rope = self.model.rope_factors;
        Ok(Loaded {
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
        loaded: &Loaded,
        contenders: &[Contender],
    ) -> Result<Header> {
        let id = |FileReport { file, sha256 }| FileId { file, sha256 };
        let context = &loaded.context;
        // Chosen for each question by how far it reaches.
        let rope = match loaded.model.long_rope_from() {
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
            context: serde_json::to_value(ContextReport::new(
                context,
                context.attend.if_any(),
                rope,
            ))?,
            seed,
            n_predict: self.n_predict(),
            distance,
            contenders: contenders.iter().map(|e| e.record.clone()).collect(),
        })
    }
}

impl Loaded {
    /// A policy that is to be asked, checked against the model.
    pub fn contender(
        &self,
        name: String,
        policy: PolicySpec,
        budget: Option<Amount>,
    ) -> Result<Contender> {
        Ok(self.asker.contender(name, policy, budget, &self.context)?)
    }

    /// Several of them, each with the cache that its lists chose.
    pub fn contenders(&self, all: Vec<Choice>) -> Result<Vec<Contender>> {
        let one = |choice: Choice| {
            let mut context = self.context.clone();
            if let Some(types) = choice.types {
                (context.type_k, context.type_v) = (types, types);
                context.by_policy.types = false;
            }
            if choice.text.is_some() {
                context.attend.text = choice.text;
                context.by_policy.attend = false;
            }
            let listed = choice.types.is_some() || choice.text.is_some();
            let Choice {
                name,
                policy,
                budget,
                ..
            } = choice;
            let mut contender = self.asker.contender(name, policy, budget, &context)?;
            if listed {
                contender.record.cache = Some(self.asker.cache(&contender)?);
            }
            Ok(contender)
        };
        all.into_iter().map(one).collect()
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
