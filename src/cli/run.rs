//! `hae run`: one prompt, or a chat.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::answer::{answer, warn_about_bin, warn_about_end};
use super::calibration::CalibrationArgs;
use super::chat::Start;
use super::crops::CropArgs;
use super::inputs::{self, EscapeArgs, check_stdin};
use super::load::{self, Files, Setup};
use super::options::{
    ConstraintArgs, ContextArgs, FitArgs, ModelArgs, POLICY, PolicyArgs, SamplerArgs, TemplateArgs,
};
use super::output::{ContextReport, Format, Report};
use super::{Done, chat, interrupt, is_of_output, note, session};
use hae::Error;
use hae::answer::Answer;
use hae::build::build;
use hae::chat::{Begin, Chat, ChatOptions};
use hae::generate::Finish;
use hae::memory::Work;
use hae::trace;
use hae::turn::Turn;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Prompt", allow_negative_numbers = true)]
pub struct Args {
    /// Picture to ask about; repeat for several
    ///
    /// Or put commas between them. - is standard input. Pictures go in front of the prompt. It may
    /// say where they go instead: with <|image_1|>, <|image_2|>, ..., counted over the whole
    /// conversation or in the turn, or with as many <__media__>.
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
    /// Read the prompt from a file; - is stdin
    ///
    /// UTF-8. The newline at its end is not part of the prompt.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// Most tokens to write; -1: no limit
    ///
    /// Without a limit an answer goes on until the model ends it or the context is full. -2 is the
    /// same.
    #[arg(short, long, alias = "predict", default_value_t = -1, value_name = "N")]
    n_predict: i64,
    /// Keep the conversation in FILE, or go on with it
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// -sys: system prompt
    #[arg(
        long,
        alias = "sys",
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "no_conversation"
    )]
    system_prompt: Option<String>,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    fit: FitArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
    #[command(flatten)]
    constraint: ConstraintArgs,
    /// full keeps all, hae prunes
    ///
    /// full is llama.cpp's cache as it is. hae drops the visual tokens that the question does not
    /// look at. With a --kv-budget it also evicts tokens while the answer is written. hae help
    /// policies lists those to compare with.
    #[arg(
        long,
        default_value = "full",
        value_name = "NAME",
        help_heading = POLICY
    )]
    kv_policy: String,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Write what the cache did, for hae report
    ///
    /// FILE holds what the cache saw and decided, the text and the pictures. hae replay reads it,
    /// too. With full, attention is read and kept for it.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    trace: Option<PathBuf>,
    /// text, or one json object
    #[arg(short, long, value_enum, hide_possible_values = true, default_value_t = Format::Text, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        super::show_log();
    }
    let policy_options = args.policy.options()?;
    args.policy
        .refuse_unread(&[&args.kv_policy], args.trace.is_some())?;
    let n_predict = args.n_predict()?;
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
    let (session, _claim) = match &args.session {
        Some(path) => {
            let (saved, claim) = session::open(path)?;
            (saved, Some(claim))
        }
        None => (None, None),
    };
    let template = args.template.template()?;
    if let Some(saved) = &session {
        session::check_flags(saved, &template, args.system_prompt.as_deref())?;
    }
    let files = Files::find(&args.model)?;
    let named = (&*args.kv_policy, &args.policy);
    let (policy, calibrated) = args.calibration.policy(&files, named, policy_options)?;
    args.context.refuse_unread(&policy)?;
    let sizes = pictures.iter().map(|p| (p.width, p.height, p.num_crops));
    let work = Work {
        pictures: sizes.collect(),
        ..Work::default()
    };
    let context = args.context.options()?;
    let flags = (&args.model, &args.context, &args.fit);
    let (model, context) = load::fitted(&files, flags, context, (&policy, &work))?;
    let setup = Setup {
        files: &files,
        model: &model,
        options: ChatOptions {
            context,
            rope: args.model.rope_factors,
            policy,
            sampler: args.sampler.options(load::clock_seed())?,
            template,
            system_prompt: args.system_prompt.clone(),
            grammar: args.constraint.grammar()?,
        },
        num_crops,
    };
    let turn = prompt.as_ref().map(|text| Turn {
        text,
        pictures: &pictures,
        n_predict,
        expected: None,
    });
    let name = files.names().0;
    let begin = Begin {
        only: turn,
        saved: session.as_ref(),
        trace: args.trace.as_deref().map(|path| (path, &*name)),
    };
    let calibration = calibrated.as_ref().map(|c| c.path.clone());
    let done = setup.open(begin).and_then(|(mut chat, load)| {
        if let Some(calibrated) = calibrated.as_ref().filter(|_| args.output == Format::Text) {
            note(&format!("{}: {}", calibrated.path, calibrated.flags()));
        }
        // A request to end does not come between an answer and what is kept of it.
        let done = interrupt::working(|| match turn {
            Some(turn) => one(args, &mut chat, turn, &setup, load, calibration),
            None => {
                let start = Start {
                    pictures: pictures.clone(),
                    num_crops,
                    n_predict,
                    calibration,
                };
                let chatted = chat::chat(&mut chat, start);
                session::keep(&mut chat, args.session.as_deref())?;
                chatted.map(|()| Done::Whole)
            }
        })?;
        chat.finish_recording()?;
        Ok(done)
    });
    done.map_err(|e| match &calibrated {
        Some(calibrated) => calibrated.blamed(e),
        None => e,
    })
}

/// The one prompt that was given.
fn one(
    args: &Args,
    chat: &mut Chat,
    turn: Turn<'_>,
    setup: &Setup<'_>,
    load: Duration,
    calibration: Option<String>,
) -> Result<Done> {
    let answered = answer(chat, turn, args.output == Format::Text);
    // Whoever read the answer may be gone, the conversation is not.
    if answered.as_ref().err().is_none_or(is_of_output) {
        session::keep(chat, args.session.as_deref())?;
    }
    let mut answer = answered?;
    answer.policy.calibration = calibration;
    warn_about_end(&answer);
    warn_about_bin(&answer);
    if args.output == Format::Json {
        print_json(&answer, chat, setup, load)?;
    }
    Ok(match answer.finish {
        Finish::Cancelled => Done::Interrupted,
        _ => Done::Whole,
    })
}

impl Args {
    /// Tokens of an answer at most; `None`: no limit.
    fn n_predict(&self) -> hae::Result<Option<usize>> {
        let n = self.n_predict;
        match usize::try_from(n) {
            Ok(n) => Ok(Some(n)),
            Err(_) if n >= -2 => Ok(None),
            Err(_) => Err(Error::option("-n", format!("{n}, expected -1 or more"))),
        }
    }

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

fn print_json(answer: &Answer, chat: &Chat, setup: &Setup<'_>, load: Duration) -> Result<()> {
    let report = Report {
        answer,
        sampling: setup.options.sampler,
        context: ContextReport::new(chat.context(), chat.attend(), chat.rope_factors()),
        model: setup.files.model_report()?,
        mmproj: setup.files.mmproj_report()?,
        load_ms: load.as_secs_f64() * 1e3,
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
