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
//! - `spread`: as many stay, the best by G, as this many times the number of tokens that G is
//!   spread over, (sum over k of G[k])^2 / (sum over k of G[k]^2): the participation ratio, or
//!   the inverse of Simpson's index. A question about one thing keeps little, one about everything
//!   all. A sum of squares, not the entropy, because a faint glow over the whole picture, which
//!   every question has, weighs little in it.
//! - Under a `--kv-budget` below 1.0 the best by G stay that it leaves room for, or fewer where a
//!   rule says so. Without a budget and a rule, [`DapRule::SPREAD`] says how many stay, and with
//!   [`DapMode::Early`] it is 0.4 of them.
//! - G may be divided by the query rows that could see the token (`Norm::PerQuery`).
//! - Only the visual tokens of the current turn are judged: the queries were theirs.
//! - `Scope`: over one picture or over all of the turn.
//! - Sinks, the recent window and the newest token stay whatever their score; those that are
//!   visual count as kept.
//! - So do, with [`DapMode::Early`], separators (the row ends of Phi-3.5-vision's crops) as long as
//!   they are at most half of what is kept: no question points at them, but without them what goes
//!   in loses its place. After a few layers or a whole prefill the others know their place already,
//!   and separators are judged like them.
//! - A token that no query could see is not judged: there is no evidence against it.
//!
//! As a policy of its own, `dap`, it prunes prompts and keeps what is decoded. Its budget leaves
//! room for the tokens to come, and can be kept only as far as visual tokens can make up for them.

use super::budget::Budget;
use super::scores::{Guard, Norm};
use super::visual::{Pictures, Visual, counted, keep_best};
use super::{Amount, DapMode, DapOptions, DapRule, Held, OptionKey, Plan, PolicyOptions, Scope};
use crate::cache::Ledger;

/// What DAP reads beside scores, guard and budget.
pub(super) const READS: &[OptionKey] = &[
    OptionKey::DapKeep,
    OptionKey::DapTau,
    OptionKey::DapR,
    OptionKey::DapSpread,
    OptionKey::DapAlpha,
    OptionKey::DapScope,
    OptionKey::DapMode,
    OptionKey::KeepSeparators,
];

/// What stays with [`DapMode::Early`] without a budget and a rule: what is pruned there shows nothing
/// to any other token, so more is needed than the question looks at.
const KEEP: Amount = Amount::Share(0.4);

pub(super) struct Dap {
    options: DapOptions,
    norm: Norm,
    budget: Option<Budget>,
    pictures: Pictures,
    /// The rule where neither a rule nor a budget is given.
    unasked: DapRule,
}

impl Dap {
    pub fn new(dap: DapOptions, options: &PolicyOptions, budget: Option<Budget>) -> Self {
        let guard = Guard {
            sinks: options.sinks,
            recent: options.recent,
        };
        let keep_separators = options.keeps_separators();
        Dap {
            options: dap,
            norm: options.norm,
            budget,
            pictures: Pictures::new(guard, keep_separators),
            unasked: match options.dap_mode {
                DapMode::Exact | DapMode::Midway => DapRule::SPREAD,
                DapMode::Early => DapRule::Keep(KEEP),
            },
        }
    }

    /// The rule, also where none is given; [`DapRule::Auto`] where the budget alone decides.
    pub fn rule(&self) -> DapRule {
        match self.options.rule {
            DapRule::Auto if self.budget.is_none_or(|budget| budget.is_whole()) => self.unasked,
            rule => rule,
        }
    }

    /// Adds the turn's visual tokens that go to `plan.evict`. `to_come` cells of the budget stay
    /// free.
    pub fn prune(&mut self, cache: &Ledger, held: Held, to_come: Option<usize>, plan: &mut Plan) {
        let norm = self.norm;
        let most = self.budget.and_then(|b| b.after_prompt(held, to_come));
        let rule = match self.rule() {
            DapRule::Auto => None,
            rule => Some(rule),
        };
        let visual = self.pictures.judge(cache, |e| norm.score(e));
        match (rule, self.options.scope) {
            (None, _) => {}
            (Some(rule), Scope::Turn) => self.options.prune(rule, visual, plan),
            (Some(rule), Scope::Image) => {
                visual.sort_by_key(|v| v.image);
                for picture in visual.chunk_by_mut(|a, b| a.image == b.image) {
                    self.options.prune(rule, picture, plan);
                }
            }
        }
        self.pictures.fit(held, most, |v| v.token, plan);
    }
}

impl DapOptions {
    /// Prunes tokens that are judged together.
    fn prune(&self, rule: DapRule, group: &mut [Visual], plan: &mut Plan) {
        if let Some(keep) = counted(rule, group) {
            return keep_best(group, keep, |v| v.token, plan);
        }
        let sum: f64 = group.iter().map(|v| f64::from(v.token.score)).sum();
        let limit = match rule {
            DapRule::Tau(tau) => tau * sum / group.len() as f64,
            DapRule::R(r) => r * sum,
            DapRule::Auto | DapRule::Keep(_) | DapRule::Spread { .. } => return,
        };
        let alpha = self.alpha.unwrap_or(f64::INFINITY);
        let low = |v: &Visual| f64::from(v.token.score) < limit && f64::from(v.max) < alpha;
        for token in group.iter_mut().filter(|v| v.is_open() && low(v)) {
            token.evict(plan);
        }
    }
}
