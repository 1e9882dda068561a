//! What `hae eval` and `hae compare` share: questions under several policies and budgets, each
//! answer saved as it comes.

mod asking;
mod print;
mod questions;
mod sitting;

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::bench::policies;
use super::load::Files;
use super::options::{POLICY, PolicyArgs};
use super::{Done, interrupt};
use hae::Error;
use hae::asker::Entrant;
use hae::eval::question::Question;
use hae::eval::record::{Answer, Header, QuestionSet};
use hae::eval::results::{Results, key};
use hae::eval::summary::budget_text;
use hae::policy::{Amount, PolicyOptions, PolicySpec, evicts_nothing};
use hae::trace;

pub use asking::{AskArgs, Asked, Ready, bar};
pub use print::{Format, percent, print_answers, print_json, print_summary, summary_text, write};
pub use questions::QuestionArgs;
use sitting::trace_path;
pub use sitting::{Sitting, Traces};

#[derive(Debug, clap::Args)]
pub struct ExamArgs {
    /// Policies, list
    ///
    /// The first is what the others are compared with.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "full,hae",
        help_heading = POLICY
    )]
    kv_policy: Vec<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    pub ask: AskArgs,
    /// Save each answer as it comes, or go on
    ///
    /// FILE holds JSON lines. A file that an earlier run began goes on.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Write what the cache did at each question
    ///
    /// One file for each question, for hae report and hae replay. The answers in the file of --out
    /// name them. Under full attention is read for it, too, and all times include the writing.
    #[arg(long, value_name = "DIR", requires = "out", help_heading = "Output")]
    trace: Option<PathBuf>,
    /// md, json, jsonl or csv
    #[arg(short, long, value_enum, hide_possible_values = true, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    pub output: Format,
}

/// What is asked, and how.
pub struct Exam<'a> {
    pub args: &'a ExamArgs,
    pub command: &'static str,
    /// The file of the questions, if they come from one.
    pub file: Option<&'a Path>,
    pub questions: &'a [Question],
    pub set: QuestionSet,
    /// Of pictures whose question does not say.
    pub num_crops: Option<u32>,
    pub distance: bool,
    pub repetitions: usize,
}

/// What came of it.
pub struct Outcome {
    pub header: Header,
    pub answers: Vec<Answer>,
    pub done: Done,
}

/// A policy at a budget, before a model is there to check it.
struct Candidate {
    policy: &'static str,
    budget: Option<Amount>,
    options: PolicyOptions,
}

impl ExamArgs {
    /// Every policy at every budget; `full` has none. What can be wrong with a budget without a
    /// model is found here.
    fn candidates(&self) -> Result<Vec<Candidate>> {
        let policies = policies(&self.kv_policy, false)?;
        let budgets = self.policy.budgets();
        if let Some(i) = (0..budgets.len()).find(|&i| budgets[..i].contains(&budgets[i])) {
            let reason = format!("{} is in the list twice", budget_text(budgets[i]));
            return Err(Error::option("--kv-budget", reason).into());
        }
        self.policy.refuse_unread(&policies, self.trace.is_some())?;
        for &budget in budgets {
            if let Amount::Share(share) = budget
                && !(share > 0.0 && share <= 1.0)
            {
                let reason = format!("a share of {share}, expected more than 0, up to 1");
                return Err(Error::option("--kv-budget", reason).into());
            }
        }
        let mut all = Vec::new();
        for policy in policies {
            let budgets = match budgets {
                [] => vec![None],
                _ if evicts_nothing(policy) => vec![None],
                budgets => budgets.iter().copied().map(Some).collect(),
            };
            for budget in budgets {
                let options = self.policy.options_at(budget)?;
                all.push(Candidate {
                    policy,
                    budget,
                    options: PolicySpec::of(policy, &options).options,
                });
            }
        }
        Ok(all)
    }
}

impl Candidate {
    fn name(&self) -> String {
        match self.budget {
            Some(budget) => format!("{}@{}", self.policy, budget_text(budget)),
            None => self.policy.to_owned(),
        }
    }
}

impl Exam<'_> {
    pub fn run(&self) -> Result<Outcome> {
        let args = self.args;
        args.ask.check()?;
        let candidates = args.candidates()?;
        self.check_files(&candidates)?;
        let files = Files::find(&args.ask.model)?;
        let questions = self.questions.iter();
        args.ask.ready(&files, questions, self.num_crops, |ready| {
            let mut entrants = candidates
                .into_iter()
                .map(|c| {
                    let policy = PolicySpec::new(c.policy, c.options.clone());
                    ready.entrant(c.name(), policy, c.budget)
                })
                .collect::<Result<Vec<_>>>()?;
            if let Some(dir) = &args.trace {
                std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
                let layers = args.policy.options_at(None)?.layers;
                for entrant in &mut entrants {
                    entrant.policy.options.layers.clone_from(&layers);
                }
            }
            let seed = args.policy.options_at(None)?.seed;
            let asked = (self.command, &self.set, self.distance, seed);
            let header = args.ask.header(asked, &files, &ready, &entrants)?;
            let traces = args.trace.as_ref().map(|dir| Traces {
                dir: dir.clone(),
                model: files.names().0,
            });
            self.sit(ready, header, &entrants, traces)
        })
    }

    /// Refuses to write over anything that is read, before anything is opened for writing.
    fn check_files(&self, candidates: &[Candidate]) -> Result<()> {
        let args = self.args;
        let mut files = args.ask.in_use(self.file, self.questions);
        if let Some(path) = &args.out {
            files.writes("--out", path)?;
        }
        let Some(dir) = &args.trace else {
            return Ok(());
        };
        for (number, question) in self.questions.iter().enumerate() {
            for candidate in candidates {
                let path = trace_path(dir, number, question, &candidate.name());
                files.writes("--trace", &path)?;
                trace::check_target(&path)?;
            }
        }
        Ok(())
    }

    fn sit(
        &self,
        ready: Ready,
        header: Header,
        entrants: &[Entrant],
        traces: Option<Traces>,
    ) -> Result<Outcome> {
        let (results, answers) = match &self.args.out {
            Some(path) => {
                let (results, answers) = Results::open(path, &header)?;
                (Some(results), answers)
            }
            None => (None, Vec::new()),
        };
        let asked = Asked {
            questions: self.questions,
            num_crops: self.num_crops,
            n_predict: self.args.ask.n_predict(),
            distance: self.distance,
            repetitions: self.repetitions,
        };
        let mut sitting = Sitting {
            asked,
            context: ready.context,
            asker: ready.asker,
            bar: bar(asked.turns() * entrants.len(), answers.len())?,
            entrants,
            known: answers.iter().map(key).collect(),
            answers,
            results,
            traces,
        };
        let done = interrupt::working(|| sitting.all());
        sitting.bar.finish_and_clear();
        Ok(Outcome {
            answers: sitting.in_order(),
            done: done?,
            header,
        })
    }
}
