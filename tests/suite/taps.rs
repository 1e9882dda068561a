//! Scores that the graph sums up: against PyTorch's attention, and against the weights that the
//! evaluation callback reads from an untouched graph without flash attention.

use hae::attend::{Kind, Lookup};
use hae::cache::Pos;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, ScoreSource};

use crate::lookup::looking;
use crate::model::{
    TEXT, converted, engine, exact, golden_prompt, goldens, load, load_vision, prefill, repository,
};
use crate::npz::{max_abs_diff, read};
use crate::precision;
use crate::random_llama::{Shape, bloom, grok, llama};

const KINDS: [(CacheType, CacheType); 5] = [
    (CacheType::F32, CacheType::F32),
    (CacheType::F16, CacheType::F16),
    (CacheType::Q8_0, CacheType::F16),
    (CacheType::Q8_0, CacheType::Q8_0),
    (CacheType::Q4_0, CacheType::Q8_0),
];

fn tapped(flash: FlashAttention, kinds: (CacheType, CacheType), layers: &[u32]) -> ContextOptions {
    let mut options = exact(1024);
    options.flash_attention = flash;
    (options.type_k, options.type_v) = kinds;
    options.score_layers = layers.to_vec();
    options
}

/// The same read by the callback, which needs flash attention off and so no quantized V.
fn called_back(mut options: ContextOptions) -> ContextOptions {
    options.score_source = ScoreSource::Callback;
    if options.type_v.is_quantized() {
        options.type_v = CacheType::F16;
    }
    options
}

#[test]
fn attention_of_layer_0_is_pytorchs() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let golden = goldens().into_iter().find(|g| g.id() == "qa0").unwrap();
    let expected = &read("tiny-phi3v/qa0_attention.npz")["layer_0"];
    let [n_head, n, _] = expected.shape[..] else {
        panic!("{:?}", expected.shape)
    };
    let segments = golden.segments(&model, &mut vision);
    let first = n - segments.last().unwrap().len();
    let mean = |query: usize, key: usize| {
        let head = |h: usize| expected.data[(h * n + query) * n + key];
        (0..n_head).map(head).sum::<f32>() / n_head as f32
    };
    // One row, some, and all of the micro-batch.
    let sets: [Vec<usize>; 4] = [
        vec![n - 1],
        vec![first],
        (first..n).step_by(2).collect(),
        (first..n).collect(),
    ];
    for flash in [FlashAttention::On, FlashAttention::Off] {
        for queries in &sets {
            let kinds = (CacheType::F16, CacheType::F16);
            let mut engine = engine(&model, tapped(flash, kinds, &[0]));
            let mut seen = Observation::default();
            let wanted = |pos: Pos| queries.contains(&(pos as usize));
            prefill(&mut engine, &segments, &mut seen, wanted);
            assert_eq!(seen.queries.len(), queries.len());
            let over = |fold: fn(f32, f32) -> f32| -> Vec<f32> {
                let of = |key| queries.iter().map(|&q| mean(q, key)).reduce(fold).unwrap();
                (0..n).map(of).collect()
            };
            // A fresh cache fills its cells in order, so cells are positions here.
            let error = max_abs_diff(&seen.max[..n], &over(f32::max));
            assert!(
                error < precision::attention(1e-3),
                "{flash:?} {queries:?}: {error}"
            );
            let error = max_abs_diff(&seen.sum[..n], &over(|a, b| a + b));
            assert!(
                error < precision::attention(1e-3) * queries.len() as f32,
                "{flash:?}: {error}"
            );
            assert!(seen.sum[n..].iter().all(|&a| a == 0.0));
            assert_eq!(seen.sum.len(), seen.max.len());
        }
    }
}

/// Largest difference of two observations, relative to the largest score.
fn difference(ours: &Observation, theirs: &Observation) -> f32 {
    assert_eq!(ours.queries, theirs.queries);
    let largest = |all: &[f32]| all.iter().copied().fold(0.0, f32::max);
    let sums = max_abs_diff(&ours.sum, &theirs.sum) / largest(&theirs.sum);
    let maxima = max_abs_diff(&ours.max, &theirs.max) / largest(&theirs.max);
    sums.max(maxima)
}

/// Whether the callback rounds queries as scores are computed. Quantized keys that lie apart are multiplied by the
/// processor where the device cannot (Vulkan), with queries of eight bits: 0.5 to 2 % off, where the device itself is 0.3 %
/// off at most. So on a GPU `taps_oracle` has these, with a plain softmax.
fn is_comparable(kinds: (CacheType, CacheType)) -> bool {
    !(precision::on_gpu() && kinds.0.is_quantized())
}

/// Over a prompt with a picture and the tokens after it, whose graphs are one graph used again.
#[test]
fn every_cache_type_agrees_with_the_callback() {
    let (text, vision) = converted("f16");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let golden = goldens().into_iter().find(|g| g.id() == "qa0").unwrap();
    let segments = golden.segments(&model, &mut vision);
    let behind = |pos: Pos| pos > 202 && pos % 3 != 0;
    for kinds in KINDS.into_iter().filter(|kinds| is_comparable(*kinds)) {
        let quantized = kinds.0.is_quantized();
        for (flash, layers, tolerance) in [
            // The input of layer 0 does not depend on any attention.
            (FlashAttention::On, &[0][..], 1e-5),
            (FlashAttention::Off, &[0], 1e-5),
            // Deeper ones differ by what flash attention, and the type of V, make of the values. Without it
            // queries of a prompt are rounded to the eight bits of a quantized K.
            (
                FlashAttention::On,
                &[0, 2, 5],
                if quantized { 5e-2 } else { 2e-2 },
            ),
            (FlashAttention::Off, &[0, 2, 5], 1e-5),
        ] {
            // The callback cannot read with a quantized V, which deeper layers depend on.
            let deep = layers.len() > 1;
            if kinds.1.is_quantized() && (deep || flash == FlashAttention::Off) {
                continue;
            }
            let options = tapped(flash, kinds, layers);
            let mut theirs = engine(&model, called_back(options.clone()));
            let mut ours = engine(&model, options);
            let (mut seen, mut expected) = (Observation::default(), Observation::default());
            let mut pos = prefill(&mut theirs, &segments, &mut expected, behind);
            prefill(&mut ours, &segments, &mut seen, behind);
            assert!(expected.queries.len() > 4);
            let error = difference(&seen, &expected);
            let tolerance = precision::attention(tolerance);
            assert!(error < tolerance, "{kinds:?} {flash:?} {layers:?}: {error}");
            // Across the border of 256 cells in view, where the graph changes.
            let n_kv = seen.sum.len();
            let (mut cells, mut steps) = (Vec::new(), 0);
            while steps < 24 || seen.sum.len() == n_kv {
                let (tokens, places) = ([500 + steps], [pos]);
                let batch = Batch {
                    queries: &[0],
                    logits: true,
                    ..Batch::new(Input::Tokens(&tokens), &places)
                };
                theirs.decode(batch, &mut cells, &mut expected).unwrap();
                ours.decode(batch, &mut cells, &mut seen).unwrap();
                let error = difference(&seen, &expected);
                assert!(error < tolerance, "{kinds:?} {flash:?} {layers:?}: {error}");
                assert_eq!(seen.sum, seen.max);
                pos += 1;
                steps += 1;
            }
        }
    }
}

/// Feeds 1700 tokens in micro-batches; the rows of the last one that `wanted` picks are queries.
fn long_prompt(engine: &mut LlamaEngine, wanted: impl Fn(u32) -> bool) -> Observation {
    let (mut cells, mut seen) = (Vec::new(), Observation::default());
    let tokens: Vec<i32> = (0..1700).map(|i| (i * 7919 + i * i) % 1000 + 3).collect();
    let places: Vec<Pos> = (0..1700).collect();
    for (tokens, pos) in tokens.chunks(425).zip(places.chunks(425)) {
        let last = pos[0] == 1275;
        let queries: Vec<u32> = (0..425).filter(|&row| last && wanted(row)).collect();
        let batch = Batch {
            queries: &queries,
            logits: last,
            ..Batch::new(Input::Tokens(tokens), pos)
        };
        engine.decode(batch, &mut cells, &mut seen).unwrap();
    }
    seen
}

/// Wide enough that the rows are computed in several pieces, the last one shorter.
#[test]
fn many_rows_over_grouped_heads_agree_with_the_callback() {
    let dir = tempfile::tempdir().unwrap();
    for width in [64, 96] {
        let path = dir.path().join(format!("{width}.gguf"));
        let shape = Shape {
            n_layer: 2,
            n_head: 32,
            n_head_kv: 8,
            width,
        };
        llama(&path, shape);
        let model = load(&path);
        for (kinds, layers) in [
            ((CacheType::F16, CacheType::F16), &[0][..]),
            ((CacheType::Q8_0, CacheType::Q8_0), &[0]),
            ((CacheType::F16, CacheType::F16), &[0, 1]),
        ]
        .into_iter()
        .filter(|&(kinds, _)| is_comparable(kinds))
        {
            let mut options = tapped(FlashAttention::On, kinds, layers);
            options.n_ctx = 2048;
            options.n_batch = 512;
            let mut theirs = engine(&model, called_back(options.clone()));
            for stride in [1, 4] {
                let wanted = |row: u32| row.is_multiple_of(stride);
                theirs.clear();
                let expected = long_prompt(&mut theirs, wanted);
                // Scores of rows add up to one.
                let total: f32 = expected.sum.iter().sum();
                assert!((total - expected.queries.len() as f32).abs() < 0.01);
                let even = 1.0 / 1700.0;
                assert!(expected.max.iter().any(|&a| a > 5.0 * even), "not sharp");
                for flash in [FlashAttention::On, FlashAttention::Off] {
                    if flash == FlashAttention::Off && kinds.1.is_quantized() {
                        continue;
                    }
                    let mut options = options.clone();
                    options.flash_attention = flash;
                    let seen = long_prompt(&mut engine(&model, options), wanted);
                    let error = difference(&seen, &expected);
                    // A flash attention of F16 values lies below layer 1, whose products a GPU rounds as well.
                    let deep = flash == FlashAttention::On && layers.len() > 1;
                    let tolerance = match (deep, precision::on_gpu()) {
                        (false, _) => precision::attention(1e-4),
                        (true, false) => 5e-3,
                        (true, true) => 2e-2,
                    };
                    let what = format!("{width} {kinds:?} {layers:?} {stride} {flash:?}: {error}");
                    println!("{what}");
                    assert!(error < tolerance, "{what}");
                }
            }
        }
    }
}

/// Bits of the logits after a prompt and after each of some tokens.
fn trace(model: &Model, options: ContextOptions, queries: bool) -> Vec<Vec<u32>> {
    let mut engine = engine(model, options);
    let bits = |engine: &LlamaEngine| -> Vec<u32> {
        let logits = engine.logits().unwrap();
        logits.iter().map(|x| x.to_bits()).collect()
    };
    let (mut cells, mut seen) = (Vec::new(), Observation::default());
    let tokens: Vec<i32> = (0..300).map(|i| 100 + i).collect();
    let places: Vec<Pos> = (0..300).collect();
    let rows: Vec<u32> = (200..290).collect();
    let batch = Batch {
        queries: if queries { &rows } else { &[] },
        logits: true,
        ..Batch::new(Input::Tokens(&tokens), &places)
    };
    engine.decode(batch, &mut cells, &mut seen).unwrap();
    let mut all = vec![bits(&engine)];
    for pos in 300..316 {
        let batch = Batch {
            seq: 0,
            input: Input::Tokens(&[pos]),
            pos: &[pos],
            // Now and then, so that graphs with and without taps follow each other.
            queries: if queries && pos % 3 > 0 { &[0] } else { &[] },
            logits: true,
            lookup: None,
        };
        engine.decode(batch, &mut cells, &mut seen).unwrap();
        assert_eq!(seen.sum.is_empty(), batch.queries.is_empty());
        all.push(bits(&engine));
    }
    all
}

#[test]
fn taps_leave_every_bit_of_the_logits() {
    let model = load(&repository(TEXT));
    for flash in [FlashAttention::On, FlashAttention::Off] {
        for kinds in KINDS {
            if flash == FlashAttention::Off && kinds.1.is_quantized() {
                continue;
            }
            let without = trace(&model, tapped(flash, kinds, &[]), false);
            assert_eq!(without.len(), 17);
            for layers in [&[0][..], &[1, 4], &[0, 1, 2, 3, 4, 5]] {
                for queries in [false, true] {
                    let with = trace(&model, tapped(flash, kinds, layers), queries);
                    assert!(with == without, "{flash:?} {kinds:?} {layers:?} {queries}");
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_tapped_is_refused() {
    let model = load(&repository(TEXT));
    let kinds = (CacheType::F16, CacheType::F16);
    let mut options = tapped(FlashAttention::On, kinds, &[0]);
    options.n_ubatch = 4;
    let mut engine = engine(&model, options);
    let mut decode = |n: i32, queries: &[u32]| {
        let tokens: Vec<i32> = (0..n).collect();
        let batch = Batch {
            queries,
            logits: true,
            ..Batch::new(Input::Tokens(&tokens), &tokens)
        };
        let mut seen = Observation::default();
        let done = engine.decode(batch, &mut Vec::new(), &mut seen);
        engine.clear();
        done.map(|()| seen.sum.iter().sum::<f32>())
            .map_err(|e| e.to_string())
    };
    for (n, queries, expected) in [
        // The scores of two micro-batches.
        (5, &[0, 4][..], "scores of 5 rows in batches of 4"),
        // Rows that there are not, or in disorder: refused before llama.cpp hears of them.
        (3, &[3], "query rows [3] of 3"),
        (3, &[2, 1], "query rows [2, 1] of 3"),
        (3, &[u32::MAX], "query rows [4294967295] of 3"),
    ] {
        let text = decode(n, queries).unwrap_err();
        assert!(text.contains(expected) && !text.contains('\n'), "{text}");
    }
    // None of it stays behind.
    assert!((decode(3, &[1, 2]).unwrap() - 2.0).abs() < 1e-3);
    assert!(decode(5, &[]).unwrap() == 0.0);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.gguf");
    crate::others::gemma3_text().write(&path);
    let model = load(&path);
    let sampler = hae::llama::SamplerOptions::GREEDY;
    let text = LlamaEngine::new(&model, tapped(FlashAttention::On, kinds, &[0]), &sampler)
        .err()
        .unwrap()
        .to_string();
    assert!(text.contains("memory cannot be read"), "{text}");
}

/// Distances in the place of positions (ALiBi), with flash attention on and off; scores with a cap,
/// which llama.cpp computes without it.
#[test]
fn other_kinds_of_attention_agree_with_the_callback() {
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<i32> = (0..200).map(|i| (i * 7919 + i * i) % 1000 + 3).collect();
    let places: Vec<Pos> = (0..200).collect();
    let rows: Vec<u32> = (100..200).step_by(3).collect();
    let scores = |model: &Model, options: ContextOptions| {
        let mut seen = Observation::default();
        let batch = Batch {
            queries: &rows,
            logits: true,
            ..Batch::new(Input::Tokens(&tokens), &places)
        };
        let mut engine = engine(model, options);
        engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
        seen
    };
    let path = dir.path().join("model.gguf");
    let makers: [fn(&std::path::Path); 3] = [
        |path| bloom(path, 2, 4),
        |path| bloom(path, 2, 6),
        |path| grok(path, 2),
    ];
    for (i, make) in makers.into_iter().enumerate() {
        make(&path);
        let model = load(&path);
        for flash in [FlashAttention::On, FlashAttention::Off] {
            for (layers, tolerance) in [(&[0][..], 1e-4), (&[0, 1], 5e-3)] {
                let options = tapped(flash, (CacheType::F16, CacheType::F16), layers);
                let expected = scores(&model, called_back(options.clone()));
                let even = 1.0 / 200.0;
                assert!(expected.max.iter().any(|&a| a > 3.0 * even), "not sharp");
                let error = difference(&scores(&model, options), &expected);
                println!("model {i}, {flash:?}, layers {layers:?}: {error:.1e}");
                let tolerance = precision::attention(tolerance);
                assert!(error < tolerance, "{i} {flash:?} {layers:?}: {error}");
            }
        }
    }
}

/// A layer that looks cells up hands over the weights that it chooses by: the scores of all cells
/// in view, as without lookups. Layers before it attend to everything here, so that it is asked the
/// same.
#[test]
fn a_lookups_own_weights_are_the_scores() {
    let (model, segments) = golden_prompt("qa0");
    let scores = |options: ContextOptions, first_layer: Option<u32>, plain_lookups: bool| {
        let options = match first_layer {
            Some(first) => looking(options, first, plain_lookups),
            None => options,
        };
        let mut engine = engine(&model, options);
        let start = prefill(&mut engine, &segments, &mut Observation::default(), |_| {
            false
        });
        let steps = (start..start + 4).map(|pos| {
            let lookup = Lookup {
                kinds: vec![Kind::Vision; pos as usize],
                n_vision: 9,
                n_text: 0,
            };
            let batch = Batch {
                seq: 0,
                input: Input::Tokens(&[7 + pos]),
                pos: &[pos],
                queries: &[0],
                logits: true,
                lookup: first_layer.map(|_| &lookup),
            };
            let mut seen = Observation::default();
            engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
            assert_eq!(seen.sum, seen.max);
            let logits = engine.logits().unwrap().to_vec();
            (seen.sum[..=pos as usize].to_vec(), logits)
        });
        steps.collect::<Vec<_>>()
    };
    for kinds in KINDS {
        for (flash, plain) in [
            (FlashAttention::On, false),
            (FlashAttention::On, true),
            (FlashAttention::Off, true),
        ] {
            if flash == FlashAttention::Off && kinds.1.is_quantized() {
                continue;
            }
            for layers in [&[0][..], &[2], &[1, 2]] {
                let options = tapped(flash, kinds, layers);
                let last = layers.last().copied();
                let looked_up = scores(options.clone(), last, plain);
                let whole = scores(options, None, plain);
                for (step, (ours, expected)) in looked_up.iter().zip(&whole).enumerate() {
                    let at = format!("{kinds:?} {flash:?}, plain {plain}, {layers:?}, step {step}");
                    let error = max_abs_diff(&ours.0, &expected.0);
                    assert!(error < precision::attention(1e-3), "{at}: {error}");
                    let sum: f32 = ours.0.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-3, "{at}: {sum}");
                    assert_ne!(ours.1, expected.1, "{at}: nothing was looked up");
                }
            }
        }
    }
}
