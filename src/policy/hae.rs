//! `hae`, Hierarchical Adaptive Eviction (arXiv 2602.02197): DAP after each prompt, DDES while
//! decoding. What each does, and where it departs from the paper, stands in `dap` and `ddes`,
//! which are policies of their own, too.
//!
//! Under a `--kv-budget` below 1.0 pictures pay for it first: DAP leaves as many visual tokens as
//! fit beside the text and the next token, or fewer where a rule says so, and while decoding DDES
//! takes visual tokens before text. At no time are more cells taken than the budget says, the bin
//! included.

use serde_json::{Value, json};

use super::budget::{BUDGET, Budget};
use super::dap::{self, Dap};
use super::ddes::{self, Ddes};
use super::registered::Registered;
use super::scores::{GUARD, Guard, SCORES};
use super::{
    DapMode, DapRule, EvictionPolicy, Held, Limits, Observe, OptionKey, Plan, PolicyOptions,
};
use crate::cache::Ledger;
use crate::error::{Error, Result};

pub(super) const POLICY: Registered = Registered {
    name: "hae",
    reads: &[
        SCORES,
        &[OptionKey::NoDap, OptionKey::Recall, OptionKey::RecallAfter],
        dap::READS,
        BUDGET,
        GUARD,
        ddes::READS,
    ],
    create: |options, limits| Hae::boxed(&POLICY, options.clone(), true, limits),
};

/// DAP alone.
pub(super) const DAP: Registered = Registered {
    name: "dap",
    reads: &[SCORES, &[OptionKey::Recall], dap::READS, BUDGET, GUARD],
    create: |options, limits| Hae::boxed(&DAP, options.clone(), false, limits),
};

/// DDES alone.
pub(super) const DDES: Registered = Registered {
    name: "ddes",
    reads: &[SCORES, &[OptionKey::Recall], BUDGET, GUARD, ddes::READS],
    create: |options, limits| {
        let mut options = options.clone();
        options.dap = None;
        options.kv_budget = options.kv_budget.or(Some(PolicyOptions::WHOLE_PROMPT));
        Hae::boxed(&DDES, options, true, limits)
    },
};

/// Both parts, or one of them.
struct Hae {
    policy: &'static Registered,
    options: PolicyOptions,
    layers: Vec<u32>,
    dap: Option<Dap>,
    ddes: Option<Ddes>,
    /// Tokens to come after the next prompt.
    to_come: Option<usize>,
    /// `[cells]` what DAP has just given up, so that DDES does not count it.
    pruned: Vec<bool>,
}

impl Hae {
    /// # Errors
    /// As [`PolicyOptions::validate`] and [`Budget::new`].
    fn boxed(
        policy: &'static Registered,
        options: PolicyOptions,
        decoding: bool,
        limits: Limits,
    ) -> Result<Box<dyn EvictionPolicy>> {
        options.validate(limits)?;
        if let Some(dap) = options.dap
            && dap.rule == DapRule::Auto
            && dap.alpha.is_some()
        {
            let reason = "has no threshold to add to, expected `dap_tau` or `dap_r` beside it";
            return Err(Error::option("dap_alpha", reason));
        }
        let PolicyOptions { sinks, recent, .. } = options;
        let budget = options
            .kv_budget
            .map(|amount| Budget::new(amount, Guard { sinks, recent }, limits))
            .transpose()?;
        let ddes = budget
            .filter(|_| decoding)
            .map(|budget| Ddes::new(&options, budget, limits))
            .transpose()?;
        Ok(Box::new(Hae {
            policy,
            layers: options.layers.resolve(limits.n_layer),
            dap: options.dap.map(|dap| Dap::new(dap, &options, budget)),
            ddes,
            options,
            to_come: None,
            pruned: Vec::new(),
        }))
    }
}

impl EvictionPolicy for Hae {
    fn name(&self) -> &'static str {
        self.policy.name
    }

    fn params(&self) -> Value {
        let mut params = self.policy.params(&self.options);
        params["layers"] = json!(self.layers);
        if let Some(dap) = &self.dap {
            params["dap"]["rule"] = json!(dap.rule());
        }
        params
    }

    fn observe(&self) -> Observe {
        if self.dap.is_none() && self.ddes.is_none() {
            return Observe::Nothing;
        }
        Observe::Layers {
            layers: self.layers.clone(),
            queries: self.options.queries,
        }
    }

    fn observes_decoding(&self) -> bool {
        self.ddes.is_some()
    }

    fn decay(&self) -> f32 {
        self.options.decay as f32
    }

    fn prune_when(&self) -> DapMode {
        match self.dap {
            Some(_) => self.options.dap_mode,
            None => DapMode::Exact,
        }
    }

    fn recalls(&self) -> bool {
        self.options.recall
    }

    fn asks_back(&self, said: usize) -> bool {
        let asks = self.options.recall && self.policy.reads(OptionKey::RecallAfter);
        // A budget leaves no room for what comes back.
        asks && self.ddes.is_none() && said >= self.options.recall_after
    }

    fn expect(&mut self, tokens: Option<usize>) {
        self.to_come = tokens;
    }

    fn prune(&mut self, cache: &Ledger, held: Held, plan: &mut Plan) -> Result<()> {
        // What DDES holds the cache at while decoding leaves a cell for the next token.
        let to_come = match self.ddes {
            Some(_) => Some(1),
            None => self.to_come,
        };
        if let Some(dap) = &mut self.dap {
            dap.prune(cache, held, to_come, plan);
        }
        Ok(())
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        if let Some(ddes) = &mut self.ddes {
            self.pruned.clear();
            self.pruned.resize(cache.span(), false);
            for &cell in &plan.evict {
                self.pruned[cell as usize] = true;
            }
            ddes.set_budget(cache);
            ddes.rebalance(cache, |cell| self.pruned[cell as usize], plan);
        }
        Ok(())
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        if let Some(ddes) = &mut self.ddes {
            ddes.rebalance(cache, |_| false, plan);
        }
        Ok(())
    }
}
