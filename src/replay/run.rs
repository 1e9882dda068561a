//! A policy on a tape, and what it costs: the attention mass that went to tokens it had evicted.

use std::rc::Rc;

use serde::Serialize;

use super::engine::TapeEngine;
use super::tape::Tape;
use crate::cache::Counts;
use crate::controller::Controller;
use crate::error::{Error, Result};
use crate::generate::Session;
use crate::policy::{EvictionPolicy, Layers, Limits, Observe, PolicySpec};
use crate::trace::Header;

/// Attention mass that decoded tokens paid, in the full cache, to tokens that the policy had
/// evicted by then; each token pays 1 in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lost {
    /// Of a decoded token.
    pub mean: f64,
    /// Of the decoded token that lost the most.
    pub worst: f64,
    /// The decoded token at which it was worst, from 1 on.
    pub worst_step: usize,
    /// Summed over all decoded tokens.
    pub total: f64,
    /// Of the query rows of prompts: what earlier turns or a trial run had evicted.
    pub prompts: f64,
}

/// The cache after a decoded token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Moment {
    /// Cells that are not in the recycle bin.
    pub live: usize,
    /// Cells that are.
    pub binned: usize,
    /// So far.
    pub evicted: usize,
    /// So far.
    pub restored: usize,
    /// Of this token.
    pub lost: f64,
}

/// What a replay came to.
#[derive(Clone, Debug, Serialize)]
pub struct Replayed {
    /// The policy's name.
    pub policy: &'static str,
    /// Its parameters, as reports show them.
    pub params: serde_json::Value,
    /// Positions of the prompts.
    pub prompt: usize,
    /// Decoded tokens.
    pub steps: usize,
    /// What it did not see any more.
    pub lost: Lost,
    /// At the end.
    pub cells: Counts,
    /// The most cells at once outside of prefills: what `--kv-budget` bounds.
    pub peak_decoding: usize,
    /// Cells in use, the mean over the decoded tokens.
    pub cells_mean: f64,
    /// Tokens that left after a prompt.
    pub evicted_after_prefill: usize,
    /// Tokens that left while decoding.
    pub evicted_in_decoding: usize,
    /// Decoding steps that removed tokens.
    pub flushes: usize,
    /// Times that a token came back from the recycle bin.
    pub restores: usize,
    /// One for each decoded token.
    #[serde(skip)]
    pub timeline: Vec<Moment>,
}

/// Runs a policy on a conversation that a full cache saw. A policy that scores by all layers
/// takes those of the trace.
///
/// # Errors
/// [`Error::Option`] for options that cannot be, or that ask for what the trace does not hold.
pub fn replay(header: &Header, tape: &Rc<Tape>, policy: &PolicySpec) -> Result<Replayed> {
    let n_cells = header.n_cells;
    let limits = Limits {
        n_layer: header.n_layer,
        n_cells,
    };
    let policy = on_layers(header, policy, limits)?;
    let controller = Controller::new(policy, n_cells.min(tape.len()));
    let mut session = Session::new(TapeEngine::new(Rc::clone(tape), n_cells), controller);

    let mut lost = Lost::default();
    let mut timeline = Vec::with_capacity(tape.steps());
    for turn in &tape.turns {
        session.expect(turn.steps);
        session.prefill(&turn.segments, &|| false)?;
        lost.prompts += session.engine.lost.drain(..).sum::<f64>();
        for _ in 0..turn.steps {
            session.step(0)?;
            let share: f64 = session.engine.lost.drain(..).sum();
            let counts = session.controller.ledger().counts();
            timeline.push(Moment {
                live: counts.live.total(),
                binned: counts.binned.total(),
                evicted: counts.evicted.total(),
                restored: counts.restored.total(),
                lost: share,
            });
            lost.total += share;
            if share > lost.worst {
                (lost.worst, lost.worst_step) = (share, timeline.len());
            }
        }
    }
    let cells: usize = timeline.iter().map(|m: &Moment| m.live + m.binned).sum();
    lost.mean = lost.total / timeline.len().max(1) as f64;
    let report = session.controller.report();
    Ok(Replayed {
        policy: report.policy,
        params: report.params,
        prompt: tape.len() - tape.steps(),
        steps: timeline.len(),
        lost,
        cells: report.cells,
        peak_decoding: report.peak_decoding,
        cells_mean: cells as f64 / timeline.len().max(1) as f64,
        evicted_after_prefill: report.evicted_after_prefill,
        evicted_in_decoding: report.evicted_in_decoding,
        flushes: report.flushes,
        restores: report.restores,
        timeline,
    })
}

/// The policy with the trace's layers, unless it has a choice of its own.
fn on_layers(
    header: &Header,
    spec: &PolicySpec,
    limits: Limits,
) -> Result<Box<dyn EvictionPolicy>> {
    let policy = spec.create(limits)?;
    let Observe::Layers { layers, .. } = policy.observe() else {
        return Ok(policy);
    };
    if layers == header.layers {
        return Ok(policy);
    }
    let everything =
        spec.options.layers == Layers::All && layers == Layers::All.resolve(limits.n_layer);
    if !everything {
        let reason = format!(
            "{} scores by layers {layers:?}, but the trace holds the mean over {:?}: record those, or give these",
            spec.name, header.layers
        );
        return Err(Error::option("score_layers", reason));
    }
    let mut spec = spec.clone();
    spec.options.layers = Layers::List(header.layers.clone());
    spec.create(limits)
}
