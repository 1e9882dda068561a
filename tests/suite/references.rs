//! Scores and DAP against the formulas, written out over the whole attention matrix.

use hae::cache::Pos;
use hae::controller::Controller;
use hae::engine::scripted::Scripted;
use hae::generate::Session;
use hae::policy::{
    Amount, DapOptions, DapRule, Limits, Norm, PolicyOptions, Queries, Scope, create,
};
use proptest::prelude::*;

use crate::random::{Turn, layout, new_session, prompt, row, turns};

/// The positions that a prompt leaves in the cache.
fn kept_of(segments: &[(bool, usize)], options: &PolicyOptions, seed: u64) -> Vec<Pos> {
    let mut session = new_session(options, seed, 200, 7);
    session.prefill(&prompt(segments, 0), &|| false).unwrap();
    let occupied = session.engine.occupied().into_iter();
    occupied.map(|(_, pos)| pos).collect()
}

proptest! {
    /// Sums, maxima and exposure against the whole attention matrix, in batches of any size.
    #[test]
    fn scores_equal_the_full_matrix(
        turns in turns(),
        all in any::<bool>(),
        seed in any::<u64>(),
        n_batch in 1..12usize,
    ) {
        let queries = if all { Queries::All } else { Queries::Last };
        let n_cells = 1000;
        let kv_budget = Some(Amount::Cells(n_cells - 1));
        let options =
            PolicyOptions { queries, dap: None, kv_budget, bin_size: 1, ..PolicyOptions::default() };
        let mut session = new_session(&options, seed, n_cells, n_batch);
        let mut is_query = Vec::new();
        for (turn, (segments, answer)) in turns.iter().enumerate() {
            session.prefill(&prompt(segments, turn as u32), &|| false).unwrap();
            let rows = layout(segments);
            let last = rows.len() - 1;
            is_query.extend(rows.iter().enumerate().map(|(i, (vision, _))| match all {
                true => !vision,
                false => i == last,
            }));
            for _ in 0..*answer {
                session.step(3).unwrap();
            }
            is_query.extend(vec![true; *answer]);
        }
        let keys: Vec<Pos> = (0..is_query.len() as Pos).collect();
        let n = keys.len();
        let (mut sum, mut max, mut seen) = (vec![0.0; n], vec![0.0f64; n], vec![0.0; n]);
        for query in (0..n).filter(|&query| is_query[query]) {
            for (key, a) in row(seed, query as Pos, &keys[..=query]).into_iter().enumerate() {
                sum[key] += a;
                max[key] = max[key].max(a);
                seen[key] += 1.0;
            }
        }
        prop_assert_eq!(session.controller.ledger().entries().count(), n);
        for entry in session.controller.ledger().entries() {
            let i = entry.pos as usize;
            prop_assert_eq!(entry.seen, seen[i] as f32);
            prop_assert!((f64::from(entry.sum) - sum[i]).abs() <= 1e-5 * sum[i].max(1e-3));
            prop_assert!((f64::from(entry.max) - max[i]).abs() <= 1e-6);
            let score = f64::from(Norm::PerQuery.score(&entry));
            let expected = if seen[i] > 0.0 { sum[i] / seen[i] } else { f64::INFINITY };
            prop_assert!(score == expected || (score - expected).abs() <= 1e-5 * expected.max(1e-3));
        }
    }

    /// Threshold DAP against the formula, written out over the whole matrix.
    #[test]
    fn dap_equals_the_formula(
        turn in turns().prop_map(|turns| turns[0].clone()),
        threshold in 0.3..1.5f64,
        absolute in any::<bool>(),
        alpha in prop::option::of(0.01..0.2f64),
        per_query in any::<bool>(),
        scope in prop_oneof![Just(Scope::Turn), Just(Scope::Image)],
        seed in any::<u64>(),
    ) {
        let (segments, _): Turn = turn;
        let rows = layout(&segments);
        let rule = if absolute { DapRule::R(threshold / 20.0) } else { DapRule::Tau(threshold) };
        let options = PolicyOptions {
            queries: Queries::All,
            norm: if per_query { Norm::PerQuery } else { Norm::Sum },
            dap: Some(DapOptions { rule, alpha, scope }),
            sinks: 2,
            recent: 2,
            ..PolicyOptions::default()
        };
        let kept = kept_of(&segments, &options, seed);

        let keys: Vec<Pos> = (0..rows.len() as Pos).collect();
        let text: Vec<usize> = (0..rows.len()).filter(|&i| !rows[i].0).collect();
        let a: Vec<Vec<f64>> = text.iter().map(|&i| row(seed, i as Pos, &keys[..=i])).collect();
        let column = |j: usize| a.iter().filter_map(move |row| row.get(j));
        let g = |j: usize| {
            let exposure = if per_query { column(j).count() as f64 } else { 1.0 };
            column(j).sum::<f64>() / exposure
        };
        let m = |j: usize| column(j).fold(0.0, |max: f64, &a| max.max(a));
        for (j, &(vision, picture)) in rows.iter().enumerate() {
            let here = kept.contains(&(j as Pos));
            if !vision || j < 2 || j + 2 >= rows.len() {
                prop_assert!(here, "text, a sink or recent");
                continue;
            }
            let group: Vec<f64> = (0..rows.len())
                .filter(|&k| rows[k].0 && (scope == Scope::Turn || rows[k].1 == picture))
                .map(g)
                .collect();
            let total: f64 = group.iter().sum();
            let limit = match rule {
                DapRule::R(r) => r * total,
                _ => threshold * total / group.len() as f64,
            };
            let alpha = alpha.unwrap_or(f64::INFINITY);
            let borderline =
                (g(j) - limit).abs() < 1e-4 * limit || (m(j) - alpha).abs() < 1e-4 * alpha;
            prop_assert!(borderline || here != (g(j) < limit && m(j) < alpha), "position {}", j);
        }
    }

    /// DAP by spread against the formula: how many go, and that none of them beats one that stays.
    #[test]
    fn dap_by_spread_equals_the_formula(
        turn in turns().prop_map(|turns| turns[0].clone()),
        factor in 0.1..1.5f64,
        all in any::<bool>(),
        per_query in any::<bool>(),
        scope in prop_oneof![Just(Scope::Turn), Just(Scope::Image)],
        seed in any::<u64>(),
    ) {
        let (segments, _): Turn = turn;
        let rows = layout(&segments);
        let options = PolicyOptions {
            queries: if all { Queries::All } else { Queries::Last },
            norm: if per_query { Norm::PerQuery } else { Norm::Sum },
            dap: Some(DapOptions { rule: DapRule::Spread { times: factor, least: Amount::Cells(0) }, alpha: None, scope }),
            sinks: 2,
            recent: 2,
            ..PolicyOptions::default()
        };
        let kept = kept_of(&segments, &options, seed);

        let n = rows.len();
        let keys: Vec<Pos> = (0..n as Pos).collect();
        let asks = |i: &usize| if all { !rows[*i].0 } else { *i == n - 1 };
        let a: Vec<Vec<f64>> =
            (0..n).filter(asks).map(|i| row(seed, i as Pos, &keys[..=i])).collect();
        let g = |j: usize| {
            let column: Vec<f64> = a.iter().filter_map(|row| row.get(j)).copied().collect();
            column.iter().sum::<f64>() / if per_query { column.len() as f64 } else { 1.0 }
        };
        let mut pictures: Vec<_> = rows.iter().filter(|row| row.0).map(|row| row.1).collect();
        pictures.dedup();
        if scope == Scope::Turn {
            pictures.truncate(1);
        }
        let mut gone = 0;
        for picture in pictures {
            let group: Vec<usize> = (0..n)
                .filter(|&j| rows[j].0 && (scope == Scope::Turn || rows[j].1 == picture))
                .collect();
            let sum: f64 = group.iter().map(|&j| g(j)).sum();
            let squares: f64 = group.iter().map(|&j| g(j).powi(2)).sum();
            let keep = factor * sum.powi(2) / squares;
            prop_assume!((keep.fract() - 0.5).abs() > 1e-3);
            let open = group.iter().filter(|&&j| j >= 2 && j + 2 < n);
            let (stay, go): (Vec<usize>, Vec<usize>) =
                open.partition(|&&j| kept.contains(&(j as Pos)));
            let leave = group.len().saturating_sub((keep.round() as usize).max(1));
            prop_assert_eq!(go.len(), leave.min(stay.len() + go.len()));
            for (&i, &j) in go.iter().flat_map(|i| stay.iter().map(move |j| (i, j))) {
                prop_assert!(g(i) <= g(j) * (1.0 + 1e-5), "{} went, {} stayed", i, j);
            }
            gone += go.len();
        }
        prop_assert_eq!(kept.len(), n - gone, "nothing else goes");
    }

    /// r is tau over the number of visual tokens.
    #[test]
    fn r_is_tau_by_the_number_of_tokens(n in 1..300usize, r in 0.0..0.02f64, seed in any::<u64>()) {
        let evicted = |rule| {
            let dap = Some(DapOptions { rule, alpha: None, scope: Scope::Image });
            let options = PolicyOptions { dap, ..PolicyOptions::paper() };
            let mut session = new_session(&options, seed, 400, 64);
            session.prefill(&prompt(&[(false, 5), (true, n), (false, 20)], 0), &|| false).unwrap();
            session.engine.occupied()
        };
        prop_assert_eq!(evicted(DapRule::R(r)), evicted(DapRule::Tau(r * n as f64)));
    }
}

/// What the paper's r amounts to: 0.86 of the mean for its 576 visual tokens, 3.8 for the 2,509
/// of a large Phi-3.5-vision picture.
#[test]
fn the_papers_threshold_as_a_share_of_the_mean() {
    let Some(DapOptions {
        rule: DapRule::R(r),
        ..
    }) = PolicyOptions::paper().dap
    else {
        panic!("the paper's form is r");
    };
    assert!((r * 576.0 - 0.864).abs() < 1e-12);
    assert!((r * 2509.0 - 3.7635).abs() < 1e-12);
    // One token in five gets 1.4 times the mean, the others 0.9: the same picture is kept whole or
    // dropped whole, by its number of tokens alone.
    for (n, kept) in [(575, 575), (2510, 0)] {
        let options = PolicyOptions {
            sinks: 0,
            recent: 0,
            kv_budget: None,
            ..PolicyOptions::paper()
        };
        let limits = Limits {
            n_layer: 1,
            n_cells: n + 1,
        };
        let policy = create("hae", &options, limits).unwrap();
        let engine =
            Scripted::new(n + 1, 512).with_attention(|_, key| if key % 5 == 0 { 1.4 } else { 0.9 });
        let mut session = Session::new(engine, Controller::new(policy, n + 1));
        session
            .prefill(&prompt(&[(true, n), (false, 1)], 0), &|| false)
            .unwrap();
        let counts = session.controller.ledger().counts();
        assert_eq!(counts.live.vision, kept, "of {n}");
    }
}
