//! A part of the layers on a GPU (`-ngl`), each with its K and V beside it: chats under every policy say what they say
//! with all layers on one side, and attention is read on both. The same of several GPUs, which share layers or rows.
//! Without a GPU there is one side, without a second one nothing to share, and nothing is run.

use hae::chat::{Begin, Chat, ChatOptions};
use hae::engine::Observation;
use hae::image::{self, Picture};
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, ModelOptions, Placement,
    SplitMode, VisionOptions,
};
use hae::policy::{self, Amount, DapMode, PolicyOptions, PolicySpec};
use hae::turn::Turn;

use crate::bin::hae;
use crate::model::{
    PICTURE, TEXT, VISION, WHERE, engine, exact, goldens_of, load_vision, prefill, quiet,
    repository,
};
use crate::npz::max_abs_diff;
use crate::precision;

/// Layers on the GPU, llama.cpp's last one being the product with the vocabulary: none, some, all but the first, all.
fn shares(n_layer: u32) -> [u32; 4] {
    [0, n_layer / 2, n_layer, n_layer + 1]
}

fn load(n_gpu_layers: u32) -> Model {
    let options = ModelOptions {
        n_gpu_layers: Some(n_gpu_layers),
        ..ModelOptions::default()
    };
    Model::load(&repository(TEXT), &options).unwrap()
}

fn n_layer() -> u32 {
    load(0).n_layer()
}

/// Whether the cache lies where the layers do.
fn assert_lies_beside(engine: &LlamaEngine, n_gpu_layers: u32) {
    let footprint = engine.footprint();
    let holds = |gpu: bool| {
        let mut of = footprint.iter().filter(|f| f.device.is_some() == gpu);
        of.any(|f| f.kv > 0)
    };
    let sides = [holds(false), holds(true)];
    let n_layer = engine.model().n_layer();
    let expected = [n_gpu_layers <= n_layer, n_gpu_layers > 1];
    assert_eq!(sides, expected, "{n_gpu_layers}: {footprint:?}");
}

fn contexts() -> Vec<ContextOptions> {
    let with = |flash_attention, kind: CacheType| ContextOptions {
        flash_attention,
        type_k: kind,
        type_v: kind,
        ..exact(1024)
    };
    vec![
        with(FlashAttention::On, CacheType::Q8_0),
        with(FlashAttention::On, CacheType::F16),
        // V is transposed.
        with(FlashAttention::Off, CacheType::F16),
    ]
}

/// Two questions about a picture, of which the second calls back what the first had pruned, and how much left. The
/// picture is always encoded by the GPU: what that rounds otherwise is the same for all who answer.
fn chat(model: &Model, context: &ContextOptions, policy: &PolicySpec) -> ([String; 2], usize) {
    let options = VisionOptions {
        use_gpu: true,
        n_threads: 1,
    };
    let vision = hae::llama::Vision::load(&repository(VISION), model, &options).unwrap();
    let options = ChatOptions {
        context: context.clone(),
        policy: policy.clone(),
        ..ChatOptions::default()
    };
    let mut chat = Chat::begin(model, Some(vision), &options, Begin::default()).unwrap();
    let picture = image::load(&repository(PICTURE), &image::Limits::default()).unwrap();
    let mut evicted = 0;
    let mut ask = |text, pictures: &[Picture]| {
        let turn = Turn {
            text,
            pictures,
            n_predict: Some(24),
            expected: None,
        };
        let answer = quiet(|hooks| chat.turn(turn, hooks)).unwrap();
        evicted += answer.kv.cells.evicted.vision + answer.kv.cells.evicted.text;
        answer.text.trim().to_owned()
    };
    let first = ask(WHERE, &[picture]);
    let second = ask("Where is the blue square?", &[]);
    ([first, second], evicted)
}

/// `cargo xtask lavapipe` names the one that it means: tests that pass on the processor say nothing of it.
#[test]
fn the_device_that_was_asked_for_is_there() {
    let Some(name) = std::env::var("HAE_TEST_DEVICE").ok() else {
        return;
    };
    let devices = hae::llama::devices().unwrap();
    let mut gpus = devices.iter().filter(|device| device.is_gpu);
    assert!(
        gpus.any(|device| device.description.contains(&name)),
        "{name}: {devices:?}"
    );
}

/// Budgets, and what `hae` does without one in each of its modes.
fn policies() -> Vec<PolicySpec> {
    let budget = |name| {
        let kv_budget = Some(Amount::Share(0.6));
        let options = PolicyOptions {
            kv_budget,
            ..PolicyOptions::default()
        };
        PolicySpec::new(name, options)
    };
    let mode = |dap_mode| {
        let options = PolicyOptions {
            dap_mode,
            ..PolicyOptions::default()
        };
        PolicySpec::new("hae", options)
    };
    let modes = [DapMode::Exact, DapMode::Early, DapMode::Midway];
    policy::names().map(budget).chain(modes.map(mode)).collect()
}

/// The kinds of caches go round, so that each policy meets one of them, and each kind several policies.
#[test]
fn every_policy_answers_with_any_share_of_the_layers() {
    if !precision::on_gpu() {
        return;
    }
    let [_, shares @ ..] = shares(n_layer());
    let contexts = contexts();
    let mut n_evicted = 0;
    for (policy, context) in policies().iter().zip(contexts.iter().cycle()) {
        let name = format!(
            "{} {:?} {:?}",
            policy.name, policy.options.dap_mode, context.type_k
        );
        let (said, _) = chat(&load(0), context, policy);
        for n in shares {
            let (answers, evicted) = chat(&load(n), context, policy);
            assert_eq!(answers, said, "{name}: {n} layers on the GPU");
            n_evicted += evicted;
        }
    }
    assert!(n_evicted > 1000, "{n_evicted}");
}

/// What a prompt with a picture leaves, and the attention of every third row.
fn observe(model: &Model, context: ContextOptions) -> (LlamaEngine, Observation) {
    let mut vision = load_vision(&repository(VISION), model);
    let golden = goldens_of("small-phi3v").into_iter().next().unwrap();
    let segments = golden.segments(model, &mut vision);
    let mut engine = engine(model, context);
    let mut seen = Observation::default();
    prefill(&mut engine, &segments, &mut seen, |pos| pos % 3 == 0);
    (engine, seen)
}

/// How far the attention of two ways is apart for a query, at most; the queries are the same ones.
fn apart(one: &Observation, other: &Observation) -> f32 {
    assert_eq!(one.queries, other.queries);
    let n_queries = one.queries.len() as f32;
    assert!(n_queries > 3.0);
    let max = max_abs_diff(&one.max, &other.max);
    let sum = max_abs_diff(&one.sum, &other.sum) / n_queries;
    let layers = max_abs_diff(&one.layers, &other.layers) / n_queries;
    max.max(sum).max(layers)
}

/// The contexts, with attention read in every layer, in one sum and by layer.
fn observed(n_layer: u32) -> impl Iterator<Item = ContextOptions> {
    contexts().into_iter().map(move |context| ContextOptions {
        score_layers: (0..n_layer).collect(),
        scores_by_layer: true,
        ..context
    })
}

#[test]
fn attention_is_read_on_both_sides() {
    if !precision::on_gpu() {
        return;
    }
    let n_layer = n_layer();
    for context in observed(n_layer) {
        let read = |n_gpu_layers| {
            let (engine, seen) = observe(&load(n_gpu_layers), context.clone());
            assert_lies_beside(&engine, n_gpu_layers);
            seen
        };
        let [cpu, gpu @ ..] = shares(n_layer).map(|n| (n, read(n)));
        let (_, cpu) = cpu;
        for (n, seen) in gpu {
            let error = apart(&seen, &cpu);
            println!("{n}: {error}");
            assert!(error < precision::attention(1e-3), "{n}: {error}");
            assert!(seen.layers.len() == seen.sum.len() * n_layer as usize);
        }
    }
}

fn placed(placement: &Placement) -> Model {
    let options = ModelOptions {
        placement: placement.clone(),
        ..ModelOptions::default()
    };
    Model::load(&repository(TEXT), &options).unwrap()
}

/// A single GPU of this machine, and the ways in which two share a model: layers by halves, unevenly and in another
/// order, the second alone, and rows, where the backend cuts weights into rows. `None` where there are not two.
fn shared() -> Option<(Model, Vec<(Placement, Model)>)> {
    let devices = hae::llama::devices().unwrap();
    let mut gpus = devices.iter().filter(|d| d.is_gpu && !d.is_remote);
    let [first, second] = [gpus.next()?, gpus.next()?].map(|gpu| gpu.name.clone());
    let of = |names: &[&String], split_mode, main_gpu, tensor_split: &[f32]| Placement {
        devices: Some(names.iter().map(|&name| name.clone()).collect()),
        split_mode,
        main_gpu,
        tensor_split: tensor_split.to_vec(),
        ..Placement::default()
    };
    let [both, turned] = [[&first, &second], [&second, &first]];
    let ways = [
        of(&both, SplitMode::Layer, 0, &[1.0, 1.0]),
        of(&both, SplitMode::Layer, 0, &[3.0, 1.0]),
        of(&turned, SplitMode::Layer, 0, &[1.0, 2.0]),
        of(&both, SplitMode::None, 1, &[]),
    ];
    // No backend that is built here lays rows of a weight on several devices.
    let rows = of(&both, SplitMode::Row, 0, &[1.0, 1.0]);
    let said = rows.check().unwrap_err().to_string();
    assert!(said.starts_with("`split_mode`: row: "), "{said}");
    let one = placed(&of(&[&first], SplitMode::Layer, 0, &[]));
    let ways = ways.into_iter().map(|way| {
        let model = placed(&way);
        (way, model)
    });
    Some((one, ways.collect()))
}

/// How many devices hold some of the cache.
fn n_holding(engine: &LlamaEngine) -> usize {
    let footprint = engine.footprint();
    let of_devices = footprint.iter().filter(|f| f.device.is_some());
    of_devices.filter(|f| f.kv > 0).count()
}

#[test]
fn several_gpus_answer_as_one() {
    let Some((one, ways)) = shared() else {
        return;
    };
    let contexts = contexts();
    let mut n_evicted = 0;
    for (policy, context) in policies().iter().zip(contexts.iter().cycle()) {
        let (said, _) = chat(&one, context, policy);
        for (way, model) in &ways {
            let (answers, evicted) = chat(model, context, policy);
            assert_eq!(answers, said, "{}: {way:?}", policy.name);
            n_evicted += evicted;
        }
    }
    assert!(n_evicted > 1000, "{n_evicted}");
}

#[test]
fn attention_is_read_on_several_gpus() {
    let Some((one, ways)) = shared() else {
        return;
    };
    for context in observed(one.n_layer()) {
        let (engine, expected) = observe(&one, context.clone());
        assert_eq!(n_holding(&engine), 1);
        for (way, model) in &ways {
            let (engine, seen) = observe(model, context.clone());
            let halved = way.split_mode != SplitMode::None;
            assert_eq!(n_holding(&engine), 1 + usize::from(halved), "{way:?}");
            let error = apart(&seen, &expected);
            println!("{way:?}: {error}");
            assert!(error < precision::attention(1e-3), "{way:?}: {error}");
        }
    }
}

/// A device that multiplies no quantized keys as they lie gets them together, instead of sending them to the processor:
/// reading the attention of all layers cuts a graph into as many pieces as with F16.
#[test]
fn scores_of_quantized_keys_stay_on_the_device() {
    if !precision::on_gpu() {
        return;
    }
    let pieces = |kind: &str| {
        let words = "run -v -p Hello -n 4 --temp 0 -fa on --kv-policy h2o --kv-budget 0.5 -ctk";
        let words: Vec<&str> = words.split(' ').chain([kind, "-ctv", kind]).collect();
        let out = hae().args(&words).output().unwrap();
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{log}");
        let lines = log.lines().filter(|line| line.contains("splits = "));
        let of = |line: &str| {
            line.split("splits = ")
                .nth(1)
                .unwrap()
                .split(", input")
                .next()
                .unwrap()
                .to_owned()
        };
        lines.map(of).collect::<Vec<String>>()
    };
    let plain = pieces("f16");
    assert!(!plain.is_empty());
    for kind in ["q8_0", "q4_0"] {
        assert_eq!(pieces(kind), plain, "{kind}");
    }
}
