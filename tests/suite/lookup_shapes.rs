//! Lookups over shapes of attention, types of cache and threads: small untrained models, the
//! processor's operations against those of every backend.
//!
//! What a layer ranks its cells by is read from another context, as scores: of the first layer from
//! one that attends to everything, of the second from the plain operations. So a set is held to be
//! the best of what others computed, and how near a tie may be is a bound on rounding.

use hae::attend::{Kind, Lookup};
use hae::cache::{Cell, Pos};
use hae::engine::scripted::hashed;
use hae::engine::{Batch, Engine, Input, Observation, Token};
use hae::llama::CacheType::{Bf16, F16, F32, Q4_0, Q5_1, Q8_0};
use hae::llama::{ContextOptions, FlashAttention, LlamaEngine, Model};
use tempfile::TempDir;

use crate::lookup::looking;
use crate::model::{engine, exact, load, takes};
use crate::npz::max_abs_diff;
use crate::precision;
use crate::random_llama::{Shape, llama};

/// Width of a head, heads, heads of K and V.
const SHAPES: [(u32, u32, u32); 7] = [
    (32, 4, 4),
    (64, 6, 2),
    (80, 4, 2),
    (80, 3, 1),
    (96, 5, 5),
    (128, 2, 1),
    (128, 8, 2),
];

const N_LAYER: u32 = 2;

fn model_of((width, n_head, n_head_kv): (u32, u32, u32), n_layer: u32, dir: &TempDir) -> Model {
    let path = dir
        .path()
        .join(format!("{width}-{n_head}-{n_head_kv}-{n_layer}.gguf"));
    let shape = Shape {
        n_layer,
        n_head,
        n_head_kv,
        width,
    };
    llama(&path, shape);
    load(&path)
}

/// A number below `n`.
fn draw(what: Pos, i: Pos, n: usize) -> usize {
    (hashed(39, what, i) * 1e9) as usize % n
}

/// `n` tokens, the first at position `from`.
fn tokens(from: Pos, n: usize) -> Vec<Token> {
    let token = |pos| 3 + draw(1, pos, 900) as Token;
    (from..from + n as Pos).map(token).collect()
}

/// Feeds these tokens; what the layer that is tapped saw of the last one.
fn feed(
    engine: &mut LlamaEngine,
    tokens: &[Token],
    from: Pos,
    lookup: Option<&Lookup>,
) -> Observation {
    let pos: Vec<Pos> = (from..).take(tokens.len()).collect();
    let last = [tokens.len() as u32 - 1];
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(tokens),
        pos: &pos,
        queries: match engine.options().score_layers.is_empty() {
            true => &[],
            false => &last,
        },
        logits: true,
        lookup,
    };
    let (mut cells, mut seen) = (Vec::new(), Observation::default());
    engine.decode(batch, &mut cells, &mut seen).unwrap();
    assert_eq!(cells.len(), tokens.len());
    seen
}

/// For the token at this position: cells of all kinds, and none of them, one, all but one, all, or some
/// between.
fn lookup(pos: Pos) -> Lookup {
    let kind = |cell| match draw(pos, cell, 8) {
        0 => Kind::Always,
        1..5 => Kind::Vision,
        _ => Kind::Text,
    };
    let kinds: Vec<Kind> = (0..pos).map(kind).collect();
    let [vision, text] = [Kind::Vision, Kind::Text].map(|kind| of(&kinds, kind).count());
    let amounts = |all: usize| [7, 0, 1, all - 1, 40, all, all / 2];
    let (n_vision, n_text) = match pos % 64 {
        0 => (0, 0),
        _ => (
            amounts(vision)[pos as usize % 7],
            amounts(text)[pos as usize / 3 % 7],
        ),
    };
    Lookup {
        kinds,
        n_vision,
        n_text,
    }
}

fn of(kinds: &[Kind], kind: Kind) -> impl Iterator<Item = Cell> + '_ {
    let cells = (0..).zip(kinds);
    cells
        .filter(move |(_, k)| **k == kind)
        .map(|(cell, _)| cell)
}

/// That the set is what these weights ask for; by how much, of the largest weight, a cell that was
/// left out is before one that was chosen.
fn disorder(set: &[Cell], lookup: &Lookup, weights: &[f32], at: &str) -> f32 {
    assert!(set.is_sorted_by(|a, b| a < b), "{at}");
    let new = lookup.kinds.len() as Cell;
    let always = of(&lookup.kinds, Kind::Always).chain([new]);
    assert!(always.into_iter().all(|cell| set.contains(&cell)), "{at}");
    assert!(set.last() == Some(&new), "{at}");
    let largest = weights.iter().copied().fold(0.0, f32::max);
    let mut worst: f32 = 0.0;
    for (kind, n) in [(Kind::Vision, lookup.n_vision), (Kind::Text, lookup.n_text)] {
        let cells: Vec<Cell> = of(&lookup.kinds, kind).collect();
        let (chosen, rest): (Vec<Cell>, Vec<Cell>) =
            cells.iter().partition(|cell| set.contains(cell));
        assert_eq!(chosen.len(), n.min(cells.len()), "{at}, {kind:?}");
        let weight = |cell: &Cell| weights[*cell as usize];
        let least = chosen.iter().map(weight).fold(f32::INFINITY, f32::min);
        let most = rest.iter().map(weight).fold(0.0, f32::max);
        worst = worst.max((most - least) / largest);
    }
    worst
}

/// What two ways did over all steps.
#[derive(Debug, Default)]
struct Apart {
    /// Largest difference of logits.
    logits: f32,
    /// What lookups did to logits, at most.
    effect: f32,
    /// Most that a set was out of order.
    disorder: f32,
    /// Cells of sets, and those that are in the other way's.
    chosen: usize,
    both: usize,
}

/// A prompt, and steps across the number of cells at which llama.cpp makes another graph. Every
/// third attends to everything.
fn run(model: &Model, base: &ContextOptions, layer: u32, sum: &mut Apart) {
    let base = ContextOptions {
        score_layers: vec![layer],
        ..base.clone()
    };
    let mut ways = [false, true].map(|plain| engine(model, looking(base.clone(), 0, plain)));
    let mut whole = engine(model, base);
    // Since two near cells changed places, everything behind them differs. Only a GPU rounds so
    // differently that nothing can be said from then on.
    let mut parted = false;
    const N: usize = 249;
    for engine in ways.iter_mut().chain([&mut whole]) {
        feed(engine, &tokens(0, N), 0, None);
    }
    for pos in N as Pos..N as Pos + 14 {
        let token = tokens(pos, 1);
        let lookup = (pos % 3 != 0).then(|| lookup(pos));
        let dense = feed(&mut whole, &token, pos, None);
        let [ours, theirs] = ways.each_mut().map(|engine| {
            let seen = feed(engine, &token, pos, lookup.as_ref());
            let sets = (0..N_LAYER).map(|layer| {
                let set = engine.looked_up(layer);
                assert_eq!(set.is_ok(), lookup.is_some());
                set.unwrap_or_default()
            });
            (sets.collect::<Vec<_>>(), seen)
        });
        // What the first layer sees does not depend on what any layer attends to.
        let scores = if layer == 0 { dense } else { theirs.1 };
        let (all, at_layer) = ((ours.0, theirs.0), layer as usize);
        let [ours, theirs] = [&all.0, &all.1].map(|sets| &sets[at_layer]);
        parted |= precision::on_gpu() && all.0[..at_layer] != all.1[..at_layer];
        if let (Some(lookup), false) = (&lookup, parted) {
            let at = format!("{:?}, layer {layer}, at {pos}", whole.options().type_k);
            for set in [ours, theirs] {
                sum.disorder = sum.disorder.max(disorder(set, lookup, &scores.sum, &at));
            }
        }
        sum.chosen += ours.len();
        sum.both += ours.iter().filter(|cell| theirs.contains(cell)).count();
        parted |= precision::on_gpu() && all.0 != all.1;
        let [ours, theirs] = ways.each_ref().map(|engine| engine.logits().unwrap());
        if !parted {
            sum.logits = sum.logits.max(max_abs_diff(ours, theirs));
        }
        sum.effect = sum.effect.max(max_abs_diff(ours, whole.logits().unwrap()));
    }
}

#[test]
fn every_shape_and_type_is_looked_up_alike() {
    let dir = TempDir::new().unwrap();
    let models = SHAPES.map(|shape| (shape, model_of(shape, N_LAYER, &dir)));
    // Flash attention takes F32 as F16 and adds values of F16 up in F16: measured, 3e-3 from what the
    // processor's operations say. With other types sums have other orders: 4e-7, or 2e-4 where this
    // lets a value or a query be rounded to another of its type. Lookups move logits by 0.9.
    for (types, bound) in [
        ((F32, F32), 1e-2),
        ((F16, F16), 1e-2),
        ((Q8_0, Q8_0), 1e-3),
        ((Q4_0, Q4_0), 1e-3),
        ((Q8_0, Q4_0), 1e-3),
        ((Q5_1, Q5_1), 1e-3),
        ((Bf16, Bf16), 1e-3),
    ]
    .into_iter()
    .filter(|&((k, _), _)| takes(k))
    {
        let in_blocks = [types.0, types.1].iter().any(|t| t.is_quantized());
        let mut sum = Apart::default();
        for (i, (shape, model)) in models.iter().enumerate() {
            if shape.0 % 32 != 0 && in_blocks {
                continue;
            }
            let base = ContextOptions {
                flash_attention: FlashAttention::On,
                type_k: types.0,
                type_v: types.1,
                n_threads: 1 + i as i32 % 3,
                ..exact(512)
            };
            for layer in 0..N_LAYER {
                run(model, &base, layer, &mut sum);
            }
            println!("{types:?} {shape:?}: {sum:?}");
        }
        assert!(sum.logits < precision::logits(bound), "{types:?}: {sum:?}");
        assert!(sum.effect > 0.5, "{types:?}: {sum:?}");
        assert!(
            sum.disorder < precision::attention(1e-3),
            "{types:?}: {sum:?}"
        );
        let alike = precision::sets_alike(998);
        assert!(sum.both * 1000 > sum.chosen * alike, "{types:?}: {sum:?}");
    }
}

/// With one layer a set says all: the other cells may as well not be there.
#[test]
fn to_attend_to_a_set_is_to_remove_the_others() {
    let dir = TempDir::new().unwrap();
    for shape in SHAPES {
        let model = model_of(shape, 1, &dir);
        let base = ContextOptions {
            n_threads: 2,
            ..exact(512)
        };
        for (flash_attention, plain) in [(FlashAttention::On, false), (FlashAttention::Off, true)] {
            let options = ContextOptions {
                flash_attention,
                ..base.clone()
            };
            let mut looks = engine(&model, looking(options, 0, plain));
            const N: usize = 100;
            feed(&mut looks, &tokens(0, N), 0, None);
            for pos in N as Pos..N as Pos + 7 {
                let lookup = lookup(pos);
                feed(&mut looks, &tokens(pos, 1), pos, Some(&lookup));
                let set = looks.looked_up(0).unwrap();
                // K and V of the only layer do not depend on what was attended to.
                let mut rest = engine(&model, base.clone());
                feed(&mut rest, &tokens(0, pos as usize), 0, None);
                let whole = {
                    feed(&mut rest, &tokens(pos, 1), pos, None);
                    rest.logits().unwrap().to_vec()
                };
                let left = (0..=pos).filter(|&p| p == pos || !set.contains(&(p as Cell)));
                let ranges: Vec<_> = left.map(|p| p..p + 1).collect();
                rest.remove(0, &ranges).unwrap();
                feed(&mut rest, &tokens(pos, 1), pos, None);
                let at = format!("{shape:?} at {pos}, plain {plain}");
                let ours = looks.logits().unwrap();
                let apart = max_abs_diff(ours, rest.logits().unwrap());
                println!(
                    "{at}: {apart:.1e}, against all {:.1e}",
                    max_abs_diff(ours, &whole)
                );
                assert!(apart < precision::logits(1e-5), "{at}: {apart}");
            }
        }
    }
}
