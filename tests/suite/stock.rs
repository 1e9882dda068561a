//! `full` against llama.cpp driven by hand, with none of this project's code in the way: the
//! same bits.

use hae::controller::Controller;
use hae::engine::Engine;
use hae::generate::Session;
use hae::llama::{CacheType, FlashAttention, LlamaEngine, SamplerOptions};
use hae::policy::{self, Limits, PolicyOptions};
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::mtmd::{MtmdBitmap, MtmdContext, MtmdContextParams, MtmdInputText};
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

use crate::model::{TEXT, VISION, exact, goldens_of, load, load_vision, repository};

const STEPS: usize = 48;

/// Tokens of an answer and the bits of the logits before each.
type Trace = Vec<(i32, Vec<u32>)>;

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// llama.cpp's own way: mtmd's evaluation of all chunks, then token by token.
fn by_hand(golden: &crate::model::Golden, flash: bool, sampler: Vec<LlamaSampler>) -> Trace {
    let backend = crate::fixture::backend();
    let model = LlamaModel::load_from_file(backend, repository(TEXT), &LlamaModelParams::default())
        .unwrap();
    let params = MtmdContextParams {
        use_gpu: false,
        n_threads: 1,
        print_timings: false,
        ..MtmdContextParams::default()
    };
    let vision = repository(VISION);
    let mut vision =
        MtmdContext::init_from_file(vision.to_str().unwrap(), &model, &params).unwrap();
    let params = LlamaContextParams::default()
        .with_n_ctx(std::num::NonZeroU32::new(1024))
        .with_n_batch(1024)
        .with_n_ubatch(512)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(KvCacheType::F16)
        .with_type_v(KvCacheType::F16)
        .with_flash_attention_policy(i32::from(flash));
    let mut context = model.new_context(backend, params).unwrap();

    let marker = llama_cpp_2::mtmd::mtmd_default_marker();
    let text = (1..=golden.pictures.len()).fold(golden.prompt().to_owned(), |text, k| {
        text.replace(&format!("<|image_{k}|>"), marker)
    });
    let text = MtmdInputText {
        text,
        add_special: true,
        parse_special: true,
    };
    let bitmaps: Vec<MtmdBitmap> = golden
        .pictures
        .iter()
        .map(|p| MtmdBitmap::from_image_data(p.width, p.height, &p.rgb).unwrap())
        .collect();
    let chunks = vision
        .tokenize(text, &bitmaps.iter().collect::<Vec<_>>())
        .unwrap();
    let start = chunks
        .eval_chunks(&mut vision, &mut context, 0, 0, 1024, true)
        .unwrap();

    let mut sampler = LlamaSampler::chain(sampler, true);
    let mut trace = Trace::new();
    let mut batch = llama_cpp_2::llama_batch::LlamaBatch::new(1, 1);
    for pos in (start..).take(STEPS) {
        let logits = bits(context.get_logits_ith(-1));
        let token = sampler.sample(&context, -1);
        trace.push((token.0, logits));
        if model.vocab().is_eog(token) {
            break;
        }
        batch.clear();
        batch.add(LlamaToken(token.0), pos, &[0], true).unwrap();
        context.decode(&mut batch).unwrap();
    }
    trace
}

/// The same through the controller with `full`.
fn by_us(golden: &crate::model::Golden, flash: bool, sampler: &SamplerOptions) -> Trace {
    let model = load(&repository(TEXT));
    let mut vision = load_vision(&repository(VISION), &model);
    let segments = golden.segments(&model, &mut vision);
    let mut options = exact(1024);
    options.n_batch = 1024;
    options.type_k = CacheType::F16;
    options.type_v = CacheType::F16;
    options.flash_attention = if flash {
        FlashAttention::On
    } else {
        FlashAttention::Off
    };
    let engine = LlamaEngine::new(&model, options, sampler).unwrap();
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: engine.n_cells(),
    };
    let policy = policy::create("full", &PolicyOptions::default(), limits).unwrap();
    let controller = Controller::new(policy, engine.n_cells());
    let mut session = Session::new(engine, controller);
    assert!(session.prefill(&segments, &|| false).unwrap());
    let mut trace = Trace::new();
    for _ in 0..STEPS {
        let logits = bits(session.engine.logits().unwrap());
        let token = session.engine.sample().unwrap();
        trace.push((token, logits));
        if session.engine.is_eog(token) {
            break;
        }
        session.step(token).unwrap();
    }
    trace
}

#[test]
fn full_is_llama_cpp_bit_for_bit() {
    let sampled = SamplerOptions {
        seed: 7,
        temp: 0.8,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        repeat_penalty: 1.1,
        repeat_last_n: 64,
    };
    let chain = || {
        vec![
            LlamaSampler::penalties(1024, 64, 1.1, 0.0, 0.0),
            LlamaSampler::top_k(40),
            LlamaSampler::top_p(0.95, 1),
            LlamaSampler::min_p(0.05, 1),
            LlamaSampler::temp(0.8),
            LlamaSampler::dist(7),
        ]
    };
    for golden in goldens_of("small-phi3v") {
        if !["story0", "two0", "qa2"].contains(&golden.id()) {
            continue;
        }
        for flash in [false, true] {
            let greedy = by_hand(&golden, flash, vec![LlamaSampler::greedy()]);
            assert!(
                greedy == by_us(&golden, flash, &SamplerOptions::GREEDY),
                "{}",
                golden.id()
            );
            let random = by_hand(&golden, flash, chain());
            assert!(random == by_us(&golden, flash, &sampled), "{}", golden.id());
        }
    }
}
