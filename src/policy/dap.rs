//! DAP, Dual-Attention Pruning: after the prefill, visual tokens that the prompt's text hardly
//! looks at are dropped (arXiv 2602.02197).
//!
//! For a visual token j, with a[i][j] the attention of query i averaged over heads and scoring
//! layers: the global score G[j] = sum over i of a[i][j], the individual score
//! M[j] = max over i of a[i][j]. The paper evicts j when G[j] < r * sum over k of G[k] and
//! M[j] < alpha. Removing a cell removes it from every layer, which is the paper's index
//! broadcasting.
//!
//! Ours, where the paper is silent or we differ:
//! - `tau`: the threshold as a share of the mean. r * |V| is 0.86 for the paper's 576 visual
//!   tokens but 3.8 for the 2,509 of a large Phi-3.5-vision picture, so r does not carry over.
//! - `keep`: a share or a number of tokens that stay, the best by G.
//! - G may be divided by the query rows that could see the token (`Norm::PerQuery`).
//! - Only the visual tokens of the current turn are judged: the queries were theirs.
//! - `Scope`: over one picture or over all of the turn.
//! - Sinks, the recent window and the newest token stay whatever their score; those that are
//!   visual count as kept.
//! - So do, with [`DapMode::Early`], separators (the row ends of Phi-3.5-vision's crops): no
//!   question points at them, but without them what goes in loses its place. After a whole
//!   prefill the others know their place already, and separators are judged like them.
//! - A token that no query could see is not judged: there is no evidence against it.

use super::scores::{Candidate, Guard, Norm};
use super::{Amount, DapMode, DapOptions, DapRule, Plan, PolicyOptions, Scope};
use crate::cache::{Ledger, Modality, State};

struct Visual {
    image: Option<u32>,
    /// Global score G.
    token: Candidate,
    /// Individual score M.
    max: f32,
    /// Whether the token may leave.
    open: bool,
}

pub(super) struct Dap {
    options: DapOptions,
    norm: Norm,
    guard: Guard,
    keep_separators: bool,
    visual: Vec<Visual>,
}

impl Dap {
    pub fn new(dap: DapOptions, options: &PolicyOptions) -> Self {
        Dap {
            options: dap,
            norm: options.norm,
            guard: Guard {
                sinks: options.sinks,
                recent: options.recent,
            },
            keep_separators: options.keep_separators && options.dap_mode == DapMode::Early,
            visual: Vec::new(),
        }
    }

    /// Adds the turn's visual tokens that go to `plan.evict`.
    pub fn prune(&mut self, cache: &Ledger, plan: &mut Plan) {
        let open = self.guard.open(cache);
        let (norm, keep_separators) = (self.norm, self.keep_separators);
        self.visual.clear();
        self.visual.extend(
            cache
                .entries()
                .filter(|e| e.modality == Modality::Vision && e.turn == cache.turn())
                .filter(|e| e.state == State::Live && e.seen > 0.0)
                .map(|e| Visual {
                    image: e.image,
                    token: Candidate {
                        score: norm.score(&e),
                        pos: e.pos,
                        cell: e.cell,
                    },
                    max: e.max,
                    open: open.contains(&e.pos) && !(keep_separators && e.separator),
                }),
        );
        match self.options.scope {
            Scope::Turn => self.prune_group(0, self.visual.len(), plan),
            Scope::Image => {
                self.visual.sort_by_key(|v| v.image);
                let mut start = 0;
                while start < self.visual.len() {
                    let image = self.visual[start].image;
                    let end = self.visual.partition_point(|v| v.image <= image);
                    self.prune_group(start, end, plan);
                    start = end;
                }
            }
        }
    }

    fn prune_group(&mut self, start: usize, end: usize, plan: &mut Plan) {
        let group = &mut self.visual[start..end];
        let sum: f64 = group.iter().map(|v| f64::from(v.token.score)).sum();
        let limit = match self.options.rule {
            DapRule::Tau(tau) => tau * sum / group.len() as f64,
            DapRule::R(r) => r * sum,
            DapRule::Keep(keep) => return keep_best(group, keep, plan),
        };
        let alpha = self.options.alpha.unwrap_or(f64::INFINITY);
        let low = |v: &&Visual| f64::from(v.token.score) < limit && f64::from(v.max) < alpha;
        plan.evict.extend(
            group
                .iter()
                .filter(low)
                .filter(|v| v.open)
                .map(|v| v.token.cell),
        );
    }
}

/// Evicts all but the best `keep`; something is always kept.
fn keep_best(group: &mut [Visual], keep: Amount, plan: &mut Plan) {
    let leave = group.len().saturating_sub(keep.of(group.len()).max(1));
    group.sort_unstable_by_key(|v| v.token);
    plan.evict.extend(
        group
            .iter()
            .filter(|v| v.open)
            .take(leave)
            .map(|v| v.token.cell),
    );
}
