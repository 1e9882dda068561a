//! The tuning questions under the settings of a search.

use std::collections::HashMap;

use anyhow::{Result, anyhow};
use indicatif::ProgressBar;

use crate::cli::asking::{Loaded, Questions};
use crate::cli::{interrupt, load};
use hae::Error;
use hae::asker::attempt::{Attempt, answers};
use hae::asker::{Contender, Reference};
use hae::bench::Pulse;
use hae::calibrate::search::Round;
use hae::calibrate::{Score, Tally};
use hae::eval::question::Question;
use hae::eval::record::Distance;
use hae::eval::score::judge;
use hae::policy::{Amount, PolicySpec};

/// Bytes of what the full cache predicts that are kept from round to round; what is beyond is
/// computed again.
const MOST_KEPT: usize = 1 << 30;

pub struct Trials<'a> {
    questions: Questions<'a>,
    loaded: Loaded,
    bar: &'a ProgressBar,
    /// Answers that come after the search.
    checks: usize,
    /// What the full cache says to some of the questions, by number.
    references: HashMap<usize, Reference>,
    kept: usize,
    /// The full cache's score, once it is known.
    full: Option<Score>,
}

impl<'a> Trials<'a> {
    pub fn new(
        questions: Questions<'a>,
        loaded: Loaded,
        bar: &'a ProgressBar,
        checks: usize,
    ) -> Self {
        Trials {
            questions,
            loaded,
            bar,
            checks,
            references: HashMap::new(),
            kept: 0,
            full: None,
        }
    }

    /// The model, for what comes after the search, and what the full cache scored.
    pub fn end(self) -> (Loaded, Score) {
        (self.loaded, self.full.unwrap_or_default())
    }

    /// The scores of a round's settings. `None`: cancelled.
    pub fn round(&mut self, round: Round<'_>, budget: Amount) -> Result<Option<Vec<Score>>> {
        let settings = round.settings.iter();
        let contenders = settings
            .map(|setting| {
                let policy = PolicySpec::new("hae", setting.options(Some(budget)));
                self.loaded
                    .contender(setting.to_string(), policy, Some(budget))
            })
            .collect::<Result<Vec<_>>>()?;
        let to_come = (round.settings.len() + round.left) * self.questions.turns() + self.checks;
        self.bar.set_length(self.bar.position() + to_come as u64);
        self.bar.set_message(round.stage.name());

        let mut tallies = vec![Tally::default(); contenders.len()];
        let mut full = Tally::default();
        for (number, question) in self.questions.all.iter().enumerate() {
            let asked = self.question(number, question, &contenders, &mut tallies, &mut full);
            let asked = asked.map_err(|e| {
                let Question { id, place, .. } = question;
                anyhow!("{place}, question {id}: {e}")
            })?;
            if !asked {
                return Ok(None);
            }
        }
        // Those of the next round read other layers.
        self.loaded.asker.drop_contexts();
        self.full.get_or_insert_with(|| full.score());
        let scores: Vec<Score> = tallies.into_iter().map(Tally::score).collect();
        if scores.iter().all(|score| score.evicted == 0) {
            let reason = "nothing is evicted on these questions, expected a smaller budget";
            return Err(Error::option("--kv-budget", reason).into());
        }
        Ok(Some(scores))
    }

    /// One question under all settings. False: cancelled.
    fn question(
        &mut self,
        number: usize,
        question: &Question,
        contenders: &[Contender],
        tallies: &mut [Tally],
        full: &mut Tally,
    ) -> hae::Result<bool> {
        let now = load::clock();
        let watch = Pulse {
            now: &now,
            cancelled: &interrupt::cancelled,
        };
        let pictures = self.questions.pictures(question)?;
        let n_predict = self.questions.n_predict(question);
        let Loaded { context, asker, .. } = &mut self.loaded;
        asker.next_question();
        let known = self.references.remove(&number);
        let reference = match known {
            Some(reference) => {
                self.kept -= bytes(&reference);
                reference
            }
            None => {
                let said = asker.reference(context, question, &pictures, &n_predict, watch)?;
                let Some(said) = said else { return Ok(false) };
                said
            }
        };
        add(full, question, &answers(&reference), &[]);
        for (contender, tally) in contenders.iter().zip(tallies) {
            let attempt = asker.attempt(
                contender, question, &pictures, &n_predict, &reference, watch,
            )?;
            let Some(Attempt {
                answers,
                distances,
                evicted,
            }) = attempt
            else {
                return Ok(false);
            };
            add(tally, question, &answers, &distances);
            tally.evicted(evicted.after_prefill, evicted.in_decoding);
            tally.ended();
            self.bar.inc(question.turns.len() as u64);
        }
        asker.rest()?;
        let size = bytes(&reference);
        if self.kept + size <= MOST_KEPT {
            self.kept += size;
            self.references.insert(number, reference);
        }
        Ok(true)
    }
}

fn bytes(reference: &Reference) -> usize {
    reference.iter().map(|(said, _)| said.bytes()).sum()
}

/// The verdicts on each turn of a question.
fn add(
    tally: &mut Tally,
    question: &Question,
    answers: &[(String, bool)],
    distances: &[Option<Distance>],
) {
    for (turn, (answer, ended)) in question.turns.iter().zip(answers) {
        let verdict = judge(&turn.expected, answer, *ended);
        tally.judged(verdict.right, verdict.facts.as_ref());
    }
    for distance in distances {
        tally.distance(distance.as_ref());
    }
}
