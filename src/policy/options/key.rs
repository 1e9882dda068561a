//! Each option by itself: the flag that sets it, and where it stands among the others.

use serde_json::{Map, Value, json};

use super::{DapRule, PolicyOptions};

/// One option of [`PolicyOptions`]. The rules of DAP count as one each, for not every policy that
/// prunes pictures can go by all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKey {
    /// [`PolicyOptions::layers`]
    Layers,
    /// [`PolicyOptions::queries`]
    Queries,
    /// [`PolicyOptions::norm`]
    Norm,
    /// [`PolicyOptions::decay`]
    Decay,
    /// [`PolicyOptions::dap`], off.
    NoDap,
    /// [`DapRule::Keep`]
    DapKeep,
    /// [`DapRule::Tau`]
    DapTau,
    /// [`DapRule::R`]
    DapR,
    /// [`DapRule::Spread`]
    DapSpread,
    /// [`super::DapOptions::alpha`]
    DapAlpha,
    /// [`super::DapOptions::scope`]
    DapScope,
    /// [`PolicyOptions::dap_mode`]
    DapMode,
    /// [`PolicyOptions::keep_separators`]
    KeepSeparators,
    /// [`PolicyOptions::kv_budget`]
    KvBudget,
    /// [`PolicyOptions::bin_size`]
    BinSize,
    /// [`PolicyOptions::sinks`]
    Sinks,
    /// [`PolicyOptions::recent`]
    Recent,
    /// [`PolicyOptions::hysteresis`]
    Hysteresis,
    /// [`PolicyOptions::restore`]
    Restore,
    /// [`PolicyOptions::recall`]
    Recall,
    /// [`PolicyOptions::recall_after`]
    RecallAfter,
    /// [`PolicyOptions::h2o_recent`]
    H2oRecent,
    /// [`crate::policy::SnapkvOptions::window`]
    SnapkvWindow,
    /// [`crate::policy::SnapkvOptions::kernel`]
    SnapkvKernel,
    /// [`crate::policy::SnapkvOptions::pooling`]
    SnapkvPooling,
    /// [`PolicyOptions::seed`]
    Seed,
}

use OptionKey as Key;

impl OptionKey {
    /// In the order in which reports show them.
    pub const ALL: [OptionKey; 26] = [
        Key::Layers,
        Key::Queries,
        Key::Norm,
        Key::Decay,
        Key::NoDap,
        Key::DapKeep,
        Key::DapTau,
        Key::DapR,
        Key::DapSpread,
        Key::DapAlpha,
        Key::DapScope,
        Key::DapMode,
        Key::KeepSeparators,
        Key::KvBudget,
        Key::BinSize,
        Key::Sinks,
        Key::Recent,
        Key::Hysteresis,
        Key::Restore,
        Key::Recall,
        Key::RecallAfter,
        Key::H2oRecent,
        Key::SnapkvWindow,
        Key::SnapkvKernel,
        Key::SnapkvPooling,
        Key::Seed,
    ];

    /// The name of the option that sets it. The scope of DAP has none of its own: a preset says it.
    pub fn flag(self) -> &'static str {
        match self {
            Key::Layers => "score_layers",
            Key::Queries => "score_queries",
            Key::Norm => "score_norm",
            Key::Decay => "score_decay",
            Key::NoDap => "no_dap",
            Key::DapKeep => "dap_keep",
            Key::DapTau => "dap_tau",
            Key::DapR => "dap_r",
            Key::DapSpread => "dap_spread",
            Key::DapAlpha => "dap_alpha",
            Key::DapScope => "kv_preset",
            Key::DapMode => "dap_mode",
            Key::KeepSeparators => "prune_separators",
            Key::KvBudget => "kv_budget",
            Key::BinSize => "bin_size",
            Key::Sinks => "sinks",
            Key::Recent => "recent",
            Key::Hysteresis => "hysteresis",
            Key::Restore => "no_restore",
            Key::Recall => "no_recall",
            Key::RecallAfter => "recall_after",
            Key::H2oRecent => "h2o_recent",
            Key::SnapkvWindow => "snapkv_window",
            Key::SnapkvKernel => "snapkv_kernel",
            Key::SnapkvPooling => "snapkv_pooling",
            Key::Seed => "kv_seed",
        }
    }

    /// Gives `to` what `from` has of this option. A rule of DAP that `from` does not go by leaves
    /// `to` with its own.
    fn copy(self, from: &PolicyOptions, to: &mut PolicyOptions) {
        match self {
            Key::Layers => to.layers.clone_from(&from.layers),
            Key::Queries => to.queries = from.queries,
            Key::Norm => to.norm = from.norm,
            Key::Decay => to.decay = from.decay,
            Key::NoDap if from.dap.is_none() => to.dap = None,
            Key::NoDap => {}
            Key::DapKeep | Key::DapTau | Key::DapR | Key::DapSpread => {
                let rule = from.dap.map(|dap| dap.rule);
                if let (Some(rule), Some(dap)) = (rule, &mut to.dap)
                    && Key::of_rule(rule) == Some(self)
                {
                    dap.rule = rule;
                }
            }
            Key::DapAlpha | Key::DapScope => {
                if let (Some(from), Some(to)) = (&from.dap, &mut to.dap) {
                    match self {
                        Key::DapAlpha => to.alpha = from.alpha,
                        _ => to.scope = from.scope,
                    }
                }
            }
            Key::DapMode => to.dap_mode = from.dap_mode,
            Key::KeepSeparators => to.keep_separators = from.keep_separators,
            Key::KvBudget => to.kv_budget = from.kv_budget,
            Key::BinSize => to.bin_size = from.bin_size,
            Key::Sinks => to.sinks = from.sinks,
            Key::Recent => to.recent = from.recent,
            Key::Hysteresis => to.hysteresis = from.hysteresis,
            Key::Restore => to.restore = from.restore,
            Key::Recall => to.recall = from.recall,
            Key::RecallAfter => to.recall_after = from.recall_after,
            Key::H2oRecent => to.h2o_recent = from.h2o_recent,
            Key::SnapkvWindow => to.snapkv.window = from.snapkv.window,
            Key::SnapkvKernel => to.snapkv.kernel = from.snapkv.kernel,
            Key::SnapkvPooling => to.snapkv.pooling = from.snapkv.pooling,
            Key::Seed => to.seed = from.seed,
        }
    }

    /// `None`: of no rule.
    fn of_rule(rule: DapRule) -> Option<OptionKey> {
        match rule {
            DapRule::Auto => None,
            DapRule::Keep(_) => Some(Key::DapKeep),
            DapRule::Tau(_) => Some(Key::DapTau),
            DapRule::R(_) => Some(Key::DapR),
            DapRule::Spread { .. } => Some(Key::DapSpread),
        }
    }

    /// The field that it is, or is a part of, in the serialised options.
    fn field(self) -> (&'static str, Option<&'static str>) {
        match self {
            Key::Layers => ("layers", None),
            Key::Queries => ("queries", None),
            Key::Norm => ("norm", None),
            Key::Decay => ("decay", None),
            Key::NoDap | Key::DapKeep | Key::DapTau | Key::DapR | Key::DapSpread => {
                ("dap", Some("rule"))
            }
            Key::DapAlpha => ("dap", Some("alpha")),
            Key::DapScope => ("dap", Some("scope")),
            Key::DapMode => ("dap_mode", None),
            Key::KeepSeparators => ("keep_separators", None),
            Key::KvBudget => ("kv_budget", None),
            Key::BinSize => ("bin_size", None),
            Key::Sinks => ("sinks", None),
            Key::Recent => ("recent", None),
            Key::Hysteresis => ("hysteresis", None),
            Key::Restore => ("restore", None),
            Key::Recall => ("recall", None),
            Key::RecallAfter => ("recall_after", None),
            Key::H2oRecent => ("h2o_recent", None),
            Key::SnapkvWindow => ("snapkv", Some("window")),
            Key::SnapkvKernel => ("snapkv", Some("kernel")),
            Key::SnapkvPooling => ("snapkv", Some("pooling")),
            Key::Seed => ("seed", None),
        }
    }
}

impl PolicyOptions {
    /// Those of `keys`, and the defaults for the others.
    pub(in crate::policy) fn only(&self, keys: impl Fn(OptionKey) -> bool) -> Self {
        let mut only = PolicyOptions::default();
        for key in Key::ALL.into_iter().filter(|&key| keys(key)) {
            key.copy(self, &mut only);
        }
        only
    }

    /// What differs from the defaults.
    pub fn set(&self) -> impl Iterator<Item = OptionKey> {
        let default = PolicyOptions::default();
        Key::ALL
            .into_iter()
            .filter(move |&key| self.only(|other| other == key) != default)
    }

    /// Those of `keys` with their values, for reports.
    pub(in crate::policy) fn shown(&self, keys: impl Fn(OptionKey) -> bool) -> Value {
        let all = json!(self);
        let mut shown = Map::new();
        for key in Key::ALL.into_iter().filter(|&key| keys(key)) {
            let (field, part) = key.field();
            match part.filter(|_| !all[field].is_null()) {
                Some(part) => {
                    let parts = shown.entry(field).or_insert_with(|| json!({}));
                    parts[part] = all[field][part].clone();
                }
                None => {
                    shown.insert(field.into(), all[field].clone());
                }
            }
        }
        Value::Object(shown)
    }
}
