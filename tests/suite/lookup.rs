//! Lookups: every layer attends to the cells that its own query asks for. The oracle is
//! tests/golden/lookup, computed by numpy.

use hae::attend::{Attend, Kind, Lookup};
use hae::engine::{Batch, Engine, Input, Observation};
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine};
use hae::policy::Amount;
use serde::Deserialize;

use crate::bin::{answer, refusal};
use crate::model::{
    converted, engine, exact, golden_prompt, goldens, load, load_vision, prefill, takes,
};
use crate::npz::{self, Array};
use crate::precision;

#[derive(Debug, Deserialize)]
struct Scenario {
    name: String,
    /// The golden prompt's id.
    prompt: String,
    /// Tokens to feed one by one behind the prompt, whatever is sampled.
    ids: Vec<i32>,
    /// By position: 0 always, 1 visual, 2 text.
    kinds: Vec<u8>,
    n_vision: usize,
    n_text: usize,
    first_layer: u32,
}

impl Scenario {
    /// What the token at this position may leave out; cells hold positions in order.
    fn lookup(&self, pos: usize) -> Lookup {
        let kinds = self.kinds[..pos].iter().map(|kind| match kind {
            1 => Kind::Vision,
            2 => Kind::Text,
            _ => Kind::Always,
        });
        Lookup {
            kinds: kinds.collect(),
            n_vision: self.n_vision,
            n_text: self.n_text,
        }
    }
}

/// What numpy computed for one scenario.
struct Expected {
    /// `[steps, vocab]`
    logits: Array,
    /// `[steps, layers, positions]`: 1 where a layer attended to.
    sets: Array,
    /// `[steps, layers]`: how much less than the last chosen weight the next one is.
    gaps: Array,
}

fn scenarios() -> Vec<(Scenario, Expected)> {
    #[derive(Deserialize)]
    struct Index {
        scenarios: Vec<Scenario>,
    }
    let text = std::fs::read_to_string(npz::golden("lookup/lookup.json")).unwrap();
    let index: Index = serde_json::from_str(&text).unwrap();
    let mut arrays = npz::read("lookup/lookup.npz");
    let all = index.scenarios.into_iter().map(|s| {
        let expected = Expected {
            logits: arrays.remove(&s.name).unwrap(),
            sets: arrays.remove(&format!("{}_sets", s.name)).unwrap(),
            gaps: arrays.remove(&format!("{}_gaps", s.name)).unwrap(),
        };
        (s, expected)
    });
    all.collect()
}

/// A context that may look up, and lets the sets be read.
pub fn looking(options: ContextOptions, first_layer: u32, plain_lookups: bool) -> ContextOptions {
    ContextOptions {
        attend: Attend {
            vision: Some(Amount::Cells(1)),
            text: Some(Amount::Cells(1)),
            first_layer,
            ..Attend::default()
        },
        keep_sets: true,
        plain_lookups,
        ..options
    }
}

/// Feeds one token.
fn step(engine: &mut LlamaEngine, token: i32, pos: i32, lookup: Option<&Lookup>) -> Vec<f32> {
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(&[token]),
        pos: &[pos],
        queries: &[],
        logits: true,
        lookup,
    };
    let mut cells = Vec::new();
    engine
        .decode(batch, &mut cells, &mut Observation::default())
        .unwrap();
    assert_eq!(cells, [pos as u32]);
    engine.logits().unwrap().to_vec()
}

/// The sets of every layer and step are numpy's, and so are the logits: the way of the processor
/// and the way of every backend, with flash attention and without.
#[test]
fn lookups_equal_numpy() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let goldens = goldens();
    // Flash attention takes an F32 cache as F16 while the prompt goes in, so that two cells with
    // weights this near may change places. With wrong sets logits move by 2 and more.
    let ways = [
        (FlashAttention::Off, true, 1e-3, 0.0),
        (FlashAttention::On, false, 1e-1, 2e-2),
        (FlashAttention::On, true, 1e-1, 2e-2),
    ];
    let mut compared = [0; 3];
    let near_of = |near: f32| {
        if precision::on_gpu() {
            near.max(2e-2)
        } else {
            near
        }
    };
    for (scenario, (s, expected)) in scenarios().into_iter().enumerate() {
        let golden = goldens.iter().find(|g| g.id() == s.prompt).unwrap();
        let segments = golden.segments(&model, &mut vision);
        for (way, &(flash_attention, plain, bound, near)) in ways.iter().enumerate() {
            let near = near_of(near);
            let base = ContextOptions {
                flash_attention,
                // Two and three threads share heads and cells in other ways than one.
                n_threads: 1 + i32::try_from(scenario % 3).unwrap(),
                ..exact(1024)
            };
            let mut engine = engine(&model, looking(base, s.first_layer, plain));
            let start = prefill(&mut engine, &segments, &mut Observation::default(), |_| {
                false
            });
            // Until two near cells change places.
            let mut same = true;
            for (k, (&id, pos)) in s.ids.iter().zip(start..).enumerate() {
                let at = format!("{} step {k}, {flash_attention:?}, plain {plain}", s.name);
                let lookup = s.lookup(pos as usize);
                let ours = step(&mut engine, id, pos, Some(&lookup));
                let n = s.kinds.len();
                let layers = expected.sets.row(k).chunks(n).enumerate();
                let gaps = expected.gaps.row(k);
                for (layer, set) in layers.skip(s.first_layer as usize) {
                    let set = (0u32..).zip(set).filter(|(_, seen)| **seen == 1.0);
                    let set: Vec<u32> = set.map(|(cell, _)| cell).collect();
                    let chosen = engine.looked_up(layer as u32).unwrap();
                    if gaps[layer] < near {
                        same &= chosen == set;
                        continue;
                    }
                    assert_eq!(chosen, set, "{at}, layer {layer}");
                    compared[way] += 1;
                }
                assert!((0..s.first_layer).all(|layer| engine.looked_up(layer).is_err()));
                let error = npz::max_abs_diff(&ours, expected.logits.row(k));
                let bound = match same {
                    true => precision::logits(bound),
                    false => precision::near_sets(2.0 * bound, 2.0),
                };
                assert!(error < bound, "{at}: {error}");
            }
        }
    }
    // Six layers; 5 scenarios of 20 and of 10 steps, one of them with two dense layers.
    let all = (4 * 6 + 4) * (20 + 10);
    assert!(compared[0] == all || precision::on_gpu(), "{compared:?}");
    assert!(
        compared[1] > all / 2 && compared[1] == compared[2],
        "{compared:?}"
    );
}

/// The processor's own operations for each type of cache choose what llama.cpp's choose, and
/// attend to it as they do.
#[test]
fn every_cache_type_is_looked_up_alike() {
    let (model, segments) = golden_prompt("story0");
    for cache_type in [
        CacheType::F16,
        CacheType::Bf16,
        CacheType::Q8_0,
        CacheType::Q5_1,
        CacheType::Q4_0,
    ]
    .into_iter()
    .filter(|&kind| takes(kind))
    {
        let base = ContextOptions {
            flash_attention: FlashAttention::On,
            type_k: cache_type,
            type_v: cache_type,
            n_threads: 2,
            ..exact(1024)
        };
        let mut ways = [false, true].map(|plain| {
            let mut engine = engine(&model, looking(base.clone(), 0, plain));
            let start = prefill(&mut engine, &segments, &mut Observation::default(), |_| {
                false
            });
            (engine, start)
        });
        let start = ways[0].1;
        let (mut chosen, mut both) = (0, 0);
        for pos in start..start + 10 {
            let lookup = sixteen(pos);
            let [ours, theirs] = ways.each_mut().map(|(engine, _)| {
                let logits = step(engine, 7 + pos, pos, Some(&lookup));
                let sets: Vec<Vec<u32>> = (0..model.n_layer())
                    .map(|layer| engine.looked_up(layer).unwrap())
                    .collect();
                (logits, sets)
            });
            for (layer, (a, b)) in ours.1.iter().zip(&theirs.1).enumerate() {
                assert_eq!(a.len(), 17, "{cache_type:?}, layer {layer}");
                chosen += a.len();
                both += a.iter().filter(|cell| b.contains(cell)).count();
            }
            let apart = npz::max_abs_diff(&ours.0, &theirs.0);
            println!("{cache_type:?} {pos}: {apart} {both} of {chosen}");
            // Wrong sets move logits by 2 and more; of 17 cells, so may one.
            assert!(
                apart < 0.5 || precision::on_gpu() && both < chosen,
                "{cache_type:?} at {pos}: {apart}"
            );
        }
        // Near ones change places: llama.cpp rounds queries to the type of the products.
        let alike = precision::sets_alike(970);
        assert!(
            both * 1000 > chosen * alike,
            "{cache_type:?}: {both} of {chosen}"
        );
    }
}

/// A context that may look up, and does not, gives the bits of one that may not; so does one that
/// is given more than there is.
#[test]
fn without_lookups_the_bits_are_those_of_a_plain_context() {
    let (model, segments) = golden_prompt("story0");
    for flash_attention in [FlashAttention::Off, FlashAttention::On] {
        let base = ContextOptions {
            flash_attention,
            type_k: CacheType::F16,
            type_v: CacheType::F16,
            ..exact(1024)
        };
        let run = |options: ContextOptions, every: i32| {
            let mut engine = engine(&model, options);
            let start = prefill(&mut engine, &segments, &mut Observation::default(), |_| {
                false
            });
            let all: Vec<Vec<f32>> = (start..start + 12)
                .map(|pos| {
                    let looks_up = (pos - start) % every == every - 1;
                    let lookup = looks_up.then(|| sixteen(pos));
                    step(&mut engine, 7 + pos, pos, lookup.as_ref())
                })
                .collect();
            all
        };
        let plain = run(base.clone(), i32::MAX);
        let able = run(looking(base.clone(), 0, false), i32::MAX);
        assert_eq!(plain, able);
        let some = run(looking(base.clone(), 0, false), 4);
        assert_eq!(plain[..3], some[..3]);
        assert_ne!(plain[3], some[3]);
    }
}

/// Sixteen of all cells.
fn sixteen(pos: i32) -> Lookup {
    Lookup {
        kinds: vec![Kind::Vision; pos as usize],
        n_vision: 16,
        n_text: 0,
    }
}

/// What a user sees: the same answer from a tenth of the visual cells, and a report that says so;
/// under eviction, with a quantized cache and without flash attention too.
#[test]
fn answers_stay_and_reports_say_what_was_looked_at() {
    let asked = |flags: &[&str]| {
        let mut args = vec!["run", "--image", "models/demo.png", "--num-crops", "16"];
        args.extend([
            "-p",
            "Where is the red triangle?",
            "--temp",
            "0",
            "-o",
            "json",
        ]);
        args.extend(flags);
        let report: serde_json::Value = serde_json::from_str(&answer(&args)).unwrap();
        assert_eq!(report["text"], " Row 6, column 7", "{flags:?}");
        report["attended"].clone()
    };
    assert!(asked(&[]).is_null());
    assert!(asked(&["--attend", "1.0"]).is_null());
    let ways: [&[&str]; 4] = [
        &["-t", "2"],
        &["-fa", "off"],
        &["-ctk", "q8_0", "-ctv", "q8_0"],
        &["--kv-policy", "h2o", "--kv-budget", "0.5"],
    ];
    for way in ways {
        let attended = asked(&[way, &["--attend", "0.1"]].concat());
        assert_eq!(attended["steps"], 7, "{way:?}");
        let share = attended["vision"].as_f64().unwrap();
        assert!((0.1..0.12).contains(&share), "{way:?}: {share}");
    }
    let run = ["run", "-p", "Why?", "--attend"];
    for (flags, reason) in [
        (&["0"][..], "--attend: 0 cells, expected at least 1"),
        (&["1.5"], "--attend: a share of 1.5"),
        (&["0.1", "--attend-from", "99"], "--attend-from: layer 99"),
    ] {
        let error = refusal(&[&run[..], flags].concat());
        assert!(error.contains(reason), "{error}");
    }
}
