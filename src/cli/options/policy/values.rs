//! What the flags of the policies come to.

use anyhow::Result;

use super::PolicyArgs;
use hae::Error;
use hae::policy::{Amount, DapOptions, DapRule, PolicyOptions, Scope};

impl PolicyArgs {
    /// Of a command that takes one budget.
    pub fn options(&self) -> Result<PolicyOptions> {
        match self.kv_budget[..] {
            [] => self.options_at(None),
            [budget] => self.options_at(Some(budget)),
            _ => {
                let reason = format!("{} values, expected one", self.kv_budget.len());
                Err(Error::option("--kv-budget", reason).into())
            }
        }
    }

    /// The budgets that were given.
    pub fn budgets(&self) -> &[Amount] {
        &self.kv_budget
    }

    /// As [`PolicyArgs::options`], with this budget in the place of those given.
    pub fn options_at(&self, budget: Option<Amount>) -> Result<PolicyOptions> {
        let mut options = PolicyOptions::preset(self.kv_preset.as_deref().unwrap_or("default"))?;
        options.dap = self.dap(options.dap);
        set(&mut options.dap_mode, &self.dap_mode);
        options.keep_separators &= !self.prune_separators;
        set(&mut options.layers, &self.score_layers);
        set(&mut options.queries, &self.score_queries);
        set(&mut options.norm, &self.score_norm);
        set(&mut options.decay, &self.score_decay);
        options.kv_budget = self.budget(budget.or(options.kv_budget));
        set(&mut options.bin_size, &self.bin_size);
        set(&mut options.sinks, &self.sinks);
        set(&mut options.recent, &self.recent);
        set(&mut options.hysteresis, &self.hysteresis);
        options.restore &= !self.no_restore;
        options.recall &= !self.no_recall;
        set(&mut options.recall_after, &self.recall_after);
        set(&mut options.h2o_recent, &self.h2o_recent);
        set(&mut options.snapkv.window, &self.snapkv_window);
        set(&mut options.snapkv.kernel, &self.snapkv_kernel);
        set(&mut options.snapkv.pooling, &self.snapkv_pooling);
        set(&mut options.seed, &self.kv_seed);
        Ok(options)
    }

    /// How prompts are pruned, where the preset says `preset`.
    fn dap(&self, preset: Option<DapOptions>) -> Option<DapOptions> {
        if self.no_dap {
            return None;
        }
        // At most one of them is given, but for --dap-keep as the least of --dap-spread.
        let spread = |times| match self.dap_keep {
            Some(least) => DapRule::Spread { times, least },
            None => DapRule::spread(times),
        };
        let rule = (self.dap_spread.map(spread))
            .or(self.dap_keep.map(DapRule::Keep))
            .or(self.dap_tau.map(DapRule::Tau))
            .or(self.dap_r.map(DapRule::R));
        let ruled = rule.map(|rule| DapOptions {
            rule,
            alpha: None,
            scope: preset.map_or(Scope::Turn, |dap| dap.scope),
        });
        let mut dap = ruled.or(preset)?;
        dap.alpha = self.dap_alpha.or(dap.alpha);
        Some(dap)
    }

    /// The budget, where beside the flags of the recycle bin `budget` is asked for.
    fn budget(&self, budget: Option<Amount>) -> Option<Amount> {
        if self.no_ddes {
            return None;
        }
        // A recycle bin is asked for together with a budget, or takes the whole prompt's cells.
        let binned = self.bin_size.is_some() || self.hysteresis.is_some() || self.no_restore;
        budget.or(binned.then_some(PolicyOptions::WHOLE_PROMPT))
    }
}

/// A flag that was not given leaves what is there.
fn set<T: Clone>(option: &mut T, given: &Option<T>) {
    if let Some(value) = given {
        option.clone_from(value);
    }
}
