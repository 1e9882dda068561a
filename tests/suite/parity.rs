//! Against the golden numbers of the model's PyTorch implementation.

use hae::controller::Controller;
use hae::engine::{Engine, Observation};
use hae::generate::{Finish, Segment, Session};
use hae::llama::Piece;
use hae::policy::{self, Limits, PolicyOptions};

use crate::model::{converted, engine, exact, goldens, load, load_vision, prefill, quiet};
use crate::npz::{max_abs_diff, read};

#[test]
fn token_ids_and_visual_token_counts_are_the_processors() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let vision = load_vision(vision, &model);
    for golden in goldens() {
        let mut ids = Vec::new();
        let mut image = 0;
        for piece in golden.pieces(&model, &vision) {
            match piece {
                Piece::Text(tokens) => ids.extend(tokens),
                Piece::Image(tokens) => {
                    image += 1;
                    ids.extend(vec![-image; tokens.n]);
                }
            }
        }
        assert_eq!(ids, golden.ids("input_ids"), "{}", golden.id());
    }
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let diff = norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(a - b)));
    diff / norm(&mut theirs.iter().map(|&b| f64::from(b)))
}

#[test]
fn projected_embeddings_are_pytorchs() {
    for (outtype, tolerance) in [("f32", 2e-3), ("f16", 1e-2)] {
        let (text, vision) = converted(outtype);
        let model = load(text);
        let mut vision = load_vision(vision, &model);
        let mut compared = 0;
        for golden in goldens() {
            let Some(name) = golden.row["embeddings"].as_str() else {
                continue;
            };
            let expected = read(&format!("tiny-phi3v/{name}"));
            for segment in golden.segments(&model, &mut vision) {
                let Segment::Image {
                    embeddings, image, ..
                } = segment
                else {
                    continue;
                };
                let expected = &expected[&format!("image_{}", image + 1)];
                let error = relative_error(&embeddings, &expected.data);
                assert!(error < tolerance, "{} {outtype}: {error}", golden.id());
                compared += 1;
            }
        }
        assert_eq!(compared, 4, "pictures with golden embeddings");
    }
}

#[test]
fn last_logits_are_pytorchs() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    for golden in goldens() {
        let mut engine = engine(&model, exact(1024));
        let segments = golden.segments(&model, &mut vision);
        prefill(&mut engine, &segments, &mut Observation::default(), |_| {
            false
        });
        let name = golden.row["logits"].as_str().unwrap();
        let expected = &read(&format!("tiny-phi3v/{name}"))["logits"];
        let error = max_abs_diff(engine.logits().unwrap(), &expected.data);
        assert!(error < 5e-2, "{}: {error}", golden.id());
    }
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
    // The rows of the text behind the picture, each alone: what sums and maxima are made of.
    let first = n - segments.last().unwrap().len();
    for query in first..n {
        let mut options = exact(512);
        options.score_layers = vec![0];
        let mut engine = engine(&model, options);
        let mut seen = Observation::default();
        prefill(&mut engine, &segments, &mut seen, |pos| {
            pos as usize == query
        });
        assert_eq!(seen.queries, [query as i32]);
        let mean: Vec<f32> = (0..n)
            .map(|key| {
                let head = |h: usize| expected.data[(h * n + query) * n + key];
                (0..n_head).map(head).sum::<f32>() / n_head as f32
            })
            .collect();
        // A fresh cache fills its cells in order, so cells are positions here.
        let error = max_abs_diff(&seen.sum[..n], &mean);
        assert!(error < 1e-3, "query {query}: {error}");
        assert!(seen.sum[n..].iter().all(|&a| a == 0.0));
        assert_eq!(seen.sum, seen.max, "one query row");
    }
}

#[test]
fn greedy_continuations_are_pytorchs() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    for golden in goldens() {
        let segments = golden.segments(&model, &mut vision);
        let engine = engine(&model, exact(1024));
        let limits = Limits {
            n_layer: model.n_layer(),
            n_cells: engine.n_cells(),
        };
        let policy = policy::create("full", &PolicyOptions::default(), limits).unwrap();
        let controller = Controller::new(policy, engine.n_cells());
        let mut session = Session::new(engine, controller);
        let answer = quiet(|hooks| session.generate(&segments, Some(400), hooks)).unwrap();
        let mut expected = golden.ids("greedy_ids");
        if golden.row["stopped"].as_bool().unwrap() {
            expected.pop();
            assert_eq!(answer.finish, Finish::Eog, "{}", golden.id());
        }
        assert_eq!(answer.tokens, expected, "{}", golden.id());
        let text = golden.row["greedy_text"].as_str().unwrap();
        assert_eq!(answer.text.trim(), text, "{}", golden.id());
    }
}
