//! What the controller adds to a decoding step, at several cache sizes.
//!
//! The cache is full to its budget with a bin of 32 behind it, half of the tokens are visual, and
//! attention has a long tail. `step` is all of it: insert, score, decide, apply, coalesce.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

use hae::cache::{Cell, Ledger, Modality, Pos, ranges};
use hae::controller::{Controller, Origin};
use hae::engine::Observation;
use hae::engine::scripted::hashed;
use hae::policy::{Amount, EvictionPolicy, Limits, Plan, PolicyOptions, create};

const SIZES: [usize; 4] = [1 << 10, 1 << 12, 1 << 14, 1 << 17];
const BIN: usize = 32;

fn policy(n_cells: usize) -> Box<dyn EvictionPolicy> {
    let kv_budget = Some(Amount::Cells(n_cells));
    let dap = None;
    let options = PolicyOptions {
        kv_budget,
        bin_size: BIN,
        dap,
        ..PolicyOptions::default()
    };
    create(
        "hae",
        &options,
        Limits {
            n_layer: 1,
            n_cells,
        },
    )
    .expect("valid options")
}

fn origin(i: usize) -> Origin {
    match modality(i) {
        Modality::Text => Origin::TEXT,
        Modality::Vision => Origin::picture(0),
    }
}

fn modality(i: usize) -> Modality {
    if i.is_multiple_of(2) {
        Modality::Vision
    } else {
        Modality::Text
    }
}

/// Attention of the query at `pos` over `n` cells.
fn attention(pos: Pos, n: usize) -> Observation {
    let row: Vec<f32> = (0..n)
        .map(|cell| hashed(7, pos, cell as Pos) as f32)
        .collect();
    Observation {
        sum: row.clone(),
        max: row,
        queries: vec![pos],
        ..Observation::default()
    }
}

/// A ledger of `n` live tokens that one query has seen.
fn ledger(n: usize) -> Ledger {
    let mut ledger = Ledger::new(n);
    for cell in 0..n {
        ledger
            .insert(cell as Cell, cell as Pos, modality(cell), None)
            .expect("an empty cell");
    }
    ledger
        .observe(&attention(n as Pos - 1, n), 1.0)
        .expect("finite scores");
    ledger
}

fn parts(c: &mut Criterion) {
    let mut group = c.benchmark_group("controller");
    for n in SIZES {
        let mut scored = ledger(n);
        let seen = attention(n as Pos - 1, n);
        group.bench_function(BenchmarkId::new("score_update", n), |b| {
            b.iter(|| scored.observe(black_box(&seen), 1.0));
        });

        // One token too many, and a bin that is one short of full: of the lowest tokens, as it
        // mostly is, or of any, most of which come back.
        for (name, any) in [("bin_decision", false), ("bin_decision_all_change", true)] {
            let mut full = ledger(n);
            let mut order: Vec<_> = full.entries().map(|e| (e.sum, e.cell)).collect();
            if !any {
                order.sort_by(|a, b| a.0.total_cmp(&b.0));
            }
            let open = order
                .iter()
                .filter(|(_, cell)| (4..n as Cell - 16).contains(cell));
            for &(_, cell) in open.take(BIN - 1) {
                full.bin(cell).expect("a live token");
            }
            let mut policy = policy(n);
            let mut plan = Plan::default();
            policy.after_prefill(&full, &mut plan).expect("a plan");
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter(|| {
                    plan.clear();
                    policy.after_step(black_box(&full), &mut plan)
                });
            });
        }

        // Scattered, as a picture's low tokens are: three in five.
        let scattered: Vec<Pos> = (0..n as Pos)
            .rev()
            .filter(|p| hashed(3, *p, 0) < 0.09)
            .collect();
        let (mut positions, mut out) = (scattered.clone(), Vec::new());
        group.bench_function(BenchmarkId::new("coalesce_prefill", n), |b| {
            b.iter(|| {
                positions.copy_from_slice(&scattered);
                ranges::coalesce(black_box(&mut positions), &mut out);
            });
        });

        step(&mut group, n);
    }
    group.finish();
}

fn step(group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>, n: usize) {
    let mut controller = Controller::new(policy(n), n);
    let cells: Vec<Cell> = (0..n as Cell - BIN as Cell).collect();
    for &cell in &cells {
        let pos = cell as Pos;
        controller
            .inserted(&[cell], &[pos], origin(cell as usize))
            .expect("an empty cell");
    }
    let mut free: Vec<Cell> = (cells.len() as Cell..n as Cell).rev().collect();
    let mut held: Vec<(Pos, Cell)> = cells.iter().map(|&cell| (cell as Pos, cell)).collect();
    // A few rows in turn: the scores move, and the bench does not time the making of attention.
    let mut rows: Vec<Observation> = (0..16).map(|pos| attention(pos, n)).collect();
    rows[0].queries[0] = controller.next_pos() - 1;
    controller.observed(&rows[0]).expect("finite scores");
    controller.after_prefill(false).expect("a plan");

    group.bench_function(BenchmarkId::new("step", n), |b| {
        b.iter(|| {
            let pos = controller.next_pos();
            let cell = free.pop().expect("a free cell");
            held.push((pos, cell));
            controller
                .inserted(&[cell], &[pos], Origin::TEXT)
                .expect("an empty cell");
            let row = &mut rows[pos as usize % 16];
            row.queries[0] = pos;
            controller.observed(row).expect("finite scores");
            for range in controller.after_step().expect("a plan") {
                let start = held.partition_point(|&(pos, _)| pos < range.start);
                let end = held.partition_point(|&(pos, _)| pos < range.end);
                free.extend(held.drain(start..end).map(|(_, cell)| cell));
            }
        });
    });
}

criterion_group!(benches, parts);
criterion_main!(benches);
