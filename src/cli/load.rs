//! From flags to a chat: the files, what shows that they load, and the clock.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::options::ModelArgs;
use super::output::FileReport;
use super::warn;
use hae::Error;
use hae::calibrate::file::Calibration;
use hae::chat::{Begin, Chat, ChatOptions};
use hae::embedded::Embedded;
use hae::llama::{Model, ModelOptions, Vision, VisionOptions};
use hae::prompt::{ChatTemplate, Source, Template};

/// The two files of a model.
#[derive(Debug)]
pub struct Files {
    pub model: PathBuf,
    pub mmproj: Option<PathBuf>,
    /// Holds the embedded model's files while they are in use.
    embedded: Option<Embedded>,
    /// Of the model, once it was asked for: a large file takes seconds.
    report: OnceCell<FileReport>,
}

impl Files {
    pub fn find(args: &ModelArgs) -> Result<Self> {
        Ok(Files::of(args.model.clone(), args.mmproj.clone())?)
    }

    /// These files, or the embedded model.
    pub fn of(model: Option<PathBuf>, mmproj: Option<PathBuf>) -> hae::Result<Self> {
        match model {
            Some(model) => Ok(Files {
                model,
                mmproj,
                embedded: None,
                report: OnceCell::new(),
            }),
            None if mmproj.is_some() => Err(Error::option(
                "--mmproj",
                "belongs to a text model, give one with -m",
            )),
            None => {
                let embedded = Embedded::unpack()?;
                Ok(Files {
                    model: embedded.model().to_owned(),
                    mmproj: Some(embedded.mmproj().to_owned()),
                    embedded: Some(embedded),
                    report: OnceCell::new(),
                })
            }
        }
    }

    /// What to call the embedded model; others are called as their files.
    #[cfg(feature = "serve")]
    pub fn alias(&self) -> Option<String> {
        self.embedded.is_some().then(|| "small-phi3v".into())
    }

    /// Where the model's calibration lies, if it has one; the embedded model has no place beside it.
    pub fn calibration(&self) -> Option<PathBuf> {
        let own = self.embedded.is_none();
        own.then(|| Calibration::beside(&self.model))
    }

    /// The model's name and hash, which is computed once.
    pub fn model_report(&self) -> hae::Result<FileReport> {
        if let Some(report) = self.report.get() {
            return Ok(report.clone());
        }
        let report = FileReport::read(&self.model, &self.names().0)?;
        Ok(self.report.get_or_init(|| report).clone())
    }

    /// The vision file's, if there is one.
    pub fn mmproj_report(&self) -> hae::Result<Option<FileReport>> {
        let file = self.mmproj.as_deref().zip(self.names().1);
        file.map(|(path, name)| FileReport::read(path, &name))
            .transpose()
    }

    /// The names to show.
    pub fn names(&self) -> (String, Option<String>) {
        match self.embedded {
            Some(_) => (
                "embedded small-phi3v-Q8_0.gguf".into(),
                Some("embedded mmproj-small-phi3v-F16.gguf".into()),
            ),
            None => (
                self.model.display().to_string(),
                self.mmproj.as_ref().map(|p| p.display().to_string()),
            ),
        }
    }
}

/// A chat's files and options, as the command line says them.
#[derive(Debug)]
pub struct Setup<'a> {
    pub files: &'a Files,
    pub model: &'a ModelArgs,
    pub options: ChatOptions,
    /// Crops of every picture, where that was chosen.
    pub num_crops: Option<u32>,
}

impl Setup<'_> {
    /// Loads the files and opens the chat; also gives the time that it took.
    pub fn open(&self, begin: Begin<'_>) -> Result<(Chat, Duration)> {
        let start = Instant::now();
        let model = load_model(self.files, self.model)?;
        let n_threads = self.options.context.n_threads;
        let vision = load_vision(self.files, self.model, n_threads, &model)?;
        self.check_num_crops(vision.as_ref())?;
        let chat = Chat::begin(&model, vision, &self.options, begin)?;
        warn_about_template(&model, &self.options.template, chat.template());
        Ok((chat, start.elapsed()))
    }

    /// A number that no picture can be cut into is better refused now than at the first picture.
    fn check_num_crops(&self, vision: Option<&Vision>) -> Result<()> {
        match (self.num_crops, vision) {
            (None, _) => Ok(()),
            (Some(n), Some(vision)) => Ok(vision.check_num_crops(n)?),
            (Some(_), None) => {
                let reason = "pictures need a vision file, give one with --mmproj";
                Err(Error::option("--num-crops", reason).into())
            }
        }
    }
}

/// A model without a template takes prompts as they are, which few know. Nor would anybody learn
/// that a template's text is not run.
pub fn warn_about_template(model: &Model, chosen: &Template, made: Option<&ChatTemplate>) {
    if chosen.source == Source::Model && made.is_none() {
        warn(&format!(
            "{}: has no chat template, prompts go in as they are: name one with --chat-template, or give --no-conversation",
            model.path().display()
        ));
    }
    if let Some(reason) = made.and_then(ChatTemplate::fallback) {
        warn(&format!(
            "the chat template cannot be run ({reason}): llama.cpp's own of that name takes its place, which --no-jinja asks for"
        ));
    }
}

pub fn load_model(files: &Files, args: &ModelArgs) -> Result<Model> {
    let bar = spinner("loading the model");
    let options = ModelOptions {
        n_gpu_layers: args.gpu_layers,
        no_mmap: args.no_mmap,
        mlock: args.mlock,
    };
    let model = Model::load(&files.model, &options);
    bar.finish_and_clear();
    Ok(model?)
}

pub fn load_vision(
    files: &Files,
    args: &ModelArgs,
    n_threads: i32,
    model: &Model,
) -> Result<Option<Vision>> {
    let Some(path) = &files.mmproj else {
        return Ok(None);
    };
    let options = VisionOptions {
        use_gpu: args.gpu_layers != Some(0),
        n_threads,
    };
    Ok(Some(Vision::load(path, model, &options)?))
}

/// A sign of life on stderr, when that is a terminal.
pub fn spinner(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner()
        .with_style(style)
        .with_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A clock that never runs backwards.
pub fn clock() -> impl Fn() -> Duration {
    let start = Instant::now();
    move || start.elapsed()
}

/// A seed for those who gave none.
pub fn clock_seed() -> u32 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| (t.subsec_nanos() ^ t.as_secs() as u32) >> 1)
}
