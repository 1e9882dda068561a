//! `tova`, Token Omission Via Attention (arXiv 2401.06104, "Transformers are Multi-State RNNs"):
//! at each step the token that the newest query looks at least goes.
//!
//! Nothing is remembered: only the last query's attention counts, after a prompt that of its last
//! token. Neither sinks nor recent tokens are protected, as in the paper; `--sinks` and `--recent`
//! are not read.
//!
//! Deviations:
//! - The paper drops a token in each layer by that layer's attention. A cell here spans all
//!   layers, so the mean over heads and scoring layers decides for all.
//! - The newest token stays whatever attention it pays itself: llama.cpp counts on from it.
//! - The paper brings a long prompt down as it comes; here at its end, all of it at once by the
//!   attention of its last token.

use serde_json::{Value, json};

use super::greedy::Greedy;
use super::scores::Guard;
use super::{EvictionPolicy, Limits, Observe, Plan, PolicyOptions, Queries};
use crate::cache::Ledger;
use crate::error::Result;

struct Tova {
    greedy: Greedy,
    layers: Vec<u32>,
    params: Value,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    options.validate_layers(limits.n_layer)?;
    let guard = Guard {
        sinks: 0,
        recent: 1,
    };
    let layers = options.layers.resolve(limits.n_layer);
    Ok(Box::new(Tova {
        greedy: Greedy::new(options, guard, limits)?,
        params: json!({ "kv_budget": options.kv_budget, "layers": layers }),
        layers,
    }))
}

impl EvictionPolicy for Tova {
    fn name(&self) -> &'static str {
        "tova"
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: Queries::Last,
        }
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.greedy.begin(cache);
        self.after_step(cache, plan)
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.greedy.evict(cache, |e| e.latest, plan);
        Ok(())
    }
}
