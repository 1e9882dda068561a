//! `streaming_llm`: attention sinks and a window of the most recent tokens (arXiv 2309.17453,
//! "Efficient Streaming Language Models with Attention Sinks").
//!
//! The first `--sinks` tokens stay, the window is what the budget leaves beside them, and for each
//! token that comes the oldest behind the sinks goes. No attention is read.
//!
//! Deviation: the paper numbers positions within the cache, so that the window follows right
//! behind the sinks; here tokens keep their positions, and the gap between the sinks and the
//! window grows. `context_shift` is the policy that moves positions.

use serde_json::{Value, json};

use super::greedy::Greedy;
use super::scores::Guard;
use super::{EvictionPolicy, Limits, Observe, Plan, PolicyOptions};
use crate::cache::Ledger;
use crate::error::Result;

struct StreamingLlm {
    greedy: Greedy,
    params: Value,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    let guard = Guard {
        sinks: options.sinks,
        recent: 1,
    };
    Ok(Box::new(StreamingLlm {
        greedy: Greedy::new(options, guard, limits)?,
        params: json!({ "kv_budget": options.kv_budget, "sinks": options.sinks }),
    }))
}

impl EvictionPolicy for StreamingLlm {
    fn name(&self) -> &'static str {
        "streaming_llm"
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Nothing
    }

    fn evicts(&self) -> bool {
        true
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.greedy.begin(cache);
        self.after_step(cache, plan)
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        // Of equal scores the older token goes first.
        self.greedy.evict(cache, |_| 0.0, plan);
        Ok(())
    }
}
