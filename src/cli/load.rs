//! From flags to a chat: the files, what shows that they load, and the clock.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::options::{ContextArgs, FitArgs, HubArgs, ModelArgs};
use super::output::FileReport;
use super::{note, warn};
use hae::Error;
use hae::calibrate::file::Calibration;
use hae::chat::{Begin, Chat, ChatOptions};
use hae::embedded::Embedded;
#[cfg(feature = "serve")]
use hae::embedded::PICTURE_CROPS;
use hae::hub::{Found, Progress};
use hae::llama::gguf::Gguf;
use hae::llama::{ContextOptions, Model, ModelOptions, Vision, VisionOptions, devices};
use hae::memory::fit::{Choice, Fit, choose};
use hae::memory::{Work, estimate};
use hae::policy::PolicySpec;
use hae::prompt::{ChatTemplate, Source, Template};

impl ModelArgs {
    /// Sees to it that the model is here, and names its files as if they had been given.
    pub fn fetch(&mut self) -> Result<()> {
        if let Some(found) = fetched(&self.hub, self.mmproj.is_none())? {
            self.model = Some(found.model);
            self.mmproj = self.mmproj.take().or(found.mmproj);
        }
        Ok(())
    }
}

/// The files of a model of the hub, if one is asked for. What is fetched shows on stderr.
pub fn fetched(args: &HubArgs, mmproj: bool) -> Result<Option<Found>> {
    let Some((hub, wanted)) = args.wanted(mmproj)? else {
        return Ok(None);
    };
    let mut bar: Option<(String, ProgressBar)> = None;
    let mut show = |progress: Progress<'_>| {
        if bar.as_ref().is_none_or(|(file, _)| file != progress.file) {
            note(&format!("fetching {}", progress.file));
            bar = Some((progress.file.to_owned(), bytes_bar(progress.of)));
        }
        if let Some((_, bar)) = &bar {
            bar.set_position(progress.bytes);
            if progress.bytes == progress.of {
                bar.finish_and_clear();
            }
        }
        Ok(())
    };
    let found = hub.fetch(&wanted, &mut show);
    drop(bar);
    let found = found?;
    if let Some(reason) = &found.stale {
        warn(&format!(
            "the hub was not reached ({reason}), the model is the one that was fetched before"
        ));
    }
    Ok(Some(found))
}

/// How much of a file is here, on stderr, when that is a terminal.
fn bytes_bar(bytes: u64) -> ProgressBar {
    let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

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

    /// Crops that show the embedded model what it was trained on; others say so themselves.
    #[cfg(feature = "serve")]
    pub fn scale(&self) -> Option<u32> {
        self.embedded.as_ref().map(|_| PICTURE_CROPS)
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
        placement: args.devices.placement()?,
        no_mmap: args.no_mmap,
        mlock: args.mlock,
        ..ModelOptions::default()
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

/// What was asked for, or what `--fit` makes of it.
pub fn fitted(
    files: &Files,
    (model, flags, fit): (&ModelArgs, &ContextArgs, &FitArgs),
    context: ContextOptions,
    asked: (&PolicySpec, &Work),
) -> Result<(ModelArgs, ContextOptions)> {
    let mut model = model.clone();
    let Some(may) = fit.may(&model, flags) else {
        return Ok((model, context));
    };
    let choice = measured(files, &model, &context, Some(may), fit.margin(), asked)?;
    if !choice.estimate.fits {
        let reason =
            "nothing fits the free memory: hae plan with the same flags says what is missing";
        return Err(Error::option("--fit", reason).into());
    }
    model.gpu_layers = choice.n_gpu_layers;
    Ok((model, choice.context))
}

/// What a run takes, with what `--fit` chooses for it.
pub fn measured(
    files: &Files,
    args: &ModelArgs,
    context: &ContextOptions,
    may: Option<Fit>,
    margin: u64,
    (policy, work): (&PolicySpec, &Work),
) -> Result<Choice> {
    let bar = spinner("measuring");
    let mut loaded: Option<(Model, Option<Vision>)> = None;
    let mut measure = |n_gpu_layers, context: &ContextOptions| {
        let same = |(model, _): &(Model, _)| Model::options(model).n_gpu_layers == n_gpu_layers;
        let (model, mut vision) = match loaded.take().filter(same) {
            Some(loaded) => loaded,
            None => {
                let options = ModelOptions {
                    n_gpu_layers,
                    placement: args.devices.placement()?,
                    measure: true,
                    ..ModelOptions::default()
                };
                let model = Model::load(&files.model, &options)?;
                let options = VisionOptions {
                    use_gpu: n_gpu_layers != Some(0),
                    n_threads: context.n_threads,
                };
                let path = files.mmproj.as_deref();
                let vision = path.map(|path| Vision::load(path, &model, &options));
                (model, vision.transpose()?)
            }
        };
        let estimate = estimate(&model, vision.as_mut(), context, policy, work, margin);
        loaded = Some((model, vision));
        estimate
    };
    let choice = match may {
        Some(mut may) => {
            if may.layers.is_some() {
                let meta = Gguf::open(&files.model)?;
                let arch = meta.text("general.architecture")?;
                let blocks = meta.unsigned(&format!("{arch}.block_count"))?;
                let gpus = devices()?.iter().any(|device| device.is_gpu);
                // The last layer is what comes behind them.
                may.layers = u32::try_from(blocks + 1).ok().filter(|_| gpus);
            }
            choose((args.gpu_layers, context), may, &mut measure)
        }
        None => {
            let nothing = Fit {
                types: false,
                layers: None,
                cells: None,
            };
            choose((args.gpu_layers, context), nothing, &mut measure)
        }
    };
    bar.finish_and_clear();
    Ok(choice?)
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
