//! `full` against llama.cpp driven by hand, with none of this project's code in the way: the
//! same bits. `context_shift` against the calls that llama.cpp's own programs make.

use hae::controller::Controller;
use hae::engine::Engine;
use hae::generate::Session;
use hae::llama::{CacheType, FlashAttention, LlamaEngine, SamplerOptions};
use hae::policy::{self, Amount, Limits, PolicyOptions};
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

/// How llama.cpp's own programs go on when their context is full: `n_keep` tokens stay, half of
/// the rest goes. None: the answer ends before.
#[derive(Clone, Copy)]
struct Full {
    n_ctx: i32,
    n_keep: i32,
    steps: usize,
}

/// llama.cpp's own way: mtmd's evaluation of all chunks, then token by token. Gives the number of
/// shifts, too.
fn by_hand(
    golden: &crate::model::Golden,
    flash: bool,
    sampler: Vec<LlamaSampler>,
    full: Option<Full>,
) -> (Trace, usize) {
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
    let (mut n_past, mut shifts) = (start, 0);
    for _ in 0..full.map_or(STEPS, |full| full.steps) {
        let logits = bits(context.get_logits_ith(-1));
        let token = sampler.sample(&context, -1);
        trace.push((token.0, logits));
        if model.vocab().is_eog(token) && full.is_none() {
            break;
        }
        if let Some(Full { n_ctx, n_keep, .. }) = full
            && n_past + 1 >= n_ctx
        {
            let n_discard = (n_past - n_keep) / 2;
            let pos = |pos: i32| Some(pos as u32);
            let (from, to) = (pos(n_keep), pos(n_keep + n_discard));
            assert!(context.clear_kv_cache_seq(Some(0), from, to).unwrap());
            context
                .kv_cache_seq_add(0, to, pos(n_past), -n_discard)
                .unwrap();
            n_past -= n_discard;
            shifts += 1;
        }
        batch.clear();
        batch.add(LlamaToken(token.0), n_past, &[0], true).unwrap();
        context.decode(&mut batch).unwrap();
        n_past += 1;
    }
    (trace, shifts)
}

/// The same through the controller, with `full` or with `context_shift`.
fn by_us(
    golden: &crate::model::Golden,
    flash: bool,
    sampler: &SamplerOptions,
    full: Option<Full>,
) -> Trace {
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
    let (name, policy_options) = match full {
        None => ("full", PolicyOptions::default()),
        Some(Full { n_ctx, n_keep, .. }) => (
            "context_shift",
            PolicyOptions {
                kv_budget: Some(Amount::Cells(n_ctx as usize)),
                sinks: n_keep as usize,
                ..PolicyOptions::default()
            },
        ),
    };
    let policy = policy::create(name, &policy_options, limits).unwrap();
    let controller = Controller::new(policy, engine.n_cells());
    let mut session = Session::new(engine, controller);
    assert!(session.prefill(&segments, &|| false).unwrap());
    let mut trace = Trace::new();
    for _ in 0..full.map_or(STEPS, |full| full.steps) {
        let logits = bits(session.engine.logits().unwrap());
        let token = session.sample().unwrap();
        trace.push((token, logits));
        if session.vocabulary().unwrap().is_eog(token) && full.is_none() {
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
            let greedy = by_hand(&golden, flash, vec![LlamaSampler::greedy()], None).0;
            assert!(
                greedy == by_us(&golden, flash, &SamplerOptions::GREEDY, None),
                "{}",
                golden.id()
            );
            let random = by_hand(&golden, flash, chain(), None).0;
            let ours = by_us(&golden, flash, &sampled, None);
            assert!(random == ours, "{}", golden.id());
        }
    }
}

/// The picture goes with the first half: what is kept and what moves, in which order, and from
/// when on, shows in every bit after it.
#[test]
fn context_shift_is_llama_cpps() {
    let goldens = goldens_of("small-phi3v");
    let golden = goldens.iter().find(|g| g.id() == "story0").unwrap();
    for (flash, n_keep) in [(false, 4), (true, 0)] {
        let full = Some(Full {
            n_ctx: 300,
            n_keep,
            steps: 220,
        });
        let (theirs, shifts) = by_hand(golden, flash, vec![LlamaSampler::greedy()], full);
        assert_eq!(shifts, 2);
        let ours = by_us(golden, flash, &SamplerOptions::GREEDY, full);
        let tokens = |trace: &Trace| trace.iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(&theirs), tokens(&ours));
        assert!(theirs == ours, "the same logits");
    }
}
