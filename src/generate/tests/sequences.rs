//! Several conversations on one engine, each as if it were alone.

use super::*;
use crate::engine::SeqId;
use crate::engine::scripted::hashed;

/// One user turn: its prompt, the tokens asked for, and at which look at it it is cancelled.
#[derive(Clone)]
struct Turn {
    prompt: Vec<Segment>,
    n_predict: usize,
    cancelled: Option<usize>,
}

/// A conversation on its way.
struct Talk {
    session: Option<Session<()>>,
    turns: Vec<Turn>,
    generation: Option<Generation<'static>>,
    looks: Slot<usize>,
    said: Vec<Generated>,
}

impl Talk {
    fn new(
        seq: SeqId,
        turns: &[Turn],
        policy: &str,
        options: &PolicyOptions,
        engine: &mut Scripted,
    ) -> Self {
        let n_cells = engine.n_cells();
        let limits = Limits {
            n_layer: 2,
            n_cells,
        };
        let policy = policy::create(policy, options, limits).unwrap();
        let session = Session::new(engine, Controller::new(policy, n_cells));
        let session = session
            .with_sequence(seq)
            .with_store(BinOptions::ram(1 << 10));
        Talk {
            session: Some(session.swap(()).0),
            turns: turns.iter().rev().cloned().collect(),
            generation: None,
            looks: Slot::new(0),
            said: Vec::new(),
        }
    }

    /// One step on the engine, which is given back; false: nothing is left to do.
    fn step(&mut self, engine: &mut Scripted) -> bool {
        let Some(turn) = self.turns.last() else {
            return false;
        };
        let generation = self.generation.get_or_insert_with(|| {
            self.looks.set(0);
            Generation::new(turn.prompt.clone(), Some(turn.n_predict))
        });
        let (mut session, ()) = self.session.take().unwrap().swap(engine);
        let looks = &self.looks;
        let cancelled = || turn.cancelled == Some(looks.replace(looks.get() + 1));
        let progress = generation.next(&mut session, &cancelled, &|| Duration::ZERO);
        if progress.unwrap().is_none() {
            let generation = self.generation.take().unwrap();
            self.said.push(generation.into_answer());
            self.turns.pop();
        }
        session.follow_moves().unwrap();
        let seq = session.sequence();
        let held = session.controller.ledger().entries();
        let held: Vec<_> = held.map(|e| (e.cell, e.pos)).collect();
        let (session, engine) = session.swap(());
        assert_eq!(held, engine.occupied_by(seq));
        self.session = Some(session);
        true
    }

    /// All that came of it, but for the cells: positions in the cache and on the host.
    fn outcome(&self) -> (Vec<Generated>, Vec<Pos>, Vec<Pos>, String) {
        let session = self.session.as_ref().unwrap();
        let held = session.controller.ledger().entries();
        let mut held: Vec<Pos> = held.map(|e| e.pos).collect();
        held.sort_unstable();
        let host = session.store.positions();
        let report = format!("{:?}", session.controller.report());
        (self.said.clone(), held, host.collect(), report)
    }
}

fn engine() -> Scripted {
    let says = |pos: Pos| if pos % 37 == 36 { 0 } else { 1 + pos % 7 };
    Scripted::new(600, 8).patched().with_says(says)
}

/// Three turns whose lengths are drawn, one of them cancelled.
fn turns(seed: u64) -> Vec<Turn> {
    let draw = |i: Pos, n: usize| {
        let share = 1.0 + hashed(seed, i, 0).ln() / 6.0;
        ((share * n as f64) as usize).min(n - 1)
    };
    let turn = |i: Pos| {
        let mut prompt = vec![tokens(3 + draw(10 * i, 20))];
        if draw(10 * i + 1, 2) == 0 {
            prompt.push(picture(4 + draw(10 * i + 2, 20)));
            prompt.push(tokens(2));
        }
        Turn {
            prompt,
            n_predict: 5 + draw(10 * i + 3, 30),
            cancelled: (draw(10 * i + 4, 3) == 0).then(|| draw(10 * i + 5, 12)),
        }
    };
    (0..3).map(turn).collect()
}

#[test]
fn conversations_that_share_a_cache_are_each_as_if_alone() {
    let budget = |cells| PolicyOptions {
        kv_budget: Some(Amount::Cells(cells)),
        bin_size: 4,
        sinks: 2,
        recent: 3,
        ..PolicyOptions::default()
    };
    let (mut cancelled, mut evicted) = (0, 0);
    for seed in 0..40 {
        for policy in ["full", "h2o", "hae", "snapkv", "streaming_llm"] {
            let options = match policy {
                "full" => PolicyOptions::default(),
                _ => budget(24),
            };
            let talks: Vec<_> = (0..3).map(|i| turns(10 * seed + i)).collect();
            let alone = talks.iter().map(|turns| {
                let mut engine = engine();
                let mut talk = Talk::new(0, turns, policy, &options, &mut engine);
                while talk.step(&mut engine) {}
                talk.outcome()
            });
            let alone: Vec<_> = alone.collect();
            let mut engine = engine();
            let make = |(seq, turns): (SeqId, &Vec<Turn>)| {
                Talk::new(seq, turns, policy, &options, &mut engine)
            };
            let mut together: Vec<_> = (0..).zip(&talks).map(make).collect();
            let mut draws = 0;
            while together.iter().any(|talk| !talk.turns.is_empty()) {
                draws += 1;
                let which = hashed(seed, draws, 1).to_bits() % 3;
                together[which as usize].step(&mut engine);
            }
            for (talk, alone) in together.iter().zip(&alone) {
                assert_eq!(&talk.outcome(), alone, "{policy} {seed}");
                let ends = talk.said.iter().map(|said| said.finish);
                cancelled += ends.filter(|&end| end == Finish::Cancelled).count();
                let report = talk.session.as_ref().unwrap().controller.report();
                evicted += report.cells.evicted.total();
            }
        }
    }
    assert!(cancelled > 50 && evicted > 1000, "{cancelled} {evicted}");
}

#[test]
fn logits_of_another_conversation_are_refused() {
    let mut engine = engine();
    let options = PolicyOptions::default();
    let mut talks = [0, 1].map(|seq| Talk::new(seq, &[], "full", &options, &mut engine));
    let mut ask = |i: usize, fed: bool| {
        let (mut session, ()) = talks[i].session.take().unwrap().swap(&mut engine);
        if fed {
            session.prefill(&[tokens(3)], &|| false).unwrap();
        }
        let sampled = session.sample();
        talks[i].session = Some(session.swap(()).0);
        sampled
    };
    ask(0, true).unwrap();
    ask(1, true).unwrap();
    ask(1, false).unwrap();
    assert_eq!(
        ask(0, false).unwrap_err().to_string(),
        "broken contract: the last batch has no logits of sequence 0"
    );
}
