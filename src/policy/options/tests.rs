use super::*;

const LIMITS: Limits = Limits {
    n_layer: 6,
    n_cells: 512,
};

fn refused(change: impl FnOnce(&mut PolicyOptions)) -> String {
    let mut options = PolicyOptions::default();
    change(&mut options);
    super::super::create("hae", &options, LIMITS)
        .err()
        .unwrap()
        .to_string()
}

fn dap(rule: DapRule, alpha: Option<f64>) -> Option<DapOptions> {
    Some(DapOptions {
        rule,
        alpha,
        scope: Scope::Turn,
    })
}

#[test]
fn presets_are_valid() {
    for name in PolicyOptions::PRESETS {
        PolicyOptions::preset(name)
            .unwrap()
            .validate(LIMITS)
            .unwrap();
    }
    assert_eq!(
        PolicyOptions::preset("fast").unwrap_err().to_string(),
        "`kv_preset`: \"fast\", expected one of default, paper"
    );
}

#[test]
fn refusals_name_the_flag_and_the_value() {
    let layers = |list: &[u32]| Layers::List(list.to_vec());
    assert_eq!(
        refused(|o| o.layers = layers(&[0, 6])),
        "`score_layers`: layer 6, but the model's layers are 0 to 5"
    );
    assert!(refused(|o| o.layers = layers(&[])).starts_with("`score_layers`"));
    assert_eq!(
        refused(|o| o.kv_budget = Some(Amount::Cells(21))),
        "`kv_budget`: 21 cells, expected at least 22: 4 sinks + 16 recent + 1 + the next token"
    );
    assert_eq!(
        refused(|o| o.kv_budget = Some(Amount::Cells(513))),
        "`kv_budget`: 513 cells, but the context holds 512"
    );
    assert_eq!(
        refused(|o| (o.kv_budget, o.bin_size) = (Some(Amount::Share(1.0)), 500)),
        "`bin_size`: 21 live cells and a bin of 500 need 521, but the context holds 512"
    );
    for share in [0.0, -0.5, 1.01, f64::NAN] {
        assert!(refused(|o| o.kv_budget = Some(Amount::Share(share))).starts_with("`kv_budget`"));
        let keep = DapRule::Keep(Amount::Share(share));
        assert!(refused(|o| o.dap = dap(keep, None)).starts_with("`dap_keep`"));
    }
    for huge in [usize::MAX, 600] {
        for budget in [Amount::Share(0.5), Amount::Cells(100)] {
            let refused =
                refused(|o| (o.sinks, o.recent, o.kv_budget) = (huge, huge, Some(budget)));
            assert!(refused.starts_with("`kv_budget`"));
        }
    }
    assert!(refused(|o| o.dap = dap(DapRule::Keep(Amount::Cells(0)), None)).contains("dap_keep"));
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(refused(|o| o.dap = dap(DapRule::Tau(bad), None)).starts_with("`dap_tau`"));
        assert!(refused(|o| o.dap = dap(DapRule::R(bad), None)).starts_with("`dap_r`"));
        assert!(
            refused(|o| o.dap = dap(
                DapRule::Spread {
                    times: bad,
                    least: Amount::Cells(0)
                },
                None
            ))
            .starts_with("`dap_spread`")
        );
        assert!(refused(|o| o.dap = dap(DapRule::R(0.1), Some(bad))).starts_with("`dap_alpha`"));
        assert!(refused(|o| o.hysteresis = bad).starts_with("`hysteresis`"));
        assert!(refused(|o| o.decay = bad).starts_with("`score_decay`"));
    }
    let keep = DapRule::Keep(Amount::Share(0.5));
    assert!(refused(|o| o.dap = dap(keep, Some(0.1))).contains("not with `dap_keep`"));
    let spread = DapRule::Spread {
        times: 2.0,
        least: Amount::Cells(0),
    };
    assert!(refused(|o| o.dap = dap(spread, Some(0.1))).contains("not with `dap_spread`"));
    assert_eq!(
        refused(|o| o.bin_size = 0),
        "`bin_size`: 0 cells, expected at least 1"
    );
}

#[test]
fn layers_from_text() {
    assert_eq!("all".parse(), Ok(Layers::All));
    assert_eq!("4,7".parse(), Ok(Layers::List(vec![4, 7])));
    assert_eq!("0-3, 30".parse(), Ok(Layers::List(vec![0, 1, 2, 3, 30])));
    for bad in ["", "x", "-1", "3-1", "1,", "0-4294967295"] {
        assert!(bad.parse::<Layers>().is_err(), "{bad}");
    }
    assert_eq!(Layers::List(vec![3, 1, 3]).resolve(6), [1, 3]);
    assert_eq!(Layers::All.resolve(3), [0, 1, 2]);
}

#[test]
fn amounts_from_text() {
    assert_eq!("512".parse(), Ok(Amount::Cells(512)));
    assert_eq!("1".parse(), Ok(Amount::Cells(1)));
    assert_eq!("1.0".parse(), Ok(Amount::Share(1.0)));
    assert_eq!("0.4".parse(), Ok(Amount::Share(0.4)));
    assert!("half".parse::<Amount>().is_err());
    // Rounded to the nearest: 0.4 of 5 is 2 whatever the last bit says.
    assert_eq!(
        (Amount::Share(0.4).of(5), Amount::Share(0.4).of(199)),
        (2, 80)
    );
}

#[test]
fn options_are_plain_data_in_reports() {
    let json = serde_json::to_string(&PolicyOptions::paper()).unwrap();
    assert_eq!(
        json,
        r#"{"layers":{"list":[0]},"queries":"all","norm":"sum","decay":1.0,"dap":{"rule":{"r":0.0015},"alpha":null,"scope":"image"},"dap_mode":"exact","keep_separators":false,"kv_budget":{"share":1.0},"bin_size":8,"sinks":4,"recent":16,"hysteresis":0.0,"restore":true,"recall":true,"recall_after":12,"h2o_recent":{"share":0.5},"snapkv":{"window":32,"kernel":5,"pooling":"avg"},"seed":0}"#
    );
}
