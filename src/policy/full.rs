//! `full`: nothing is observed and nothing leaves. The stock cache, and what others compare to.

use serde_json::{Value, json};

use super::registered::Registered;
use super::{EvictionPolicy, Observe, Plan};
use crate::cache::Ledger;
use crate::error::Result;

pub(super) const POLICY: Registered = Registered {
    name: "full",
    reads: &[],
    create: |_, _| Ok(Box::new(Full)),
};

pub struct Full;

impl EvictionPolicy for Full {
    fn name(&self) -> &'static str {
        POLICY.name
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
