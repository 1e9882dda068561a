//! `hae run`: one prompt, or a chat.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::load::{self, Files, Made, Setup, Template};
use super::options::{ContextArgs, ModelArgs, PolicyArgs, SamplerArgs};
use super::output::{ContextReport, FileReport, Report};
use super::{chat, warn};
use hae::Error;
use hae::build::build;
use hae::conversation::{Answer, Conversation, Turn};
use hae::generate::{Finish, Hooks};
use hae::image::{self, Picture};
use hae::llama::{self, ContextOptions, FlashAttention};
use hae::policy::PolicyOptions;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Picture to ask about; repeat for several. The prompt may say where they go with
    /// <|image_1|>, <|image_2|>, ...; otherwise they go in front
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The prompt; without one, a chat
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens to generate at most; -1: until the model ends or the context is full
    #[arg(short, long, default_value_t = -1, allow_negative_numbers = true, value_name = "N")]
    n_predict: i64,
    /// -sys: system prompt
    #[arg(long, visible_alias = "sys", value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Name or text of a chat template that llama.cpp knows [default: the model's own]
    #[arg(long, value_name = "TEMPLATE")]
    chat_template: Option<String>,
    /// -no-cnv: use no chat template, the prompt goes in as it is
    #[arg(long, visible_alias = "no-cnv", conflicts_with_all = ["chat_template", "system_prompt"])]
    no_conversation: bool,
    #[command(flatten)]
    context: ContextArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// `full` keeps everything, as llama.cpp does; `hae` prunes visual tokens after the prompt
    /// (DAP) and, with --kv-budget, evicts through a recycle bin while decoding (DDES)
    #[arg(long, default_value = "full", value_name = "NAME")]
    kv_policy: String,
    #[command(flatten)]
    policy: PolicyArgs,
    /// What stdout carries: the answer, or one JSON object at the end
    #[arg(short, long, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

pub fn run(args: &Args) -> Result<()> {
    if args.verbose {
        llama::log::show(|line| eprint!("{line}"));
    }
    let policy_options = args.policy.options()?;
    if args.kv_policy == "full" && policy_options != PolicyOptions::default() {
        return Err(Error::option(
            "--kv-policy",
            "full takes no parameters, expected hae beside these flags",
        )
        .into());
    }
    let n_predict = match args.n_predict {
        -1 => None,
        n => Some(
            usize::try_from(n)
                .map_err(|_| Error::option("-n", format!("{n}, expected -1 or more")))?,
        ),
    };
    let prompt = prompt(args)?;
    if prompt.is_none() && args.output == Format::Json {
        return Err(Error::option("-o", "json needs a prompt, give one with -p or -f").into());
    }
    let pictures = args
        .image
        .iter()
        .map(|path| picture(path))
        .collect::<Result<Vec<_>>>()?;
    let files = Files::find(&args.model)?;
    let cancel = cancel_flag()?;
    let setup = Setup {
        files: &files,
        model: &args.model,
        context: &args.context,
        policy: (&args.kv_policy, &policy_options),
        sampler: args.sampler.options(load::clock_seed())?,
        template: match (&args.chat_template, args.no_conversation) {
            (_, true) => Template::Raw,
            (Some(name), _) => Template::Named(name),
            (None, _) => Template::Model,
        },
        system_prompt: args.system_prompt.as_deref(),
        prompt: prompt.as_deref(),
        pictures: &pictures,
        n_predict,
    };
    setup.run(|conversation, made| {
        warn_about_flash_attention(&made.context);
        let Some(text) = &prompt else {
            return chat::chat(conversation, pictures.clone(), n_predict, &cancel);
        };
        let turn = Turn { text: text.clone(), pictures: pictures.clone(), n_predict };
        let answer = answer(conversation, &turn, &cancel, args.output == Format::Text)?;
        if answer.finish == Finish::Context {
            warn("the context is full, the answer is cut short: give a larger -c, or a --kv-budget with --kv-policy hae");
        }
        if args.output == Format::Json { print_json(&answer, &setup, made) } else { Ok(()) }
    })
}

/// Set by Ctrl-C; the second one does not wait for the answer to notice.
fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let cancel = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&cancel);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(cancel)
}

fn print_json(answer: &Answer, setup: &Setup<'_>, made: &Made) -> Result<()> {
    let (name, mmproj) = setup.files.names();
    let report = Report {
        answer,
        sampling: setup.sampler,
        context: ContextReport::new(&made.context, made.rope_factors),
        model: FileReport::read(&setup.files.model, &name)?,
        mmproj: setup
            .files
            .mmproj
            .as_deref()
            .zip(mmproj)
            .map(|(path, name)| FileReport::read(path, &name))
            .transpose()?,
        load_ms: made.load.as_secs_f64() * 1e3,
        build: build(),
    };
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &report).map_err(std::io::Error::from)?;
    Ok(writeln!(out)?)
}

fn prompt(args: &Args) -> Result<Option<String>> {
    let text = match (&args.prompt, &args.file) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(path)) => Some(std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?),
        (None, None) => None,
    };
    if text.as_ref().is_some_and(String::is_empty) {
        return Err(Error::option("-p", "the prompt is empty").into());
    }
    Ok(text)
}

pub fn picture(path: &Path) -> Result<Picture> {
    Ok(image::load(path, &image::Limits::default())?)
}

fn warn_about_flash_attention(context: &ContextOptions) {
    if !context.score_layers.is_empty() && context.flash_attention == FlashAttention::On {
        warn("this policy reads attention scores, which switches flash attention off");
    }
}

/// One turn with its text streamed to stdout.
pub fn answer(
    conversation: &mut Conversation<'_>,
    turn: &Turn,
    cancel: &AtomicBool,
    stream: bool,
) -> Result<Answer> {
    let now = load::clock();
    let bar = load::spinner("reading the prompt");
    let mut out = std::io::stdout().lock();
    let mut failure = None;
    let answer = {
        let cancelled = || cancel.load(Ordering::SeqCst);
        let mut on_text = |text: &str| {
            bar.finish_and_clear();
            if stream && failure.is_none() {
                // The loop has no use for a broken pipe; stop it and report.
                if let Err(e) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                    failure = Some(e);
                    cancel.store(true, Ordering::SeqCst);
                }
            }
        };
        conversation.ask(
            turn,
            Hooks {
                on_text: &mut on_text,
                cancelled: &cancelled,
                now: &now,
            },
        )
    };
    bar.finish_and_clear();
    if let Some(e) = failure {
        return Err(e.into());
    }
    let answer = answer?;
    if stream {
        writeln!(out)?;
    }
    Ok(answer)
}
