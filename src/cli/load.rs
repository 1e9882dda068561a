//! From flags to a conversation: checks first, then files, then the context.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::options::{ContextArgs, ModelArgs, RopeArg};
use super::output::FileReport;
use super::warn;
use hae::Error;
use hae::calibrate::file::Calibration;
use hae::controller::Controller;
use hae::conversation::Conversation;
use hae::embedded::Embedded;
use hae::engine::Engine;
use hae::image::Picture;
use hae::llama::chat::{self, Message};
use hae::llama::{
    ContextOptions, LlamaEngine, Model, ModelOptions, Piece, RopeFactors, SamplerOptions, Vision,
    VisionOptions,
};
use hae::policy::{Limits, Observe, PolicySpec};
use hae::prompt::{Transcript, place_pictures, tokenize};
use hae::saved::Saved;
use hae::trace;

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

/// Everything that a conversation is made from.
#[derive(Debug)]
pub struct Setup<'a> {
    pub files: &'a Files,
    pub model: &'a ModelArgs,
    pub context: &'a ContextArgs,
    pub policy: &'a PolicySpec,
    pub sampler: SamplerOptions,
    pub template: Template<'a>,
    pub system_prompt: Option<&'a str>,
    /// The first prompt, when it is known: how far a run reaches decides its rope factors.
    pub prompt: Option<&'a str>,
    pub pictures: &'a [Picture],
    /// Crops of every picture, where that was chosen.
    pub num_crops: Option<u32>,
    pub n_predict: Option<usize>,
    /// An earlier conversation to go on with.
    pub session: Option<&'a Saved>,
    /// Host memory for evicted text, MiB.
    pub bin_host_mib: u32,
    /// Where to write what the cache sees and decides.
    pub trace: Option<&'a Path>,
}

/// Which chat template to use.
#[derive(Clone, Copy, Debug)]
pub enum Template<'a> {
    /// The one in the model's file.
    Model,
    Named(&'a str),
    /// None: prompts go in as they are.
    Raw,
}

impl<'a> Template<'a> {
    /// As `--chat-template` and `--no-conversation` say it.
    pub fn chosen(name: Option<&'a str>, raw: bool) -> Self {
        match (name, raw) {
            (_, true) => Template::Raw,
            (Some(name), _) => Template::Named(name),
            (None, _) => Template::Model,
        }
    }

    /// Its text; `None` where prompts go in as they are.
    pub fn of(self, model: &Model) -> Option<String> {
        match self {
            Template::Model => model.chat_template(),
            Template::Named(name) => Some(name.to_owned()),
            Template::Raw => None,
        }
    }
}

/// What a conversation was made with.
#[derive(Clone, Debug)]
pub struct Made {
    pub context: ContextOptions,
    /// `short`, `long`, or `none` for models without two sets.
    pub rope_factors: &'static str,
    pub load: Duration,
}

impl Setup<'_> {
    /// Loads the model, makes the context and hands the conversation to `f`.
    pub fn run<R>(&self, f: impl FnOnce(&mut Conversation, &Made) -> Result<R>) -> Result<R> {
        let start = Instant::now();
        let n_threads = self.context.n_threads()?;
        let model = load_model(self.files, self.model)?;
        let vision = load_vision(self.files, self.model, n_threads, &model)?;
        self.check_num_crops(vision.as_ref())?;
        let mut context = self.context_options(&model, vision.as_ref())?;
        if self.trace.is_some() {
            read_for_trace(&mut context, &model, self.policy)?;
        }
        let template = self.template.of(&model);
        check_template(
            &model,
            self.template,
            template.as_deref(),
            self.system_prompt,
        )?;
        let transcript = Transcript::new(template, self.system_prompt.map(str::to_owned));

        let (rope, max_positions) =
            self.rope_factors(&model, vision.as_ref(), &context, &transcript)?;
        context.rope_factors = rope;
        let rope_factors = rope_name(rope, &model, context.n_ctx);
        let engine = LlamaEngine::new(&model, context.clone(), &self.sampler)?;
        let limits = Limits {
            n_layer: model.n_layer(),
            n_cells: engine.n_cells(),
        };
        let mut controller = Controller::new(self.policy.create(limits)?, engine.n_cells());
        if self.bin_host_mib > 0 && !controller.recalls() {
            let reason = "wants a policy that calls evicted tokens back: hae, without --no-recall";
            return Err(Error::option("--bin-host-mib", reason).into());
        }
        if let Some(path) = self.trace {
            let header = trace::Header::new(
                self.files.names().0,
                limits,
                self.policy,
                context.score_layers.clone(),
            );
            trace::record(&mut controller, path, header)?;
        }
        let host_bin = usize::try_from(self.bin_host_mib).unwrap_or(0) << 20;
        let mut conversation = Conversation::new(
            engine,
            vision,
            controller,
            transcript,
            max_positions,
            host_bin,
        );
        conversation.prepare()?;
        if let Some(saved) = self.session {
            conversation.resume(saved.clone())?;
        }
        let done = f(
            &mut conversation,
            &Made {
                context,
                rope_factors,
                load: start.elapsed(),
            },
        )?;
        conversation.finish_recording()?;
        Ok(done)
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

    /// The context's options with what the policy and the vision model need.
    fn context_options(&self, model: &Model, vision: Option<&Vision>) -> Result<ContextOptions> {
        let mut context = self.context.options(model.n_ctx_train())?;
        context.non_causal_images = vision.is_some_and(Vision::non_causal);
        Ok(for_policy(context, model, self.policy)?)
    }

    /// The factors for the positions that the run can reach, and up to where they hold.
    fn rope_factors(
        &self,
        model: &Model,
        vision: Option<&Vision>,
        context: &ContextOptions,
        transcript: &Transcript,
    ) -> Result<(RopeFactors, Option<usize>)> {
        let Some(from) = model.long_rope_from() else {
            return Ok((RopeFactors::Context, None));
        };
        let from = from as usize;
        let n_ctx = padded(context.n_ctx) as usize;
        // Cached keys were rotated once and for all.
        match (self.model.rope_factors, self.session) {
            (RopeArg::Auto, Some(saved)) if saved.rope_factors == RopeFactors::Long => {
                return Ok((RopeFactors::Long, None));
            }
            (RopeArg::Auto, Some(_)) => return Ok((RopeFactors::Short, Some(from))),
            _ => {}
        }
        // Without eviction no position lies beyond the cache, nor where positions move down.
        let limits = Limits {
            n_layer: model.n_layer(),
            n_cells: n_ctx,
        };
        let shifts = self.policy.create(limits)?.shifts();
        let evicts = context.kv_size.is_some() && !shifts;
        let positions = match (self.model.rope_factors, self.prompt, self.n_predict) {
            (RopeArg::Short, ..) => 0,
            (RopeArg::Long, ..) => usize::MAX,
            (RopeArg::Context, ..) => return Ok((RopeFactors::Context, None)),
            (RopeArg::Auto, Some(text), Some(n)) if evicts || n_ctx > from => self
                .first_prompt(model, vision, text, transcript)?
                .saturating_add(n),
            // A chat, or an answer without an end: as far as the cache reaches.
            (RopeArg::Auto, ..) => n_ctx,
        };
        let positions = if evicts {
            positions
        } else {
            positions.min(n_ctx)
        };
        Ok(
            if self.model.rope_factors == RopeArg::Long || positions > from {
                (RopeFactors::Long, None)
            } else {
                (
                    RopeFactors::Short,
                    (!shifts || n_ctx > from).then_some(from),
                )
            },
        )
    }

    /// Positions of the first prompt.
    fn first_prompt(
        &self,
        model: &Model,
        vision: Option<&Vision>,
        text: &str,
        transcript: &Transcript,
    ) -> Result<usize> {
        let line = vision.is_some_and(Vision::bos_per_text);
        let (content, order) =
            place_pictures(text, transcript.pictures(), self.pictures.len(), line)?;
        let pictures: Vec<&Picture> = order.iter().map(|&i| &self.pictures[i]).collect();
        let text = transcript.clone().ask(model, content)?;
        Ok(tokenize(model, vision, &text, &pictures, true)?
            .iter()
            .map(Piece::positions)
            .sum())
    }
}

/// A template that cannot be used is better refused now than at the first question. `text` is the
/// chosen template's, if there is one.
pub fn check_template(
    model: &Model,
    chosen: Template<'_>,
    text: Option<&str>,
    system_prompt: Option<&str>,
) -> Result<()> {
    let Some(text) = text else {
        if system_prompt.is_some() {
            let reason =
                "the model has no chat template to put it into, name one with --chat-template";
            return Err(Error::option("-sys", reason).into());
        }
        if matches!(chosen, Template::Model) {
            warn(&format!(
                "{}: has no chat template, prompts go in as they are: name one with --chat-template, or give --no-conversation",
                model.path().display()
            ));
        }
        return Ok(());
    };
    let probe = Message {
        role: "user".into(),
        content: "?".into(),
    };
    match chat::apply(model, text, &[probe], true) {
        Err(_) if matches!(chosen, Template::Model) => Err(Error::file(
            model.path(),
            "llama.cpp does not know its chat template, expected --chat-template with a name such as phi3 or chatml, or --no-conversation",
        )
        .into()),
        result => Ok(result.map(|_| ())?),
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

/// Cells that a cache with eviction begins with.
const KV_SIZE_AT_FIRST: u32 = 256;

/// The context with what the policy asks of it.
///
/// # Errors
/// [`Error::Option`] for parameters that cannot be, [`Error::Unsupported`] for a model whose cache
/// does not allow what the policy does.
pub fn for_policy(
    mut context: ContextOptions,
    model: &Model,
    policy: &PolicySpec,
) -> hae::Result<ContextOptions> {
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: context.n_ctx as usize,
    };
    let policy = policy.create(limits)?;
    if policy.evicts() {
        if let Some(reason) = model.eviction_obstacle() {
            return Err(Error::Unsupported {
                policy: policy.name(),
                reason: reason.into(),
            });
        }
        if let Observe::Layers { layers, .. } = policy.observe() {
            context.score_layers = layers;
        }
        // `full` allocates all of its cells at once, as llama.cpp does.
        context.kv_size = Some(KV_SIZE_AT_FIRST);
    }
    Ok(context)
}

/// A trace of `full` holds attention that the policy itself does not ask for.
///
/// # Errors
/// [`Error::Option`] for layers that are not there, or a model whose cells cannot be told apart.
pub fn read_for_trace(
    context: &mut ContextOptions,
    model: &Model,
    policy: &PolicySpec,
) -> hae::Result<()> {
    if policy.name != "full" {
        return Ok(());
    }
    if let Some(reason) = model.eviction_obstacle() {
        let reason = format!("attention by token cannot be read: {reason}");
        return Err(Error::option("--trace", reason));
    }
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: context.n_ctx as usize,
    };
    policy.options.validate(limits)?;
    context.score_layers = policy.options.layers.resolve(limits.n_layer);
    Ok(())
}

/// The set of rope factors that a context uses, for reports; `none` for models without two sets.
pub fn rope_name(rope: RopeFactors, model: &Model, n_ctx: u32) -> &'static str {
    match rope.resolved(model, n_ctx) {
        RopeFactors::Context => "none",
        RopeFactors::Long => "long",
        RopeFactors::Short => "short",
    }
}

/// The cells that llama.cpp makes of `-c`.
pub fn padded(n_ctx: u32) -> u32 {
    n_ctx.next_multiple_of(256)
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
