//! What Metal would do, without a Mac (`tests/dry-metal`): the backend's own rules, fusions and launches for
//! every graph that is built here, as docs/metal.md tells.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use dry_metal::{Node, Report};
use hae::controller::Controller;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::generate::Session;
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, SamplerOptions, Vision,
    VisionOptions,
};
use hae::policy::{self, Amount, DapMode, Limits, Observe, OptionKey, PolicyOptions};
use hae::prompt;

use crate::kv_cells::{Pair, Step, cache};
use crate::lookup::looking;
use crate::model::{
    PICTURE, TEXT, VISION, converted, engine, exact, feed_and_read, load, quiet, repository,
};
use crate::others::{gemma3, llava_llama, mamba, qwen2vl, qwen25vl};
use crate::random_llama::{EMBD, Shape, bloom, grok, keys, layer, llama};
use crate::remake::Tensor;

/// In a process of its own: the device is there from the start, and nothing else runs.
const ALONE: &str = "DRY_METAL_ALONE";

const TYPES: [CacheType; 9] = [
    CacheType::F32,
    CacheType::F16,
    CacheType::Bf16,
    CacheType::Q8_0,
    CacheType::Q5_1,
    CacheType::Q5_0,
    CacheType::Q4_1,
    CacheType::Q4_0,
    CacheType::Iq4Nl,
];

/// Head sizes of models that people run: SmolLM and Qwen, Phi-2, Phi-3, LLaMA, Gemma.
const WIDTHS: [u32; 5] = [64, 80, 96, 128, 256];

fn decode(engine: &mut LlamaEngine, tokens: &[i32], from: i32, queries: &[u32]) {
    feed_and_read(engine, tokens, from, queries, None);
    engine.logits().unwrap();
}

fn tokens(n: i32) -> Vec<i32> {
    (0..n).map(|i| 3 + i * 7919 % 900).collect()
}

/// What a decoded token costs between the device and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Traffic {
    /// Parts that the device computes.
    graphs: u64,
    /// Bytes to and from it.
    bytes: u64,
}

/// A prompt, a few rows, single tokens.
fn plain(model: &Model, options: &ContextOptions) -> Traffic {
    let mut engine = engine(model, options.clone());
    decode(&mut engine, &tokens(300), 0, &[]);
    decode(&mut engine, &tokens(5), 300, &[]);
    decode(&mut engine, &tokens(1), 305, &[]);
    let before = dry_metal::counts();
    decode(&mut engine, &tokens(1), 306, &[]);
    let after = dry_metal::counts();
    Traffic {
        graphs: after.graphs - before.graphs,
        bytes: after.set + after.got - before.set - before.got,
    }
}

/// Attention that the graph sums up, of one query and of some.
fn taps(model: &Model, options: &ContextOptions) {
    for by_layer in [false, true] {
        let mut engine = engine(
            model,
            ContextOptions {
                score_layers: vec![0, 1],
                scores_by_layer: by_layer,
                ..options.clone()
            },
        );
        decode(&mut engine, &tokens(300), 0, &[299]);
        decode(&mut engine, &tokens(40), 300, &[1, 4, 9, 20, 39]);
        decode(&mut engine, &tokens(1), 340, &[0]);
    }
}

/// Decoding steps that attend to some cells.
fn lookups(model: &Model, options: &ContextOptions) {
    use hae::attend::{Kind, Lookup};
    let mut engine = engine(model, looking(options.clone(), 0, false));
    decode(&mut engine, &tokens(300), 0, &[]);
    for (pos, n_vision) in [(300, 8), (301, 0)] {
        let kind = |i| match i {
            0..4 => Kind::Always,
            4..150 => Kind::Vision,
            _ => Kind::Text,
        };
        let lookup = Lookup {
            kinds: (0..pos).map(kind).collect(),
            n_vision,
            n_text: 30,
        };
        feed_and_read(&mut engine, &[5], pos, &[], Some(&lookup));
    }
}

/// Cells that move, caches that grow and shrink, rows out and in, states.
fn cells(model: &Model, flash: bool, k: CacheType, v: CacheType) {
    let mut pair = Pair::new(model, &cache(flash, k, v));
    let mask = 0x9e37_79b9_7f4a_7c15_u64;
    for step in [
        Step::Resize(2, 0),
        Step::Decode(tokens(100)),
        Step::Remove(mask & mask.rotate_left(11)),
        Step::Compact,
        Step::Rows(mask & mask.rotate_right(5)),
        Step::Decode(vec![7]),
        Step::Resize(1, 0),
        Step::SaveAndRestore,
        Step::DeviceCopy,
        Step::Decode(vec![5, 8, 13]),
    ] {
        pair.take(&step).unwrap();
    }
}

/// A prompt that goes on behind the first layers.
fn midway(model: &Model, options: &ContextOptions) {
    let mut engine = engine(
        model,
        ContextOptions {
            score_layers: vec![1],
            ..options.clone()
        },
    );
    let trial = engine.trials().unwrap().begin(60, true).unwrap();
    let pos: Vec<i32> = (0..60).collect();
    let (mut at, mut seen) = (Vec::new(), Observation::default());
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(&tokens(60)),
        pos: &pos,
        queries: &[59],
        logits: false,
        lookup: None,
    };
    trial.decode(batch, &mut at, &mut seen).unwrap();
    let kept: Vec<i32> = (0..60).filter(|pos| pos % 3 != 1).collect();
    let from: Vec<u32> = kept.iter().map(|&pos| at[pos as usize]).collect();
    let batch = Batch {
        seq: 0,
        input: Input::Trial(&from),
        pos: &kept,
        queries: &[],
        logits: true,
        lookup: None,
    };
    engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
    engine.trials().unwrap().end().unwrap();
}

/// An answer about a picture under every policy, on the small model.
fn answers(text: &Path, flash: FlashAttention, kind: CacheType) {
    let model = load(text);
    let mut vision = seeing(&repository(VISION), &model);
    let picture = hae::image::load(&repository(PICTURE), &hae::image::Limits::default()).unwrap();
    let question = "<|user|>\n<|image_1|>\nWhere is the pink heart?<|end|>\n<|assistant|>\n";
    let (place, order) = prompt::place_pictures(question, 0, 1, true).unwrap();
    assert_eq!(order, [0]);
    let pieces = prompt::tokenize(&model, Some(&vision), &place, &[&picture], true).unwrap();
    let segments: Vec<_> = pieces
        .into_iter()
        .map(|piece| match piece {
            hae::llama::Piece::Text(tokens) => hae::generate::Segment::Tokens(tokens),
            hae::llama::Piece::Image(image) => {
                hae::turn::segment(vision.encode(&image).unwrap(), 0)
            }
        })
        .collect();
    for name in policy::names() {
        for dap_mode in [DapMode::Exact, DapMode::Midway] {
            // One of the two will do for those that prune no prompt by it.
            if dap_mode == DapMode::Midway && !policy::reads(name, OptionKey::DapMode) {
                continue;
            }
            let options = PolicyOptions {
                dap_mode,
                kv_budget: Some(Amount::Cells(120)),
                ..PolicyOptions::default()
            };
            let limits = Limits {
                n_layer: model.n_layer(),
                n_cells: 1024,
            };
            let Ok(policy) = policy::create(name, &options, limits) else {
                continue;
            };
            dry_metal::label(&format!("policy {name}"));
            let mut context = exact(1024);
            (context.type_k, context.type_v) = (kind, kind);
            context.flash_attention = flash;
            if policy.evicts() {
                context.kv_size = Some(256);
            }
            if let Observe::Layers { layers, .. } = policy.observe() {
                context.score_layers = layers;
            }
            let engine = engine(&model, context);
            let controller = Controller::new(policy, engine.n_cells());
            let mut session = Session::new(engine, controller);
            quiet(|hooks| session.generate(&segments, Some(12), hooks)).unwrap();
        }
    }
}

/// A vision file on the device.
fn seeing(path: &Path, model: &Model) -> Vision {
    let options = VisionOptions {
        use_gpu: true,
        n_threads: 1,
    };
    Vision::load(path, model, &options).unwrap()
}

/// A picture through a vision file, and what comes of it through the model.
fn sees(text: &Path, vision: &Path) {
    let model = load(text);
    let mut vision = seeing(vision, &model);
    let picture = hae::image::load(&repository(PICTURE), &hae::image::Limits::default()).unwrap();
    let parts = [hae::llama::Part::Picture(&picture)];
    for piece in vision.tokenize(&parts, false).unwrap() {
        if let hae::llama::Piece::Image(image) = piece {
            vision.encode(&image).unwrap();
        }
    }
    for flash in [FlashAttention::Off, FlashAttention::On] {
        let mut options = exact(1024);
        options.flash_attention = flash;
        (options.type_k, options.type_v) = (CacheType::F16, CacheType::F16);
        plain(&model, &options);
    }
}

/// DeepSeek-V2's attention (MLA): one head of K, 576 wide, whose first 512 are V.
fn mla(path: &Path) {
    let shape = Shape {
        n_layer: 2,
        n_head: 16,
        n_head_kv: 1,
        width: 576,
    };
    let mut file = keys("deepseek2", shape);
    let (lora_q, lora_kv, nope, rope, v) = (32, 512, 128, 64, 128);
    for (key, value) in [
        ("leading_dense_block_count", 2),
        ("attention.q_lora_rank", lora_q),
        ("attention.kv_lora_rank", lora_kv),
        ("attention.key_length", lora_kv + rope),
        ("attention.value_length", lora_kv),
        ("attention.key_length_mla", nope + rope),
        ("attention.value_length_mla", v),
        ("rope.dimension_count", rope),
        ("expert_feed_forward_length", 16),
        ("expert_shared_count", 1),
        ("expert_count", 2),
        ("expert_used_count", 1),
    ] {
        file.set_u32(&format!("deepseek2.{key}"), value);
    }
    file.set_f32("deepseek2.attention.layer_norm_rms_epsilon", 1e-5);
    let n = u64::from(shape.n_head);
    let [lora_q, lora_kv, nope, rope, v] = [lora_q, lora_kv, nope, rope, v].map(u64::from);
    file.tensors = vec![
        Tensor::random("token_embd.weight", &[EMBD, 1024]),
        Tensor::ones("output_norm.weight", EMBD),
    ];
    for block in 0..shape.n_layer {
        for (part, dims) in [
            ("attn_norm.weight", &[EMBD][..]),
            ("attn_q_a_norm.weight", &[lora_q]),
            ("attn_kv_a_norm.weight", &[lora_kv]),
            ("attn_q_a.weight", &[EMBD, lora_q]),
            ("attn_q_b.weight", &[lora_q, n * (nope + rope)]),
            ("attn_kv_a_mqa.weight", &[EMBD, lora_kv + rope]),
            ("attn_k_b.weight", &[nope, lora_kv, n]),
            ("attn_v_b.weight", &[lora_kv, v, n]),
            ("attn_output.weight", &[n * v, EMBD]),
            ("ffn_norm.weight", &[EMBD]),
            ("ffn_gate.weight", &[EMBD, 96]),
            ("ffn_up.weight", &[EMBD, 96]),
            ("ffn_down.weight", &[96, EMBD]),
        ] {
            file.tensors.push(layer(block, part, dims));
        }
    }
    file.write(path);
}

/// Runs a part, and says which one failed: the others then still tell what they see.
fn part(failed: &mut Vec<String>, name: &str, run: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
        failed.push(name.to_owned());
    }
}

/// How much is run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    All,
    /// One head size and the types that differ.
    Some,
}

/// GPUs without bfloat.
const NO_BF16: [&str; 2] = ["no-bf16", "virtual"];

/// ggml would end the program: the GPU holds a cache that it cannot write.
fn refused(model: &Model, options: ContextOptions) {
    let made = LlamaEngine::new(model, options, &SamplerOptions::GREEDY);
    let line = made.err().expect("refused").to_string();
    let reason = "bf16: the GPU Apple";
    assert!(line.contains(reason), "{line}");
}

/// Everything that is asked of the device, by label. The parts that failed.
fn everything(scope: Scope, traffic: &dyn Fn(&str, Traffic)) -> Vec<String> {
    let mut failed = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    let context = |flash, kind: CacheType| {
        // A quantized V needs flash attention.
        let v = if flash || !kind.is_quantized() {
            kind
        } else {
            CacheType::F16
        };
        let options = ContextOptions {
            n_batch: 512,
            n_ubatch: 512,
            ..cache(flash, kind, v)
        };
        (options, v)
    };
    for width in WIDTHS {
        let path = dir.path().join(format!("{width}.gguf"));
        let shape = Shape {
            n_layer: 2,
            n_head: 4,
            n_head_kv: 2,
            width,
        };
        llama(&path, shape);
        let model = load(&path);
        for kind in TYPES {
            // Blocks of 32 values have to fit.
            let fits = !kind.is_quantized() || width.is_multiple_of(32);
            let some = [CacheType::F16, CacheType::Bf16, CacheType::Q8_0].contains(&kind);
            if !fits || scope == Scope::Some && !(width == 64 && some) {
                continue;
            }
            for flash in [true, false] {
                let (options, v) = context(flash, kind);
                let name = format!("{width}\t{}\t{}\t{flash}", kind.name(), v.name());
                let without = std::env::var("DRY_METAL").is_ok_and(|gpu| NO_BF16.contains(&&*gpu));
                if without && kind == CacheType::Bf16 {
                    part(&mut failed, &name, || refused(&model, options.clone()));
                    continue;
                }
                let mut at = |label, run: &dyn Fn()| {
                    dry_metal::label(label);
                    part(&mut failed, &format!("{label} {name}"), run);
                };
                at("decoding", &|| traffic(&name, plain(&model, &options)));
                at("taps", &|| taps(&model, &options));
                at("lookups", &|| lookups(&model, &options));
                // Cells move by rows, whatever is in them.
                if [64, 80].contains(&width) {
                    at("cells", &|| cells(&model, flash, kind, v));
                    at("midway", &|| midway(&model, &options));
                }
            }
        }
    }
    for (name, make) in [
        ("576", mla as fn(&Path)),
        ("bloom", |path| bloom(path, 2, 2)),
        ("grok", |path| grok(path, 2)),
        ("mamba", |path| mamba().write(path)),
    ] {
        let path = dir.path().join(name);
        make(&path);
        for flash in [true, false] {
            let options = context(flash, CacheType::F16).0;
            dry_metal::label("decoding");
            let key = format!("{name}\tf16\tf16\t{flash}");
            part(&mut failed, &format!("decoding {key}"), || {
                traffic(&key, plain(&load(&path), &options));
            });
            if ["bloom", "grok"].contains(&name) {
                dry_metal::label("taps");
                let run = || taps(&load(&path), &options);
                part(&mut failed, &format!("taps {name}"), run);
            }
        }
    }
    let texts = [TEXT, "models/small-phi3v-Q4_K_M.gguf"];
    for text in &texts[..if scope == Scope::All { 2 } else { 1 }] {
        for (flash, kind) in [
            (FlashAttention::On, CacheType::Q8_0),
            (FlashAttention::Off, CacheType::F16),
        ] {
            part(&mut failed, &format!("answers of {text}"), || {
                answers(&repository(text), flash, kind);
            });
        }
    }
    for (name, pair) in [
        ("llava", llava_llama()),
        ("qwen2vl", qwen2vl(1.0)),
        ("qwen2.5vl", qwen25vl()),
        ("gemma3", gemma3(1.0)),
    ] {
        dry_metal::label("pictures");
        part(&mut failed, name, || {
            sees(&pair.file("text.gguf"), &pair.file("vision.gguf"));
        });
    }
    dry_metal::label("pictures");
    let (text, vision) = converted("f16");
    part(&mut failed, "phi3v", || sees(text, vision));
    failed
}

/// What a process with this GPU prints.
fn run_alone(gpu: &str, test: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ALONE, "1")
        .env("DRY_METAL", gpu)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{gpu}: {text}{errors}");
    text
}

/// Prints what is seen in a process of its own.
fn tell(scope: Scope) {
    println!();
    let failed = everything(scope, &|name, t| {
        println!("traffic\t{name}\t{}\t{}", t.graphs, t.bytes)
    });
    dry_metal::lines()
        .iter()
        .for_each(|line| println!("{line}"));
    failed.iter().for_each(|name| println!("failed\t{name}"));
}

/// What such a process saw, if nothing failed in it that would fail on a Mac.
fn seen(gpu: &str, test: &str) -> (Report, Vec<String>) {
    let text = run_alone(gpu, test);
    let with = |prefix: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(with("failed\t"), [""; 0], "{gpu}");
    let report = Report::of(&text);
    assert_eq!(report.faults, [""; 0], "{gpu}");
    (report, with("traffic\t"))
}

/// Whose operation it is: llama.cpp's, or the part of ours that alone asks for it.
fn whose(node: &Node) -> String {
    let theirs = ["decoding", "pictures", "policy full"];
    if node.labels.iter().any(|l| theirs.contains(&l.as_str())) {
        return "llama.cpp".to_owned();
    }
    let ours = node.labels.iter().map(|label| {
        let policy = label.strip_prefix("policy ");
        match policy {
            Some("context_shift") => "context shift",
            Some(_) => "policies",
            None => label,
        }
    });
    let mut ours: Vec<&str> = ours.collect();
    ours.dedup();
    ours.join(", ")
}

/// The columns of GPUs: a name, and whose answer it is.
const GPUS: [(&str, &str); 4] = [
    ("Apple", "m1"),
    ("Apple without bfloat", "no-bf16"),
    ("CUDA", "cuda"),
    ("Vulkan", "vulkan"),
];

/// Operations that get the same answers everywhere, in one row.
#[derive(Default)]
struct Row {
    cases: BTreeSet<String>,
    /// Of each source, and of the result.
    types: Vec<BTreeSet<String>>,
    lines: BTreeMap<&'static str, BTreeSet<u32>>,
}

/// The table of docs/metal.md.
fn table(nodes: &[Node]) -> String {
    let mut rows: BTreeMap<(String, usize, Vec<bool>, String), Row> = BTreeMap::new();
    for node in nodes {
        let (op, case) = node.op.split_once(' ').unwrap_or((&node.op, ""));
        let (sources, result) = node.types.split_once(" -> ").unwrap();
        let sources: Vec<&str> = sources.split(", ").collect();
        let answers = GPUS.map(|(_, gpu)| node.answers[gpu].yes).to_vec();
        let key = (op.to_owned(), sources.len(), answers, whose(node));
        let row = rows.entry(key).or_default();
        if !case.is_empty() {
            // How many rows and queries there are changes which kernel it is, and not whether there is one.
            let case = case.split(" queries").next().unwrap();
            let case = case.split("rows").next().unwrap().trim();
            row.cases.insert(case.to_owned());
        }
        row.types.resize_with(sources.len() + 1, BTreeSet::new);
        for (at, kind) in sources.iter().chain([&result]).enumerate() {
            row.types[at].insert((*kind).to_owned());
        }
        for (_, gpu) in GPUS {
            row.lines
                .entry(gpu)
                .or_default()
                .insert(node.answers[gpu].line);
        }
    }
    let list = |set: &BTreeSet<String>, between| {
        let words: Vec<&str> = set
            .iter()
            .map(String::as_str)
            .filter(|w| !w.is_empty())
            .collect();
        words.join(between)
    };
    let mut out = "| operation | asked for by |".to_owned();
    GPUS.iter()
        .for_each(|(name, _)| out += &format!(" {name} |"));
    out += "\n|---|---|---|---|---|---|\n";
    for ((op, _, answers, whose), row) in &rows {
        let cases = list(&row.cases, ", ");
        let (result, sources) = row.types.split_last().unwrap();
        let sources: Vec<String> = sources.iter().map(|kinds| list(kinds, " ")).collect();
        let gap = if cases.is_empty() { "" } else { " " };
        let types = format!("{} → {}", sources.join(" · "), list(result, " "));
        out += &format!("| `{op}`{gap}{cases}: {types} | {whose} |");
        for ((_, gpu), yes) in GPUS.iter().zip(answers) {
            let lines: Vec<String> = row.lines[gpu].iter().map(u32::to_string).collect();
            let answer = if *yes { "yes" } else { "**no**" };
            out += &format!(" {answer} {} |", lines.join(", "));
        }
        out += "\n";
    }
    out
}

/// What a token costs between the GPU and the processor, of head size 128 and of MLA.
fn costs(traffic: &[String]) -> String {
    let mut out =
        "| head | K | V | `-fa` | parts of the graph | bytes |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for line in traffic {
        let [head, k, v, flash, parts, bytes] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        if ["128", "576"].contains(&head) {
            let flash = if flash == "true" { "on" } else { "off" };
            out += &format!("| {head} | {k} | {v} | {flash} | {parts} | {bytes} |\n");
        }
    }
    out
}

/// The part of the page between two marks.
fn between<'a>(page: &'a str, name: &str) -> &'a str {
    let (begin, end) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end of {name} -->"),
    );
    let from = page.find(&begin).unwrap_or_else(|| panic!("{begin}")) + begin.len();
    let to = page[from..].find(&end).unwrap_or_else(|| panic!("{end}"));
    &page[from..from + to]
}

/// docs/metal.md holds what the graphs ask for and the sources answer now; with `METAL_WRITE` in the
/// environment, as `cargo xtask metal --write` sets it, it is written.
#[test]
fn the_documented_tables_are_what_metal_does() {
    const NAME: &str = "metal::the_documented_tables_are_what_metal_does";
    const PAGE: &str = "docs/metal.md";
    assert_eq!(dry_metal::BROKEN, "");
    if std::env::var_os(ALONE).is_some() {
        return tell(Scope::All);
    }
    let (report, traffic) = seen("m1", NAME);
    assert!(report.nodes.iter().any(|n| n.refused) && report.nodes.len() > 200);
    let path = repository(PAGE);
    let mut page = std::fs::read_to_string(&path).unwrap();
    let tables = [
        ("operations", table(&report.nodes)),
        ("costs", costs(&traffic)),
    ];
    for (name, ours) in &tables {
        let old = between(&page, name).to_owned();
        if std::env::var_os("METAL_WRITE").is_some() {
            let begin = format!("<!-- {name} -->\n");
            page = page.replace(&format!("{begin}{old}"), &format!("{begin}{ours}"));
        } else if old != *ours {
            let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
            let (old, ours) = (lines(&old), lines(ours));
            let gone: Vec<_> = old.difference(&ours).collect();
            let new: Vec<_> = ours.difference(&old).collect();
            panic!("{PAGE}, {name}: cargo xtask metal --write; now {new:#?} instead of {gone:#?}");
        }
    }
    if std::env::var_os("METAL_WRITE").is_some() {
        std::fs::write(&path, page).unwrap();
    }
}

/// Later GPUs launch other kernels, and lesser ones leave operations to the processor: whatever they have,
/// nothing fails. The lesser ones take a minute more, and are asked by `cargo xtask metal` alone.
#[test]
fn no_gpu_of_apples_fails() {
    const NAME: &str = "metal::no_gpu_of_apples_fails";
    assert_eq!(dry_metal::BROKEN, "");
    if std::env::var_os(ALONE).is_some() {
        return tell(Scope::Some);
    }
    let kernels = |gpu| {
        let (report, _) = seen(gpu, NAME);
        let all = report.nodes.into_iter().flat_map(|node| node.kernels);
        all.collect::<BTreeSet<String>>()
    };
    let m5 = kernels("m5");
    let tensor = "kernel_flash_attn_ext_tensor_f16_dk576_dv512";
    let bf16 = |kernels: &BTreeSet<String>| kernels.iter().any(|name| name.contains("bf16"));
    assert!(m5.contains(tensor) && bf16(&m5), "{m5:?}");
    if std::env::var_os("METAL_ALL").is_none() {
        return;
    }
    let [plain, least] = ["no-bf16", "virtual"].map(kernels);
    assert!(!plain.contains(tensor) && !bf16(&plain), "{plain:?}");
    assert!(
        least.len() < plain.len() * 2 / 3,
        "{} {}",
        least.len(),
        plain.len()
    );
}
