//! Questions under several policies by turns, each answer saved as it comes.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::Loaded;
use super::questions::Questions;
use crate::cli::load;
use crate::cli::{Done, interrupt};
use hae::Error;
use hae::answer::Answer as Answered;
use hae::asker::{Contender, Reference};
use hae::bench::stats::Summary as Quartiles;
use hae::bench::{Pulse, turns};
use hae::eval::question::Question;
use hae::eval::record::{Answer, Distance};
use hae::eval::results::{Key, Results, key};
use hae::eval::score::judge;
use hae::generate::Finish;
use hae::image::Picture;

/// Asks every question under every policy.
pub struct Runner<'e> {
    pub questions: Questions<'e>,
    /// Whether distances to the full cache are measured.
    pub distance: bool,
    /// Times that each policy answers a question.
    pub repetitions: usize,
    pub loaded: Loaded,
    /// The first is what the others are compared with.
    pub contenders: &'e [Contender],
    pub results: Option<Results>,
    pub answers: Vec<Answer>,
    /// The answers that are there already.
    pub known: HashSet<Key>,
    pub bar: ProgressBar,
    pub traces: Option<Traces>,
}

/// Where conversations are recorded.
pub struct Traces {
    pub dir: PathBuf,
    /// The model's name to show.
    pub model: String,
}

/// The file for a question under a policy. Ids may hold anything, so a number keeps apart what
/// looks alike without it.
pub fn trace_path(dir: &Path, number: usize, question: &Question, contender: &str) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let id: String = question.id.chars().take(40).map(plain).collect();
    dir.join(format!("{number:05}-{id}-{contender}.trace"))
}

impl Runner<'_> {
    /// Asks what is not answered yet.
    pub fn run(&mut self) -> Result<Done> {
        for (i, question) in self.questions.all.iter().enumerate() {
            if !self.question(i, question)? {
                return Ok(Done::Interrupted);
            }
        }
        Ok(Done::Whole)
    }

    /// Whether this contender has answered all turns.
    fn has(&self, contender: usize, question: &Question) -> bool {
        let name = &self.contenders[contender].record.name;
        (0..question.turns.len()).all(|turn| {
            self.known
                .contains(&(question.id.clone(), turn, name.clone()))
        })
    }

    /// One question under all policies that have not answered it yet. False: cancelled.
    fn question(&mut self, number: usize, question: &Question) -> Result<bool> {
        let missing: Vec<usize> = (0..self.contenders.len())
            .filter(|&i| !self.has(i, question))
            .collect();
        if missing.is_empty() {
            return Ok(true);
        }
        let now = load::clock();
        let watch = Pulse {
            now: &now,
            cancelled: &interrupt::cancelled,
        };
        let questions = self.questions;
        let pictures = questions
            .pictures(question)
            .map_err(|e| self.failed(question, None, e))?;
        let n_predict = questions.n_predict(question);
        self.loaded.asker.next_question();

        let mut reference: Option<Reference> = None;
        if self.distance {
            self.bar.set_message(format!("{} reference", question.id));
            let Loaded { asker, context, .. } = &mut self.loaded;
            let said = asker.reference(context, question, &pictures, &n_predict, watch);
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
        for round in 0..self.repetitions {
            for i in order(&missing, number + round, round == 0) {
                let contender = &self.contenders[i];
                let name = &contender.record.name;
                self.bar.set_message(format!("{} {name}", question.id));
                let trace = self.traces.as_ref();
                let trace =
                    trace.map(|t| (trace_path(&t.dir, number, question, name), t.model.clone()));
                if let Some((path, model)) = &trace {
                    self.loaded.asker.trace_next(path.clone(), model.clone());
                }
                let answered = self.loaded.asker.ask(
                    contender,
                    question,
                    &pictures,
                    &n_predict,
                    expected.as_deref(),
                    watch,
                );
                let answered = answered.map_err(|e| self.failed(question, Some(contender), e))?;
                let Some(answered) = answered else {
                    return Ok(false);
                };
                if i == 0 && expected.is_none() {
                    expected = Some(answered.iter().map(|a| a.tokens.generated).collect());
                }
                runs.entry(i).or_default().push(answered);
                // Of one run each is saved as soon as it is there.
                if round + 1 == self.repetitions {
                    let runs = runs.remove(&i).unwrap_or_default();
                    let Some(distances) =
                        self.distances(i, question, &pictures, reference.as_ref(), watch)?
                    else {
                        return Ok(false);
                    };
                    let trace = trace.map(|(path, _)| path.display().to_string());
                    self.save((i, question), runs, distances, trace)?;
                }
            }
        }
        Ok(true)
    }

    /// The answers by question, turn and policy: what runs by turns is saved in another order.
    pub fn in_order(&mut self) -> Vec<Answer> {
        let mut answers = std::mem::take(&mut self.answers);
        let ids = self.questions.all.iter().map(|q| q.id.as_str());
        let questions: HashMap<&str, usize> = ids.zip(0..).collect();
        let names = self.contenders.iter().map(|e| e.record.name.as_str());
        let contenders: HashMap<&str, usize> = names.zip(0..).collect();
        answers.sort_by_key(|a| {
            let question = questions.get(a.id.as_str());
            let contender = contenders.get(a.contender.as_str());
            (question.copied(), a.turn, contender.copied())
        });
        answers
    }

    fn distances(
        &mut self,
        contender: usize,
        question: &Question,
        pictures: &[Picture],
        reference: Option<&Reference>,
        watch: Pulse<'_>,
    ) -> Result<Option<Vec<Option<Distance>>>> {
        let Some(reference) = reference else {
            return Ok(Some(Vec::new()));
        };
        let contender = &self.contenders[contender];
        let n_predict = self.questions.n_predict(question);
        let followed = self
            .loaded
            .asker
            .distance(contender, question, pictures, &n_predict, reference, watch);
        let followed = followed.map_err(|e| self.failed(question, Some(contender), e))?;
        Ok(followed.map(|(distances, _)| distances))
    }

    /// How long the first contender's saved answers to a question are.
    fn lengths(&self, question: &Question) -> Option<Vec<usize>> {
        let first = &self.contenders.first()?.record.name;
        (0..question.turns.len())
            .map(|turn| {
                let mut own = self.answers.iter().filter(|a| a.contender == *first);
                let answer = own.find(|a| a.id == question.id && a.turn == turn)?;
                Some(answer.tokens.generated)
            })
            .collect()
    }

    /// Judges the answers of a contender's runs, which differ in their times alone.
    fn save(
        &mut self,
        (contender, question): (usize, &Question),
        mut runs: Vec<Vec<Answered>>,
        mut distances: Vec<Option<Distance>>,
        trace: Option<String>,
    ) -> Result<()> {
        let contender = &self.contenders[contender].record;
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
                num_crops: question.num_crops.or(self.questions.num_crops),
                prompt: asked.text.clone(),
                expected: asked.expected.shown(),
                answer: answered.text.clone(),
                right: verdict.right,
                chosen: verdict.chosen,
                facts: verdict.facts,
                anls: verdict.anls,
                finish: answered.finish,
                tokens: answered.tokens.clone(),
                kv: answered.kv.clone(),
                attended: answered.attended,
                timings: answered.timings.clone(),
                evicted: answered.evicted.clone(),
                bin: answered.bin.clone(),
                distance: distances.get_mut(turn).and_then(Option::take),
                trace: trace.clone(),
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
    fn failed(
        &self,
        question: &Question,
        contender: Option<&Contender>,
        e: Error,
    ) -> anyhow::Error {
        let Question { id, place, .. } = question;
        let under = contender.map_or_else(String::new, |e| format!(" under {}", e.record.name));
        let saved = self.results.as_ref().map(Results::saved);
        let saved = saved.map_or_else(String::new, |saved| format!("; {saved}"));
        anyhow!("{place}, question {id}{under}: {e}{saved}")
    }
}

/// The contenders by turns. In the first round the first of all comes first, for the others need to
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

/// A bar with the time that is left, for so many answers of which some are there.
pub fn progress_bar(answers: usize, done: usize) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed}, {eta} left, {msg}")?;
    let bar = ProgressBar::new(answers as u64)
        .with_style(style)
        .with_position(done as u64);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
