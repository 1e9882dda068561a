//! `hae run`: one prompt, or a chat.

use std::cell::RefCell;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::calibration::CalibrationArgs;
use super::chat::Start;
use super::crops::CropArgs;
use super::inputs::{self, EscapeArgs, check_stdin};
use super::load::{self, Files, Made, Setup, Template};
use super::options::{ContextArgs, ModelArgs, PolicyArgs, SamplerArgs};
use super::output::{ContextReport, Report};
use super::{Done, chat, interrupt, is_of_output, note, session, warn};
use hae::Error;
use hae::build::build;
use hae::conversation::{Answer, Conversation, Turn};
use hae::generate::{Finish, Hooks};
use hae::policy::PolicySpec;
use hae::trace;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Prompt", allow_negative_numbers = true)]
pub struct Args {
    /// Picture to ask about, - for standard input; repeat for several, or put commas between them.
    /// The prompt may say where they go with <|image_1|>, <|image_2|>, ..., counted over the whole
    /// conversation or in the turn, or with as many <__media__>; otherwise they go in front
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    #[command(flatten)]
    crops: CropArgs,
    /// The prompt; without one, a chat
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "file"
    )]
    prompt: Option<String>,
    /// Read the prompt from a file (UTF-8), - for standard input, without the newline at its end
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// Tokens to generate at most; -1 and -2: until the model ends or the context is full
    #[arg(short, long, alias = "predict", default_value_t = -1, value_name = "N")]
    n_predict: i64,
    /// Keep the conversation in FILE, and go on with it if FILE holds one
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// -sys: system prompt
    #[arg(long, alias = "sys", value_name = "TEXT", allow_hyphen_values = true)]
    system_prompt: Option<String>,
    /// Name or text of a chat template that llama.cpp knows [default: the model's own]
    #[arg(long, value_name = "TEMPLATE")]
    chat_template: Option<String>,
    /// -no-cnv: use no chat template, the prompt goes in as it is
    #[arg(long, alias = "no-cnv", conflicts_with_all = ["chat_template", "system_prompt"])]
    no_conversation: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// `full` keeps everything, as llama.cpp does; `hae` prunes visual tokens after the prompt
    /// (`dap` alone) and, with a --kv-budget, evicts through a recycle bin while decoding (`ddes`
    /// alone). To compare with: random, random_visual, streaming_llm, context_shift, h2o, tova,
    /// snapkv, fastv, mustdrop
    #[arg(
        long,
        default_value = "full",
        value_name = "NAME",
        help_heading = "KV cache policy"
    )]
    kv_policy: String,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Keep text that a budget evicts in this much host memory, to be put back for the next
    /// question; with a policy that calls evicted tokens back
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        help_heading = "KV cache policy"
    )]
    bin_host_mib: u32,
    /// Write what the cache saw and decided to FILE, for `hae replay` and `hae report`; it holds the
    /// text and the pictures, too. With `full`, attention is read and kept as well
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    trace: Option<PathBuf>,
    /// What stdout carries: the answer, or one JSON object at the end
    #[arg(short, long, value_enum, default_value_t = Format::Text, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        super::show_log();
    }
    let policy_options = args.policy.options()?;
    args.policy
        .refuse_unread(&[&args.kv_policy], args.trace.is_some())?;
    let n_predict = match args.n_predict {
        -1 | -2 => None,
        n => Some(
            usize::try_from(n)
                .map_err(|_| Error::option("-n", format!("{n}, expected -1 or more")))?,
        ),
    };
    let chat = args.prompt.is_none() && args.file.is_none();
    check_stdin(args.file.as_deref(), &args.image, chat)?;
    let prompt = prompt(args)?;
    if prompt.is_none() && args.output == Format::Json {
        return Err(Error::option("-o", "json needs a prompt, give one with -p or -f").into());
    }
    let num_crops = args.crops.num_crops()?;
    let pictures = inputs::pictures(&args.image)
        .iter()
        .map(|path| inputs::picture_or_stdin(path, num_crops))
        .collect::<hae::Result<Vec<_>>>()?;
    args.check_files()?;
    let session = match &args.session {
        Some(path) => session::open(path)?,
        None => None,
    };
    let template = Template::chosen(args.chat_template.as_deref(), args.no_conversation);
    if let Some(saved) = &session {
        session::check_flags(saved, template, args.system_prompt.as_deref())?;
    }
    let files = Files::find(&args.model)?;
    let calibrated = args
        .calibration
        .find(&files, &args.kv_policy, &args.policy)?;
    let policy_options = match &calibrated {
        Some(calibrated) => calibrated.options.clone(),
        None => policy_options,
    };
    let policy = PolicySpec::new(&args.kv_policy, policy_options);
    let setup = Setup {
        files: &files,
        model: &args.model,
        context: &args.context,
        policy: &policy,
        sampler: args.sampler.options(load::clock_seed())?,
        template,
        system_prompt: args.system_prompt.as_deref(),
        prompt: prompt.as_deref(),
        pictures: &pictures,
        num_crops,
        n_predict,
        session: session.as_ref(),
        bin_host_mib: args.bin_host_mib,
        trace: args.trace.as_deref(),
    };
    let done = setup.run(|conversation, made| {
        if let Some(calibrated) = calibrated.as_ref().filter(|_| args.output == Format::Text) {
            note(&format!("{}: {}", calibrated.path, calibrated.flags()));
        }
        let calibration = calibrated.as_ref().map(|c| c.path.clone());
        // A request to end does not come between an answer and what is kept of it.
        interrupt::working(|| {
            let Some(text) = &prompt else {
                let chat = Start {
                    pictures: pictures.clone(),
                    num_crops,
                    n_predict,
                    calibration,
                };
                let chatted = chat::chat(conversation, chat);
                session::keep(conversation, args.session.as_deref())?;
                return chatted.map(|()| Done::Whole);
            };
            let turn = Turn {
                text: text.clone(),
                pictures: pictures.clone(),
                n_predict,
            };
            let answered = answer(conversation, &turn, args.output == Format::Text);
            // Whoever read the answer may be gone, the conversation is not.
            if answered.as_ref().err().is_none_or(is_of_output) {
                session::keep(conversation, args.session.as_deref())?;
            }
            let mut answer = answered?;
            answer.policy.calibration = calibration;
            warn_about_end(&answer);
            if args.output == Format::Json {
                print_json(&answer, &setup, made)?;
            }
            Ok(match answer.finish {
                Finish::Cancelled => Done::Interrupted,
                _ => Done::Whole,
            })
        })
    });
    done.map_err(|e| match &calibrated {
        Some(calibrated) => calibrated.blamed(e),
        None => e,
    })
}

impl Args {
    /// Refuses to write over anything that the run reads, before anything is opened for writing.
    fn check_files(&self) -> Result<()> {
        let mut files = self.model.in_use();
        inputs::pictures(&self.image)
            .iter()
            .for_each(|path| files.reads("--image", path));
        if let Some(path) = &self.file {
            files.reads("-f", path);
        }
        self.calibration.in_use(&self.model, &mut files);
        if let Some(path) = &self.session {
            files.writes("--session", path)?;
        }
        if let Some(path) = &self.trace {
            files.writes("--trace", path)?;
            trace::check_target(path)?;
        }
        Ok(())
    }
}

fn print_json(answer: &Answer, setup: &Setup<'_>, made: &Made) -> Result<()> {
    let report = Report {
        answer,
        sampling: setup.sampler,
        context: ContextReport::new(&made.context, made.rope_factors),
        model: setup.files.model_report()?,
        mmproj: setup.files.mmproj_report()?,
        load_ms: made.load.as_secs_f64() * 1e3,
        build: build(),
    };
    let mut out = std::io::stdout().lock();
    let text = serde_json::to_string_pretty(&report)?;
    writeln!(out, "{text}").context("stdout")
}

fn prompt(args: &Args) -> Result<Option<String>> {
    Ok(match (&args.file, &args.prompt) {
        (Some(path), _) => Some(args.escapes.file(path)?),
        (None, Some(text)) => Some(args.escapes.prompt("-p", text)?),
        (None, None) => None,
    })
}

/// One turn with its text streamed to stdout; a signal ends it where this is
/// [`interrupt::working`].
pub fn answer(conversation: &mut Conversation, turn: &Turn, stream: bool) -> Result<Answer> {
    let now = load::clock();
    let bar = load::spinner("reading the prompt");
    let mut out = std::io::stdout().lock();
    // Why the text could not be written; the answer has no use then and ends.
    let failure: RefCell<Option<std::io::Error>> = RefCell::new(None);
    let cancelled = || interrupt::cancelled() || failure.borrow().is_some();
    let mut on_text = |text: &str| {
        bar.finish_and_clear();
        if stream && failure.borrow().is_none() {
            *failure.borrow_mut() = out
                .write_all(text.as_bytes())
                .and_then(|()| out.flush())
                .err();
        }
    };
    let hooks = Hooks {
        on_text: &mut on_text,
        cancelled: &cancelled,
        now: &now,
    };
    let answer = conversation.ask(turn, hooks);
    bar.finish_and_clear();
    if let Some(e) = failure.into_inner() {
        return Err(e).context("stdout");
    }
    let answer = answer?;
    if stream {
        writeln!(out).context("stdout")?;
    }
    Ok(answer)
}

/// Says on stderr why an answer is shorter than the model wanted it.
pub fn warn_about_end(answer: &Answer) {
    match answer.finish {
        Finish::Context => warn(
            "the context is full, the answer is cut short: give a larger -c, or a --kv-budget with --kv-policy hae",
        ),
        Finish::Positions => warn(
            "the short rope factors reach no further, the answer is cut short: give --rope-factors long",
        ),
        Finish::Eog | Finish::Length | Finish::Cancelled => {}
    }
}
