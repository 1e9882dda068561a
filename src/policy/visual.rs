//! What policies share that prune the pictures of a prompt: its visual tokens with their scores,
//! and how many more have to go for a budget.
//!
//! With [`super::DapMode::Early`] separators stay, and count among what is kept: no threshold
//! takes them, and where a number or a budget says how many tokens stay, the others go before
//! them. But a picture is no use for its row ends alone, so separators are at most half of what is
//! kept; of more than that, the lowest go.

use super::scores::{Candidate, Guard};
use super::{DapRule, Held, Plan};
use crate::cache::{Entry, Ledger, Modality, State};

pub(super) struct Visual {
    pub image: Option<u32>,
    pub token: Candidate,
    /// The most attention that a single query paid.
    pub max: f32,
    /// Whether the token may leave, and has not done so yet.
    open: bool,
    /// Whether it separates parts of a picture and stays for that.
    separator: bool,
    gone: bool,
}

impl Visual {
    /// Whether a threshold may take the token, which it did not yet.
    pub fn is_open(&self) -> bool {
        self.open && !self.separator
    }

    pub fn evict(&mut self, plan: &mut Plan) {
        (self.open, self.gone) = (false, true);
        plan.evict.push(self.token.cell);
    }
}

/// The visual tokens of the current turn.
pub(super) struct Pictures {
    guard: Guard,
    /// Whether tokens that separate parts of a picture stay.
    keep_separators: bool,
    /// Reused.
    tokens: Vec<Visual>,
}

impl Pictures {
    pub fn new(guard: Guard, keep_separators: bool) -> Self {
        Pictures {
            guard,
            keep_separators,
            tokens: Vec::new(),
        }
    }

    /// Looks at the turn's visual tokens. One that no query could see is left out: there is no
    /// evidence against it. Nor is one of an earlier turn: the queries were not its.
    pub fn judge(&mut self, cache: &Ledger, score: impl Fn(&Entry) -> f32) -> &mut [Visual] {
        let open = self.guard.open(cache);
        let keep_separators = self.keep_separators;
        self.tokens.clear();
        self.tokens.extend(
            cache
                .entries()
                .filter(|e| e.modality == Modality::Vision && e.turn == cache.turn())
                .filter(|e| e.state == State::Live && e.seen > 0.0)
                .map(|e| Visual {
                    image: e.image,
                    token: Candidate {
                        score: score(&e),
                        pos: e.pos,
                        cell: e.cell,
                    },
                    max: e.max,
                    open: open.contains(&e.pos),
                    separator: keep_separators && e.separator,
                    gone: false,
                }),
        );
        &mut self.tokens
    }

    /// Evicts further ones of those that were judged, the first in `order` first, until `most`
    /// cells are left; something of a picture always is.
    pub fn fit<K: Ord>(
        &mut self,
        held: Held,
        most: Option<usize>,
        order: impl Fn(&Visual) -> K,
        plan: &mut Plan,
    ) {
        let Some(most) = most else { return };
        let left = held.cells.saturating_sub(plan.evict.len());
        let kept = self.tokens.iter().filter(|v| !v.gone).count();
        let leave = left.saturating_sub(most).min(kept.saturating_sub(1));
        if leave > 0 {
            evict_first(&mut self.tokens, leave, order, plan);
        }
    }
}

/// How many of a group a rule keeps that goes by number, not by threshold.
pub(super) fn counted(rule: DapRule, group: &[Visual]) -> Option<usize> {
    match rule {
        DapRule::Keep(keep) => Some(keep.of(group.len())),
        DapRule::Spread { times, least } => {
            let wanted = (times * spread(group)).round() as usize;
            Some(wanted.max(least.of(group.len())))
        }
        DapRule::Auto | DapRule::Tau(_) | DapRule::R(_) => None,
    }
}

/// Over how many tokens the scores are spread, `(sum s)^2 / sum s^2`: the number of tokens with
/// equal scores that would be as concentrated. Without any attention nothing speaks against any.
fn spread(group: &[Visual]) -> f64 {
    let scores = || group.iter().map(|v| f64::from(v.token.score));
    let (sum, squares) = (scores().sum::<f64>(), scores().map(|s| s * s).sum::<f64>());
    match squares > 0.0 {
        true => sum * sum / squares,
        false => f64::INFINITY,
    }
}

/// Evicts all but `keep` of a group, the first in `order` first; something is always kept, and
/// what may not leave counts as kept.
pub(super) fn keep_best<K: Ord>(
    group: &mut [Visual],
    keep: usize,
    order: impl Fn(&Visual) -> K,
    plan: &mut Plan,
) {
    let leave = group.len().saturating_sub(keep.max(1));
    evict_first(group, leave, order, plan);
}

/// Evicts so many of a group, the first in `order` first: separators only where they would be more
/// than half of what is left, or where nothing else may leave.
fn evict_first<K: Ord>(
    group: &mut [Visual],
    leave: usize,
    order: impl Fn(&Visual) -> K,
    plan: &mut Plan,
) {
    let count = |which: &dyn Fn(&Visual) -> bool| group.iter().filter(|v| which(v)).count();
    let left = count(&|v| !v.gone).saturating_sub(leave);
    let separators = count(&|v| v.separator && !v.gone);
    let (open, others) = (count(&|v| v.open), count(&Visual::is_open));
    let too_many = separators.saturating_sub(left / 2).min(open - others);
    let of_others = leave.saturating_sub(too_many).min(others);
    let mut rest = [of_others, leave - of_others];
    group.sort_unstable_by_key(order);
    for token in group.iter_mut().filter(|v| v.open) {
        let rest = &mut rest[usize::from(token.separator)];
        if *rest > 0 {
            *rest -= 1;
            token.evict(plan);
        }
    }
}
