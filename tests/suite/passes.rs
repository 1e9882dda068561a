//! Rows of several sequences in one pass over the weights: each as in a batch by itself.
//!
//! In the same cells the sums over cells are the same. What differs is how a processor multiplies
//! one row or several by a weight, in the order of its sums: the logits agree to rounding.

use hae::Error;
use hae::cache::{Cell, Pos};
use hae::engine::scripted::hashed;
use hae::engine::{Batch, Engine, Input, Observation, Part, SeqId, Token};
use hae::llama::{ContextOptions, FlashAttention, LlamaEngine, ScoreSource};

use crate::model::{converted, engine, exact, load};
use crate::npz::max_abs_diff;
use crate::precision;

/// Rows of one part.
#[derive(Clone)]
struct Rows {
    seq: SeqId,
    tokens: Vec<Token>,
    pos: Vec<Pos>,
    queries: Vec<u32>,
    logits: bool,
}

impl Rows {
    fn new(seq: SeqId, first: Pos, n: usize) -> Self {
        let token = |i| 3 + (hashed(seq as u64, first, i as Pos).to_bits() % 900) as Token;
        Rows {
            seq,
            tokens: (0..n).map(token).collect(),
            pos: (first..).take(n).collect(),
            queries: Vec::new(),
            logits: true,
        }
    }

    fn asking(self, queries: &[u32]) -> Self {
        let queries = queries.to_vec();
        Rows { queries, ..self }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            seq: self.seq,
            input: Input::Tokens(&self.tokens),
            pos: &self.pos,
            queries: &self.queries,
            logits: self.logits,
            lookup: None,
        }
    }
}

#[derive(Debug)]
struct Came {
    cells: Vec<Cell>,
    seen: Observation,
    logits: Option<Vec<f32>>,
}

fn together(engine: &mut LlamaEngine, all: &[Rows]) -> hae::Result<Vec<Came>> {
    let mut came: Vec<_> = all
        .iter()
        .map(|_| (vec![7; 3], Observation::default()))
        .collect();
    let mut parts: Vec<_> = all
        .iter()
        .zip(&mut came)
        .map(|(rows, (cells, seen))| Part {
            batch: rows.batch(),
            cells,
            seen,
        })
        .collect();
    engine.decode_parts(&mut parts)?;
    let each = all.iter().zip(came).map(|(rows, (cells, seen))| Came {
        cells,
        seen,
        logits: engine.logits_of(rows.seq).ok().map(<[f32]>::to_vec),
    });
    Ok(each.collect())
}

fn apart(engine: &mut LlamaEngine, all: &[Rows]) -> Vec<Came> {
    let one = |rows: &Rows| {
        together(engine, std::slice::from_ref(rows))
            .unwrap()
            .remove(0)
    };
    all.iter().map(one).collect()
}

fn several(flash_attention: FlashAttention, score_source: ScoreSource) -> ContextOptions {
    ContextOptions {
        flash_attention,
        n_seq_max: 4,
        n_ubatch: 64,
        score_layers: vec![0, 1],
        score_source,
        kv_size: Some(256),
        ..exact(512)
    }
}

/// One row whose attention is wanted.
fn asks(seq: SeqId, pos: Pos) -> Rows {
    Rows::new(seq, pos, 1).asking(&[0])
}

#[test]
fn parts_of_a_pass_are_each_as_by_itself() {
    let model = load(converted("f32").0);
    for options in [
        several(FlashAttention::Off, ScoreSource::Graph),
        several(FlashAttention::On, ScoreSource::Graph),
        several(FlashAttention::Off, ScoreSource::Callback),
    ] {
        let (flash, source) = (options.flash_attention, options.score_source);
        let mut worst = (0.0f32, 0.0f32);
        let (mut joint, mut single) = (
            engine(&model, options.clone()),
            engine(&model, options.clone()),
        );
        let mut quiet = Rows::new(3, 0, 5);
        quiet.logits = false;
        let mut passes = vec![
            // Prompts beside each other, one of them asked and one without logits.
            vec![
                Rows::new(2, 0, 20),
                Rows::new(0, 0, 30).asking(&[0, 28, 29]),
                quiet,
            ],
            // Steps, and the end of a prompt.
            vec![
                Rows::new(0, 30, 1),
                Rows::new(2, 20, 1).asking(&[0]),
                Rows::new(1, 0, 17),
                Rows::new(3, 5, 1),
            ],
            vec![Rows::new(3, 6, 1), Rows::new(1, 17, 1)],
            vec![Rows::new(1, 18, 1)],
        ];
        if source == ScoreSource::Graph {
            passes.extend([
                vec![
                    Rows::new(0, 31, 3).asking(&[0, 2]),
                    Rows::new(2, 21, 1).asking(&[0]),
                    Rows::new(3, 7, 2),
                    Rows::new(1, 19, 4).asking(&[1, 2, 3]),
                ],
                // The graph of a step is used again, and not for other groups.
                vec![asks(2, 22), asks(0, 34), asks(3, 9), asks(1, 23)],
                vec![asks(1, 24), asks(2, 23), asks(0, 35), asks(3, 10)],
                vec![
                    Rows::new(1, 25, 2).asking(&[0, 1]),
                    Rows::new(0, 36, 2).asking(&[0, 1]),
                ],
                vec![
                    Rows::new(1, 27, 1).asking(&[0]),
                    Rows::new(0, 38, 3).asking(&[0, 1, 2]),
                ],
            ]);
        }
        for rows in passes {
            let ours = together(&mut joint, &rows).unwrap();
            let theirs = apart(&mut single, &rows);
            for ((ours, theirs), rows) in ours.iter().zip(&theirs).zip(&rows) {
                assert_eq!(ours.cells, theirs.cells);
                assert_eq!(ours.logits.is_some(), rows.logits);
                if let (Some(ours), Some(own)) = (&ours.logits, &theirs.logits) {
                    worst.0 = worst.0.max(max_abs_diff(ours, own));
                }
                let asked = rows.queries.iter().map(|&row| rows.pos[row as usize]);
                assert_eq!(ours.seen.queries, asked.collect::<Vec<_>>());
                assert_eq!(ours.seen.sum.is_empty(), rows.queries.is_empty());
                for (ours, theirs) in [
                    (&ours.seen.sum, &theirs.seen.sum),
                    (&ours.seen.max, &theirs.seen.max),
                ] {
                    for (cell, ours) in ours.iter().enumerate() {
                        let theirs = theirs.get(cell).copied().unwrap_or(0.0);
                        worst.1 = worst.1.max((ours - theirs).abs());
                    }
                }
            }
        }
        for seq in 0..4 {
            let cells = joint.cells_of_seq(seq).unwrap();
            assert_eq!(cells, single.cells_of_seq(seq).unwrap());
        }
        println!(
            "flash attention {flash:?}, {source:?}: logits {}, scores {}",
            worst.0, worst.1
        );
        // Flash attention takes several rows in tiles and one by itself.
        let bound = match flash {
            FlashAttention::Off => 2e-5,
            _ => 1e-2,
        };
        // With AVX-512 sums over F16 keys go in another order: 2.3e-5.
        let bounds = (precision::logits(bound), precision::attention(1e-4));
        assert!(worst.0 < bounds.0 && worst.1 < bounds.1, "{worst:?}");
    }
}

/// In every part: as where this layer alone is scored, and their mean is the sum over layers.
#[test]
fn every_layer_has_sums_of_its_own() {
    let model = load(converted("f32").0);
    let layers = vec![0, 2, 5];
    for flash in [FlashAttention::On, FlashAttention::Off] {
        let scoring = |score_layers: Vec<u32>| ContextOptions {
            scores_by_layer: score_layers.len() > 1,
            score_layers,
            ..several(flash, ScoreSource::Graph)
        };
        let mut all = engine(&model, scoring(layers.clone()));
        let mut each: Vec<_> = layers
            .iter()
            .map(|&il| engine(&model, scoring(vec![il])))
            .collect();
        for rows in [
            vec![Rows::new(0, 0, 40).asking(&[39])],
            vec![
                Rows::new(0, 40, 5).asking(&[0, 3, 4]),
                Rows::new(1, 0, 20),
                Rows::new(2, 0, 30).asking(&[7, 29]),
            ],
            // The same graph twice, and one of other groups.
            vec![asks(0, 45), asks(1, 20), asks(2, 30)],
            vec![asks(2, 31), asks(0, 46), asks(1, 21)],
            vec![Rows::new(0, 47, 2).asking(&[0, 1]), asks(1, 22)],
            vec![Rows::new(1, 23, 4)],
        ] {
            let ours = together(&mut all, &rows).unwrap();
            let alone = each.iter_mut().map(|one| together(one, &rows).unwrap());
            let alone: Vec<_> = alone.collect();
            for (part, came) in ours.iter().enumerate() {
                let seen = &came.seen;
                let n = seen.sum.len();
                assert_eq!(n == 0, rows[part].queries.is_empty());
                assert_eq!(seen.layers.len(), n * layers.len());
                let mut mean = vec![0.0; n];
                for (i, alone) in alone.iter().enumerate() {
                    let layer = &seen.layers[i * n..][..n];
                    let error = max_abs_diff(layer, &alone[part].seen.sum);
                    let bound = precision::attention(1e-5);
                    assert!(error < bound, "{flash:?} layer {}: {error}", layers[i]);
                    assert!(alone[part].seen.layers.is_empty());
                    let share = layer.iter().map(|a| a / layers.len() as f32);
                    mean.iter_mut().zip(share).for_each(|(mean, a)| *mean += a);
                }
                assert!(max_abs_diff(&mean, &seen.sum) < precision::attention(1e-5));
            }
        }
    }
}

#[test]
fn sums_by_layer_need_layers_in_order_and_the_graph() {
    let model = load(converted("f32").0);
    let by_layer = |score_layers: &[u32], source| ContextOptions {
        scores_by_layer: true,
        score_layers: score_layers.to_vec(),
        ..several(FlashAttention::Off, source)
    };
    for (options, why) in [
        (by_layer(&[0, 1], ScoreSource::Callback), "callback"),
        (by_layer(&[1, 0], ScoreSource::Graph), "ascending"),
        (by_layer(&[1, 1], ScoreSource::Graph), "ascending"),
    ] {
        let made = LlamaEngine::new(&model, options, &hae::llama::SamplerOptions::GREEDY);
        let error = made.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            error.contains("scores_by_layer") && error.contains(why),
            "{error}"
        );
    }
}

#[test]
fn of_a_pass_that_does_not_fit_nothing_goes_in() {
    let model = load(converted("f32").0);
    for kv_size in [None, Some(256)] {
        let options = ContextOptions {
            kv_size,
            ..several(FlashAttention::Off, ScoreSource::Graph)
        };
        let mut engine = engine(&model, options);
        for i in 0..10 {
            together(&mut engine, &[Rows::new(0, 50 * i, 50)]).unwrap();
        }
        let held = engine.cells_of_seq(0).unwrap();
        let many = [Rows::new(1, 0, 10).asking(&[9]), Rows::new(2, 0, 3)];
        let full = together(&mut engine, &many);
        assert!(
            matches!(full, Err(Error::ContextFull { n_ctx: 512 })),
            "{full:?}"
        );
        assert_eq!(engine.cells_of_seq(0).unwrap(), held);
        assert!(engine.cells_of_seq(1).unwrap().is_empty());
        assert!(engine.logits_of(0).is_err() && engine.logits().is_err());
        // One of them does.
        together(&mut engine, &many[..1]).unwrap();
        assert_eq!(engine.cells_of_seq(1).unwrap().len(), 10);
    }
}

#[test]
fn what_cannot_be_told_apart_is_refused() {
    let model = load(converted("f32").0);
    let mut engine = engine(&model, several(FlashAttention::Off, ScoreSource::Callback));
    let (a, b) = (Rows::new(0, 0, 4), Rows::new(1, 0, 4));
    let mut beyond = b.clone();
    beyond.tokens[2] = Token::MAX;
    for (parts, why) in [
        (vec![], "without parts"),
        (
            vec![a.clone(), Rows::new(0, 4, 1)],
            "two parts of sequence 0",
        ),
        (
            vec![a.clone().asking(&[3]), b.clone().asking(&[3])],
            "beside",
        ),
        (
            vec![a.clone(), Rows::new(1, 0, 61)],
            "61 rows of sequence 1 beside 4",
        ),
        (vec![a.clone(), Rows::new(4, 0, 2)], "sequence 4 of 4"),
        (vec![a.clone(), beyond], "vocabulary"),
        (vec![a.clone(), b.clone().asking(&[4])], "query rows"),
    ] {
        let error = together(&mut engine, &parts).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    assert!((0..4).all(|seq| engine.cells_of_seq(seq).unwrap().is_empty()));
    // An engine for one sequence takes one.
    let mut single = crate::model::engine(&model, exact(64));
    assert!(together(&mut single, &[a.clone(), b]).is_err());
    together(&mut single, &[a]).unwrap();
}

#[test]
fn there_are_as_many_sequences_as_rows_of_a_batch_at_most() {
    let model = load(converted("f32").0);
    let options = |n_batch| ContextOptions {
        n_seq_max: 64,
        n_batch,
        n_ubatch: n_batch,
        ..exact(512)
    };
    let refused = LlamaEngine::new(&model, options(63), &hae::llama::SamplerOptions::GREEDY);
    let error = refused.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("64 sequences in batches of 63"), "{error}");
    let mut engine = engine(&model, options(64));
    let all: Vec<_> = (0..64).map(|seq| Rows::new(seq, 0, 1)).collect();
    let came = together(&mut engine, &all).unwrap();
    assert!(came.iter().all(|came| came.logits.is_some()));
}
