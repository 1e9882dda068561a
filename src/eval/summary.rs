//! From answers to shares with intervals, costs, and tests between policies.

use std::collections::HashMap;

use serde::Serialize;

use super::record::{Answer, Contender, Distance, Header};
use super::stats::{self, Pair, Share, mean};
use crate::quantile::{median, quantile};

/// Below this, after Holm's correction, a difference is called one.
pub const LEVEL: f64 = 0.05;

/// The task of rows that sum up all tasks.
pub const ALL: &str = "all";

/// What a results file says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Each contender over everything, then each task.
    pub rows: Vec<Row>,
    /// Every other contender against the first.
    pub against_first: Vec<Comparison>,
    /// At each budget, every other policy against the first that has one.
    pub at_budget: Vec<Comparison>,
}

/// A contender on the questions of a task. Shares are 0 to 1, times medians, cells and bytes means.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Its name.
    pub contender: String,
    /// Its policy's name.
    pub policy: String,
    /// Its budget, as it was asked for.
    pub budget: Option<String>,
    /// The task, or [`ALL`].
    pub task: String,
    /// Questions answered.
    pub n: usize,
    /// Those that could be scored as right or wrong; stories are scored by their facts.
    pub scored: usize,
    /// Those that are right.
    pub right: usize,
    /// `right / scored`; none where nothing was scored.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval.
    pub low: Option<f64>,
    /// Its upper end.
    pub high: Option<f64>,
    /// Mean similarity of the answers that are scored by it ([`super::anls`]).
    pub anls: Option<f64>,
    /// Stories, and those that state every fact and nothing wrong.
    pub stories: usize,
    /// Those that state every fact and nothing wrong.
    pub stories_whole: usize,
    /// Mentions that stories have to make, and make; statements they make, and true ones.
    pub facts_required: usize,
    /// Mentions that they make.
    pub facts_made: usize,
    /// Statements that they make.
    pub facts_said: usize,
    /// Statements that are true.
    pub facts_true: usize,
    /// `facts_made / facts_required`.
    pub recall: Option<f64>,
    /// `facts_true / facts_said`.
    pub precision: Option<f64>,
    /// Of the mentions that the first contender makes, those made here, too.
    pub facts_kept: Option<f64>,
    /// Answers that are the first contender's, letter by letter.
    pub agreement: Option<f64>,
    /// Cells in use after the answer.
    pub cells_end: f64,
    /// The most cells in use while the answer grew.
    pub cells_peak_decoding: f64,
    /// The most cells in use, the whole prompt included.
    pub cells_peak: f64,
    /// Bytes of `cells_end`.
    pub bytes_in_use: f64,
    /// Bytes of `cells_peak_decoding`.
    pub bytes_peak_decoding: f64,
    /// The most bytes of the buffers behind the cache.
    pub bytes_allocated_peak: f64,
    /// Bytes in use at the end, over the first contender's.
    pub kv_of_first: Option<f64>,
    /// From the question to the first token, encoding included.
    pub ttft_ms: Option<f64>,
    /// The mean time of a token after the first.
    pub tpot_ms: Option<f64>,
    /// Predictions that were compared with the full cache's.
    pub predictions: usize,
    /// Mean KL of their distributions to the full cache's, in nats.
    pub kl_mean: Option<f64>,
    /// The median of the same.
    pub kl_median: Option<f64>,
    /// The 99th percentile of the same.
    pub kl_p99: Option<f64>,
    /// Share of them whose likeliest token is the full cache's.
    pub top1: Option<f64>,
    /// Perplexity of the full cache's answers, over that under the full cache.
    pub ppl_ratio: Option<f64>,
    /// Share of the full cache's attention that went to what the policy does not have.
    pub attention_lost: Option<f64>,
    /// Answers of the full cache in which no prediction differs.
    pub never_differing: Option<f64>,
    /// Where they differ: the first such token, the median.
    pub first_differing: Option<f64>,
}

/// What two contenders are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// Answers, by McNemar's exact test.
    Accuracy,
    /// Facts of stories, by the paired bootstrap.
    Facts,
}

/// What a comparison says at [`LEVEL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The second is better.
    Better,
    /// The second is worse.
    Worse,
    /// None that could be told from chance.
    None,
}

/// Two contenders on the same questions; differences are `second` minus `first`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The contender that is compared to.
    pub first: String,
    /// The contender that is compared.
    pub second: String,
    /// What is compared.
    pub measure: Measure,
    /// Questions, or stories, that both answered.
    pub n: usize,
    /// Answers: right under the one only, and the other only.
    pub only_first: Option<usize>,
    /// Answers: right under the other only.
    pub only_second: Option<usize>,
    /// Of the shares.
    pub difference: f64,
    /// Facts: the 95 % interval of the bootstrap.
    pub low: Option<f64>,
    /// Its upper end.
    pub high: Option<f64>,
    /// Of a difference as large where there is none, before any correction.
    pub p: f64,
    /// After Holm's correction for all comparisons of its table.
    pub p_holm: f64,
    /// How `second` stands to `first`.
    pub verdict: Verdict,
}

impl Summary {
    /// All rows and comparisons of a file's answers.
    pub fn of(header: &Header, answers: &[Answer]) -> Self {
        let groups: Vec<(&Contender, Vec<&Answer>)> = header
            .contenders
            .iter()
            .map(|contender| {
                let own = answers.iter().filter(|a| a.contender == contender.name);
                (contender, own.collect())
            })
            .collect();
        let first = by_key(groups.first().map_or(&[], |(_, answers)| answers));
        let mut tasks: Vec<&str> = answers.iter().map(|a| a.task.as_str()).collect();
        tasks.sort_unstable();
        tasks.dedup();
        let mut rows: Vec<Row> = groups
            .iter()
            .map(|(contender, answers)| row(contender, ALL, answers, &first))
            .collect();
        for task in tasks {
            rows.extend(groups.iter().map(|(contender, answers)| {
                let own: Vec<&Answer> =
                    answers.iter().copied().filter(|a| a.task == task).collect();
                row(contender, task, &own, &first)
            }));
        }
        let pairs = |of: &dyn Fn(usize) -> Option<usize>| {
            let compared = (0..groups.len()).flat_map(|i| match of(i) {
                Some(j) => compare(&groups[j], &groups[i], header.seed),
                None => Vec::new(),
            });
            corrected(compared.collect())
        };
        let budget = |i: usize| groups[i].0.budget;
        let leading = groups
            .iter()
            .find(|(contender, _)| contender.budget.is_some());
        let leading = leading.map(|(contender, _)| contender.policy.as_str());
        Summary {
            rows,
            against_first: pairs(&|i| (i > 0).then_some(0)),
            at_budget: pairs(&|i| {
                let same = |j: &usize| {
                    budget(*j).is_some()
                        && budget(*j) == budget(i)
                        && Some(groups[*j].0.policy.as_str()) == leading
                };
                (0..groups.len()).find(same).filter(|&j| j != i)
            }),
        }
    }

    /// The rows over all tasks, in the contenders' order.
    pub fn overall(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.task == ALL)
    }
}

type ByKey<'a> = HashMap<(&'a str, usize), &'a Answer>;

fn by_key<'a>(answers: &[&'a Answer]) -> ByKey<'a> {
    let key = |a: &'a Answer| ((a.id.as_str(), a.turn), a);
    answers.iter().map(|answer| key(answer)).collect()
}

fn row(contender: &Contender, task: &str, answers: &[&Answer], first: &ByKey<'_>) -> Row {
    let n = answers.len();
    let asked = answers.iter().filter(|a| a.facts.is_none());
    let scored: Vec<bool> = asked.filter_map(|a| a.right).collect();
    let share = Share::of(scored.iter().filter(|&&right| right).count(), scored.len());
    let known = (!scored.is_empty()).then_some(share);
    let near: Vec<f64> = answers.iter().filter_map(|a| a.anls).collect();
    let facts: Vec<_> = answers.iter().filter_map(|a| a.facts.as_ref()).collect();
    let total = |of: fn(&super::record::FactScore) -> usize| facts.iter().map(|&f| of(f)).sum();
    let (required, made): (usize, usize) = (total(|f| f.required), total(|f| f.made));
    let (said, correct): (usize, usize) = (total(|f| f.said), total(|f| f.correct));
    let part = |some: usize, of: usize| (of > 0).then(|| some as f64 / of as f64);
    let pairs: Vec<(&Answer, &Answer)> = answers
        .iter()
        .filter_map(|&a| Some((*first.get(&(a.id.as_str(), a.turn))?, a)))
        .collect();
    let same = pairs.iter().filter(|(a, b)| a.answer == b.answer).count();
    let mean_of =
        |of: &dyn Fn(&Answer) -> f64| mean(&answers.iter().map(|a| of(a)).collect::<Vec<_>>());
    let bytes = |of: &dyn Fn(&(&Answer, &Answer)) -> u64| pairs.iter().map(of).sum::<u64>() as f64;
    let (own, firsts) = (
        bytes(&|p| p.1.kv.bytes_in_use),
        bytes(&|p| p.0.kv.bytes_in_use),
    );
    let distance = Pooled::of(answers.iter().filter_map(|a| a.distance.as_ref()));
    Row {
        contender: contender.name.clone(),
        policy: contender.policy.clone(),
        budget: contender.budget.map(|budget| budget.to_string()),
        task: task.to_owned(),
        n,
        scored: scored.len(),
        right: share.hits,
        accuracy: known.map(|s| s.share),
        low: known.map(|s| s.low),
        high: known.map(|s| s.high),
        anls: (!near.is_empty()).then(|| mean(&near)),
        stories: facts.len(),
        stories_whole: answers
            .iter()
            .filter(|a| a.facts.is_some() && a.right == Some(true))
            .count(),
        facts_required: required,
        facts_made: made,
        facts_said: said,
        facts_true: correct,
        recall: part(made, required),
        precision: part(correct, said),
        facts_kept: kept(&pairs),
        agreement: part(same, pairs.len()),
        cells_end: mean_of(&|a| a.kv.cells.cells() as f64),
        cells_peak_decoding: mean_of(&|a| a.kv.peak_decoding as f64),
        cells_peak: mean_of(&|a| a.kv.cells.peak as f64),
        bytes_in_use: mean_of(&|a| a.kv.bytes_in_use as f64),
        bytes_peak_decoding: mean_of(&|a| a.kv.bytes_peak_decoding as f64),
        bytes_allocated_peak: mean_of(&|a| a.kv.bytes_allocated_peak as f64),
        kv_of_first: (firsts > 0.0).then(|| own / firsts),
        ttft_ms: median(answers.iter().filter_map(|a| a.timings.ttft_ms)),
        tpot_ms: median(answers.iter().filter_map(|a| a.timings.tpot_ms)),
        predictions: distance.kl.len(),
        kl_mean: distance.known(mean(&distance.kl)),
        kl_median: distance.known(quantile(&distance.kl, 0.5)),
        kl_p99: distance.known(quantile(&distance.kl, 0.99)),
        top1: distance.known(distance.same / distance.kl.len() as f64),
        ppl_ratio: distance.known((distance.log_ratio / distance.kl.len() as f64).exp()),
        attention_lost: (!distance.lost.is_empty()).then(|| mean(&distance.lost)),
        never_differing: distance.known(1.0 - distance.differing.len() as f64 / distance.n as f64),
        first_differing: median(distance.differing.iter().copied()),
    }
}

/// Of the facts that the one states, those that the other states, too.
fn kept(pairs: &[(&Answer, &Answer)]) -> Option<f64> {
    let (mut both, mut firsts) = (0, 0);
    for (a, b) in pairs {
        let (Some(a), Some(b)) = (&a.facts, &b.facts) else {
            continue;
        };
        firsts += a.made;
        let shared = a.by_fact.iter().zip(&b.by_fact).map(|(a, b)| a.min(b));
        both += shared.sum::<usize>();
    }
    (firsts > 0).then(|| both as f64 / firsts as f64)
}

/// The predictions of several answers together.
struct Pooled {
    /// Answers.
    n: usize,
    /// Sorted.
    kl: Vec<f64>,
    lost: Vec<f64>,
    /// Predictions whose likeliest token is the same.
    same: f64,
    log_ratio: f64,
    differing: Vec<f64>,
}

impl Pooled {
    fn of<'a>(distances: impl Iterator<Item = &'a Distance>) -> Self {
        let mut pooled = Pooled {
            n: 0,
            kl: Vec::new(),
            lost: Vec::new(),
            same: 0.0,
            log_ratio: 0.0,
            differing: Vec::new(),
        };
        for distance in distances {
            pooled.n += 1;
            pooled.kl.extend(distance.kl.iter().map(|&x| f64::from(x)));
            pooled
                .lost
                .extend(distance.lost.iter().map(|&x| f64::from(x)));
            pooled.same += (distance.top1 * distance.n_tokens as f64).round();
            pooled.log_ratio += distance.log_prob_full - distance.log_prob;
            pooled
                .differing
                .extend(distance.first_differing.map(|i| i as f64));
        }
        pooled.kl.sort_by(f64::total_cmp);
        pooled
    }

    fn known(&self, value: f64) -> Option<f64> {
        (!self.kl.is_empty()).then_some(value)
    }
}

/// Both measures, as far as there are questions of the kind.
fn compare(
    first: &(&Contender, Vec<&Answer>),
    second: &(&Contender, Vec<&Answer>),
    seed: u64,
) -> Vec<Comparison> {
    let before = by_key(&first.1);
    let pairs: Vec<(&Answer, &Answer)> = second
        .1
        .iter()
        .filter_map(|&a| Some((*before.get(&(a.id.as_str(), a.turn))?, a)))
        .collect();
    let names = (first.0.name.clone(), second.0.name.clone());
    [accuracy(&names, &pairs), stories(&names, &pairs, seed)]
        .into_iter()
        .flatten()
        .collect()
}

/// Stories are compared by their facts, not by whether every one of them is right.
fn accuracy(names: &(String, String), pairs: &[(&Answer, &Answer)]) -> Option<Comparison> {
    let known = pairs.iter().filter(|(a, _)| a.facts.is_none());
    let known: Vec<(bool, bool)> = known.filter_map(|(a, b)| a.right.zip(b.right)).collect();
    let n = known.len();
    let only_first = known.iter().filter(|&&(a, b)| a && !b).count();
    let only_second = known.iter().filter(|&&(a, b)| !a && b).count();
    (n > 0).then(|| Comparison {
        first: names.0.clone(),
        second: names.1.clone(),
        measure: Measure::Accuracy,
        n,
        only_first: Some(only_first),
        only_second: Some(only_second),
        difference: (only_second as f64 - only_first as f64) / n as f64,
        low: None,
        high: None,
        p: stats::mcnemar(only_first, only_second),
        p_holm: 1.0,
        verdict: Verdict::None,
    })
}

fn stories(
    names: &(String, String),
    pairs: &[(&Answer, &Answer)],
    seed: u64,
) -> Option<Comparison> {
    let told: Vec<Pair> = pairs
        .iter()
        .filter_map(|(a, b)| {
            let (a, b) = (a.facts.as_ref()?, b.facts.as_ref()?);
            Some(Pair {
                required: a.required,
                first: a.made,
                second: b.made,
            })
        })
        .collect();
    let drawn = stats::bootstrap(&told, seed)?;
    Some(Comparison {
        first: names.0.clone(),
        second: names.1.clone(),
        measure: Measure::Facts,
        n: told.len(),
        only_first: None,
        only_second: None,
        difference: drawn.difference,
        low: Some(drawn.low),
        high: Some(drawn.high),
        p: drawn.p,
        p_holm: 1.0,
        verdict: Verdict::None,
    })
}

/// Corrects for the number of comparisons and says which differences are some.
fn corrected(mut comparisons: Vec<Comparison>) -> Vec<Comparison> {
    let p: Vec<f64> = comparisons.iter().map(|c| c.p).collect();
    for (comparison, p) in comparisons.iter_mut().zip(stats::holm(&p)) {
        comparison.p_holm = p;
        comparison.verdict = match comparison.difference {
            d if p < LEVEL && d > 0.0 => Verdict::Better,
            d if p < LEVEL && d < 0.0 => Verdict::Worse,
            _ => Verdict::None,
        };
    }
    comparisons
}
