//! What `hae eval` and `hae compare` share: questions under several policies and budgets, each
//! answer saved as it comes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::args::{Choice, InferenceArgs, Loaded};
use super::print::Format;
use super::questions::Questions;
use super::run::{Runner, Traces, progress_bar, trace_path};
use crate::cli::lists::{policies, values};
use crate::cli::load::Files;
use crate::cli::named::parse;
use crate::cli::options::{POLICY, PolicyArgs};
use crate::cli::{Done, interrupt};
use hae::Error;
use hae::asker::Contender;
use hae::eval::question::Question;
use hae::eval::record::{self, Answer, Header, QuestionSet};
use hae::eval::results::{Results, key};
use hae::llama::CacheType;
use hae::policy::{Amount, PolicySpec, evicts_nothing};
use hae::trace;

#[derive(Debug, clap::Args)]
pub struct EvaluationArgs {
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
    pub policy: PolicyArgs,
    /// Types of K and V, list
    ///
    /// Every policy is asked with each, in the place of -ctk and -ctv.
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["cache_type_k", "cache_type_v"], help_heading = POLICY)]
    cache_types: Vec<String>,
    /// Amounts of text that a layer looks at, list
    ///
    /// Numbers or shares, in the place of --attend-text; 1.0 is all. Every policy is asked with each.
    #[arg(long, value_name = "N|SHARE", conflicts_with = "attend_text", help_heading = POLICY)]
    attend_texts: Vec<String>,
    #[command(flatten)]
    pub inference: InferenceArgs,
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
pub struct Evaluation<'a> {
    pub args: &'a EvaluationArgs,
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

impl EvaluationArgs {
    /// Every policy at every budget (`full` has none), with every type and amount of text. What can be wrong with
    /// them without a model is found here.
    pub fn contenders(&self) -> Result<Vec<Choice>> {
        let policies = policies(&self.kv_policy, false)?;
        let budgets = self.policy.budgets();
        let types = values("--cache-types", &self.cache_types, parse::<CacheType>)?;
        let texts = values("--attend-texts", &self.attend_texts, |text| {
            text.parse::<Amount>().map_err(|e| e.to_string())
        })?;
        once("--kv-budget", budgets.iter().map(Amount::to_string))?;
        once("--cache-types", types.iter().map(|of| of.name().to_owned()))?;
        once("--attend-texts", texts.iter().map(Amount::to_string))?;
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
                let policy = PolicySpec::of(policy, &options);
                for types in each(&types) {
                    for text in each(&texts) {
                        let mut name = record::Contender::name_of(&policy.name, budget);
                        name.extend(types.map(|types| format!("@{}", types.name())));
                        name.extend(text.map(|text| format!("@text{text}")));
                        all.push(Choice {
                            name,
                            policy: policy.clone(),
                            budget,
                            types,
                            text,
                        });
                    }
                }
            }
        }
        Ok(all)
    }
}

/// Each value of a list, or once none where the list is empty.
fn each<T: Copy>(list: &[T]) -> Vec<Option<T>> {
    match list {
        [] => vec![None],
        list => list.iter().copied().map(Some).collect(),
    }
}

/// Refuses a list that has something twice.
fn once(flag: &'static str, mut list: impl Iterator<Item = String>) -> Result<()> {
    let mut seen = HashSet::new();
    match list.find(|name| !seen.insert(name.clone())) {
        Some(name) => Err(Error::option(flag, format!("{name} is in the list twice")).into()),
        None => Ok(()),
    }
}

impl Evaluation<'_> {
    pub fn run(&self) -> Result<Outcome> {
        let args = self.args;
        args.inference.check()?;
        let contenders = args.contenders()?;
        let names: Vec<String> = contenders
            .iter()
            .map(|choice| choice.name.clone())
            .collect();
        self.check_files(&names)?;
        let files = Files::find(&args.inference.model)?;
        let questions = self.questions.iter();
        let loaded = args.inference.load(&files, questions, self.num_crops)?;
        let mut contenders = loaded.contenders(contenders)?;
        if let Some(dir) = &args.trace {
            std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
            let layers = args.policy.options_at(None)?.layers;
            for contender in &mut contenders {
                contender.policy.options.layers.clone_from(&layers);
            }
        }
        let seed = args.policy.options_at(None)?.seed;
        let asked = (self.command, &self.set, self.distance, seed);
        let header = args.inference.header(asked, &files, &loaded, &contenders)?;
        let traces = args.trace.as_ref().map(|dir| Traces {
            dir: dir.clone(),
            model: files.names().0,
        });
        self.ask(loaded, header, &contenders, traces)
    }

    /// Refuses to write over anything that is read, before anything is opened for writing.
    fn check_files(&self, contenders: &[String]) -> Result<()> {
        let args = self.args;
        let mut files = args.inference.in_use(self.file, self.questions);
        if let Some(path) = &args.out {
            files.writes("--out", path)?;
        }
        let Some(dir) = &args.trace else {
            return Ok(());
        };
        for (number, question) in self.questions.iter().enumerate() {
            for contender in contenders {
                let path = trace_path(dir, number, question, contender);
                files.writes("--trace", &path)?;
                trace::check_target(&path)?;
            }
        }
        Ok(())
    }

    /// Asks what the file of earlier answers does not have.
    fn ask(
        &self,
        loaded: Loaded,
        header: Header,
        contenders: &[Contender],
        traces: Option<Traces>,
    ) -> Result<Outcome> {
        let (results, answers) = match &self.args.out {
            Some(path) => {
                let (results, answers) = Results::open(path, &header)?;
                (Some(results), answers)
            }
            None => (None, Vec::new()),
        };
        let questions = Questions {
            all: self.questions,
            num_crops: self.num_crops,
            n_predict: self.args.inference.n_predict(),
        };
        let mut runner = Runner {
            questions,
            distance: self.distance,
            repetitions: self.repetitions,
            loaded,
            bar: progress_bar(questions.turns() * contenders.len(), answers.len())?,
            contenders,
            known: answers.iter().map(key).collect(),
            answers,
            results,
            traces,
        };
        let done = interrupt::working(|| runner.run());
        runner.bar.finish_and_clear();
        Ok(Outcome {
            answers: runner.in_order(),
            done: done?,
            header,
        })
    }
}
