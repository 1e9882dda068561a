//! The controller on random conversations with random options: what must hold after every step.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use hae::Error;
use hae::cache::{Ledger, Modality, Pos, State};
use hae::controller::Controller;
use hae::engine::Engine;
use hae::engine::scripted::{Call, Scripted, hashed};
use hae::generate::Session;
use hae::policy::{Amount, EvictionPolicy, Held, Limits, Observe, Plan, PolicyOptions, create};
use proptest::prelude::*;

use crate::random::{N_LAYER, Turn, assert_in_step, options, prompt, turns};

/// Checks every plan of a policy against the ledger that it was made from, and keeps them.
struct Spy {
    policy: Box<dyn EvictionPolicy>,
    options: PolicyOptions,
    n_cells: usize,
    /// B and d of the turn.
    budget: usize,
    bin_size: usize,
    plans: Arc<Mutex<Vec<Plan>>>,
}

impl Spy {
    fn check(&self, cache: &Ledger, plan: &Plan) {
        let (first, newest) = (cache.first().unwrap(), cache.newest().unwrap());
        let protected = |pos: Pos| {
            pos < first + self.options.sinks as Pos
                || pos > newest - self.options.recent as Pos
                || pos == newest
        };
        let mut planned: Vec<_> = [&plan.bin, &plan.restore, &plan.evict]
            .into_iter()
            .flatten()
            .collect();
        let n = planned.len();
        planned.sort_unstable();
        planned.dedup();
        assert_eq!(planned.len(), n, "no cell twice");
        for &cell in plan.bin.iter().chain(&plan.evict) {
            assert!(!protected(cache.get(cell).unwrap().pos));
        }
        assert!(
            plan.bin
                .iter()
                .all(|&cell| cache.get(cell).unwrap().state == State::Live)
        );
        assert!(
            plan.restore
                .iter()
                .all(|&cell| cache.get(cell).unwrap().state == State::Binned)
        );
        assert!(self.options.restore || plan.restore.is_empty());

        // Text becomes less only when no visual token that may leave is live.
        let count = |cells: &[u32], modality, state| {
            let entries = cells.iter().map(|&cell| cache.get(cell).unwrap());
            entries
                .filter(|e| e.modality == modality && e.state == state)
                .count()
        };
        let leaving = |m| count(&plan.bin, m, State::Live) + count(&plan.evict, m, State::Live);
        let restored = |m| count(&plan.restore, m, State::Binned);
        let vision = cache.entries().filter(|e| {
            e.modality == Modality::Vision && e.state == State::Live && !protected(e.pos)
        });
        if leaving(Modality::Text) > restored(Modality::Text) {
            assert_eq!(leaving(Modality::Vision), vision.count());
            assert_eq!(restored(Modality::Vision), 0);
        }

        // Whatever came before, the turn's budget holds from here on.
        let cells = cache.counts().cells() - plan.evict.len();
        let gone = leaving(Modality::Text) + leaving(Modality::Vision);
        let live = cache.counts().live.total() - gone + plan.restore.len();
        assert!(live <= self.budget && cells < self.budget + self.bin_size);
        self.plans.lock().unwrap().push(plan.clone());
    }
}

impl EvictionPolicy for Spy {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn params(&self) -> serde_json::Value {
        self.policy.params()
    }

    fn observe(&self) -> Observe {
        self.policy.observe()
    }

    fn observes_decoding(&self) -> bool {
        self.policy.observes_decoding()
    }

    fn decay(&self) -> f32 {
        self.policy.decay()
    }

    fn prune(&mut self, cache: &Ledger, held: Held, plan: &mut Plan) -> hae::Result<()> {
        self.policy.prune(cache, held, plan)
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> hae::Result<()> {
        let positions = (cache.newest().unwrap() - cache.first().unwrap() + 1) as usize;
        let least = self.options.sinks + self.options.recent + 1;
        let both = match self.options.kv_budget {
            Some(Amount::Cells(cells)) => cells,
            Some(Amount::Share(share)) => {
                ((share * positions as f64).round() as usize).clamp(least + 1, self.n_cells)
            }
            None => usize::MAX,
        };
        self.bin_size = self.options.bin_size.min(both - least);
        self.budget = both - self.bin_size;
        self.policy.after_prefill(cache, plan)?;
        self.check(cache, plan);
        Ok(())
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> hae::Result<()> {
        // Here the new token is in and nothing has left yet: the peak.
        assert!(cache.counts().cells() <= self.budget + self.bin_size);
        self.policy.after_step(cache, plan)?;
        self.check(cache, plan);
        Ok(())
    }
}

fn converse(
    options: &PolicyOptions,
    turns: &[Turn],
    seed: u64,
    n_batch: usize,
) -> (Session<Scripted>, Vec<Plan>) {
    let rows: usize = turns
        .iter()
        .map(|(s, n)| s.iter().map(|s| s.1).sum::<usize>() + n)
        .sum();
    let n_cells = rows + options.sinks + options.recent + 60;
    let policy = create(
        "hae",
        options,
        Limits {
            n_layer: N_LAYER,
            n_cells,
        },
    )
    .unwrap();
    let plans = Arc::new(Mutex::new(Vec::new()));
    let spy = Spy {
        policy,
        options: options.clone(),
        n_cells,
        budget: 0,
        bin_size: 0,
        plans: plans.clone(),
    };
    let engine = Scripted::new(n_cells, n_batch).with_attention(move |q, k| hashed(seed, q, k));
    let mut session = Session::new(engine, Controller::new(Box::new(spy), n_cells));
    for (turn, (segments, answer)) in turns.iter().enumerate() {
        assert!(
            session
                .prefill(&prompt(segments, 10 * turn as u32), &|| false)
                .unwrap()
        );
        assert_in_step(&session);
        for _ in 0..*answer {
            session.step(3).unwrap();
            assert_in_step(&session);
        }
    }
    let counts = session.controller.ledger().counts();
    assert_eq!(
        counts.cells() + counts.evicted.total(),
        rows,
        "nobody is lost"
    );
    let plans = std::mem::take(&mut *plans.lock().unwrap());
    (session, plans)
}

fn removals(session: &Session<Scripted>) -> Vec<Vec<Range<Pos>>> {
    let calls = session.engine.calls.iter();
    calls
        .filter_map(|call| match call {
            Call::Remove(ranges) => Some(ranges.clone()),
            _ => None,
        })
        .collect()
}

proptest! {
    /// The engine itself refuses unsorted or overlapping ranges, absent positions, the newest.
    #[test]
    fn conversations_keep_the_rules(
        options in options(),
        turns in turns(),
        seed in any::<u64>(),
        n_batch in 1..12usize,
    ) {
        let (session, plans) = converse(&options, &turns, seed, n_batch);
        let report = session.controller.report();
        let evicted: usize = plans.iter().map(|plan| plan.evict.len()).sum();
        prop_assert_eq!(report.cells.evicted.total(), evicted);
        prop_assert_eq!(report.evicted_after_prefill + report.evicted_in_decoding, evicted);
        prop_assert_eq!(report.restores, plans.iter().map(|p| p.restore.len()).sum::<usize>());
        prop_assert!(report.flushes <= plans.len());
        for ranges in removals(&session) {
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "coalesced");
        }
        if options.kv_budget.is_none() && options.dap.is_none() {
            prop_assert!(plans.iter().all(Plan::is_empty));
        }

        let (again, same_plans) = converse(&options, &turns, seed, n_batch);
        prop_assert_eq!(plans, same_plans);
        prop_assert_eq!(session.engine.calls, again.engine.calls);
    }

    #[test]
    fn a_score_that_is_no_number_is_an_error(
        turns in turns(),
        answered in 0..8usize,
        bad in prop_oneof![Just(f64::NAN), Just(f64::INFINITY)],
    ) {
        let kv_budget = Some(Amount::Cells(40));
        let options = PolicyOptions { kv_budget, ..PolicyOptions::default() };
        let rows: usize = turns[0].0.iter().map(|s| s.1).sum();
        let n_cells = 200;
        let policy = create("hae", &options, Limits { n_layer: 1, n_cells }).unwrap();
        let at = (rows + answered) as Pos;
        let engine = Scripted::new(n_cells, 8)
            .with_attention(move |q, k| if q == at { bad } else { hashed(1, q, k) });
        let mut session = Session::new(engine, Controller::new(policy, n_cells));
        prop_assert!(session.prefill(&prompt(&turns[0].0, 0), &|| false).unwrap());
        for _ in 0..answered {
            session.step(3).unwrap();
        }
        let error = session.step(3).unwrap_err();
        let is_nan_score = matches!(error, Error::NanScore { value, .. } if !value.is_finite());
        prop_assert!(is_nan_score, "{}", error);
    }
}

#[test]
fn full_observes_nothing_and_removes_nothing() {
    let n_cells = 64;
    let limits = Limits {
        n_layer: 1,
        n_cells,
    };
    let policy = create("full", &PolicyOptions::default(), limits).unwrap();
    let mut session = Session::new(Scripted::new(n_cells, 8), Controller::new(policy, n_cells));
    session
        .prefill(&prompt(&[(false, 3), (true, 9), (false, 2)], 0), &|| false)
        .unwrap();
    while session.step(5).is_ok() {}
    assert_eq!(session.controller.ledger().counts().cells(), n_cells);
    assert!(matches!(
        session.step(5),
        Err(Error::ContextFull { n_ctx: 64 })
    ));
    assert_in_step(&session);
    assert_eq!(session.engine.n_cells(), n_cells);
    let observed =
        |call: &Call| matches!(call, Call::Decode { queries, .. } if !queries.is_empty());
    assert!(!session.engine.calls.iter().any(observed));
    assert_eq!(removals(&session), Vec::<Vec<Range<Pos>>>::new());
}

#[test]
fn a_policy_that_plans_the_impossible_is_an_error() {
    struct Wrong(Plan);
    impl EvictionPolicy for Wrong {
        fn name(&self) -> &'static str {
            "wrong"
        }
        fn params(&self) -> serde_json::Value {
            serde_json::Value::Null
        }
        fn observe(&self) -> Observe {
            Observe::Nothing
        }
        fn after_prefill(&mut self, _: &Ledger, plan: &mut Plan) -> hae::Result<()> {
            plan.clone_from(&self.0);
            Ok(())
        }
        fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> hae::Result<()> {
            Ok(())
        }
    }
    let plan = |bin: &[u32], restore: &[u32], evict: &[u32]| Plan {
        bin: bin.to_vec(),
        restore: restore.to_vec(),
        evict: evict.to_vec(),
        shift: None,
    };
    for (plan, complaint) in [
        (plan(&[], &[], &[3]), "cell 3 holds the newest position 3"),
        (plan(&[3], &[], &[]), "cell 3 holds the newest position 3"),
        (plan(&[], &[], &[4]), "cell 4 is empty"),
        (plan(&[], &[0], &[]), "cell 0 is live"),
        (plan(&[1, 1], &[], &[]), "cell 1 is in the recycle bin"),
        (plan(&[], &[], &[1, 1]), "cell 1 is empty"),
        (plan(&[1], &[], &[1]), "cell 1 is empty"),
    ] {
        let controller = Controller::new(Box::new(Wrong(plan)), 8);
        let mut session = Session::new(Scripted::new(8, 8), controller);
        let error = session
            .prefill(&prompt(&[(false, 4)], 0), &|| false)
            .unwrap_err();
        assert!(matches!(error, Error::Cell { .. }));
        assert!(
            error.to_string().contains(complaint),
            "{error}, expected {complaint}"
        );
    }
}
