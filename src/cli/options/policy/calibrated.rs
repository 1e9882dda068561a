//! Which flags a calibration stands in for.

use anyhow::Result;

use super::PolicyArgs;
use hae::calibrate::file::Calibration;
use hae::policy::{DapRule, PolicyOptions};

/// A flag that was not given, and what a calibration says in its place.
pub struct Taken {
    pub flag: &'static str,
    pub value: String,
}

impl PolicyArgs {
    /// Whether values start from a preset, which leaves nothing to a calibration.
    pub fn has_preset(&self) -> bool {
        self.kv_preset.is_some()
    }

    /// As [`PolicyArgs::options`], with the calibration's values for flags that were not given.
    ///
    /// Which attention judges holds at any memory. What is made of it, tau and the size of the
    /// bin, was chosen for one budget, and is taken for that one alone: the budget itself never
    /// is, so that a calibration does not switch on eviction while decoding.
    pub fn calibrated(&self, by: &Calibration) -> Result<(PolicyOptions, Vec<Taken>)> {
        let mut options = self.options()?;
        let mut taken = Vec::new();
        let mut take = |flag, value: String| taken.push(Taken { flag, value });
        let found = &by.parameters;
        if self.score_layers.is_none() {
            options.layers = found.layers.clone();
            take("--score-layers", found.layers.to_string());
        }
        if self.score_queries.is_none() {
            options.queries = found.queries;
            take("--score-queries", found.queries_name().into());
        }
        if self.kv_budget != [by.kv_budget] {
            return Ok((options, taken));
        }
        let ruled = self.dap_keep.is_some()
            || self.dap_tau.is_some()
            || self.dap_r.is_some()
            || self.dap_spread.is_some()
            || self.dap_alpha.is_some()
            || self.no_dap;
        if let (Some(tau), false, Some(dap)) = (found.tau, ruled, &mut options.dap) {
            dap.rule = DapRule::Tau(tau);
            take("--dap-tau", tau.to_string());
        }
        if self.bin_size.is_none() {
            options.bin_size = found.bin_size;
            take("--bin-size", found.bin_size.to_string());
        }
        Ok((options, taken))
    }
}
