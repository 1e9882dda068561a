//! What `hae eval` and `hae compare` share: questions under several policies and budgets, each
//! answer saved as it comes.

mod print;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};

use super::bench::policies;
use super::load::{self, Files, Template};
use super::options::{ContextArgs, ModelArgs, PolicyArgs, RopeArg};
use super::output::{ContextReport, FileReport};
use super::{Done, interrupt};
use hae::Error;
use hae::asker::{Answered, Asker, Entrant, Reference};
use hae::bench::stats::Summary as Quartiles;
use hae::bench::{Watch, turns};
use hae::build::build;
use hae::eval::question::{Expected, Question};
use hae::eval::record::{Answer, Contender, Distance, FileId, Header, QuestionSet, VERSION};
use hae::eval::results::{Key, Results, key};
use hae::eval::score::judge;
use hae::eval::summary::budget_text;
use hae::generate::Finish;
use hae::llama::{ContextOptions, Model, RopeFactors, Vision};
use hae::policy::{self, Amount, Limits, PolicyOptions};

pub use print::{Format, print_answers, print_json, print_summary};

/// Tokens of an answer at most, and of a story.
const N_PREDICT: usize = 256;
const N_PREDICT_STORY: usize = 1536;

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
    model: ModelArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// Tokens of an answer at most [default: 256, for stories 1536]
    #[arg(short, long, value_name = "N")]
    n_predict: Option<u32>,
    /// Name or text of a chat template that llama.cpp knows [default: the model's own]
    #[arg(long, value_name = "TEMPLATE")]
    chat_template: Option<String>,
    /// -no-cnv: use no chat template, prompts go in as they are
    #[arg(long, alias = "no-cnv", conflicts_with = "chat_template")]
    no_conversation: bool,
    /// Save each answer in FILE as it comes, JSON lines; a file that was begun goes on
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// What stdout carries
    #[arg(short, long, value_enum, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    pub output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
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

impl Exam<'_> {
    pub fn run(&self) -> Result<Outcome> {
        let args = self.args;
        if args.verbose {
            super::show_log();
        }
        if args.n_predict == Some(0) {
            return Err(Error::option("-n", "0 tokens, expected at least 1").into());
        }
        let candidates = args.candidates()?;
        let files = Files::find(&args.model)?;
        let n_threads = args.context.n_threads()?;
        let model = load::load_model(&files, &args.model)?;
        let vision = load::load_vision(&files, &args.model, n_threads, &model)?;
        self.check_pictures(vision.as_ref())?;
        let chosen = Template::chosen(args.chat_template.as_deref(), args.no_conversation);
        let template = chosen.of(&model);
        load::check_template(&model, chosen, template.as_deref(), None)?;
        let mut context = args.context.options(model.n_ctx_train())?;
        context.non_causal_images = vision.as_ref().is_some_and(Vision::non_causal);
        let max_positions = rope(&mut context, args.model.rope_factors, &model);
        let entrants = candidates
            .into_iter()
            .map(|candidate| entrant(candidate, &context, &model))
            .collect::<Result<Vec<_>>>()?;
        let header = self.header(&files, &context, &model, &entrants)?;
        let (results, answers) = match &args.out {
            Some(path) => {
                let (results, answers) = Results::open(path, &header)?;
                (Some(results), answers)
            }
            None => (None, Vec::new()),
        };
        let mut sitting = Sitting {
            exam: self,
            context,
            asker: Asker::new(&model, vision, template, max_positions),
            bar: self.bar(entrants.len(), answers.len())?,
            entrants: &entrants,
            known: answers.iter().map(key).collect(),
            answers,
            results,
        };
        let done = interrupt::answering(|| sitting.all());
        sitting.bar.finish_and_clear();
        let answers = std::mem::take(&mut sitting.answers);
        Ok(Outcome {
            answers,
            done: done?,
            header,
        })
    }

    /// Pictures and numbers of crops that the model cannot take are better refused now.
    fn check_pictures(&self, vision: Option<&Vision<'_>>) -> Result<()> {
        let mut checked = HashSet::new();
        for question in self.questions {
            if question.images.is_empty() {
                continue;
            }
            let Some(vision) = vision else {
                let reason = "pictures need a vision file, give one with --mmproj";
                return Err(Error::option("--mmproj", reason).into());
            };
            let crops = question.num_crops.or(self.num_crops);
            if let Some(n) = crops.filter(|&n| checked.insert(n)) {
                vision
                    .check_num_crops(n)
                    .map_err(|e| anyhow!("{}: {e}", question.place))?;
            }
        }
        Ok(())
    }

    fn header(
        &self,
        files: &Files,
        context: &ContextOptions,
        model: &Model,
        entrants: &[Entrant],
    ) -> Result<Header> {
        let id = |path: &std::path::Path, name: &str| -> Result<FileId> {
            let FileReport { file, sha256 } = FileReport::read(path, name)?;
            Ok(FileId { file, sha256 })
        };
        let (name, mmproj) = files.names();
        let rope = load::rope_name(context.rope_factors, model, context.n_ctx);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Header {
            version: VERSION,
            command: self.command.into(),
            time: now.unwrap_or_default().as_secs(),
            build: serde_json::to_value(build())?,
            model: id(&files.model, &name)?,
            mmproj: match files.mmproj.as_deref().zip(mmproj) {
                Some((path, name)) => Some(id(path, &name)?),
                None => None,
            },
            questions: self.set.clone(),
            context: serde_json::to_value(ContextReport::new(context, rope))?,
            seed: self.args.policy.options_at(None)?.seed,
            n_predict: self.args.n_predict.map(|n| n as usize),
            distance: self.distance,
            contenders: entrants.iter().map(|e| e.contender.clone()).collect(),
        })
    }

    fn bar(&self, entrants: usize, done: usize) -> Result<ProgressBar> {
        let turns: usize = self.questions.iter().map(|q| q.turns.len()).sum();
        let style =
            ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed}, {eta} left, {msg}")?;
        let bar = ProgressBar::new((turns * entrants) as u64)
            .with_style(style)
            .with_position(done as u64);
        bar.reset_eta();
        bar.enable_steady_tick(Duration::from_millis(200));
        Ok(bar)
    }

    fn n_predict(&self, question: &Question) -> Vec<usize> {
        let limit = |expected: &Expected| match (self.args.n_predict, expected) {
            (Some(n), _) => n as usize,
            (None, Expected::Facts(_)) => N_PREDICT_STORY,
            (None, _) => N_PREDICT,
        };
        question.turns.iter().map(|t| limit(&t.expected)).collect()
    }
}

fn entrant(candidate: Candidate, context: &ContextOptions, model: &Model) -> Result<Entrant> {
    let Candidate {
        policy,
        budget,
        options,
    } = candidate;
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: load::padded(context.n_ctx) as usize,
    };
    let name = match budget {
        Some(budget) => format!("{policy}@{}", budget_text(budget)),
        None => policy.to_owned(),
    };
    Ok(Entrant {
        contender: Contender {
            name,
            policy: policy.into(),
            budget,
            params: policy::create(policy, &options, limits)?.params(),
        },
        context: load::for_policy(context.clone(), model, (policy, &options))?,
        options,
    })
}

/// Sets the rope factors, the same for all policies and questions, and says how far they reach.
fn rope(context: &mut ContextOptions, rule: RopeArg, model: &Model) -> Option<usize> {
    let from = model.long_rope_from()?;
    let long = match rule {
        RopeArg::Context => return None,
        RopeArg::Short => false,
        RopeArg::Long => true,
        RopeArg::Auto => load::padded(context.n_ctx) > from,
    };
    context.rope_factors = if long {
        RopeFactors::Long
    } else {
        RopeFactors::Short
    };
    (!long).then_some(from as usize)
}

/// An exam under way.
struct Sitting<'e, 'm> {
    exam: &'e Exam<'e>,
    /// That of `full`.
    context: ContextOptions,
    asker: Asker<'m>,
    entrants: &'e [Entrant],
    results: Option<Results>,
    answers: Vec<Answer>,
    known: HashSet<Key>,
    bar: ProgressBar,
}

impl Sitting<'_, '_> {
    fn all(&mut self) -> Result<Done> {
        for (i, question) in self.exam.questions.iter().enumerate() {
            if !self.question(i, question)? {
                return Ok(Done::Interrupted);
            }
        }
        Ok(Done::Whole)
    }

    /// Whether this entrant has answered all turns.
    fn has(&self, entrant: usize, question: &Question) -> bool {
        let name = &self.entrants[entrant].contender.name;
        (0..question.turns.len()).all(|turn| {
            self.known
                .contains(&(question.id.clone(), turn, name.clone()))
        })
    }

    /// One question under all policies that have not answered it yet. False: cancelled.
    fn question(&mut self, number: usize, question: &Question) -> Result<bool> {
        let missing: Vec<usize> = (0..self.entrants.len())
            .filter(|&i| !self.has(i, question))
            .collect();
        if missing.is_empty() {
            return Ok(true);
        }
        let now = load::clock();
        let watch = Watch {
            now: &now,
            cancelled: &interrupt::cancelled,
        };
        let exam = self.exam;
        let crops = question.num_crops.or(exam.num_crops);
        let pictures = question
            .images
            .iter()
            .map(|image| image.load(crops))
            .collect::<hae::Result<Vec<_>>>()
            .map_err(|e| self.failed(question, None, e))?;
        let n_predict = exam.n_predict(question);
        self.asker.next_question();

        let mut reference: Option<Reference> = None;
        if exam.distance {
            self.bar.set_message(format!("{} reference", question.id));
            let said = self
                .asker
                .reference(&self.context, question, &pictures, &n_predict, watch);
            match said.map_err(|e| self.failed(question, None, e))? {
                Some(said) => reference = Some(said),
                None => return Ok(false),
            }
        }
        // Policies that prune prompts alone leave room for as long an answer as this.
        let mut expected = reference
            .as_ref()
            .map(|turns| turns.iter().map(|(said, _)| said.fed().len()).collect());
        if expected.is_none() {
            expected = self.lengths(question);
        }

        let mut runs: HashMap<usize, Vec<Vec<Answered>>> = HashMap::new();
        for round in 0..exam.repetitions {
            for i in order(&missing, number + round, round == 0) {
                let entrant = &self.entrants[i];
                let name = &entrant.contender.name;
                self.bar.set_message(format!("{} {name}", question.id));
                let answered = self.asker.ask(
                    entrant,
                    question,
                    &pictures,
                    &n_predict,
                    expected.as_deref(),
                    watch,
                );
                let answered = answered.map_err(|e| self.failed(question, Some(entrant), e))?;
                let Some(answered) = answered else {
                    return Ok(false);
                };
                if i == 0 && expected.is_none() {
                    expected = Some(answered.iter().map(|a| a.tokens.generated).collect());
                }
                runs.entry(i).or_default().push(answered);
                // Of one run each is saved as soon as it is there.
                if round + 1 == exam.repetitions {
                    let runs = runs.remove(&i).unwrap_or_default();
                    let Some(distances) =
                        self.distances(i, question, &pictures, reference.as_ref(), watch)?
                    else {
                        return Ok(false);
                    };
                    self.save(i, question, runs, distances)?;
                }
            }
        }
        Ok(true)
    }

    fn distances(
        &mut self,
        entrant: usize,
        question: &Question,
        pictures: &[hae::image::Picture],
        reference: Option<&Reference>,
        watch: Watch<'_>,
    ) -> Result<Option<Vec<Option<Distance>>>> {
        let Some(reference) = reference else {
            return Ok(Some(Vec::new()));
        };
        let entrant = &self.entrants[entrant];
        let distances = self
            .asker
            .distance(entrant, question, pictures, reference, watch);
        distances.map_err(|e| self.failed(question, Some(entrant), e))
    }

    /// How long the first entrant's saved answers to a question are.
    fn lengths(&self, question: &Question) -> Option<Vec<usize>> {
        let first = &self.entrants.first()?.contender.name;
        (0..question.turns.len())
            .map(|turn| {
                let mut own = self.answers.iter().filter(|a| a.contender == *first);
                let answer = own.find(|a| a.id == question.id && a.turn == turn)?;
                Some(answer.tokens.generated)
            })
            .collect()
    }

    /// Judges the answers of an entrant's runs, which differ in their times alone.
    fn save(
        &mut self,
        entrant: usize,
        question: &Question,
        mut runs: Vec<Vec<Answered>>,
        mut distances: Vec<Option<Distance>>,
    ) -> Result<()> {
        let contender = &self.entrants[entrant].contender;
        let all = runs.clone();
        for (turn, asked) in question.turns.iter().enumerate() {
            let Some(answered) = runs.first_mut().and_then(|run| run.get_mut(turn)) else {
                continue;
            };
            middle(answered, &all, turn);
            let verdict = judge(
                &asked.expected,
                &answered.text,
                answered.finish == Finish::Eog,
            );
            let answer = Answer {
                id: question.id.clone(),
                turn,
                task: asked.task.clone(),
                contender: contender.name.clone(),
                policy: contender.policy.clone(),
                budget: contender.budget,
                images: question.image_names(),
                num_crops: question.num_crops.or(self.exam.num_crops),
                prompt: asked.text.clone(),
                expected: asked.expected.shown(),
                answer: answered.text.clone(),
                right: verdict.right,
                chosen: verdict.chosen,
                facts: verdict.facts,
                finish: answered.finish,
                tokens: answered.tokens.clone(),
                kv: answered.kv.clone(),
                timings: answered.timings.clone(),
                evicted: answered.evicted.clone(),
                distance: distances.get_mut(turn).and_then(Option::take),
                trace: None,
            };
            // The earlier turns of a chat that was interrupted are there already.
            if !self.known.insert(key(&answer)) {
                continue;
            }
            if let Some(results) = &mut self.results {
                results.add(&answer)?;
            }
            self.answers.push(answer);
            self.bar.inc(1);
        }
        Ok(())
    }

    /// An error with what it happened to and what was saved.
    fn failed(&self, question: &Question, entrant: Option<&Entrant>, e: Error) -> anyhow::Error {
        let Question { id, place, .. } = question;
        let under = entrant.map_or_else(String::new, |e| format!(" under {}", e.contender.name));
        let saved = self.results.as_ref().map(Results::saved);
        let saved = saved.map_or_else(String::new, |saved| format!("; {saved}"));
        anyhow!("{place}, question {id}{under}: {e}{saved}")
    }
}

/// The entrants by turns. In the first round the first of all comes first, for the others need to
/// know how long its answer is.
fn order(missing: &[usize], turn: usize, first_round: bool) -> Vec<usize> {
    let fixed = usize::from(first_round && missing.first() == Some(&0));
    let (first, others) = missing.split_at(fixed);
    let others_by_turns = turns(others.len(), turn % others.len().max(1)).map(|i| others[i]);
    first.iter().copied().chain(others_by_turns).collect()
}

/// Puts the medians of all runs in the place of the first run's times.
fn middle(answered: &mut Answered, runs: &[Vec<Answered>], turn: usize) {
    let median = |of: &dyn Fn(&Answered) -> Option<f64>| {
        let values: Vec<f64> = runs.iter().filter_map(|run| of(run.get(turn)?)).collect();
        Quartiles::of(&values).map(|quartiles| quartiles.median)
    };
    let timings = &mut answered.timings;
    timings.probe_ms = median(&|a| Some(a.timings.probe_ms)).unwrap_or_default();
    timings.prefill_ms = median(&|a| Some(a.timings.prefill_ms)).unwrap_or_default();
    timings.decode_ms = median(&|a| Some(a.timings.decode_ms)).unwrap_or_default();
    timings.ttft_ms = median(&|a| a.timings.ttft_ms);
    timings.tpot_ms = median(&|a| a.timings.tpot_ms);
}
