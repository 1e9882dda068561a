//! The policies against plain re-implementations that share nothing with them but the formulas.

use hae::cache::{Ledger, Modality, Pos, State};
use hae::controller::Controller;
use hae::engine::Observation;
use hae::engine::scripted::{Scripted, hashed};
use hae::generate::Session;
use hae::policy::{
    Amount, DapOptions, DapRule, Limits, Norm, Plan, PolicyOptions, Queries, Scope, create,
};
use proptest::prelude::*;

use crate::controller::{N_LAYER, Turn, prompt, turns};

fn new_session(options: &PolicyOptions, seed: u64, n_cells: usize, n_batch: usize) -> Session<Scripted> {
    let policy = create("hae", options, Limits { n_layer: N_LAYER, n_cells }).unwrap();
    let engine = Scripted::new(n_cells, n_batch).with_attention(move |q, k| hashed(seed, q, k));
    Session::new(engine, Controller::new(policy, n_cells))
}

/// Softmax attention of `query` to each of `keys`.
fn row(seed: u64, query: Pos, keys: &[Pos]) -> Vec<f64> {
    let weights: Vec<f64> = keys.iter().map(|&key| hashed(seed, query, key)).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// Whether each position of the prompt is visual, with the number of its segment.
fn layout(segments: &[(bool, usize)]) -> Vec<(bool, usize)> {
    let rows = segments.iter().enumerate();
    rows.flat_map(|(s, &(picture, n))| vec![(picture, s); n]).collect()
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
                is_query.push(true);
            }
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
        let mut session = new_session(&options, seed, 200, 7);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let kept: Vec<Pos> = session.engine.occupied().into_iter().map(|(_, pos)| pos).collect();

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

    /// d = 1 without restoring is the greedy policy: whenever one token is too many, the lowest
    /// goes.
    #[test]
    fn a_bin_of_one_is_greedy(
        budget in 8..40usize,
        segments in prop::collection::vec((any::<bool>(), 1..20usize), 1..5),
        answer in 0..120usize,
        per_query in any::<bool>(),
        decay in prop_oneof![Just(1.0), Just(0.9)],
        seed in any::<u64>(),
    ) {
        let options = PolicyOptions {
            norm: if per_query { Norm::PerQuery } else { Norm::Sum },
            decay,
            dap: None,
            kv_budget: Some(Amount::Cells(budget)),
            bin_size: 1,
            sinks: 2,
            recent: 3,
            restore: false,
            ..PolicyOptions::default()
        };
        let mut session = new_session(&options, seed, 300, 16);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();

        // (position, visual, sum, exposure)
        let rows = layout(&segments).into_iter().enumerate();
        let mut cache: Vec<_> = rows.map(|(i, (v, _))| (i as Pos, v, 0.0f32, 0.0f32)).collect();
        for step in 0..=answer {
            if step > 0 {
                session.step(3).unwrap();
                let next = cache.last().unwrap().0 + 1;
                cache.push((next, false, 0.0, 0.0));
            }
            let newest = cache.last().unwrap().0;
            let keys: Vec<Pos> = cache.iter().map(|token| token.0).collect();
            let decay = if step > 0 { decay as f32 } else { 1.0 };
            for (token, a) in cache.iter_mut().zip(row(seed, newest, &keys)) {
                token.2 = token.2 * decay + a as f32;
                token.3 = token.3 * decay + 1.0;
            }
            while cache.len() > budget {
                let score = |t: &(Pos, bool, f32, f32)| if per_query { t.2 / t.3 } else { t.2 };
                let worst = (0..cache.len())
                    .filter(|&i| cache[i].0 >= 2 && cache[i].0 <= newest - 3)
                    .min_by(|&i, &j| {
                        let by_kind = cache[j].1.cmp(&cache[i].1);
                        by_kind.then(score(&cache[i]).total_cmp(&score(&cache[j])))
                    });
                cache.remove(worst.unwrap());
            }
            let mut held: Vec<_> = session.engine.occupied().iter().map(|(_, pos)| *pos).collect();
            held.sort_unstable();
            prop_assert_eq!(held, cache.iter().map(|token| token.0).collect::<Vec<_>>());
        }
    }

    /// One DDES decision on any cache, against the rule applied one token at a time.
    #[test]
    fn ddes_equals_one_token_at_a_time(
        tokens in prop::collection::vec((any::<bool>(), 0..200u16, prop::bool::weighted(0.3)), 2..60),
        budget in 1..30usize,
        bin_size in 1..12usize,
        (sinks, recent) in (0..3usize, 0..3usize),
        hysteresis in prop_oneof![Just(0.0), Just(0.25)],
        restore in any::<bool>(),
    ) {
        let mut ledger = Ledger::new(64);
        for (i, (vision, ..)) in tokens.iter().enumerate() {
            let modality = if *vision { Modality::Vision } else { Modality::Text };
            // Cells in another order than positions, with holes.
            let cell = (i * 37 % 64) as u32;
            ledger.insert(cell, i as Pos, modality, None).unwrap();
        }
        let mut scores = vec![0.0; 64];
        for (i, (_, score, _)) in tokens.iter().enumerate() {
            scores[i * 37 % 64] = f32::from(*score) / 256.0;
        }
        let queries = vec![tokens.len() as Pos - 1];
        let seen = Observation { sum: scores.clone(), max: scores.clone(), queries };
        ledger.observe(&seen, 1.0).unwrap();
        let open = |i: usize| i >= sinks && i + recent.max(1) < tokens.len();
        let binnable = (0..tokens.len()).filter(|&i| tokens[i].2 && open(i));
        // Never a full bin to begin with, as after any step.
        for i in binnable.take(bin_size - 1) {
            ledger.bin((i * 37 % 64) as u32).unwrap();
        }
        let budget = budget + sinks + recent;
        let options = PolicyOptions {
            dap: None,
            kv_budget: Some(Amount::Cells(budget)),
            bin_size,
            sinks,
            recent,
            hysteresis,
            restore,
            ..PolicyOptions::default()
        };
        let mut plan = Plan::default();
        let mut policy = create("hae", &options, Limits { n_layer: 1, n_cells: 64 }).unwrap();
        policy.after_prefill(&ledger, &mut plan).unwrap();
        let mut controlled = ledger.clone();
        for &cell in &plan.evict {
            controlled.remove(cell).unwrap();
        }
        plan.restore.iter().for_each(|&cell| controlled.restore(cell).unwrap());
        plan.bin.iter().for_each(|&cell| controlled.bin(cell).unwrap());

        #[derive(Clone, Copy, PartialEq, Debug)]
        enum At { Live, Old, New, Gone }
        let cell = |i: usize| (i * 37 % 64) as u32;
        let score = |i: usize| f32::from(tokens[i].1) / 256.0;
        let mut at: Vec<At> = (0..tokens.len())
            .map(|i| match ledger.get(cell(i)).unwrap().state {
                State::Live => At::Live,
                State::Binned => At::Old,
            })
            .collect();
        let lowest = |at: &[At], vision| {
            (0..at.len())
                .filter(|&i| at[i] == At::Live && open(i) && tokens[i].0 == vision)
                .min_by(|&i, &j| score(i).total_cmp(&score(j)))
        };
        let best_old = |at: &[At], vision| {
            (0..at.len())
                .filter(|&i| at[i] == At::Old && tokens[i].0 == vision)
                .max_by(|&i, &j| score(i).total_cmp(&score(j)))
        };
        let live = |at: &[At]| at.iter().filter(|&&at| at == At::Live).count();
        while live(&at) > budget {
            let Some(i) = lowest(&at, true).or_else(|| lowest(&at, false)) else { break };
            at[i] = At::New;
        }
        while restore && live(&at) < budget {
            let Some(i) = best_old(&at, false).or_else(|| best_old(&at, true)) else { break };
            at[i] = At::Live;
        }
        // What has just come back for free competes no more, nor does it lose its place at once.
        let mut before: Vec<At> = at.clone();
        for (i, at) in before.iter_mut().enumerate() {
            if *at == At::Live && ledger.get(cell(i)).unwrap().state == State::Binned {
                *at = At::Gone;
            }
        }
        for vision in [true, false] {
            while let (true, Some(i), Some(j)) =
                (restore, best_old(&before, vision), lowest(&before, vision))
            {
                if score(i) <= score(j) * (1.0 + hysteresis as f32) {
                    break;
                }
                (at[i], at[j]) = (At::Live, At::New);
                (before[i], before[j]) = (At::Gone, At::Gone);
            }
        }
        let mut bin: Vec<usize> =
            (0..at.len()).filter(|&i| matches!(at[i], At::Old | At::New)).collect();
        bin.sort_by(|&i, &j| {
            tokens[j].0.cmp(&tokens[i].0).then(score(i).total_cmp(&score(j))).then(i.cmp(&j))
        });
        while bin.len() >= bin_size {
            bin.drain(..bin_size).for_each(|i| at[i] = At::Gone);
        }
        for (i, at) in at.iter().enumerate() {
            let expected = match at {
                At::Live => Some(State::Live),
                At::Old | At::New => Some(State::Binned),
                At::Gone => None,
            };
            prop_assert_eq!(controlled.get(cell(i)).map(|e| e.state), expected, "position {}", i);
        }
    }
}

/// What the paper's r amounts to: 0.86 of the mean for its 576 visual tokens, 3.8 for the 2,509
/// of a large Phi-3.5-vision picture.
#[test]
fn the_papers_threshold_as_a_share_of_the_mean() {
    let Some(DapOptions { rule: DapRule::R(r), .. }) = PolicyOptions::paper().dap else {
        panic!("the paper's form is r");
    };
    assert!((r * 576.0 - 0.864).abs() < 1e-12);
    assert!((r * 2509.0 - 3.7635).abs() < 1e-12);
    // One token in five gets 1.4 times the mean, the others 0.9: the same picture is kept whole or
    // dropped whole, by its number of tokens alone.
    for (n, kept) in [(575, 575), (2510, 0)] {
        let options = PolicyOptions { sinks: 0, recent: 0, ..PolicyOptions::paper() };
        let limits = Limits { n_layer: 1, n_cells: n + 1 };
        let policy = create("hae", &options, limits).unwrap();
        let engine = Scripted::new(n + 1, 512)
            .with_attention(|_, key| if key % 5 == 0 { 1.4 } else { 0.9 });
        let mut session = Session::new(engine, Controller::new(policy, n + 1));
        session.prefill(&prompt(&[(true, n), (false, 1)], 0), &|| false).unwrap();
        let counts = session.controller.ledger().counts();
        assert_eq!(counts.live.vision, kept, "of {n}");
    }
}
