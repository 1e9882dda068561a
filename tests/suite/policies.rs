//! Every policy against a plain re-implementation that shares nothing with it but the rules, and
//! what must hold for all of them.

use std::collections::BTreeSet;

use hae::cache::Pos;
use hae::controller::Controller;
use hae::engine::scripted::{Call, Scripted, hashed};
use hae::generate::Session;
use hae::policy::{
    self, Amount, DapOptions, DapRule, Limits, Norm, PolicyOptions, Pooling, Scope, SnapkvOptions,
};
use proptest::prelude::*;

use crate::random::{N_LAYER, assert_in_step, layout, prompt, row};

const N_CELLS: usize = 400;

fn session(name: &str, options: &PolicyOptions, seed: u64) -> Session<Scripted> {
    let limits = Limits {
        n_layer: N_LAYER,
        n_cells: N_CELLS,
    };
    let policy = policy::create(name, options, limits).unwrap();
    let engine = Scripted::new(N_CELLS, 64).with_attention(move |q, k| hashed(seed, q, k));
    Session::new(engine, Controller::new(policy, N_CELLS))
}

fn held(session: &Session<Scripted>) -> Vec<Pos> {
    let mut held: Vec<Pos> = session.engine.occupied().iter().map(|c| c.1).collect();
    held.sort_unstable();
    held
}

/// A token of the plain re-implementation, with what queries have paid it.
#[derive(Clone, Debug)]
struct Token {
    pos: Pos,
    visual: bool,
    sum: f32,
    latest: f32,
    max: f32,
}

/// The cache as a list by position.
struct Plain {
    tokens: Vec<Token>,
    seed: u64,
}

impl Plain {
    /// A prompt that went in segment by segment, seen by the rows that `asks` wants, of (segment,
    /// row of the prompt, visual).
    fn prompt(
        segments: &[(bool, usize)],
        seed: u64,
        asks: impl Fn(usize, usize, bool) -> bool,
    ) -> Self {
        let rows = layout(segments);
        let token = |(pos, &(visual, _)): (usize, &(bool, usize))| Token {
            pos: pos as Pos,
            visual,
            sum: 0.0,
            latest: 0.0,
            max: 0.0,
        };
        let mut plain = Plain {
            tokens: rows.iter().enumerate().map(token).collect(),
            seed,
        };
        for segment in 0..segments.len() {
            // Sums are formed by segment, as the engine forms them by batch, so that they round
            // alike.
            let mut sums = vec![0.0f32; rows.len()];
            for (query, &(visual, of)) in rows.iter().enumerate() {
                if of != segment || !asks(segment, query, visual) {
                    continue;
                }
                let keys: Vec<Pos> = (0..=query as Pos).collect();
                for (i, a) in row(seed, query as Pos, &keys).into_iter().enumerate() {
                    sums[i] += a as f32;
                    plain.tokens[i].max = plain.tokens[i].max.max(a as f32);
                }
            }
            for (token, sum) in plain.tokens.iter_mut().zip(sums) {
                token.sum += sum;
                token.latest += sum;
            }
        }
        plain
    }

    fn step(&mut self) {
        let pos = self.tokens.last().unwrap().pos + 1;
        let new = Token {
            pos,
            visual: false,
            sum: 0.0,
            latest: 0.0,
            max: 0.0,
        };
        self.tokens.push(new);
        let keys: Vec<Pos> = self.tokens.iter().map(|t| t.pos).collect();
        for (token, a) in self.tokens.iter_mut().zip(row(self.seed, pos, &keys)) {
            token.latest = a as f32;
            token.sum += a as f32;
        }
    }

    /// Removes the token with the lowest key among those that `open` lets go, one by one, until
    /// `most` are left or none may go.
    fn bring_down(
        &mut self,
        most: usize,
        open: impl Fn(&Token, Pos) -> bool,
        key: impl Fn(&Token) -> f32,
    ) {
        let newest = self.tokens.last().unwrap().pos;
        while self.tokens.len() > most {
            let candidates = (0..self.tokens.len()).filter(|&i| open(&self.tokens[i], newest));
            let lowest =
                candidates.min_by(|&i, &j| key(&self.tokens[i]).total_cmp(&key(&self.tokens[j])));
            let Some(lowest) = lowest else { return };
            self.tokens.remove(lowest);
        }
    }

    fn held(&self) -> Vec<Pos> {
        self.tokens.iter().map(|t| t.pos).collect()
    }

    fn visual(&self) -> usize {
        self.tokens.iter().filter(|t| t.visual).count()
    }
}

fn segments() -> impl Strategy<Value = Vec<(bool, usize)>> {
    let segment = (any::<bool>(), 1..30usize);
    prop::collection::vec(segment, 1..5).prop_map(|mut segments| {
        segments.push((false, 1 + segments.len()));
        segments
    })
}

fn rows(segments: &[(bool, usize)]) -> usize {
    segments.iter().map(|s| s.1).sum()
}

fn with_budget(cells: usize) -> PolicyOptions {
    PolicyOptions {
        kv_budget: Some(Amount::Cells(cells)),
        sinks: 2,
        recent: 3,
        ..PolicyOptions::default()
    }
}

proptest! {
    #[test]
    fn streaming_llm_is_sinks_and_a_window(
        segments in segments(), budget in 8..50usize, answer in 0..60usize,
    ) {
        let mut session = session("streaming_llm", &with_budget(budget), 1);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        for step in 0..=answer {
            if step > 0 {
                session.step(3).unwrap();
            }
            let all = (rows(&segments) + step) as Pos;
            let window = (budget - 1 - 2) as Pos;
            let expected: Vec<Pos> =
                (0..all).filter(|&pos| pos < 2 || pos >= all - window).collect();
            prop_assert_eq!(held(&session), expected);
        }
    }

    #[test]
    fn h2o_drops_the_lowest_sum_of_all_queries(
        segments in segments(), budget in 8..50usize, answer in 0..60usize, seed in any::<u64>(),
        recent in prop_oneof![(1..9usize).prop_map(Amount::Cells), Just(Amount::Share(0.5))],
    ) {
        let options = PolicyOptions { h2o_recent: recent, ..with_budget(budget) };
        let mut session = session("h2o", &options, seed);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let mut plain = Plain::prompt(&segments, seed, |_, _, _| true);
        let window = match recent {
            Amount::Cells(n) => n.min(budget - 4),
            Amount::Share(_) => ((budget as f64 * 0.5).round() as usize).min(budget - 4),
        };
        for step in 0..=answer {
            if step > 0 {
                session.step(3).unwrap();
                plain.step();
            }
            let open = |t: &Token, newest: Pos| t.pos >= 2 && t.pos <= newest - window as Pos;
            plain.bring_down(budget - 1, open, |t| t.sum);
            prop_assert_eq!(held(&session), plain.held());
        }
    }

    #[test]
    fn tova_drops_what_the_newest_query_looks_at_least(
        segments in segments(), budget in 3..50usize, answer in 0..60usize, seed in any::<u64>(),
    ) {
        let mut session = session("tova", &with_budget(budget), seed);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let last = rows(&segments) - 1;
        let mut plain = Plain::prompt(&segments, seed, |_, row, _| row == last);
        for step in 0..=answer {
            if step > 0 {
                session.step(3).unwrap();
                plain.step();
            }
            plain.bring_down(budget - 1, |t, newest| t.pos != newest, |t| t.latest);
            prop_assert_eq!(held(&session), plain.held());
        }
    }

    #[test]
    fn snapkv_keeps_the_best_neighbourhoods_and_the_window(
        segments in segments(), budget in 4..60usize, answer in 0..10usize, seed in any::<u64>(),
        window in 1..40usize, half in 0..4usize, max in any::<bool>(),
    ) {
        let kernel = 2 * half + 1;
        let pooling = if max { Pooling::Max } else { Pooling::Avg };
        let snapkv = SnapkvOptions { window, kernel, pooling };
        let options = PolicyOptions { snapkv, ..with_budget(budget) };
        let mut session = session("snapkv", &options, seed);
        session.expect(answer);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let n = rows(&segments);
        let mut plain = Plain::prompt(&segments, seed, |_, row, _| row + window >= n);
        let room = budget.saturating_sub(answer).max(2);
        if n > room {
            let kept_window = window.min(room / 2);
            let before = n - kept_window;
            let score = |i: usize| {
                let near = (0..before).filter(|j| i.abs_diff(*j) <= half);
                let scores = near.map(|j| plain.tokens[j].latest);
                match max {
                    true => scores.fold(0.0, f32::max),
                    false => scores.sum::<f32>() / kernel as f32,
                }
            };
            let mut order: Vec<usize> = (0..before).collect();
            order.sort_by(|&i, &j| score(i).total_cmp(&score(j)));
            let gone: BTreeSet<usize> = order.into_iter().take(n - room).collect();
            plain.tokens.retain(|t| !gone.contains(&(t.pos as usize)));
        }
        prop_assert_eq!(held(&session), plain.held());
        for _ in 0..answer {
            session.step(3).unwrap();
            plain.step();
        }
        prop_assert_eq!(held(&session), plain.held());
        prop_assert!(plain.tokens.len() <= budget.max(2 + answer));
    }

    #[test]
    fn fastv_keeps_what_the_last_token_looks_at(
        segments in segments(), seed in any::<u64>(), answer in 0..10usize,
        budget in prop::option::of(3..60usize), keep in prop::option::of(1..30usize),
    ) {
        let rule = keep.map_or(DapRule::Auto, |keep| DapRule::Keep(Amount::Cells(keep)));
        let dap = Some(DapOptions { rule, alpha: None, scope: Scope::Turn });
        let kv_budget = Some(budget.map_or(Amount::Share(1.0), Amount::Cells));
        let options = PolicyOptions { dap, kv_budget, ..PolicyOptions::default() };
        let mut session = session("fastv", &options, seed);
        session.expect(answer);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let last = rows(&segments) - 1;
        let mut plain = Plain::prompt(&segments, seed, |_, row, _| row == last);
        let visual = plain.visual();
        let text = plain.tokens.len() - visual;
        let kept = match (keep, budget) {
            (Some(keep), _) => keep,
            (None, Some(_)) => visual,
            (None, None) => (0.5 * visual as f64).round() as usize,
        };
        let room = budget.map_or(usize::MAX, |budget| budget.saturating_sub(answer));
        let kept = kept.min(room.saturating_sub(text)).max(1);
        plain.bring_down(text + kept, |t, _| t.visual, |t| t.latest);
        prop_assert_eq!(held(&session), plain.held());
    }

    #[test]
    fn mustdrop_drops_what_is_low_on_both_counts(
        segments in segments(), seed in any::<u64>(),
        threshold in 0.0..0.1f64, alpha in 0.0..0.3f64,
        how in 0..4usize, amount in 1..40usize,
    ) {
        let (rule, kv_budget) = match how {
            0 => (DapRule::R(threshold), Amount::Share(1.0)),
            1 => (DapRule::Auto, Amount::Cells(amount + 2)),
            3 => (DapRule::Spread { times: threshold * 20.0, least: Amount::Cells(0) }, Amount::Cells(amount + 2)),
            _ => (DapRule::Tau(threshold * 20.0), Amount::Cells(amount + 2)),
        };
        // A number of tokens takes no alpha; the policy's own remains.
        let given = (how < 3).then_some(alpha);
        let alpha = given.unwrap_or(0.001);
        let dap = Some(DapOptions { rule, alpha: given, scope: Scope::Turn });
        let kv_budget = Some(kv_budget);
        let options = PolicyOptions { dap, kv_budget, ..PolicyOptions::default() };
        let mut session = session("mustdrop", &options, seed);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let mut plain = Plain::prompt(&segments, seed, |_, _, visual| !visual);
        // A picture behind all text was seen by nobody; the last segment is text here.
        let n = plain.visual();
        let total: f64 = plain.tokens.iter().filter(|t| t.visual).map(|t| f64::from(t.sum)).sum();
        let limit = match rule {
            DapRule::R(r) => r * total,
            DapRule::Tau(tau) => tau * total / n.max(1) as f64,
            _ => 0.0,
        };
        let low = |t: &Token| f64::from(t.max) < alpha;
        plain.tokens.retain(|t| !(t.visual && f64::from(t.sum) < limit && low(t)));
        if how > 0 {
            let text = plain.tokens.len() - plain.visual();
            let mut most = (amount + 2).max(text + plain.visual().min(1));
            if let DapRule::Spread { times: factor, .. } = rule {
                let scores = || plain.tokens.iter().filter(|t| t.visual).map(|t| f64::from(t.sum));
                let squares: f64 = scores().map(|s| s * s).sum();
                let keep = factor * scores().sum::<f64>().powi(2) / squares;
                prop_assume!((keep.fract() - 0.5).abs() > 1e-3 || squares == 0.0);
                most = most.min(text + (keep.round() as usize).clamp(1, n.max(1)).min(n));
            }
            plain.bring_down(most, |t, _| t.visual && low(t), |t| t.sum);
            plain.bring_down(most, |t, _| t.visual, |t| t.sum);
        }
        prop_assert_eq!(held(&session), plain.held());
    }

    /// `dap` under a budget: the best visual tokens by mean attention per query, as many as fit
    /// beside the text and the tokens to come.
    #[test]
    fn dap_under_a_budget_fills_it(
        segments in segments(), seed in any::<u64>(), budget in 7..80usize, answer in 0..10usize,
    ) {
        let mut session = session("dap", &with_budget(budget), seed);
        session.expect(answer);
        session.prefill(&prompt(&segments, 0), &|| false).unwrap();
        let last = rows(&segments) - 1;
        let mut plain = Plain::prompt(&segments, seed, |_, row, _| row == last);
        let text = plain.tokens.len() - plain.visual();
        let most = budget.saturating_sub(answer).max(text + plain.visual().min(1));
        let open = |t: &Token, newest: Pos| t.visual && t.pos >= 2 && t.pos <= newest - 3;
        plain.bring_down(most, open, |t| t.latest);
        prop_assert_eq!(held(&session), plain.held());
    }

    /// llama.cpp's rule, spelled out on a list of what position each cell's token has.
    #[test]
    fn context_shift_halves_what_is_not_kept(
        n_prompt in 2..60usize, budget in 8..50usize, answer in 0..80usize, n_keep in 0..5usize,
    ) {
        let options = PolicyOptions { sinks: n_keep, ..with_budget(budget) };
        let mut session = session("context_shift", &options, 1);
        session.prefill(&prompt(&[(false, n_prompt)], 0), &|| false).unwrap();
        // The tokens by their order of arrival.
        let mut tokens: Vec<usize> = (0..n_prompt).collect();
        for step in 0..=answer {
            if step > 0 {
                session.step(3).unwrap();
                tokens.push(n_prompt + step - 1);
            }
            while tokens.len() + 1 >= budget {
                let n_discard = (tokens.len() - n_keep) / 2;
                tokens.drain(n_keep..n_keep + n_discard);
            }
            prop_assert_eq!(held(&session), (0..tokens.len() as Pos).collect::<Vec<_>>());
            assert_in_step(&session);
        }
        let evicted = session.controller.ledger().counts().evicted.text;
        prop_assert_eq!(evicted + tokens.len(), n_prompt + answer);
    }

    /// What `--kv-budget` promises, whatever the policy.
    #[test]
    fn no_policy_exceeds_its_budget(
        segments in segments(), seed in any::<u64>(), answer in 0..60usize,
        cells in 0..60usize, share in prop::option::of(0.2..0.9f64), bin_size in 1..40usize,
        per_query in any::<bool>(),
    ) {
        let n = rows(&segments);
        for name in policy::names().filter(|name| *name != "full") {
            let (budget, amount) = match share {
                Some(share) => ((share * n as f64).round() as usize, Amount::Share(share)),
                None => (cells + 8, Amount::Cells(cells + 8)),
            };
            // Sinks, recent window, one more, and the next token.
            let least = match name {
                "hae" | "dap" | "ddes" | "random" | "random_visual" => 2 + 3 + 2,
                "streaming_llm" | "h2o" | "context_shift" => 2 + 1 + 2,
                _ => 1 + 2,
            };
            let budget = budget.max(least);
            let norm = if per_query { Norm::PerQuery } else { Norm::Sum };
            let options = PolicyOptions {
                kv_budget: Some(amount), bin_size, norm, seed, ..with_budget(0)
            };
            let mut session = session(name, &options, seed);
            session.expect(answer);
            session.prefill(&prompt(&segments, 0), &|| false).unwrap();
            let positions = |session: &Session<Scripted>| session.controller.next_pos();
            for _ in 0..answer {
                let before = positions(&session);
                session.step(3).unwrap();
                let held = held(&session);
                prop_assert_eq!(held.last().copied(), Some(positions(&session) - 1));
                if name != "context_shift" {
                    prop_assert_eq!(positions(&session), before + 1);
                }
                assert_in_step(&session);
            }
            let has_sinks = !["tova", "snapkv", "fastv", "mustdrop"].contains(&name);
            prop_assert!(!has_sinks || held(&session)[..2] == [0, 1], "{}", name);
            let peak = session.controller.report().peak_decoding;
            let decodes = ["hae", "ddes", "random", "random_visual", "streaming_llm",
                "context_shift", "h2o", "tova"];
            if decodes.contains(&name) {
                prop_assert!(peak <= budget, "{} took {} of {}", name, peak, budget);
                // All that may be taken is, but for the half that a shift discards.
                let full = n + answer > budget && answer > bin_size;
                prop_assert!(!full || name == "context_shift" || peak == budget, "{} {}", name, peak);
            } else {
                // Visual tokens alone may go, and something of a picture stays; snapkv keeps two.
                let text: usize = segments.iter().filter(|s| !s.0).map(|s| s.1).sum();
                let protected = 6 + answer;
                let least = if name == "snapkv" { 2 } else { text + protected };
                prop_assert!(peak <= budget.max(least + answer), "{} {}", name, peak);
            }
        }
    }
}

/// Sinks of every policy that has them, and pictures before text where that is the rule.
#[test]
fn pictures_pay_first() {
    let prompt = prompt(&[(false, 6), (true, 100), (false, 10)], 0);
    for name in ["hae", "ddes", "random_visual", "dap", "fastv", "mustdrop"] {
        let options = PolicyOptions {
            recent: 4,
            bin_size: 8,
            ..with_budget(46)
        };
        let mut session = session(name, &options, 9);
        session.expect(20);
        session.prefill(&prompt, &|| false).unwrap();
        for _ in 0..20 {
            session.step(3).unwrap();
        }
        let counts = session.controller.ledger().counts();
        assert_eq!(counts.evicted.text, 0, "{name}");
        assert_eq!(session.controller.report().peak_decoding, 46, "{name}");
    }
}

#[test]
fn a_whole_budget_prunes_no_prompt() {
    let prompt = prompt(&[(false, 40)], 0);
    for name in policy::names() {
        let mut session = session(name, &PolicyOptions::default(), 3);
        session.prefill(&prompt, &|| false).unwrap();
        let evicted = session.controller.ledger().counts().evicted.total();
        // The next token needs a cell where the budget is kept while decoding.
        let greedy = ["random", "random_visual", "streaming_llm", "h2o", "tova"];
        assert_eq!(evicted, usize::from(greedy.contains(&name)), "{name}");
    }
}

#[test]
fn lots_are_reproducible_and_fair() {
    // One of 20 tokens has to go.
    let drawn = |name: &str, segments: &[(bool, usize)], seed: u64| {
        let options = PolicyOptions {
            kv_budget: Some(Amount::Cells(20)),
            sinks: 2,
            recent: 3,
            seed,
            ..PolicyOptions::default()
        };
        let mut session = session(name, &options, 0);
        session.prefill(&prompt(segments, 0), &|| false).unwrap();
        let removed = session.engine.calls.iter().find_map(|call| match call {
            Call::Remove(ranges) => Some(ranges[0].start),
            _ => None,
        });
        (removed.unwrap(), held(&session))
    };
    let text = [(false, 20)];
    let mixed = [(false, 5), (true, 8), (false, 7)];
    for (name, segments, open) in [
        ("random", &text[..], 2..17),
        ("random", &mixed, 2..17),
        ("random_visual", &mixed, 5..13),
        ("random_visual", &text, 2..17),
    ] {
        let mut times = [0usize; 20];
        let draws = 3000;
        for seed in 0..draws {
            let (pos, held) = drawn(name, segments, seed);
            assert_eq!((pos, held), drawn(name, segments, seed));
            times[pos as usize] += 1;
        }
        let expected = draws as f64 / open.len() as f64;
        // Five standard deviations of a binomial count.
        let bound = 5.0 * (expected * (1.0 - 1.0 / open.len() as f64)).sqrt();
        for (pos, &times) in times.iter().enumerate() {
            let fair = match open.contains(&(pos as i32)) {
                true => (times as f64 - expected).abs() <= bound,
                false => times == 0,
            };
            assert!(fair, "{name}: position {pos} went {times} times of {draws}");
        }
    }
}

#[test]
fn parameters_name_what_decides() {
    let limits = Limits {
        n_layer: 24,
        n_cells: 64,
    };
    for name in policy::names().filter(|name| *name != "full") {
        let options = PolicyOptions {
            kv_budget: Some(Amount::Cells(40)),
            ..PolicyOptions::default()
        };
        let policy = policy::create(name, &options, limits).unwrap();
        assert_eq!(policy.name(), name);
        assert!(policy.evicts());
        assert_eq!(policy.params()["kv_budget"]["cells"], 40, "{name}");
        let refused = |options: &PolicyOptions| {
            let error = policy::create(name, options, limits).err();
            error.unwrap_or_else(|| panic!("{name}")).to_string()
        };
        for (amount, reason) in [
            (Amount::Cells(65), "65 cells, but the context holds 64"),
            (Amount::Cells(2), "`kv_budget`: 2 cells, expected at least"),
            (Amount::Cells(0), "`kv_budget`: 0 cells"),
            (Amount::Share(1.5), "`kv_budget`: a share of 1.5"),
        ] {
            let line = refused(&PolicyOptions {
                kv_budget: Some(amount),
                ..PolicyOptions::default()
            });
            assert!(line.contains(reason), "{name}: {line}");
        }
    }
    let layers = |name: &str| {
        let policy = policy::create(name, &PolicyOptions::default(), limits).unwrap();
        policy.params()["layers"].clone()
    };
    assert_eq!(layers("fastv"), serde_json::json!([1]));
    assert_eq!(layers("mustdrop"), serde_json::json!([2, 6, 10, 14]));
    for (window, kernel, flag) in [(0, 5, "`snapkv_window`"), (4, 2, "`snapkv_kernel`")] {
        let mut options = PolicyOptions::default();
        (options.snapkv.window, options.snapkv.kernel) = (window, kernel);
        let error = policy::create("snapkv", &options, limits).err().unwrap();
        assert!(error.to_string().starts_with(flag));
    }
}
