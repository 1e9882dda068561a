//! Lookups where some layers have windows: the others look up. A small untrained model of Gemma 3's
//! architecture with a window in the first of its two layers.

use hae::attend::Attend;
use hae::engine::Engine;
use hae::generate::Session;
use hae::llama::{CacheType, ContextOptions, LlamaEngine};
use hae::policy::Amount;

use crate::lookup_mrope::{STEPS, assert_enough_is_whole, logits, looking, prompt_of, session};
use crate::model::load;
use crate::npz::max_abs_diff;
use crate::others::gemma3;
use crate::precision;

/// The layer without a window.
const LOOKS: u32 = 1;

fn options(type_k: CacheType, plain_lookups: bool, attend: Attend) -> ContextOptions {
    ContextOptions {
        non_causal_images: true,
        ..looking(type_k, plain_lookups, attend)
    }
}

fn attend(vision: usize, text: usize) -> Attend {
    Attend {
        vision: Some(Amount::Cells(vision)),
        text: Some(Amount::Cells(text)),
        ..Attend::default()
    }
}

fn set(session: &mut Session<LlamaEngine>) -> Vec<u32> {
    session.engine.looked_up(LOOKS).unwrap()
}

/// The processor's operations and the plain ones choose the same cells, as many as they were told,
/// and say the same.
#[test]
fn both_ways_choose_the_same_cells_of_the_layers_without_windows() {
    let pair = gemma3(2.0);
    let model = load(&pair.file("text.gguf"));
    let prompt = prompt_of(&pair, &model);
    let question = prompt.last().unwrap().len();
    for (type_k, bound) in [
        (CacheType::F32, 5e-3),
        (CacheType::F16, 5e-3),
        (CacheType::Q8_0, 2e-2),
    ] {
        let choice = attend(12, 7);
        let mut ways =
            [false, true].map(|plain| session(&model, &prompt, &options(type_k, plain, choice)));
        let mut whole = session(&model, &prompt, &options(type_k, false, Attend::default()));
        assert_eq!(ways[0].engine.looking_layers(), [LOOKS]);
        let (mut both, mut chosen, mut effect) = (0, 0, 0.0_f32);
        for step in 0..STEPS {
            let at = format!("{type_k:?} step {step}");
            let token = 30 + 7 * step;
            let [ours, theirs] = ways.each_mut().map(|session| {
                session.step(token).unwrap();
                (logits(session), set(session))
            });
            whole.step(token).unwrap();
            let ledger = whole.controller.ledger();
            let is_row = |cell: &&u32| ledger.get(**cell).is_some_and(|e| e.image.is_some());
            let rows = |cells: &[u32]| cells.iter().filter(is_row).count();
            // Beside those that were chosen, as many rows as are among the last cells.
            let recent = choice.recent.saturating_sub(question + step as usize);
            assert_eq!(rows(&ours.1), 12 + recent, "{at}");
            let newest = ledger.newest().unwrap() as u32;
            let last = newest + 1 - choice.recent as u32..=newest;
            assert!(
                last.clone().all(|cell| ours.1.contains(&cell)),
                "{at}: {last:?}"
            );
            assert_eq!(ours.1.len(), theirs.1.len(), "{at}");
            chosen += ours.1.len();
            both += ours.1.iter().filter(|cell| theirs.1.contains(cell)).count();
            let apart = max_abs_diff(&ours.0, &theirs.0);
            effect = effect.max(max_abs_diff(&ours.0, &logits(&whole)));
            assert!(apart < precision::logits(bound), "{at}: {apart}");
        }
        println!("{type_k:?}: {both} of {chosen}, against all {effect:.1e}");
        assert!(both * 100 > chosen * 98, "{type_k:?}: {both} of {chosen}");
        assert!(
            effect > 1e-2,
            "{type_k:?}: lookups change nothing: {effect}"
        );
    }
}

#[test]
fn enough_is_the_whole_cache_beside_windows() {
    let pair = gemma3(2.0);
    let model = load(&pair.file("text.gguf"));
    let prompt = prompt_of(&pair, &model);
    let [able, whole] =
        [attend(1000, 1000), Attend::default()].map(|a| options(CacheType::F16, false, a));
    assert_enough_is_whole(&model, &prompt, &able, &whole);
}

/// Cells are counted, not read, beside windows: what is taken back must be counted back.
#[test]
fn an_answer_that_is_taken_back_leaves_no_trace_beside_windows() {
    let pair = gemma3(2.0);
    let model = load(&pair.file("text.gguf"));
    let prompt = prompt_of(&pair, &model);
    let options = options(CacheType::F32, false, attend(12, 7));
    let [mut again, mut once] = [0, 1].map(|_| session(&model, &prompt, &options));
    let from = again.controller.ledger().newest().unwrap() + 1;
    for token in 200..210 {
        again.step(token).unwrap();
    }
    let left = again.controller.rewind(from);
    again.engine.rewind(0, from, left).unwrap();
    for token in 30..50 {
        again.step(token).unwrap();
        once.step(token).unwrap();
        assert_eq!(set(&mut again), set(&mut once), "{token}");
        assert_eq!(logits(&again), logits(&once), "{token}");
    }
}

/// What a user sees.
#[test]
fn reports_of_models_with_windows_say_what_was_looked_at() {
    let pair = gemma3(1.0);
    let full = pair.json("");
    assert!(full["attended"].is_null());
    let whole = pair.json("--attend 1.0 --attend-text 1.0");
    assert!(whole["attended"].is_null());
    assert_eq!(whole["text"], full["text"]);
    for more in ["", "-fa off", "-ctk q8_0 -ctv q8_0"] {
        let report = pair.json(&format!("--attend 0.125 {more}"));
        // The first of six tokens comes from the prompt.
        assert_eq!(report["attended"]["steps"], 5, "{more}");
        let share = report["attended"]["vision"].as_f64().unwrap();
        // An eighth, and what of the last 16 cells is no text.
        assert!((0.12..0.3).contains(&share), "{more}: {share}");
    }
}
