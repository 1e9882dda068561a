//! `hae eval`: how many questions a model answers, or how well it predicts a text, under several
//! cache policies.

use anyhow::Result;

use super::asking::{
    Evaluation, EvaluationArgs, Format, QuestionArgs, TextArgs, print_json, print_summary,
};
use super::{Done, warn};
use hae::Error;
use hae::eval::split::Part;
use hae::eval::summary::Summary;

/// What asks questions, of which a text has none.
const QUESTIONS: [&str; 8] = [
    "questions",
    "format",
    "image_dir",
    "subset",
    "every",
    "part",
    "distance",
    "min_accuracy",
];

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    mut_arg("text", |arg| arg.conflicts_with_all(QUESTIONS)),
    mut_arg("kl_divergence_base", |arg| arg.conflicts_with_all(QUESTIONS)),
    after_help = "Lists: values separated by commas. Every policy but full is asked at every --kv-budget."
)]
pub struct Args {
    #[command(flatten)]
    questions: QuestionArgs,
    /// Ask a part: tune, test, or tune:0.3
    ///
    /// The number is the share of the pictures that is for tuning. Which pictures these are follows
    /// from their names.
    #[arg(long, value_name = "PART[:SHARE]")]
    part: Option<Part>,
    /// Measure the distance to the full cache
    ///
    /// How far predictions are from the full cache's. It takes two more runs of each question.
    #[arg(long)]
    distance: bool,
    /// Exit with 1 when a policy is right less often
    ///
    /// Or when its stories state a smaller share of their facts.
    #[arg(long, value_name = "SHARE")]
    min_accuracy: Option<f64>,
    /// Exit with 1 when the mean KL is larger
    ///
    /// That of a policy to the full cache. It implies --distance.
    #[arg(long, value_name = "NATS")]
    max_kl: Option<f64>,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    pub evaluation: EvaluationArgs,
}

pub fn run(args: &Args) -> Result<Done> {
    if let Some(x) = args.min_accuracy.filter(|x| !(0.0..=1.0).contains(x)) {
        let reason = format!("{x}, expected a share from 0 to 1");
        return Err(Error::option("--min-accuracy", reason).into());
    }
    if let Some(x) = args.max_kl.filter(|x| !(x.is_finite() && *x >= 0.0)) {
        let reason = format!("{x}, expected a number of at least 0");
        return Err(Error::option("--max-kl", reason).into());
    }
    if args.text.wanted() {
        let read = args.text.run(args.questions.limit(), &args.evaluation)?;
        let kl = read.kl.iter();
        let misses: Vec<String> = kl
            .filter_map(|(contender, kl)| too_far(args, contender, *kl))
            .collect();
        return match read.done {
            Done::Whole => Ok(told(&misses)),
            done => Ok(done),
        };
    }
    let num_crops = args.questions.crops.num_crops()?;
    let file = args.questions.read()?;
    let (set, questions) = args.questions.select(&file, args.part);
    if questions.is_empty() {
        let reason = format!(
            "leaves none of {} questions, expected at least one",
            file.all.len()
        );
        return Err(Error::option("--part", reason).into());
    }
    let evaluation = Evaluation {
        args: &args.evaluation,
        command: "eval",
        file: Some(args.questions.path()?),
        set,
        questions: &questions,
        num_crops,
        distance: args.distance || args.max_kl.is_some(),
        repetitions: 1,
    };
    let outcome = evaluation.run()?;
    let summary = Summary::of(&outcome.header, &outcome.answers);
    match args.evaluation.output {
        Format::Json => print_json(&outcome.header, &[], &summary)?,
        format => print_summary(format, &outcome.header, &summary)?,
    }
    match outcome.done {
        Done::Whole => Ok(missed(args, &summary)),
        done => Ok(done),
    }
}

/// Whether a threshold was missed.
fn missed(args: &Args, summary: &Summary) -> Done {
    let mut misses = Vec::new();
    for row in summary.overall() {
        let name = &row.contender;
        for (what, value) in [("accuracy", row.accuracy), ("share of facts", row.recall)] {
            if let (Some(least), Some(value)) = (args.min_accuracy, value)
                && value < least
            {
                misses.push(format!(
                    "{name}: its {what} is {value:.4}, below --min-accuracy {least}"
                ));
            }
        }
        misses.extend(row.kl_mean.and_then(|kl| too_far(args, name, kl)));
    }
    told(&misses)
}

fn too_far(args: &Args, name: &str, kl: f64) -> Option<String> {
    let most = args.max_kl.filter(|&most| kl > most)?;
    let text = format!("{name}: its mean KL is {kl:.6}, above --max-kl {most}");
    Some(text)
}

/// Says on stderr what was missed.
fn told(misses: &[String]) -> Done {
    for text in misses {
        warn(text);
    }
    match misses {
        [] => Done::Whole,
        _ => Done::Missed,
    }
}
