//! What `--kv-budget` means, the same for every policy: the most cells that are taken at once from
//! the end of a prompt's pruning on, the token that is just being decoded included.
//!
//! - A policy that evicts while decoding holds one cell less between steps, for the next token.
//! - A policy that only prunes prompts leaves room for the tokens to come, when it is told how
//!   many ([`super::EvictionPolicy::expect`]); otherwise decoding adds to what the budget says.
//! - The recycle bin is part of it: B live cells and a bin of d are B + d = budget.
//!
//! A share counts every token that went in so far, which is what the full cache would hold at the
//! end of the prompt. A share of 1 is no limit below that: pruning policies keep what they choose
//! to, policies that evict while decoding let new tokens push out others, and the recycle bin
//! comes on top.

use super::scores::Guard;
use super::{Amount, Held, Limits, OptionKey, PolicyOptions};
use crate::error::{Error, Result};

/// The option of a policy that evicts.
pub(super) const BUDGET: &[OptionKey] = &[OptionKey::KvBudget];

#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    amount: Amount,
    /// The fewest cells that leave a choice: what is protected, one more, and the next token.
    least: usize,
    n_cells: usize,
}

impl Budget {
    /// That of a policy that cannot do without one.
    ///
    /// # Errors
    /// As [`Budget::new`].
    pub fn always(options: &PolicyOptions, guard: Guard, limits: Limits) -> Result<Self> {
        let amount = options.kv_budget.unwrap_or(PolicyOptions::WHOLE_PROMPT);
        Budget::new(amount, guard, limits)
    }

    /// # Errors
    /// [`Error::Option`] for a budget that leaves `guard` no choice, or does not fit the context.
    pub fn new(amount: Amount, guard: Guard, limits: Limits) -> Result<Self> {
        const FLAG: &str = "kv_budget";
        amount.check(FLAG)?;
        let Guard { sinks, recent } = guard;
        let least = sinks.saturating_add(recent).saturating_add(2);
        let n_cells = limits.n_cells;
        let cells = match amount {
            Amount::Cells(cells) => cells,
            Amount::Share(_) => least,
        };
        if cells < least {
            let reason = format!(
                "{cells} cells, expected at least {least}: {sinks} sinks + {recent} recent + 1 + the next token"
            );
            return Err(Error::option(FLAG, reason));
        }
        if cells > n_cells {
            let reason = format!("{cells} cells, but the context holds {n_cells}");
            return Err(Error::option(FLAG, reason));
        }
        Ok(Budget {
            amount,
            least,
            n_cells,
        })
    }

    /// Whether it is no limit below what the full cache holds at the end of the prompt.
    pub fn is_whole(&self) -> bool {
        matches!(self.amount, Amount::Share(share) if share >= 1.0)
    }

    /// The budget of the turn whose prompt went in last.
    pub fn cells(&self, held: Held) -> usize {
        self.amount.of(held.went_in).clamp(self.least, self.n_cells)
    }

    /// What may be left of a prompt after which `to_come` tokens follow, when only the prompt is
    /// pruned; `None`: no limit.
    pub fn after_prompt(&self, held: Held, to_come: Option<usize>) -> Option<usize> {
        let cells = self.cells(held).saturating_sub(to_come.unwrap_or(0));
        (!self.is_whole()).then_some(cells)
    }
}
