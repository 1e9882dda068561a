//! Random conversations and options, and what the tests on them share.

use hae::cache::{Pos, State};
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::generate::{Segment, Session};
use hae::policy::{
    Amount, DapOptions, DapRule, Layers, Limits, Norm, PolicyOptions, Queries, Scope, create,
};
use proptest::prelude::*;

/// Segments (picture or text, rows) and the number of tokens to answer with.
pub type Turn = (Vec<(bool, usize)>, usize);

pub const N_LAYER: u32 = 3;

pub fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let segment = (any::<bool>(), 1..20usize);
    let segments = prop::collection::vec(segment, 1..5).prop_map(|mut segments| {
        segments.push((false, 1 + segments.len()));
        segments
    });
    prop::collection::vec((segments, 0..40usize), 1..4)
}

fn dap() -> impl Strategy<Value = Option<DapOptions>> {
    let amount = prop_oneof![
        (0.05..1.0).prop_map(Amount::Share),
        (1..30usize).prop_map(Amount::Cells)
    ];
    let rule = prop_oneof![
        (0.0..2.0).prop_map(DapRule::Tau),
        (0.0..0.1).prop_map(DapRule::R),
        amount.prop_map(DapRule::Keep),
        (0.0..3.0).prop_map(|times| DapRule::Spread {
            times,
            least: Amount::Cells(0)
        })
    ];
    let scope = prop_oneof![Just(Scope::Turn), Just(Scope::Image)];
    prop::option::of(
        (rule, prop::option::of(0.0..0.2), scope).prop_map(|(rule, alpha, scope)| {
            let alpha = alpha.filter(|_| matches!(rule, DapRule::Tau(_) | DapRule::R(_)));
            DapOptions { rule, alpha, scope }
        }),
    )
}

pub fn options() -> impl Strategy<Value = PolicyOptions> {
    let scores = (
        prop_oneof![Just(Queries::All), Just(Queries::Last)],
        prop_oneof![Just(Norm::PerQuery), Just(Norm::Sum)],
        prop_oneof![Just(1.0), 0.5..1.0],
        dap(),
    );
    let budget = prop_oneof![
        (0..40usize).prop_map(Amount::Cells),
        (0.1..1.0).prop_map(Amount::Share)
    ];
    let bin = (
        1..12usize,
        0..5usize,
        0..8usize,
        prop_oneof![Just(0.0), 0.0..0.5],
        any::<bool>(),
    );
    (scores, prop::option::weighted(0.8, budget), bin).prop_map(
        |((queries, norm, decay, dap), budget, (bin_size, sinks, recent, hysteresis, restore))| {
            // Budgets are drawn as what they leave beyond the least.
            let kv_budget = budget.map(|budget| match budget {
                Amount::Cells(more) => Amount::Cells(sinks + recent + 1 + bin_size + more),
                share => share,
            });
            PolicyOptions {
                layers: Layers::All,
                queries,
                norm,
                decay,
                dap,
                kv_budget,
                bin_size,
                sinks,
                recent,
                hysteresis,
                restore,
                ..PolicyOptions::default()
            }
        },
    )
}

pub fn prompt(segments: &[(bool, usize)], first_image: u32) -> Vec<Segment> {
    let segments = segments
        .iter()
        .zip(first_image..)
        .map(|(&(picture, n), image)| match picture {
            true => Segment::Image {
                embeddings: (0..2 * n).map(|x| x as f32).collect(),
                n,
                image,
                axes: None,
                separators: Vec::new(),
            },
            false => Segment::Tokens(vec![3; n]),
        });
    segments.collect()
}

pub fn new_session(
    options: &PolicyOptions,
    seed: u64,
    n_cells: usize,
    n_batch: usize,
) -> Session<Scripted> {
    let policy = create(
        "hae",
        options,
        Limits {
            n_layer: N_LAYER,
            n_cells,
        },
    )
    .unwrap();
    let engine = Scripted::new(n_cells, n_batch).with_attention(move |q, k| hashed(seed, q, k));
    Session::new(engine, Controller::new(policy, n_cells))
}

/// Softmax attention of `query` to each of `keys`.
pub fn row(seed: u64, query: Pos, keys: &[Pos]) -> Vec<f64> {
    let weights: Vec<f64> = keys.iter().map(|&key| hashed(seed, query, key)).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// Whether each position of the prompt is visual, with the number of its segment.
pub fn layout(segments: &[(bool, usize)]) -> Vec<(bool, usize)> {
    let rows = segments.iter().enumerate();
    rows.flat_map(|(s, &(picture, n))| vec![(picture, s); n])
        .collect()
}

/// Engine and ledger hold the same positions in the same cells.
pub fn assert_in_step(session: &Session<Scripted>) {
    let ledger = session.controller.ledger();
    let held: Vec<_> = ledger.entries().map(|e| (e.cell, e.pos)).collect();
    assert_eq!(held, session.engine.occupied());
    let counts = ledger.counts();
    assert_eq!(counts.cells(), held.len());
    let binned = ledger
        .entries()
        .filter(|e| e.state == State::Binned)
        .count();
    assert_eq!(counts.binned.total(), binned);
}
