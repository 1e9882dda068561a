//! What DAP and DDES share: how a score is read, in which order tokens leave, and which may.

use std::cmp::Ordering;
use std::ops::Range;

use crate::cache::{Cell, Entry, Ledger, Pos};

/// How the attention that a token has gathered becomes its score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// The mean over the query rows that could see the token (ours): a young token is not
    /// punished for the queries that came before it. A token no query has seen yet scores
    /// infinity: nothing speaks against it.
    PerQuery,
    /// The plain sum (the paper, and H2O).
    Sum,
}

impl Norm {
    #[inline]
    pub fn score(self, entry: &Entry) -> f32 {
        match self {
            Norm::PerQuery if entry.seen > 0.0 => entry.sum / entry.seen,
            Norm::PerQuery => f32::INFINITY,
            Norm::Sum => entry.sum,
        }
    }
}

/// A token that may leave or come back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub score: f32,
    pub pos: Pos,
    pub cell: Cell,
}

impl Candidate {
    /// Lowest score first; of equal scores the older token goes first.
    pub fn order(&self, other: &Candidate) -> Ordering {
        self.score.total_cmp(&other.score).then(self.pos.cmp(&other.pos))
    }
}

/// The tokens that never leave: the attention sinks, the most recent ones, the newest.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    /// First positions of the sequence.
    pub sinks: usize,
    /// Last positions of the sequence. The newest is protected even at 0.
    pub recent: usize,
}

impl Guard {
    /// The positions that may leave. Positions, not ranks: what is protected was never evicted,
    /// so both count the same tokens.
    pub fn open(&self, cache: &Ledger) -> Range<Pos> {
        let (Some(first), Some(newest)) = (cache.first(), cache.newest()) else { return 0..0 };
        let pos = |n: usize| Pos::try_from(n).unwrap_or(Pos::MAX);
        let recent = newest.saturating_sub(pos(self.recent.max(1))).saturating_add(1);
        first.saturating_add(pos(self.sinks))..recent
    }
}
