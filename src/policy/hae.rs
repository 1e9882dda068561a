//! `hae`, Hierarchical Adaptive Eviction (arXiv 2602.02197): DAP after each prompt, DDES while
//! decoding. What each does, and where it departs from the paper, stands in `dap` and `ddes`.

use serde_json::{Value, json};

use super::dap::Dap;
use super::ddes::Ddes;
use super::{DapMode, EvictionPolicy, Limits, Observe, Plan, PolicyOptions};
use crate::cache::Ledger;
use crate::error::Result;

pub struct Hae {
    options: PolicyOptions,
    layers: Vec<u32>,
    dap: Option<Dap>,
    ddes: Option<Ddes>,
    /// `[cells]` what DAP has just given up, so that DDES does not count it.
    pruned: Vec<bool>,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    Ok(Box::new(Hae::new(options, limits)?))
}

impl Hae {
    /// # Errors
    /// As [`PolicyOptions::validate`].
    pub fn new(options: &PolicyOptions, limits: Limits) -> Result<Self> {
        options.validate(limits)?;
        Ok(Hae {
            options: options.clone(),
            layers: options.layers.resolve(limits.n_layer),
            dap: options.dap.map(|dap| Dap::new(dap, options)),
            ddes: options
                .kv_budget
                .map(|budget| Ddes::new(options, budget, limits)),
            pruned: Vec::new(),
        })
    }
}

impl EvictionPolicy for Hae {
    fn name(&self) -> &'static str {
        "hae"
    }

    fn params(&self) -> Value {
        let mut params = json!(self.options);
        params["layers"] = json!(self.layers);
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

    fn prune(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        if let Some(dap) = &mut self.dap {
            dap.prune(cache, plan);
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
