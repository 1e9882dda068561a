//! `random` and `random_visual`: what leaves is drawn by lot. The control that every policy has to
//! beat at the same budget.
//!
//! `random` draws among all tokens that may leave, `random_visual` among the visual ones while
//! there are any: the control of policies that let pictures go first. Sinks and the recent window
//! stay, as with the policies that they are compared with. The same seed draws the same tokens; a
//! conversation that follows on another in the same process goes on with the stream.

use serde_json::{Value, json};

use super::greedy::Greedy;
use super::scores::Guard;
use super::{EvictionPolicy, Limits, Observe, Plan, PolicyOptions};
use crate::cache::{Entry, Ledger, Modality};
use crate::error::Result;
use crate::noise::Noise;

/// Bits of a lot: an f32 holds it, and one behind all of them, exactly.
const LOT_BITS: u32 = 23;
const LATER: f32 = (1 << LOT_BITS) as f32;

struct Random {
    name: &'static str,
    pictures_first: bool,
    greedy: Greedy,
    noise: Noise,
    params: Value,
}

pub(super) fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    Random::boxed("random", false, options, limits)
}

pub(super) fn create_visual(
    options: &PolicyOptions,
    limits: Limits,
) -> Result<Box<dyn EvictionPolicy>> {
    Random::boxed("random_visual", true, options, limits)
}

impl Random {
    fn boxed(
        name: &'static str,
        pictures_first: bool,
        options: &PolicyOptions,
        limits: Limits,
    ) -> Result<Box<dyn EvictionPolicy>> {
        let PolicyOptions {
            kv_budget,
            sinks,
            recent,
            seed,
            ..
        } = *options;
        Ok(Box::new(Random {
            name,
            pictures_first,
            greedy: Greedy::new(options, Guard { sinks, recent }, limits)?,
            noise: Noise::new(seed),
            params: json!({
                "kv_budget": kv_budget, "sinks": sinks, "recent": recent, "seed": seed,
            }),
        }))
    }

    fn evict(&mut self, cache: &Ledger, plan: &mut Plan) {
        let (noise, pictures_first) = (&mut self.noise, self.pictures_first);
        let lot = |e: &Entry| {
            let lot = (noise.bits() >> (64 - LOT_BITS)) as f32;
            let later = pictures_first && e.modality == Modality::Text;
            if later { lot + LATER } else { lot }
        };
        self.greedy.evict(cache, lot, plan);
    }
}

impl EvictionPolicy for Random {
    fn name(&self) -> &'static str {
        self.name
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
        self.evict(cache, plan);
        Ok(())
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        self.evict(cache, plan);
        Ok(())
    }
}
