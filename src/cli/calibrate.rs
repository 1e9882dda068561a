//! `hae calibrate`: the parameters of `hae` that keep the most of a model's quality at a given
//! memory, chosen on some questions and checked on others.

mod print;
mod trials;

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use indicatif::ProgressBar;

use super::asking::{InferenceArgs, Loaded, QuestionArgs, Questions, Runner, progress_bar, write};
use super::load::Files;
use super::options::POLICY;
use super::{Done, interrupt, note};
use hae::Error;
use hae::asker::Contender;
use hae::calibrate::file::{Calibration, Chosen, Compared, Scores, VERSION};
use hae::calibrate::grid::Grid;
use hae::calibrate::search::{self, Found};
use hae::calibrate::{Score, Setting};
use hae::eval::question::Question;
use hae::eval::record::{self, Answer, Header, QuestionSet};
use hae::eval::split::Part;
use hae::llama::gguf;
use hae::outfile::OutFile;
use hae::policy::{Amount, PolicySpec};
use trials::Trials;

const FULL: &str = "full";
const CALIBRATED: &str = "calibrated";

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "The file is written beside the model, where `hae run --kv-policy hae` finds it."
)]
pub struct Args {
    #[command(flatten)]
    questions: QuestionArgs,
    /// Share of the pictures to choose on
    ///
    /// The check is on the others. --every and --limit thin out both. Which pictures these are
    /// follows from their names.
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    tune: f64,
    /// Times to go over all parameters
    ///
    /// The search ends before when one round changes nothing.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10), value_name = "N")]
    passes: u32,
    /// Most cells to choose for
    ///
    /// The most cells that are taken once the prompt was pruned, a number (512) or a share. A share is one of what the full
    /// cache would hold at the end of the prompt, and below 1.
    #[arg(
        long,
        default_value = "0.4",
        value_name = "N|SHARE",
        help_heading = POLICY
    )]
    kv_budget: Amount,
    #[command(flatten)]
    pub inference: InferenceArgs,
    /// Where the parameters go
    ///
    /// [default: MODEL.hae.json beside the model]
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// md for tables, or json
    ///
    /// json is what the file holds.
    #[arg(short, long, value_enum, hide_possible_values = true, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Md,
    Json,
}

/// A part of the questions.
struct Drawn {
    set: QuestionSet,
    questions: Vec<Question>,
}

pub fn run(args: &Args) -> Result<Done> {
    args.inference.check()?;
    check_budget(args.kv_budget)?;
    let num_crops = args.questions.crops.num_crops()?;
    let (tune, held_out) = draw(args)?;
    let files = Files::find(&args.inference.model)?;
    let path = match (&args.out, files.calibration()) {
        (Some(path), _) => path.clone(),
        (None, Some(path)) => path,
        (None, None) => {
            let reason = "the embedded model has no place beside it, expected the name of a file";
            return Err(Error::option("--out", reason).into());
        }
    };
    let questions = [&tune.questions[..], &held_out.questions].concat();
    let mut in_use = args
        .inference
        .in_use(Some(args.questions.path()?), &questions);
    in_use.writes("--out", &path)?;
    // Better refused now than after the search.
    let out = Calibration::create(&path)?;
    let questions = tune.questions.iter().chain(&held_out.questions);
    let loaded = args.inference.load(&files, questions, num_crops)?;
    let job = Job {
        args,
        files: &files,
        fingerprint: gguf::fingerprint(&files.model)?,
        num_crops,
        tune: &tune,
        held_out: &held_out,
        bar: progress_bar(0, 0)?,
    };
    let done = interrupt::working(|| job.run(loaded));
    job.bar.finish_and_clear();
    let Some(outcome) = done? else {
        note("interrupted, nothing was written");
        return Ok(Done::Interrupted);
    };
    outcome.report(args.output, out)?;
    Ok(Done::Whole)
}

fn check_budget(budget: Amount) -> Result<()> {
    match budget {
        Amount::Share(share) if !(share > 0.0 && share < 1.0) => {
            let reason = format!("a share of {share}, expected more than 0, below 1");
            Err(Error::option("--kv-budget", reason).into())
        }
        _ => Ok(()),
    }
}

/// The questions to choose on and those to check on.
fn draw(args: &Args) -> Result<(Drawn, Drawn)> {
    let share = args.tune;
    if !(share > 0.0 && share < 1.0) {
        let reason = format!("{share}, expected a share between 0 and 1");
        return Err(Error::option("--tune", reason).into());
    }
    let file = args.questions.read()?;
    let part = |tune| -> Result<Drawn> {
        let (set, questions) = args.questions.select(&file, Some(Part { tune, share }));
        if questions.is_empty() {
            let what = if tune { "choose" } else { "check" };
            let n = file.all.len();
            let reason = format!("{share} leaves none of {n} questions to {what} on");
            return Err(Error::option("--tune", reason).into());
        }
        Ok(Drawn { set, questions })
    };
    Ok((part(true)?, part(false)?))
}

/// A calibration under way.
struct Job<'a> {
    args: &'a Args,
    files: &'a Files,
    /// Of the model.
    fingerprint: String,
    /// Of pictures whose question does not say.
    num_crops: Option<u32>,
    tune: &'a Drawn,
    held_out: &'a Drawn,
    bar: ProgressBar,
}

/// What came of it.
struct Outcome {
    calibration: Calibration,
    header: Header,
    /// On the held-out part.
    answers: Vec<Answer>,
}

impl Job<'_> {
    /// `None`: cancelled.
    fn run(&self, loaded: Loaded) -> Result<Option<Outcome>> {
        // What can be wrong with a budget is found before the search.
        let contenders = self.contenders(&loaded, &Setting::default())?;
        let asked = ("calibrate", &self.held_out.set, true, 0);
        let inference = &self.args.inference;
        let mut header = inference.header(asked, self.files, &loaded, &contenders)?;
        let grid = Grid {
            n_layer: loaded.model.n_layer(),
        };
        let (tune, held_out) = (self.questions(self.tune), self.questions(self.held_out));
        let checks = 3 * held_out.turns();
        let mut trials = Trials::new(tune, loaded, &self.bar, checks);
        let passes = self.args.passes as usize;
        let budget = self.args.kv_budget;
        let found = search::search(grid, passes, |round| trials.round(round, budget))?;
        let Some(found) = found else { return Ok(None) };
        let (loaded, full) = trials.end();

        let contenders = self.contenders(&loaded, &found.best().parameters)?;
        header.contenders = contenders.iter().map(|c| c.record.clone()).collect();
        let mut runner = Runner {
            questions: held_out,
            distance: true,
            repetitions: 1,
            loaded,
            contenders: &contenders,
            results: None,
            answers: Vec::new(),
            known: HashSet::new(),
            bar: self.bar.clone(),
            traces: None,
        };
        if runner.run()? == Done::Interrupted {
            return Ok(None);
        }
        let answers = runner.in_order();
        Ok(Some(self.outcome(header, found, full, answers)))
    }

    fn questions<'q>(&self, drawn: &'q Drawn) -> Questions<'q> {
        Questions {
            all: &drawn.questions,
            num_crops: self.num_crops,
            n_predict: self.args.inference.n_predict(),
        }
    }

    /// Who takes the check: `full`, the defaults, and what was found, if that is something else.
    fn contenders(&self, loaded: &Loaded, found: &Setting) -> Result<Vec<Contender>> {
        let budget = Some(self.args.kv_budget);
        let of = |name: &str, setting: &Setting| {
            let policy = PolicySpec::new("hae", setting.options(budget));
            loaded.contender(record::Contender::name_of(name, budget), policy, budget)
        };
        let defaults = Setting::default();
        let mut all = vec![
            loaded.contender(FULL.into(), PolicySpec::full(), None)?,
            of("hae", &defaults)?,
        ];
        if *found != defaults {
            all.push(of(CALIBRATED, found)?);
        }
        Ok(all)
    }

    fn outcome(&self, header: Header, found: Found, full: Score, answers: Vec<Answer>) -> Outcome {
        let of = |i: usize| {
            let name = header.contenders.get(i).map(|c| c.name.as_str());
            Score::of(
                answers
                    .iter()
                    .filter(|a| Some(a.contender.as_str()) == name),
            )
        };
        let other = header.contenders.len() > 2;
        let checked = Compared {
            full: of(0),
            defaults: of(1),
            found: of(if other { 2 } else { 1 }),
        };
        // A search always finds something on the questions that it chose by.
        let chosen = match checked.found.beats(&checked.defaults) {
            true => Chosen::Found,
            false => Chosen::Defaults,
        };
        let calibration = Calibration {
            format: Calibration::format(),
            version: VERSION,
            time: header.time,
            model: header.model.clone(),
            fingerprint: Some(self.fingerprint.clone()),
            mmproj: header.mmproj.clone(),
            tune: self.tune.set.clone(),
            held_out: self.held_out.set.clone(),
            kv_budget: self.args.kv_budget,
            chosen,
            parameters: match chosen {
                Chosen::Found => found.best().parameters.clone(),
                Chosen::Defaults => Setting::default(),
            },
            found: found.best().parameters.clone(),
            scores: Scores {
                tune: Compared {
                    full,
                    defaults: found.defaults().score.clone(),
                    found: found.best().score.clone(),
                },
                held_out: checked,
            },
            tried: found.tried,
            context: header.context.clone(),
            n_predict: header.n_predict,
            build: header.build.clone(),
        };
        Outcome {
            calibration,
            header,
            answers,
        }
    }
}

impl Outcome {
    /// Saves it, then shows it.
    fn report(&self, format: Format, out: OutFile) -> Result<()> {
        let path = out.target().display().to_string();
        self.calibration.write(out)?;
        match format {
            Format::Md => write(&print::tables(self))?,
            Format::Json => {
                let json = serde_json::to_string_pretty(&self.calibration)?;
                write(&format!("{json}\n"))?;
            }
        }
        note(&format!("{path}: {}", self.calibration.parameters));
        Ok(())
    }
}
