//! What `hae eval` and `hae compare` share: questions under several policies and budgets, each
//! answer saved as it comes.

mod asking;
mod print;
mod questions;
mod sitting;

use std::path::PathBuf;

use anyhow::Result;

use super::bench::policies;
use super::load::Files;
use super::options::PolicyArgs;
use super::{Done, interrupt};
use hae::Error;
use hae::asker::Entrant;
use hae::eval::question::Question;
use hae::eval::record::{Answer, Header, QuestionSet};
use hae::eval::results::{Results, key};
use hae::eval::summary::budget_text;
use hae::policy::{Amount, PolicyOptions};

pub use asking::{AskArgs, Asked, Ready, bar};
pub use print::{
    Columns, Format, percent, print_answers, print_json, print_summary, summary_text, write,
};
pub use questions::QuestionArgs;
pub use sitting::Sitting;

#[derive(Debug, clap::Args)]
pub struct ExamArgs {
    /// Cache policies, list; the first is what the others are compared with
    #[arg(
        long,
        value_name = "NAME",
        default_value = "full,hae",
        help_heading = "KV cache policy"
    )]
    kv_policy: Vec<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    ask: AskArgs,
    /// Save each answer in FILE as it comes, JSON lines; a file that was begun goes on
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// What stdout carries
    #[arg(short, long, value_enum, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    pub output: Format,
}

/// What is asked, and how.
pub struct Exam<'a> {
    pub args: &'a ExamArgs,
    pub command: &'static str,
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
        let policies = policies(&self.kv_policy)?;
        let budgets = self.policy.budgets();
        if let Some(i) = (0..budgets.len()).find(|&i| budgets[..i].contains(&budgets[i])) {
            let reason = format!("{} is in the list twice", budget_text(budgets[i]));
            return Err(Error::option("--kv-budget", reason).into());
        }
        if policies == ["full"]
            && self.policy.options_at(budgets.first().copied())? != PolicyOptions::default()
        {
            let reason = "full takes no parameters, expected another policy beside these flags";
            return Err(Error::option("--kv-policy", reason).into());
        }
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
            let budgets = match (policy, budgets) {
                ("full", _) => vec![None],
                (_, []) => vec![None],
                (_, budgets) => budgets.iter().copied().map(Some).collect(),
            };
            for budget in budgets {
                let options = match policy {
                    "full" => PolicyOptions::default(),
                    _ => self.policy.options_at(budget)?,
                };
                all.push(Candidate {
                    policy,
                    budget,
                    options,
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
        let files = Files::find(&args.ask.model)?;
        let questions = self.questions.iter();
        args.ask.ready(&files, questions, self.num_crops, |ready| {
            let entrants = candidates
                .into_iter()
                .map(|c| ready.entrant(c.name(), c.policy, c.budget, c.options))
                .collect::<Result<Vec<_>>>()?;
            let seed = args.policy.options_at(None)?.seed;
            let asked = (self.command, &self.set, self.distance, seed);
            let header = args.ask.header(asked, &files, &ready, &entrants)?;
            self.sit(ready, header, &entrants)
        })
    }

    fn sit(&self, ready: Ready<'_>, header: Header, entrants: &[Entrant]) -> Result<Outcome> {
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
        };
        let done = interrupt::answering(|| sitting.all());
        sitting.bar.finish_and_clear();
        Ok(Outcome {
            answers: sitting.in_order(),
            done: done?,
            header,
        })
    }
}
