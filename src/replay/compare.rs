//! Several policies on several traces, side by side.

use std::rc::Rc;

use serde::Serialize;

use super::run::{Replayed, replay};
use super::tape::Tape;
use crate::error::Result;
use crate::policy::PolicyOptions;
use crate::trace::Header;

/// A policy as it is to be compared.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Unique among the settings.
    pub name: String,
    pub policy: String,
    pub options: PolicyOptions,
    /// The recycle bin, for policies that are compared by its size.
    pub bin_size: Option<usize>,
    /// The setting without a recycle bin that this one is held against.
    pub greedy: Option<usize>,
}

/// One conversation of a trace.
#[derive(Clone, Debug)]
pub struct Subject {
    pub name: String,
    pub header: Rc<Header>,
    pub tape: Rc<Tape>,
}

/// One setting on one conversation.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub trace: String,
    pub setting: String,
    pub bin_size: Option<usize>,
    #[serde(flatten)]
    pub replayed: Replayed,
    /// Whether it lost less than the greedy policy; none where there is nothing to compare.
    pub less_than_greedy: Option<bool>,
}

/// A setting over all conversations.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub setting: String,
    pub policy: &'static str,
    pub bin_size: Option<usize>,
    pub traces: usize,
    pub steps: usize,
    /// Attention lost, of 1 for each decoded token: the mean over all of them.
    pub lost_mean: f64,
    /// At the worst token of any trace.
    pub lost_worst: f64,
    /// Over a whole trace, the mean of all traces.
    pub lost_total: f64,
    /// The largest share of the prompt's cells that decoding took at once.
    pub peak_share: f64,
    pub peak_decoding: usize,
    pub flushes: usize,
    pub restores: usize,
    /// Traces on which it lost less than the greedy policy, of those where the two differ in
    /// nothing but the bin.
    pub less_than_greedy: Option<usize>,
    /// Attention lost, over what the greedy policy lost on the same traces.
    pub of_greedy: Option<f64>,
}

/// Every setting on every subject, subject by subject.
///
/// # Errors
/// As [`replay`].
pub fn compare(settings: &[Setting], subjects: &[Subject]) -> Result<Vec<Row>> {
    let mut rows = Vec::with_capacity(settings.len() * subjects.len());
    for Subject { name, header, tape } in subjects {
        let first = rows.len();
        for Setting {
            name: setting,
            policy,
            options,
            bin_size,
            ..
        } in settings
        {
            rows.push(Row {
                trace: name.clone(),
                setting: setting.clone(),
                bin_size: *bin_size,
                replayed: replay(header, tape, policy, options)?,
                less_than_greedy: None,
            });
        }
        for (i, setting) in settings.iter().enumerate() {
            if let Some(greedy) = setting.greedy {
                let lost = |i: usize| rows[first + i].replayed.lost.total;
                rows[first + i].less_than_greedy = Some(lost(i) < lost(greedy));
            }
        }
    }
    Ok(rows)
}

/// Sums the rows of [`compare`] up by setting.
pub fn summarize(settings: &[Setting], rows: &[Row]) -> Vec<Summary> {
    let of = |i: usize| rows.iter().skip(i).step_by(settings.len().max(1));
    let total = |i: usize| of(i).map(|row| row.replayed.lost.total).sum::<f64>();
    let summary = |(i, setting): (usize, &Setting)| {
        let all = |number: fn(&Replayed) -> usize| of(i).map(move |row| number(&row.replayed));
        let (traces, steps) = (of(i).count(), all(|r| r.steps).sum::<usize>());
        let worst = of(i).map(|row| row.replayed.lost.worst);
        let share =
            |row: &Row| row.replayed.peak_decoding as f64 / row.replayed.prompt.max(1) as f64;
        let compared = setting.greedy.filter(|_| traces > 0);
        Summary {
            setting: setting.name.clone(),
            policy: of(i).next().map_or("", |row| row.replayed.policy),
            bin_size: setting.bin_size,
            traces,
            steps,
            lost_mean: total(i) / steps.max(1) as f64,
            lost_worst: worst.fold(0.0, f64::max),
            lost_total: total(i) / traces.max(1) as f64,
            peak_share: of(i).map(share).fold(0.0, f64::max),
            peak_decoding: all(|r| r.peak_decoding).max().unwrap_or(0),
            flushes: all(|r| r.flushes).sum(),
            restores: all(|r| r.restores).sum(),
            less_than_greedy: compared.map(|_| {
                of(i)
                    .filter(|row| row.less_than_greedy == Some(true))
                    .count()
            }),
            of_greedy: compared
                .map(|greedy| total(i) / total(greedy))
                .filter(|ratio| ratio.is_finite()),
        }
    };
    settings.iter().enumerate().map(summary).collect()
}
