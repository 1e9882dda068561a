//! `full`: nothing is observed and nothing leaves. The stock cache, and what others compare to.

use serde_json::{Value, json};

use super::{EvictionPolicy, Limits, Observe, Plan, PolicyOptions};
use crate::cache::Ledger;
use crate::error::Result;

pub struct Full;

pub(super) fn create(_: &PolicyOptions, _: Limits) -> Result<Box<dyn EvictionPolicy>> {
    Ok(Box::new(Full))
}

impl EvictionPolicy for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn params(&self) -> Value {
        json!({})
    }

    fn observe(&self) -> Observe {
        Observe::Nothing
    }

    fn after_prefill(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}
