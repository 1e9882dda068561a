//! Hand-made caches: what each rule decides on scores that can be read off.

use super::*;
use crate::cache::{Modality, Pos};
use crate::engine::Observation;

const LIMITS: Limits = Limits {
    n_layer: 2,
    n_cells: 64,
};
const NONE: [Cell; 0] = [];

/// A cache with one token a cell, at the same position, each with the attention of one query.
/// `V` and `W` are tokens of pictures 0 and 1, `T` is text.
fn cache(kinds: &str, attention: &[f32]) -> Ledger {
    let mut ledger = Ledger::new(64);
    for (cell, kind) in kinds.chars().enumerate() {
        let (modality, image) = match kind {
            'V' => (Modality::Vision, Some(0)),
            'W' => (Modality::Vision, Some(1)),
            _ => (Modality::Text, None),
        };
        ledger
            .insert(cell as Cell, cell as Pos, modality, image)
            .unwrap();
    }
    look(&mut ledger, attention);
    ledger
}

fn look(ledger: &mut Ledger, attention: &[f32]) {
    let (sum, max) = (attention.to_vec(), attention.to_vec());
    let queries = vec![ledger.newest().unwrap()];
    let seen = Observation {
        sum,
        max,
        queries,
        ..Observation::default()
    };
    ledger.observe(&seen, 1.0).unwrap();
}

fn options() -> PolicyOptions {
    let dap = None;
    PolicyOptions {
        dap,
        sinks: 0,
        recent: 0,
        hysteresis: 0.0,
        ..PolicyOptions::default()
    }
}

fn with_dap(rule: DapRule, alpha: Option<f64>, scope: Scope) -> PolicyOptions {
    PolicyOptions {
        dap: Some(DapOptions { rule, alpha, scope }),
        ..options()
    }
}

/// `cells` live ones and a bin.
fn with_budget(cells: usize, bin_size: usize) -> PolicyOptions {
    PolicyOptions {
        kv_budget: Some(Amount::Cells(cells + bin_size)),
        bin_size,
        ..options()
    }
}

fn prefill(options: &PolicyOptions, ledger: &Ledger) -> Plan {
    let mut plan = Plan::default();
    let mut policy = create("hae", options, LIMITS).unwrap();
    policy.prune(ledger, Held::of(ledger), &mut plan).unwrap();
    policy.after_prefill(ledger, &mut plan).unwrap();
    plan.evict.sort_unstable();
    plan
}

fn sorted(mut cells: Vec<Cell>) -> Vec<Cell> {
    cells.sort_unstable();
    cells
}

#[test]
fn unknown_names_list_the_known_ones() {
    let error = create("lru", &options(), LIMITS).err().unwrap();
    assert_eq!(
        error.to_string(),
        "`kv_policy`: \"lru\", expected one of full, hae, dap, ddes, random, random_visual, \
         streaming_llm, context_shift, h2o, tova, snapkv, fastv, mustdrop"
    );
    assert!(names().all(|name| create(name, &options(), LIMITS).unwrap().name() == name));
}

#[test]
fn what_is_observed() {
    let observe = |options: &PolicyOptions| create("hae", options, LIMITS).unwrap().observe();
    assert_eq!(observe(&options()), Observe::Nothing);
    let all = Observe::Layers {
        layers: vec![0, 1],
        queries: Queries::Last,
    };
    assert_eq!(observe(&PolicyOptions::default()), all);
    let first = Observe::Layers {
        layers: vec![0],
        queries: Queries::All,
    };
    assert_eq!(observe(&PolicyOptions::paper()), first);
    assert_eq!(
        create("full", &options(), LIMITS).unwrap().observe(),
        Observe::Nothing
    );
    // DAP alone decides nothing while decoding.
    let decoding = |o: &PolicyOptions| create("hae", o, LIMITS).unwrap().observes_decoding();
    assert!(!decoding(&PolicyOptions::default()));
    assert!(decoding(&with_budget(30, 2)));
}

#[test]
fn dap_thresholds() {
    let ledger = cache("TVVVVT", &[0.0, 0.1, 0.4, 0.2, 0.1, 0.2]);
    // Mean 0.2, sum 0.8.
    let evicted = |rule, alpha| prefill(&with_dap(rule, alpha, Scope::Turn), &ledger).evict;
    assert_eq!(evicted(DapRule::Tau(0.75), None), [1, 4]);
    assert_eq!(evicted(DapRule::Tau(1.5), None), [1, 3, 4]);
    assert_eq!(evicted(DapRule::R(0.1875), None), [1, 4]);
    assert_eq!(evicted(DapRule::Tau(1.5), Some(0.15)), [1, 4]);
    assert_eq!(evicted(DapRule::Tau(0.0), None), NONE);
}

#[test]
fn dap_budgets() {
    let ledger = cache("TVVVVT", &[0.0, 0.1, 0.4, 0.2, 0.1, 0.2]);
    let evicted = |keep| prefill(&with_dap(DapRule::Keep(keep), None, Scope::Turn), &ledger).evict;
    assert_eq!(evicted(Amount::Share(0.5)), [1, 4]);
    assert_eq!(evicted(Amount::Cells(3)), [1], "of equals the older goes");
    assert_eq!(evicted(Amount::Cells(9)), NONE);
    assert_eq!(evicted(Amount::Share(0.01)), [1, 3, 4], "one stays");
}

/// Scores that are spread over 0.64 / 0.22 = 2.9 tokens.
#[test]
fn dap_by_spread() {
    let spread = |factor, scope| {
        with_dap(
            DapRule::Spread {
                times: factor,
                least: Amount::Cells(0),
            },
            None,
            scope,
        )
    };
    let ledger = cache("TVVVVT", &[0.0, 0.1, 0.4, 0.2, 0.1, 0.2]);
    let evicted = |factor| prefill(&spread(factor, Scope::Turn), &ledger).evict;
    assert_eq!(evicted(1.0), [1], "of equals the older goes");
    assert_eq!(evicted(0.75), [1, 4]);
    assert_eq!(evicted(0.0), [1, 3, 4], "one stays");
    assert_eq!(evicted(1.25), NONE);
    assert_eq!(evicted(f64::MAX), NONE);
    let floored = |least| {
        let rule = DapRule::Spread { times: 0.75, least };
        prefill(&with_dap(rule, None, Scope::Turn), &ledger).evict
    };
    assert_eq!(floored(Amount::Share(0.25)), [1, 4], "one would do");
    assert_eq!(floored(Amount::Cells(3)), [1]);
    assert_eq!(floored(Amount::Share(1.0)), NONE);
    let evicted =
        |attention: &[f32], scope| prefill(&spread(1.0, scope), &cache("VVTWWT", attention)).evict;
    let alike = [0.1, 0.1, 0.0, 0.1, 0.1, 0.5];
    assert_eq!(evicted(&alike, Scope::Turn), NONE);
    assert_eq!(
        evicted(&[0.0; 6], Scope::Turn),
        NONE,
        "nothing was looked at"
    );
    let one = [0.001, 0.001, 0.0, 0.001, 0.9, 0.0];
    assert_eq!(evicted(&one, Scope::Turn), [0, 1, 3]);
    assert_eq!(
        evicted(&one, Scope::Image),
        [3],
        "a picture that is faint all over stays"
    );
}

/// The budget is an upper bound, whatever the spread.
#[test]
fn dap_by_spread_under_a_budget() {
    let ledger = cache("TVVVVT", &[0.0, 0.1, 0.4, 0.2, 0.1, 0.2]);
    let evicted = |factor, cells| {
        let kv_budget = Some(Amount::Cells(cells));
        let spread = with_dap(
            DapRule::Spread {
                times: factor,
                least: Amount::Cells(0),
            },
            None,
            Scope::Turn,
        );
        let mut plan = Plan::default();
        let mut dap = create(
            "dap",
            &PolicyOptions {
                kv_budget,
                ..spread
            },
            LIMITS,
        )
        .unwrap();
        dap.prune(&ledger, Held::of(&ledger), &mut plan).unwrap();
        sorted(plan.evict)
    };
    assert_eq!(evicted(1.25, 4), [1, 4]);
    assert_eq!(evicted(1.0, 4), [1, 4]);
    assert_eq!(evicted(0.25, 4), [1, 3, 4]);
}

#[test]
fn dap_per_picture_or_per_turn() {
    let ledger = cache("VVTWWT", &[0.1, 0.2, 0.0, 0.3, 0.4, 0.0]);
    let half = DapRule::Keep(Amount::Share(0.5));
    assert_eq!(
        prefill(&with_dap(half, None, Scope::Turn), &ledger).evict,
        [0, 1]
    );
    assert_eq!(
        prefill(&with_dap(half, None, Scope::Image), &ledger).evict,
        [0, 3]
    );
    let tau = DapRule::Tau(0.9);
    assert_eq!(
        prefill(&with_dap(tau, None, Scope::Turn), &ledger).evict,
        [0, 1]
    );
    assert_eq!(
        prefill(&with_dap(tau, None, Scope::Image), &ledger).evict,
        [0, 3]
    );
}

#[test]
fn dap_judges_only_this_turn_and_what_was_seen() {
    let mut ledger = cache("VVT", &[0.1, 0.2, 0.0]);
    ledger.begin_turn();
    for (cell, modality) in [
        (3, Modality::Vision),
        (4, Modality::Vision),
        (5, Modality::Text),
    ] {
        ledger.insert(cell, cell as Pos, modality, Some(1)).unwrap();
    }
    let all = with_dap(DapRule::Tau(100.0), None, Scope::Turn);
    assert_eq!(
        prefill(&all, &ledger).evict,
        NONE,
        "no query has seen the second picture"
    );
    look(&mut ledger, &[0.1, 0.1, 0.1, 0.1, 0.2, 0.0]);
    assert_eq!(prefill(&all, &ledger).evict, [3, 4]);
    let guarded = PolicyOptions { recent: 2, ..all };
    assert_eq!(prefill(&guarded, &ledger).evict, [3]);
    // In the budget form what is protected counts as kept.
    let keep = with_dap(DapRule::Keep(Amount::Cells(1)), None, Scope::Turn);
    assert_eq!(
        prefill(&PolicyOptions { recent: 3, ..keep }, &ledger).evict,
        NONE
    );
}

#[test]
fn ddes_takes_visual_tokens_first_and_the_lowest() {
    let ledger = cache("TVTVVT", &[0.01, 0.3, 0.02, 0.1, 0.2, 0.0]);
    let plan = prefill(&with_budget(5, 4), &ledger);
    assert_eq!(
        (plan.bin.as_slice(), plan.evict.as_slice()),
        (&[3][..], &[][..])
    );
    let plan = prefill(&with_budget(2, 5), &ledger);
    assert_eq!(
        sorted(plan.bin),
        [0, 1, 3, 4],
        "text only when no visual token is left"
    );
    // More than a bin: whole bins go for good.
    let plan = prefill(&with_budget(2, 3), &ledger);
    assert_eq!(
        (plan.bin.as_slice(), plan.evict.as_slice()),
        (&[0][..], &[1, 3, 4][..])
    );
    let plan = prefill(&with_budget(2, 1), &ledger);
    assert_eq!(plan.evict, [0, 1, 3, 4]);
    // Sinks and the recent window stay.
    let guarded = PolicyOptions {
        sinks: 2,
        recent: 1,
        ..with_budget(4, 4)
    };
    assert_eq!(prefill(&guarded, &ledger).bin, [3, 4]);
}

#[test]
fn ddes_restores_what_earns_it() {
    let mut ledger = cache("TVVTTT", &[0.5, 0.1, 0.2, 0.05, 0.3, 0.0]);
    ledger.bin(1).unwrap();
    ledger.bin(3).unwrap();
    let step = |options: PolicyOptions, ledger: &Ledger| {
        let mut plan = Plan::default();
        let mut policy = create("hae", &options, LIMITS).unwrap();
        policy.after_prefill(ledger, &mut plan).unwrap();
        plan
    };
    let two = with_budget(4, 3);
    assert!(step(two.clone(), &ledger).is_empty());
    // Both binned tokens pass the lowest of their own kind: 0.8 > 0.2, and 0.45 > 0.3.
    look(&mut ledger, &[0.0, 0.7, 0.0, 0.4, 0.0, 0.0]);
    let plan = step(two.clone(), &ledger);
    assert_eq!(
        (plan.restore, plan.bin, plan.evict),
        (vec![3, 1], vec![4, 2], vec![])
    );
    // 0.45 does not exceed 0.3 by 60 percent.
    let stiff = PolicyOptions {
        hysteresis: 0.6,
        ..two.clone()
    };
    let plan = step(stiff, &ledger);
    assert_eq!((plan.restore, plan.bin), (vec![1], vec![2]));
    let plan = step(
        PolicyOptions {
            restore: false,
            ..two.clone()
        },
        &ledger,
    );
    assert!(plan.is_empty());
    // A larger budget takes binned tokens back, text first.
    let plan = step(with_budget(5, 3), &ledger);
    assert_eq!(plan.restore, [3, 1]);
    assert_eq!(plan.bin, [2], "the second one had to win its place");
}

#[test]
fn ddes_flushes_a_full_bin_at_once() {
    let mut ledger = cache("TVVVVT", &[0.5, 0.1, 0.2, 0.3, 0.4, 0.0]);
    ledger.bin(1).unwrap();
    ledger.bin(2).unwrap();
    let plan = prefill(&with_budget(3, 3), &ledger);
    assert_eq!(
        (plan.bin.as_slice(), plan.evict.as_slice()),
        (&[][..], &[1, 2, 3][..])
    );
}

#[test]
fn dap_and_ddes_add_up() {
    let ledger = cache("VVVVTT", &[0.1, 0.2, 0.3, 0.4, 0.5, 0.0]);
    let dap = with_dap(DapRule::Keep(Amount::Cells(3)), None, Scope::Turn).dap;
    let plan = prefill(
        &PolicyOptions {
            dap,
            ..with_budget(4, 3)
        },
        &ledger,
    );
    assert_eq!(
        (plan.evict.as_slice(), plan.bin.as_slice()),
        (&[0][..], &[1][..])
    );
}

#[test]
fn a_share_is_bounded_by_what_is_protected_and_by_the_context() {
    let ledger = cache("TTTTTTTTTT", &[0.1; 10]);
    let share = |share| PolicyOptions {
        kv_budget: Some(Amount::Share(share)),
        ..with_budget(1, 3)
    };
    // Half of 10 are 2 live ones and a bin of 3, of which 8 fill two.
    let plan = prefill(&share(0.5), &ledger);
    assert_eq!((plan.evict.len(), plan.bin.len()), (6, 2));
    let protected = PolicyOptions {
        sinks: 3,
        recent: 3,
        ..share(0.1)
    };
    let plan = prefill(&protected, &ledger);
    assert_eq!(plan.evict.len(), 3, "3 + 3 + 1 stay, the bin gets one cell");
    // A whole one is the prompt, with the bin on top.
    assert!(prefill(&share(1.0), &ledger).is_empty());
    let limits = Limits {
        n_layer: 1,
        n_cells: 12,
    };
    let mut plan = Plan::default();
    create("hae", &share(1.0), limits)
        .unwrap()
        .after_prefill(&ledger, &mut plan)
        .unwrap();
    assert_eq!(plan.bin.len(), 1, "9 live and a bin of 3");
}
