//! Longrope's factor sets follow the choice that was made, not the size of the cache.

use hae::engine::{Engine, Observation};
use hae::llama::{ContextOptions, RopeFactors};
use serde_json::Value;

use crate::bin::hae;
use crate::model::{PICTURE, engine, exact, goldens, load, load_vision, prefill, repository};
use crate::npz::{max_abs_diff, read};

/// Last logits of a golden prompt, with these factors in a cache of this size.
fn logits(rope_factors: RopeFactors, n_ctx: u32) -> Vec<f32> {
    let (text, vision) = crate::model::converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let golden = goldens().into_iter().find(|g| g.id() == "qa0").unwrap();
    let mut engine = engine(
        &model,
        ContextOptions {
            rope_factors,
            ..exact(n_ctx)
        },
    );
    let segments = golden.segments(&model, &mut vision);
    prefill(&mut engine, &segments, &mut Observation::default(), |_| {
        false
    });
    engine.logits().unwrap().to_vec()
}

#[test]
fn the_factors_are_those_that_were_chosen() {
    let golden = &read("tiny-phi3v/qa0_logits.npz")["logits"].data;
    // PyTorch takes the short factors for a prompt this short, however large the cache.
    assert!(max_abs_diff(&logits(RopeFactors::Short, 8192), golden) < 5e-2);
    assert!(max_abs_diff(&logits(RopeFactors::Context, 1024), golden) < 5e-2);
    // llama.cpp's own rule takes the long ones here, and so does the explicit choice.
    let long = logits(RopeFactors::Long, 1024);
    assert!(max_abs_diff(&long, golden) > 0.5);
    assert!(max_abs_diff(&long, &logits(RopeFactors::Context, 8192)) < 1e-3);
}

#[test]
fn a_run_chooses_by_the_positions_that_it_can_reach() {
    let picture = repository(PICTURE);
    let chosen = |args: &[&str]| {
        let output = hae()
            .args(["run", "-o", "json", "--temp", "0", "-p", "Is there a star?"])
            .args(["-c", "8192", "--image", picture.to_str().unwrap()])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["context"]["rope_factors"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    // The prompt has about 210 positions, and the model ends its answer by itself.
    assert_eq!(chosen(&["-n", "100"]), "short");
    assert_eq!(chosen(&["-n", "3800"]), "short");
    assert_eq!(chosen(&["-n", "4000"]), "long");
    assert_eq!(chosen(&["-n", "-1"]), "long");
    assert_eq!(chosen(&["-n", "-1", "-c", "4096"]), "short");
    assert_eq!(chosen(&["-n", "100", "--rope-factors", "context"]), "long");
    assert_eq!(chosen(&["-n", "4000", "--rope-factors", "short"]), "short");
}
