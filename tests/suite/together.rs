//! Conversations with pictures whose steps go through the model together, in any order, with all
//! that can happen to them beside: each says what it says alone.
//!
//! In llama.cpp two things are otherwise than alone: a conversation's tokens lie in other cells, and
//! its rows are multiplied by the weights beside others. Both change the order of sums, and nothing
//! else.

use hae::engine::scripted::Scripted;
use hae::generate::Finish;
use hae::llama::ContextOptions;

use crate::lives::{Life, alone, beside_others, policies};
use crate::model::{converted, engine, exact, load};
use crate::npz::max_abs_diff;
use crate::precision;

/// What came of it all, over several runs.
#[derive(Debug, Default)]
struct Tally {
    worst: f32,
    tokens: usize,
    cancelled: usize,
    recalled: usize,
    evicted: usize,
    fates: [usize; 3],
}

impl Tally {
    /// One conversation beside others, and by itself.
    fn add(&mut self, ours: &Life, single: &Life, name: &str) {
        let (heard, by_itself) = (ours.heard(), single.heard());
        assert_eq!(heard.len(), by_itself.len());
        for (ours, theirs) in heard.iter().zip(&by_itself) {
            self.worst = self.worst.max(max_abs_diff(ours, theirs));
        }
        assert_eq!(ours.said(), single.said(), "{name}: {self:?}");
        assert_eq!(ours.held(), single.held(), "{name}");
        let report = ours.session().controller.report();
        self.tokens += heard.len();
        self.recalled += report.recalled;
        self.evicted += report.cells.evicted.total();
        let ends = ours.said().iter().map(|said| said.finish);
        self.cancelled += ends.filter(|&end| end == Finish::Cancelled).count();
        (0..3).for_each(|i| self.fates[i] += ours.fates[i]);
    }
}

/// Where sums do not depend on what lies beside, all is equal; and passes are saved.
#[test]
fn scripted_conversations_are_equal_to_the_last_number() {
    let says = |pos| if pos % 37 == 36 { 0 } else { 1 + pos % 7 };
    let scripted = || Scripted::new(2000, 8).with_says(says).patched();
    let (mut all, mut saved) = (Tally::default(), 0);
    for seed in 0..30 {
        let seeds: Vec<u64> = (0..4).map(|i| 10 * seed + i).collect();
        for policy in policies() {
            let name = format!("{} {seed}", policy.name);
            let mut engine = scripted();
            let ours = beside_others(&mut engine, &seeds, &policy);
            let mut single = 0;
            for (life, &seed) in ours.iter().zip(&seeds) {
                let mut engine = scripted();
                let by_itself = alone(&mut engine, seed, &policy);
                single += engine.passes;
                all.add(life, &by_itself, &name);
                let report = |life: &Life| format!("{:?}", life.session().controller.report());
                assert_eq!(report(life), report(&by_itself), "{name}");
            }
            saved += single.saturating_sub(engine.passes);
        }
    }
    println!("{all:?}, {saved} passes saved");
    assert_eq!(all.worst, 0.0);
    assert!(saved > 1000, "{saved} passes saved");
    assert!(all.fates.iter().all(|&n| n > 50) && all.cancelled > 50);
    assert!(all.evicted > 1000 && all.recalled > 100);
}

#[test]
fn conversations_decoded_together_are_each_as_if_alone() {
    let model = load(converted("f32").0);
    let mut all = Tally::default();
    for policy in policies() {
        // There rounding is large enough to change what is evicted, and what is said after it.
        if precision::on_gpu() && policy.name != "full" {
            println!("{} on a GPU is left out", policy.name);
            continue;
        }
        let score_layers = match policy.name {
            "full" => Vec::new(),
            _ => vec![0, 1],
        };
        // A cache that grows and shrinks moves tokens of all conversations.
        let options = ContextOptions {
            n_ubatch: 32,
            kv_size: Some(256),
            score_layers,
            ..exact(1024)
        };
        let several = ContextOptions {
            n_seq_max: 3,
            ..options.clone()
        };
        for seed in 0..2 {
            let name = format!("{} {:?} {seed}", policy.name, policy.options.dap_mode);
            let seeds: Vec<u64> = (0..3).map(|i| 10 * seed + i).collect();
            let mut together = engine(&model, several.clone());
            let ours = beside_others(&mut together, &seeds, &policy);
            for (life, &seed) in ours.iter().zip(&seeds) {
                let mut own = engine(&model, options.clone());
                all.add(life, &alone(&mut own, seed, &policy), &name);
            }
            println!("{name}: {}", all.worst);
        }
    }
    println!("{all:?}");
    // A GPU has one kernel for a query alone, and one that rounds to F16 for several.
    let bound = if precision::on_gpu() { 8e-2 } else { 5e-5 };
    assert!(all.worst < bound, "{all:?}");
    assert!(all.fates.iter().all(|&n| n > 0) && all.cancelled > 0);
    assert!(precision::on_gpu() || all.evicted > 100 && all.recalled > 10);
}
