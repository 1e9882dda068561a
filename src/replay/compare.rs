//! Several policies on several traces, side by side.

use std::rc::Rc;

use serde::Serialize;

use super::run::{Replayed, replay};
use super::tape::Tape;
use crate::error::Result;
use crate::policy::{Amount, PolicyOptions, PolicySpec};
use crate::trace::Header;

/// A policy that is compared.
#[derive(Clone, Debug)]
pub struct Contender {
    /// Unique among the contenders.
    pub name: String,
    /// The policy, made anew for each conversation.
    pub policy: PolicySpec,
    /// The recycle bin, for policies that are compared by its size.
    pub bin_size: Option<usize>,
    /// What it is held against: the same without a recycle bin, under this budget.
    pub against: Option<Against>,
}

/// The budget of a greedy policy beside one with a bin of d cells. Between two flushes the bin
/// fills up, so that on average half of it is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The same peak.
    Peak,
    /// d / 2 fewer: the same number of cells on average.
    Mean,
    /// d fewer: the same live cells.
    Live,
}

impl Contender {
    /// The policy without its recycle bin: greedy eviction is a bin of 1 that gives nothing back.
    pub fn greedy(policy: &PolicySpec) -> PolicySpec {
        let options = PolicyOptions {
            bin_size: 1,
            restore: false,
            ..policy.options.clone()
        };
        PolicySpec::new(&policy.name, options)
    }

    /// The greedy policy that it is held against on a prompt of so many cells.
    fn rival(&self, prompt: usize) -> Option<PolicySpec> {
        let bin = self.policy.options.bin_size;
        let fewer = match self.against? {
            Against::Peak => 0,
            Against::Mean => bin / 2,
            Against::Live => bin,
        };
        let mut rival = Contender::greedy(&self.policy);
        let budget = &mut rival.options.kv_budget;
        *budget = budget.map(|budget| match budget {
            Amount::Cells(cells) => Amount::Cells(cells.saturating_sub(fewer)),
            Amount::Share(share) => {
                let cells = budget.of(prompt).saturating_sub(fewer);
                let less = cells as f64 / prompt.max(1) as f64;
                Amount::Share(if fewer > 0 { less } else { share })
            }
        });
        Some(rival)
    }
}

/// One conversation of a trace.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// The trace's name, and the conversation's number where there are several.
    pub name: String,
    /// What the trace says of its run.
    pub header: Rc<Header>,
    /// What the policies are replayed on.
    pub tape: Rc<Tape>,
}

/// One contender on one conversation.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The name of the [`Conversation`].
    pub trace: String,
    /// The name of the [`Contender`].
    #[serde(rename = "setting")]
    pub contender: String,
    /// The recycle bin, where contenders are compared by its size.
    pub bin_size: Option<usize>,
    /// What it came to.
    #[serde(flatten)]
    pub replayed: Replayed,
    /// What the greedy policy beside it lost, and whether that is more; none where there is none.
    pub greedy_lost: Option<f64>,
    /// Whether it lost less than that.
    pub less_than_greedy: Option<bool>,
}

/// A contender over all conversations.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The name of the [`Contender`].
    #[serde(rename = "setting")]
    pub contender: String,
    /// The policy's name.
    pub policy: &'static str,
    /// The recycle bin, where contenders are compared by its size.
    pub bin_size: Option<usize>,
    /// How many conversations were replayed.
    pub traces: usize,
    /// Decoded tokens, summed.
    pub steps: usize,
    /// Attention lost, of 1 for each decoded token: the mean over all of them.
    pub lost_mean: f64,
    /// At the worst token of any trace.
    pub lost_worst: f64,
    /// Over a whole trace, the mean of all traces.
    pub lost_total: f64,
    /// Cells in use, the mean over all decoded tokens.
    pub cells_mean: f64,
    /// The largest share of the prompt's cells that decoding took at once.
    pub peak_share: f64,
    /// The most cells at once outside of prefills, of any trace.
    pub peak_decoding: usize,
    /// Decoding steps that removed tokens, summed.
    pub flushes: usize,
    /// Times that a token came back from the recycle bin, summed.
    pub restores: usize,
    /// Traces on which it lost less than the greedy policy beside it.
    pub less_than_greedy: Option<usize>,
    /// Attention lost, over what the greedy policy lost on the same traces.
    pub of_greedy: Option<f64>,
}

/// Every contender on every conversation, conversation by conversation.
///
/// # Errors
/// As [`replay`].
pub fn compare(contenders: &[Contender], conversations: &[Conversation]) -> Result<Vec<Row>> {
    let mut rows = Vec::with_capacity(contenders.len() * conversations.len());
    for Conversation { name, header, tape } in conversations {
        for contender in contenders {
            let replayed = replay(header, tape, &contender.policy)?;
            let rival = contender.rival(tape.first_prompt());
            let rival = rival.map(|policy| replay(header, tape, &policy));
            let greedy_lost = rival.transpose()?.map(|greedy| greedy.lost.total);
            rows.push(Row {
                trace: name.clone(),
                contender: contender.name.clone(),
                bin_size: contender.bin_size,
                less_than_greedy: greedy_lost.map(|greedy| replayed.lost.total < greedy),
                greedy_lost,
                replayed,
            });
        }
    }
    Ok(rows)
}

/// Sums the rows of [`compare`] up by contender.
pub fn summarize(contenders: &[Contender], rows: &[Row]) -> Vec<Summary> {
    let of = |i: usize| rows.iter().skip(i).step_by(contenders.len().max(1));
    let total = |i: usize| of(i).map(|row| row.replayed.lost.total).sum::<f64>();
    let summary = |(i, contender): (usize, &Contender)| {
        let all = |number: fn(&Replayed) -> usize| of(i).map(move |row| number(&row.replayed));
        let (traces, steps) = (of(i).count(), all(|r| r.steps).sum::<usize>());
        let cells: f64 = of(i)
            .map(|row| row.replayed.cells_mean * row.replayed.steps as f64)
            .sum();
        let worst = of(i).map(|row| row.replayed.lost.worst);
        let share =
            |row: &Row| row.replayed.peak_decoding as f64 / row.replayed.prompt.max(1) as f64;
        let greedy: Option<f64> = of(i).map(|row| row.greedy_lost).sum();
        let greedy = greedy.filter(|_| contender.against.is_some() && traces > 0);
        let less = |row: &&Row| row.less_than_greedy == Some(true);
        Summary {
            contender: contender.name.clone(),
            policy: of(i).next().map_or("", |row| row.replayed.policy),
            bin_size: contender.bin_size,
            traces,
            steps,
            lost_mean: total(i) / steps.max(1) as f64,
            lost_worst: worst.fold(0.0, f64::max),
            lost_total: total(i) / traces.max(1) as f64,
            cells_mean: cells / steps.max(1) as f64,
            peak_share: of(i).map(share).fold(0.0, f64::max),
            peak_decoding: all(|r| r.peak_decoding).max().unwrap_or(0),
            flushes: all(|r| r.flushes).sum(),
            restores: all(|r| r.restores).sum(),
            less_than_greedy: greedy.map(|_| of(i).filter(less).count()),
            of_greedy: greedy
                .map(|greedy| total(i) / greedy)
                .filter(|ratio| ratio.is_finite()),
        }
    };
    contenders.iter().enumerate().map(summary).collect()
}
