//! The policy that the full cache's attention is read under.

use serde_json::{Value, json};

use crate::cache::Ledger;
use crate::error::Result;
use crate::policy::{EvictionPolicy, Observe, Plan, Queries};

/// Keeps everything, as `full` does, and watches where attention goes. It has no name that
/// `--kv-policy` takes.
pub struct AttentiveFull {
    /// Sorted.
    layers: Vec<u32>,
}

impl AttentiveFull {
    /// Of a model with so many layers: the mean over all of them.
    pub fn all(n_layer: u32) -> Self {
        AttentiveFull {
            layers: (0..n_layer).collect(),
        }
    }
}

impl EvictionPolicy for AttentiveFull {
    fn name(&self) -> &'static str {
        "watch"
    }

    fn params(&self) -> Value {
        json!({})
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: Queries::Last,
        }
    }

    fn evicts(&self) -> bool {
        false
    }

    fn after_prefill(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}
