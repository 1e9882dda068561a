//! `random` and `random_visual`: what leaves is drawn by lot. The control that every policy has to
//! beat at the same budget.
//!
//! `random` draws among all tokens that may leave, `random_visual` among the visual ones while
//! there are any: the control of policies that let pictures go first. Sinks and the recent window
//! stay, as with the policies that they are compared with. The same seed draws the same tokens; a
//! conversation that follows on another in the same process goes on with the stream.

use super::budget::BUDGET;
use super::greedy::Greedy;
use super::registered::Registered;
use super::scores::{GUARD, Guard};
use super::{EvictionPolicy, Limits, OptionKey, PolicyOptions};
use crate::cache::Modality;
use crate::error::Result;
use crate::noise::Noise;

pub(super) const POLICY: Registered = Registered {
    name: "random",
    reads: &[BUDGET, GUARD, &[OptionKey::Seed]],
    create: |options, limits| create(&POLICY, false, options, limits),
};

pub(super) const VISUAL: Registered = Registered {
    name: "random_visual",
    reads: POLICY.reads,
    create: |options, limits| create(&VISUAL, true, options, limits),
};

pub(super) const SEED: u64 = 0;

/// Bits of a lot: an f32 holds it, and one behind all of them, exactly.
const LOT_BITS: u32 = 23;
const LATER: f32 = (1 << LOT_BITS) as f32;

fn create(
    policy: &Registered,
    pictures_first: bool,
    options: &PolicyOptions,
    limits: Limits,
) -> Result<Box<dyn EvictionPolicy>> {
    let PolicyOptions {
        sinks,
        recent,
        seed,
        ..
    } = *options;
    let greedy = Greedy::new(policy, options, Guard { sinks, recent }, limits)?;
    let mut noise = Noise::new(seed);
    Ok(greedy.boxed(move |token| {
        let lot = (noise.bits() >> (64 - LOT_BITS)) as f32;
        let later = pictures_first && token.modality == Modality::Text;
        if later { lot + LATER } else { lot }
    }))
}
