//! What holds for every policy of the registry, whichever there are.

use serde_json::Value;

use super::super::{
    Amount, DapMode, DapOptions, DapRule, Layers, Norm, Observe, PolicySpec, Pooling, Queries,
    Scope, SnapkvOptions,
};
use super::*;

const LIMITS: Limits = Limits {
    n_layer: 24,
    n_cells: 512,
};

/// Nothing of it is a default.
fn other(rule: DapRule, alpha: Option<f64>) -> PolicyOptions {
    let scope = Scope::Image;
    PolicyOptions {
        layers: Layers::List(vec![3]),
        queries: Queries::All,
        norm: Norm::Sum,
        decay: 0.5,
        dap: Some(DapOptions { rule, alpha, scope }),
        dap_mode: DapMode::Midway,
        keep_separators: false,
        kv_budget: Some(Amount::Cells(100)),
        bin_size: 5,
        sinks: 3,
        recent: 7,
        hysteresis: 0.5,
        restore: false,
        recall: false,
        recall_after: 3,
        h2o_recent: Amount::Cells(9),
        snapkv: SnapkvOptions {
            window: 9,
            kernel: 3,
            pooling: Pooling::Max,
        },
        seed: 7,
    }
}

/// Others that have, each by itself, every option in common with one of these.
fn others() -> Vec<PolicyOptions> {
    let mut none = other(DapRule::Auto, None);
    none.dap = None;
    let least = Amount::Cells(5);
    vec![
        other(DapRule::Tau(0.5), Some(0.25)),
        other(DapRule::R(0.25), Some(0.25)),
        other(DapRule::Keep(Amount::Cells(9)), None),
        other(DapRule::Spread { times: 3.0, least }, None),
        none,
    ]
}

/// The defaults, but for this option.
fn changed(key: OptionKey) -> PolicyOptions {
    let one = others().into_iter().map(|o| o.only(|k| k == key));
    let mut changed = one.filter(|o| *o != PolicyOptions::default());
    changed.next().unwrap_or_else(|| panic!("{key:?}"))
}

fn params(name: &str, options: &PolicyOptions) -> Value {
    create(name, options, LIMITS).unwrap().params()
}

#[test]
fn every_option_has_a_key() {
    for options in others() {
        assert_eq!(options.only(|_| true), options);
        assert_eq!(options.only(|_| false), PolicyOptions::default());
    }
    for key in OptionKey::ALL {
        assert_eq!(changed(key).set().collect::<Vec<_>>(), [key]);
    }
    assert_eq!(PolicyOptions::default().set().count(), 0);
}

#[test]
fn reports_show_what_a_policy_reads_and_nothing_else() {
    let every = PolicyOptions::default().shown(|_| true);
    let json = serde_json::to_value(PolicyOptions::default()).unwrap();
    assert_eq!(every, json);
    // Of options that go together in reports, each part is told by itself.
    let names = |value: &Value| -> Vec<String> {
        let fields = value.as_object().unwrap().iter();
        let names = fields.flat_map(|(field, value)| match (&**field, value.as_object()) {
            ("dap" | "snapkv", Some(parts)) => {
                parts.keys().map(|part| format!("{field}.{part}")).collect()
            }
            _ => vec![field.clone()],
        });
        names.collect()
    };
    for policy in POLICIES {
        let shown = params(policy.name, &PolicyOptions::default());
        let read = policy.params(&PolicyOptions::default());
        assert_eq!(names(&shown), names(&read), "{}", policy.name);
    }
}

/// No option is silently without effect: a policy shows it, or refuses it by its flag.
#[test]
fn every_option_is_read_or_refused() {
    for policy in POLICIES {
        let name = policy.name;
        for key in OptionKey::ALL {
            let mut options = changed(key);
            let mut plain = PolicyOptions::default();
            if key == OptionKey::DapAlpha && policy.reads(OptionKey::DapTau) {
                // It goes with a threshold only.
                for dap in [&mut options.dap, &mut plain.dap].into_iter().flatten() {
                    dap.rule = DapRule::Tau(0.5);
                }
            }
            let checked = PolicySpec::new(name, options.clone()).check();
            let shown = params(name, &options);
            if policy.reads(key) {
                checked.unwrap();
                assert_ne!(shown, params(name, &plain), "{name} {key:?}");
            } else {
                let line = checked.unwrap_err().to_string();
                let expected = format!("`{}`: the policy {name} does not read it", key.flag());
                assert_eq!(line, expected);
                assert_eq!(shown, params(name, &plain), "{name} {key:?}");
            }
        }
    }
}

#[test]
fn what_is_read_goes_with_what_a_policy_does() {
    for policy in POLICIES {
        let name = policy.name;
        let options = changed(OptionKey::KvBudget);
        let created = create(name, &options, LIMITS).unwrap();
        assert_eq!(
            created.evicts(),
            policy.reads(OptionKey::KvBudget),
            "{name}"
        );
        assert_eq!(evicts_nothing(name), !created.evicts(), "{name}");
        let looks = created.observe() != Observe::Nothing;
        assert_eq!(looks, policy.reads(OptionKey::Layers), "{name}");
        let early = create(name, &changed(OptionKey::DapMode), LIMITS).unwrap();
        let has_trial = early.prune_when().has_trial();
        assert_eq!(has_trial, policy.reads(OptionKey::DapMode), "{name}");
        assert_eq!(created.recalls(), policy.reads(OptionKey::Recall), "{name}");
    }
    assert!(!evicts_nothing("lru") && !reads("lru", OptionKey::Layers));
}

#[test]
fn of_several_policies_one_has_to_read_it() {
    use OptionKey::{BinSize, H2oRecent, KvBudget};
    let refuse = |policies: &[&str], sets: &[OptionKey]| {
        let refused = refuse_unread(policies, [("flag", sets.to_vec())]);
        refused.err().map(|e| e.to_string())
    };
    assert_eq!(refuse(&["full", "h2o"], &[H2oRecent]), None);
    let line = refuse(&["full", "hae"], &[H2oRecent]).unwrap();
    assert_eq!(line, "`flag`: none of the policies full, hae reads it");
    // One part of what it sets is enough, and it may set nothing.
    assert_eq!(refuse(&["tova"], &[BinSize, KvBudget]), None);
    assert_eq!(refuse(&["full"], &[]), None);
    // Who that is, others say.
    assert_eq!(refuse(&["lru"], &[BinSize]), None);
    // Each gets its own.
    let both = PolicyOptions {
        h2o_recent: Amount::Cells(9),
        ..changed(BinSize)
    };
    assert_eq!(PolicySpec::of("h2o", &both).options, changed(H2oRecent));
    assert_eq!(PolicySpec::of("hae", &both).options, changed(BinSize));
    assert_eq!(PolicySpec::of("full", &both), PolicySpec::full());
}
