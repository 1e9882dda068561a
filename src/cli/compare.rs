//! `hae compare`: the same prompts under several cache policies and budgets, side by side.

use std::path::PathBuf;

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::Done;
use super::asking::{
    Evaluation, EvaluationArgs, Format, TextArgs, print_answers, print_json, print_summary,
};
use super::crops::CropArgs;
use super::inputs::{self, EscapeArgs};
use super::output::FileReport;
use hae::Error;
use hae::eval::files::Source;
use hae::eval::question::{Expected, Image, Question, Turn};
use hae::eval::record::{FileId, QuestionSet};
use hae::eval::summary::Summary;

/// What asks, where a text is read.
const PROMPTS: [&str; 5] = ["image", "prompt", "file", "repetitions", "no_distance"];

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    mut_arg("text", |arg| arg.conflicts_with_all(PROMPTS)),
    mut_arg("kl_divergence_base", |arg| arg.conflicts_with_all(PROMPTS)),
    next_help_heading = "Prompt",
    after_help = "Lists: values separated by commas. Every policy but full is asked at every --kv-budget."
)]
pub struct Args {
    /// Picture to ask about; repeat for several
    ///
    /// Or put commas between them.
    #[arg(long, value_name = "FILE", requires = "prompt")]
    image: Vec<PathBuf>,
    #[command(flatten)]
    crops: CropArgs,
    /// The prompt
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "file"
    )]
    prompt: Option<String>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// File of prompts, JSON lines
    ///
    /// As for hae eval, but answers may be missing.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Times that each policy answers
    ///
    /// By turns. Times in the table are medians.
    #[arg(short, long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    repetitions: u32,
    /// Do not measure the distance to the full cache
    #[arg(long)]
    no_distance: bool,
    #[command(flatten)]
    text: TextArgs,
    /// Windows of the text, at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "text", help_heading = "Text")]
    limit: Option<u32>,
    #[command(flatten)]
    pub evaluation: EvaluationArgs,
}

pub fn run(args: &Args) -> Result<Done> {
    if args.text.wanted() {
        let limit = args.limit.map(|n| n as usize);
        return Ok(args.text.run(limit, &args.evaluation)?.done);
    }
    let num_crops = args.crops.num_crops()?;
    let (questions, file, format) = match (&args.prompt, &args.file) {
        (Some(text), _) => {
            let text = args.escapes.prompt("-p", text)?;
            prompt(&text, &inputs::pictures(&args.image))?
        }
        (None, Some(path)) => {
            let source = Source {
                path: path.clone(),
                unanswered: true,
                ..Source::default()
            };
            let (format, questions) = source.read()?;
            let FileReport { file, sha256 } = FileReport::read(path, &path.display().to_string())?;
            (questions, FileId { file, sha256 }, format.name())
        }
        (None, None) => {
            let reason = "is missing, expected a prompt, or a file of them with -f";
            return Err(Error::option("-p", reason).into());
        }
    };
    let evaluation = Evaluation {
        args: &args.evaluation,
        command: "compare",
        file: args.file.as_deref(),
        set: QuestionSet {
            file,
            format: format.into(),
            part: None,
            every: 1,
            limit: None,
            n: questions.iter().map(|q| q.turns.len()).sum(),
        },
        questions: &questions,
        num_crops,
        distance: !args.no_distance,
        repetitions: args.repetitions as usize,
    };
    let outcome = evaluation.run()?;
    let summary = Summary::of(&outcome.header, &outcome.answers);
    match args.evaluation.output {
        Format::Json => print_json(&outcome.header, &outcome.answers, &summary)?,
        format => {
            if format == Format::Md {
                print_answers(&outcome.header, &outcome.answers)?;
            }
            print_summary(format, &outcome.header, &summary)?;
        }
    }
    Ok(outcome.done)
}

/// One question that the command line asks.
fn prompt(text: &str, images: &[PathBuf]) -> Result<(Vec<Question>, FileId, &'static str)> {
    if text.trim().is_empty() {
        return Err(Error::option("-p", "is empty, expected a prompt").into());
    }
    for path in images {
        if !path.is_file() {
            let reason = format!("there is no picture {}", path.display());
            return Err(Error::option("--image", reason).into());
        }
    }
    let question = Question {
        id: "prompt".into(),
        place: "-p".into(),
        images: images.iter().cloned().map(Image::File).collect(),
        num_crops: None,
        turns: vec![Turn {
            task: "prompt".into(),
            text: text.into(),
            raw: Some(text.into()),
            expected: Expected::Nothing,
        }],
    };
    let names = question.image_names().join("\n");
    let id = FileId {
        file: "-p".into(),
        sha256: format!("{:x}", Sha256::digest(format!("{text}\n{names}"))),
    };
    Ok((vec![question], id, "prompt"))
}
