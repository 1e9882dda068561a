//! `hae`, Hierarchical Adaptive Eviction (arXiv 2602.02197): DAP after each prompt, DDES while
//! decoding. What each does, and where it departs from the paper, stands in `dap` and `ddes`,
//! which are policies of their own, too.
//!
//! Under a `--kv-budget` below 1.0 pictures pay for it first: DAP leaves as many visual tokens as
//! fit beside the text and the next token, or fewer where a rule says so, and while decoding DDES
//! takes visual tokens before text. At no time are more cells taken than the budget says, the bin
//! included.

use serde_json::{Value, json};

use super::budget::Budget;
use super::dap::Dap;
use super::ddes::Ddes;
use super::scores::Guard;
use super::{DapMode, DapRule, EvictionPolicy, Held, Limits, Observe, Plan, PolicyOptions};
use crate::cache::Ledger;
use crate::error::{Error, Result};

/// Both parts, or one of them.
pub(super) struct Hae {
    name: &'static str,
    options: PolicyOptions,
    layers: Vec<u32>,
    dap: Option<Dap>,
    ddes: Option<Ddes>,
    /// Tokens to come after the next prompt.
    to_come: Option<usize>,
    /// `[cells]` what DAP has just given up, so that DDES does not count it.
    pruned: Vec<bool>,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    Ok(Box::new(Hae::new("hae", options.clone(), true, limits)?))
}

impl Hae {
    /// DAP alone.
    ///
    /// # Errors
    /// As [`PolicyOptions::validate`] and [`Budget::new`].
    pub fn dap(options: &PolicyOptions, limits: Limits) -> Result<Self> {
        let mut options = options.clone();
        options.dap = options.dap.or(PolicyOptions::default().dap);
        Hae::new("dap", options, false, limits)
    }

    /// DDES alone.
    ///
    /// # Errors
    /// As [`PolicyOptions::validate`] and [`Budget::new`].
    pub fn ddes(options: &PolicyOptions, limits: Limits) -> Result<Self> {
        let mut options = options.clone();
        options.dap = None;
        options.kv_budget = options.kv_budget.or(Some(PolicyOptions::WHOLE_PROMPT));
        Hae::new("ddes", options, true, limits)
    }

    fn new(
        name: &'static str,
        options: PolicyOptions,
        decoding: bool,
        limits: Limits,
    ) -> Result<Self> {
        options.validate(limits)?;
        if let Some(dap) = options.dap
            && dap.rule == DapRule::Auto
            && dap.alpha.is_some()
        {
            let reason = "has no threshold to add to, expected --dap-tau or --dap-r beside it";
            return Err(Error::option("--dap-alpha", reason));
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
        Ok(Hae {
            name,
            layers: options.layers.resolve(limits.n_layer),
            dap: options.dap.map(|dap| Dap::new(dap, &options, budget)),
            ddes,
            options,
            to_come: None,
            pruned: Vec::new(),
        })
    }
}

impl EvictionPolicy for Hae {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> Value {
        let mut params = json!(self.options);
        params["layers"] = json!(self.layers);
        if let Some(dap) = &self.dap {
            params["dap"]["rule"] = json!(dap.rule());
        }
        if let Some(params) = params.as_object_mut() {
            for of_others in ["h2o_recent", "snapkv", "seed"] {
                params.shift_remove(of_others);
            }
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

    fn dap_mode(&self) -> DapMode {
        match self.dap {
            Some(_) => self.options.dap_mode,
            None => DapMode::Exact,
        }
    }

    fn recalls(&self) -> bool {
        self.options.recall
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
