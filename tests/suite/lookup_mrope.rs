//! Lookups in models with pictures of several axes (M-RoPE): most rows of a picture share one
//! position. A small untrained model of Qwen2-VL's architecture.

use hae::attend::Attend;
use hae::controller::Controller;
use hae::engine::Engine;
use hae::generate::{Segment, Session};
use hae::image::{self, Limits as Sizes};
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, Piece};
use hae::policy::{Amount, Limits, PolicyOptions, create};
use hae::prompt;
use hae::turn::segment;

use crate::model::{PICTURE, engine, exact, load, load_vision, repository};
use crate::npz::max_abs_diff;
use crate::others::{Pair, qwen2vl};
use crate::precision;

/// Two pictures, one of them wide, with a short question behind the second.
pub fn prompt_of(pair: &Pair, model: &Model) -> Vec<Segment> {
    let mut vision = load_vision(&pair.file("vision.gguf"), model);
    let pictures = [PICTURE, "tests/golden/small-phi3v/wide0_1.png"]
        .map(|path| image::load(&repository(path), &Sizes::default()).unwrap());
    let text = "These are two pictures of the same place, taken by two people on one day. \
        <|image_1|> This is the first one, and the second one follows. <|image_2|> Why?";
    let (text, order) = prompt::place_pictures(text, 0, 2, true).unwrap();
    let pictures: Vec<_> = order.iter().map(|&i| &pictures[i]).collect();
    let pieces = prompt::tokenize(model, Some(&vision), &text, &pictures, true).unwrap();
    let mut images = 0..;
    let segments = pieces.into_iter().map(|piece| match piece {
        Piece::Text(tokens) => Segment::Tokens(tokens),
        Piece::Image(image) => segment(vision.encode(&image).unwrap(), images.next().unwrap()),
    });
    segments.collect()
}

/// A conversation that the prompt has gone into.
pub fn session(
    model: &Model,
    prompt: &[Segment],
    options: &ContextOptions,
) -> Session<LlamaEngine> {
    let n_cells = options.n_ctx as usize;
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells,
    };
    let policy = create("full", &PolicyOptions::default(), limits).unwrap();
    let mut session = Session::new(
        engine(model, options.clone()),
        Controller::new(policy, n_cells),
    );
    assert!(session.prefill(prompt, &|| false).unwrap());
    session
}

pub fn logits(session: &Session<LlamaEngine>) -> Vec<f32> {
    session.engine.logits().unwrap().to_vec()
}

pub fn looking(type_k: CacheType, plain_lookups: bool, attend: Attend) -> ContextOptions {
    ContextOptions {
        flash_attention: FlashAttention::On,
        type_k,
        type_v: type_k,
        attend,
        keep_sets: true,
        plain_lookups,
        n_threads: 2,
        ..exact(1024)
    }
}

pub const STEPS: i32 = 24;

/// More than the question, so that the last rows of a picture are among them for some steps.
const RECENT: usize = 32;

/// The processor's operations and the plain ones choose the same rows of pictures, as many as they
/// were told, and say the same.
#[test]
fn both_ways_choose_the_same_rows_of_m_rope_pictures() {
    let pair = qwen2vl(6.0);
    let model = load(&pair.file("text.gguf"));
    let prompt = prompt_of(&pair, &model);
    let question = prompt.last().unwrap().len();
    assert!(question < RECENT, "{question}");
    // Flash attention rounds more than the processor's operations do where values are not quantized.
    for (type_k, attend, bound) in [
        (CacheType::F32, (20, None), 5e-3),
        (CacheType::F16, (20, Some(5)), 5e-3),
        (CacheType::Q8_0, (60, Some(1)), 5e-3),
    ] {
        let attend = Attend {
            vision: Some(Amount::Cells(attend.0)),
            text: attend.1.map(Amount::Cells),
            recent: RECENT,
            ..Attend::default()
        };
        let mut ways =
            [false, true].map(|plain| session(&model, &prompt, &looking(type_k, plain, attend)));
        let mut whole = session(&model, &prompt, &looking(type_k, false, Attend::default()));
        let (mut both, mut chosen) = (0, 0);
        for step in 0..STEPS {
            let at = format!("{type_k:?} step {step}");
            let token = 30 + 7 * step;
            let [ours, theirs] = ways.each_mut().map(|session| {
                session.step(token).unwrap();
                let of = |layer| session.engine.looked_up(layer).unwrap();
                let sets: Vec<_> = (0..model.n_layer()).map(of).collect();
                (logits(session), sets)
            });
            whole.step(token).unwrap();
            let ledger = whole.controller.ledger();
            for (a, b) in ours.1.iter().zip(&theirs.1) {
                chosen += a.len();
                both += a.iter().filter(|cell| b.contains(cell)).count();
                let is_row = |cell: &&u32| ledger.get(**cell).is_some_and(|e| e.image.is_some());
                let seen = a.iter().filter(is_row).count();
                let Some(Amount::Cells(most)) = attend.vision else {
                    panic!()
                };
                // Beside those that were chosen, as many rows as are among the last cells.
                let recent = RECENT.saturating_sub(question + step as usize);
                assert_eq!(seen, most + recent, "{at}");
            }
            let apart = max_abs_diff(&ours.0, &theirs.0);
            let effect = max_abs_diff(&ours.0, &logits(&whole));
            println!("{at}: {apart:.1e}, {both} of {chosen}, against all {effect:.1e}");
            let most = match both == chosen {
                true => precision::logits(bound),
                // What wrong rows do here.
                false => precision::near_sets(bound, 0.3),
            };
            assert!(apart < most, "{at}: {apart}");
        }
        assert!(both * 100 > chosen * 98, "{type_k:?}: {both} of {chosen}");
    }
}

/// Two conversations behind a prompt, the same to the last bit on a processor (a GPU's kernels are chosen by the graph
/// that they lie in): `able` looks up more than there is, `whole` cannot look up.
pub fn assert_enough_is_whole(
    model: &Model,
    prompt: &[Segment],
    able: &ContextOptions,
    whole: &ContextOptions,
) {
    let [mut able, mut whole] = [able, whole].map(|options| session(model, prompt, options));
    let same = |able: &Session<LlamaEngine>, whole: &Session<LlamaEngine>, at: &str| {
        let apart = max_abs_diff(&logits(able), &logits(whole));
        assert!(apart <= precision::logits(0.0), "{at}: {apart}");
    };
    same(&able, &whole, "prompt");
    for token in 0..STEPS {
        able.step(token).unwrap();
        whole.step(token).unwrap();
        same(&able, &whole, &format!("step {token}"));
    }
}

#[test]
fn enough_is_the_whole_m_rope_picture() {
    let pair = qwen2vl(6.0);
    let model = load(&pair.file("text.gguf"));
    let prompt = prompt_of(&pair, &model);
    let all = Attend {
        vision: Some(Amount::Cells(1000)),
        text: Some(Amount::Share(1.0)),
        ..Attend::default()
    };
    let [able, whole] = [all, Attend::default()].map(|a| looking(CacheType::F16, false, a));
    assert_enough_is_whole(&model, &prompt, &able, &whole);
}

/// What a user sees. The question is shorter than the recent positions.
#[test]
fn reports_of_m_rope_models_say_what_was_looked_at() {
    let pair = qwen2vl(1.0);
    let full = pair.json("");
    assert!(full["attended"].is_null());
    let whole = pair.json("--attend 1.0 --attend-text 1.0");
    assert!(whole["attended"].is_null());
    assert_eq!(whole["text"], full["text"]);
    for more in ["", "-fa off", "-ctk q8_0 -ctv q8_0", "-b 50 -ub 50"] {
        let report = pair.json(&format!("--attend 0.1 {more}"));
        // The first of six tokens comes from the prompt.
        assert_eq!(report["attended"]["steps"], 5, "{more}");
        let share = report["attended"]["vision"].as_f64().unwrap();
        // A tenth, and what of the last 16 cells is no text.
        assert!((0.09..0.12).contains(&share), "{more}: {share}");
        assert_eq!(report["kv"]["cells"]["live"]["vision"], 144);
    }
}
