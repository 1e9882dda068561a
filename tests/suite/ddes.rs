//! DDES against plain re-implementations that share nothing with it but the rules.

use hae::cache::{Ledger, Modality, Pos, State};
use hae::engine::Observation;
use hae::policy::{Amount, Limits, Norm, Plan, PolicyOptions, create};
use proptest::prelude::*;

use crate::random::{layout, new_session, prompt, row};

proptest! {
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
            kv_budget: Some(Amount::Cells(budget + 1)),
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
        let seen = Observation { sum: scores.clone(), max: scores.clone(), queries, ..Observation::default() };
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
            kv_budget: Some(Amount::Cells(budget + bin_size)),
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
