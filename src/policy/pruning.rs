//! The schedule that `fastv` and `mustdrop` share: visual tokens of a prompt are pruned once, and
//! nothing while decoding. The budget leaves room for the tokens to come, where they are known.

use serde_json::{Value, json};

use super::budget::Budget;
use super::registered::Registered;
use super::scores::Guard;
use super::visual::{Pictures, Visual};
use super::{
    DapMode, EvictionPolicy, Held, Layers, Limits, Observe, OptionKey, Plan, PolicyOptions, Queries,
};
use crate::cache::{Entry, Ledger};
use crate::error::Result;

/// What the schedule reads.
pub(super) const READS: &[OptionKey] = &[
    OptionKey::KvBudget,
    OptionKey::Layers,
    OptionKey::DapMode,
    OptionKey::KeepSeparators,
];

/// How a policy judges the visual tokens of a prompt.
pub(super) trait Judge: Send + 'static {
    type Order: Ord;

    /// The rows of the prompt whose attention judges.
    const QUERIES: Queries;

    /// The layers whose attention judges, where `--score-layers` names none.
    fn layers(n_layer: u32) -> Vec<u32>;

    /// A token's attention; higher is more worth keeping.
    fn score(token: &Entry) -> f32;

    /// Where a number of tokens has to go, the first in this order go first.
    fn order(&self, token: &Visual) -> Self::Order;

    /// Evicts what goes whatever the budget. `bounded`: a budget below the whole prompt takes
    /// more where this is not enough.
    fn prune(&self, visual: &mut [Visual], bounded: bool, plan: &mut Plan);
}

pub(super) struct PromptPruner<J> {
    judge: J,
    name: &'static str,
    pub params: Value,
    mode: DapMode,
    budget: Budget,
    layers: Vec<u32>,
    pictures: Pictures,
    to_come: Option<usize>,
}

impl<J: Judge> PromptPruner<J> {
    /// # Errors
    /// [`crate::Error::Option`] for options that cannot be.
    pub fn new(
        policy: &Registered,
        judge: J,
        options: &PolicyOptions,
        limits: Limits,
    ) -> Result<Self> {
        options.layers.check(limits.n_layer)?;
        if let Some(dap) = &options.dap {
            dap.check()?;
        }
        let layers = match &options.layers {
            Layers::All => J::layers(limits.n_layer),
            list @ Layers::List(_) => list.resolve(limits.n_layer),
        };
        let guard = Guard::NEWEST;
        let mut params = policy.params(options);
        params["layers"] = json!(layers);
        Ok(PromptPruner {
            judge,
            name: policy.name,
            params,
            mode: options.dap_mode,
            budget: Budget::always(options, guard, limits)?,
            layers,
            pictures: Pictures::new(guard, options.keeps_separators()),
            to_come: None,
        })
    }
}

impl<J: Judge> EvictionPolicy for PromptPruner<J> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: J::QUERIES,
        }
    }

    fn observes_decoding(&self) -> bool {
        false
    }

    fn prune_when(&self) -> DapMode {
        self.mode
    }

    fn expect(&mut self, tokens: Option<usize>) {
        self.to_come = tokens;
    }

    fn prune(&mut self, cache: &Ledger, held: Held, plan: &mut Plan) -> Result<()> {
        let judge = &self.judge;
        let most = self.budget.after_prompt(held, self.to_come);
        let visual = self.pictures.judge(cache, J::score);
        judge.prune(visual, most.is_some(), plan);
        self.pictures.fit(held, most, |v| judge.order(v), plan);
        Ok(())
    }

    fn after_prefill(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}
