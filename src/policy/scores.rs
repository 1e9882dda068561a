//! What DAP and DDES share: how a score is read, in which order tokens leave, and which may.

use std::cmp::Ordering;
use std::ops::Range;

use super::OptionKey;
use crate::cache::{Cell, Entry, Ledger, Pos};
use crate::error::{Error, Result};

/// The options of how a score is read.
pub const SCORES: &[OptionKey] = &[OptionKey::Layers, OptionKey::Queries, OptionKey::Norm];

/// The options of [`Guard`].
pub const GUARD: &[OptionKey] = &[OptionKey::Sinks, OptionKey::Recent];

/// # Errors
/// [`Error::Option`] for a factor that makes scores grow, or ends them.
pub fn check_decay(decay: f64) -> Result<()> {
    if decay > 0.0 && decay <= 1.0 {
        return Ok(());
    }
    let reason = format!("{decay}, expected more than 0, up to 1");
    Err(Error::option("score_decay", reason))
}

/// How the attention that a token has gathered becomes its score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
    /// The score of a cell's token: the higher, the more worth keeping.
    #[inline]
    pub fn score(self, entry: &Entry) -> f32 {
        self.of(entry.sum, entry.seen)
    }

    /// The same of a sum of attention and an exposure.
    #[inline(always)]
    pub(super) fn of(self, sum: f32, seen: f32) -> f32 {
        match self {
            Norm::PerQuery if seen > 0.0 => sum / seen,
            Norm::PerQuery => f32::INFINITY,
            Norm::Sum => sum,
        }
    }
}

/// A token that may leave or come back. The order is that in which tokens leave: lowest score
/// first, of equal scores the older token first. Scores are never NaN: the ledger refuses it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub score: f32,
    pub pos: Pos,
    pub cell: Cell,
}

impl Candidate {
    /// Leaves after every token there is.
    pub const LAST: Candidate = Candidate {
        score: f32::INFINITY,
        pos: Pos::MAX,
        cell: Cell::MAX,
    };
}

impl Ord for Candidate {
    #[inline]
    fn cmp(&self, other: &Candidate) -> Ordering {
        let by_score = self
            .score
            .partial_cmp(&other.score)
            .unwrap_or(Ordering::Equal);
        by_score.then(self.pos.cmp(&other.pos))
    }
}

impl PartialOrd for Candidate {
    #[inline]
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }

    /// Spelled out because a scan of the cache asks little else, once a cell.
    #[inline]
    fn lt(&self, other: &Candidate) -> bool {
        self.score < other.score || (self.score == other.score && self.pos < other.pos)
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Candidate) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// The tokens that never leave: the attention sinks, the most recent ones, the newest.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    /// First positions of the sequence.
    pub sinks: usize,
    /// Last positions of the sequence. The newest is protected even at 0.
    pub recent: usize,
}

impl Guard {
    /// Ours.
    pub const DEFAULT: Guard = Guard {
        sinks: 4,
        recent: 16,
    };

    /// Only the newest token.
    pub const NEWEST: Guard = Guard {
        sinks: 0,
        recent: 1,
    };

    /// The positions that may leave. Positions, not ranks: what is protected was never evicted,
    /// so both count the same tokens.
    pub fn open(&self, cache: &Ledger) -> Range<Pos> {
        let (Some(first), Some(newest)) = (cache.first(), cache.newest()) else {
            return 0..0;
        };
        let pos = |n: usize| Pos::try_from(n).unwrap_or(Pos::MAX);
        let recent = newest
            .saturating_sub(pos(self.recent.max(1)))
            .saturating_add(1);
        first.saturating_add(pos(self.sinks))..recent
    }
}
