//! Against the golden numbers of the models' PyTorch implementations.

use hae::chat::{Begin, Chat, ChatOptions};
use hae::controller::Controller;
use hae::engine::{Engine, Observation};
use hae::generate::{Finish, Segment, Session};
use hae::llama::Piece;
use hae::policy::{self, Limits, PolicyOptions};
use hae::turn::Turn;

use crate::model::{converted_of, engine, exact, goldens_of, load, load_vision, prefill, quiet};
use crate::npz::{max_abs_diff, read};
use crate::precision;

const MODELS: [&str; 2] = ["tiny-phi3v", "small-phi3v"];

#[test]
fn token_ids_and_visual_token_counts_are_the_processors() {
    for name in MODELS {
        let (text, vision) = converted_of(name, "f32");
        let model = load(text);
        let vision = load_vision(vision, &model);
        for golden in goldens_of(name) {
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
            assert_eq!(ids, golden.ids("input_ids"), "{name} {}", golden.id());
        }
    }
}

pub fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let diff = norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(a - b)));
    diff / norm(&mut theirs.iter().map(|&b| f64::from(b)))
}

#[test]
fn projected_embeddings_are_pytorchs() {
    let cases = [
        ("tiny-phi3v", "f32", 2e-3, 4),
        ("tiny-phi3v", "f16", 1e-2, 4),
        ("small-phi3v", "f32", 2e-3, 7),
        ("small-phi3v", "f16", 1e-2, 7),
    ];
    for (name, outtype, tolerance, n) in cases {
        let (text, vision) = converted_of(name, outtype);
        let model = load(text);
        let mut vision = load_vision(vision, &model);
        let mut compared = 0;
        for golden in goldens_of(name) {
            let Some(file) = golden.row["embeddings"].as_str() else {
                continue;
            };
            let expected = read(&format!("{name}/{file}"));
            for segment in golden.segments(&model, &mut vision) {
                let Segment::Image {
                    embeddings, image, ..
                } = segment
                else {
                    continue;
                };
                let expected = &expected[&format!("image_{}", image + 1)];
                let error = relative_error(&embeddings, &expected.data);
                println!("{name} {} {outtype}: {error:.1e}", golden.id());
                assert!(
                    error < tolerance,
                    "{name} {} {outtype}: {error}",
                    golden.id()
                );
                compared += 1;
            }
        }
        assert_eq!(compared, n, "{name}: pictures with golden embeddings");
    }
}

#[test]
fn last_logits_are_pytorchs() {
    for name in MODELS {
        let (text, vision) = converted_of(name, "f32");
        let model = load(text);
        let mut vision = load_vision(vision, &model);
        for golden in goldens_of(name) {
            let mut engine = engine(&model, exact(1024));
            let segments = golden.segments(&model, &mut vision);
            prefill(&mut engine, &segments, &mut Observation::default(), |_| {
                false
            });
            let file = golden.row["logits"].as_str().unwrap();
            let expected = &read(&format!("{name}/{file}"))["logits"];
            let error = max_abs_diff(engine.logits().unwrap(), &expected.data);
            println!("{name} {}: {error:.1e}", golden.id());
            assert!(error < 5e-2, "{name} {}: {error}", golden.id());
        }
    }
}

#[test]
fn attention_of_layer_0_is_pytorchs() {
    MODELS.into_iter().for_each(attention_of_layer_0);
}

fn attention_of_layer_0(name: &str) {
    let (text, vision) = converted_of(name, "f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let golden = goldens_of(name).into_iter().find(|g| g.id() == "qa0");
    let golden = golden.unwrap();
    let expected = &read(&format!("{name}/qa0_attention.npz"))["layer_0"];
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

/// What the policies judge by, in any layer: attention to the visual tokens.
#[test]
fn scores_of_visual_tokens_are_pytorchs() {
    let name = "small-phi3v";
    let (text, vision) = converted_of(name, "f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let mut compared = 0;
    for golden in goldens_of(name) {
        let Some(file) = golden.row["scores"].as_str() else {
            continue;
        };
        let expected = read(&format!("{name}/{file}"));
        let ids = golden.ids("input_ids");
        let behind = ids.iter().rposition(|&id| id < 0).unwrap() as i32;
        let last = ids.len() as i32 - 1;
        let segments = golden.segments(&model, &mut vision);
        for layer in [0, 1, 4, 7] {
            for (queries, from) in [("text", behind + 1), ("last", last)] {
                let mut options = exact(1024);
                options.score_layers = vec![layer];
                let mut engine = engine(&model, options);
                let mut seen = Observation::default();
                prefill(&mut engine, &segments, &mut seen, |pos| pos >= from);
                assert_eq!(seen.queries, (from..=last).collect::<Vec<_>>());
                // A fresh cache fills its cells in order, so cells are positions here.
                let ours = (0..ids.len()).filter(|&i| ids[i] < 0).map(|i| seen.sum[i]);
                let ours: Vec<f32> = ours.collect();
                let error = relative_error(&ours, expected[queries].row(layer as usize));
                println!("{} layer {layer} {queries}: {error:.1e}", golden.id());
                assert!(
                    error < precision::attention(1e-3).into(),
                    "{} layer {layer} {queries}: {error}",
                    golden.id()
                );
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 3 * 4 * 2);
}

#[test]
fn greedy_continuations_are_pytorchs() {
    for name in MODELS {
        let (text, vision) = converted_of(name, "f32");
        let model = load(text);
        let mut vision = load_vision(vision, &model);
        for golden in goldens_of(name) {
            let id = format!("{name} {}", golden.id());
            let segments = golden.segments(&model, &mut vision);
            let engine = engine(&model, exact(1024));
            let mut session = Session::new(engine, full(&model, 1024));
            let answer = quiet(|hooks| session.generate(&segments, Some(400), hooks)).unwrap();
            let mut expected = golden.ids("greedy_ids");
            if golden.row["stopped"].as_bool().unwrap() {
                expected.pop();
                assert_eq!(answer.finish, Finish::Eog, "{id}");
            }
            assert_eq!(answer.tokens, expected, "{id}");
            let text = golden.row["greedy_text"].as_str().unwrap();
            assert_eq!(answer.text.trim(), text, "{id}");
        }
    }
}

fn full(model: &hae::llama::Model, n_cells: usize) -> Controller {
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells,
    };
    let policy = policy::create("full", &PolicyOptions::default(), limits).unwrap();
    Controller::new(policy, n_cells)
}

/// The golden chat, asked turn by turn: each answer goes on from the cache, and is the one that
/// the prompt of the golden repeats.
#[test]
fn a_chat_turn_by_turn_is_pytorchs() {
    let name = "small-phi3v";
    let (text, vision) = converted_of(name, "f32");
    let model = load(text);
    let vision = load_vision(vision, &model);
    let golden = goldens_of(name).into_iter().find(|g| g.id() == "chat0");
    let golden = golden.unwrap();
    let options = ChatOptions {
        context: exact(1024),
        ..ChatOptions::default()
    };
    let mut chat = Chat::begin(&model, Some(vision), &options, Begin::default()).unwrap();

    let mut pictures = golden.pictures.clone();
    let turns: Vec<&str> = golden.prompt().split("<|user|>\n").skip(1).collect();
    assert_eq!(turns.len(), 5);
    for turn in turns {
        let (question, rest) = turn.split_once("<|end|>\n<|assistant|>\n").unwrap();
        let pictures = std::mem::take(&mut pictures);
        let turn = Turn {
            text: question,
            pictures: &pictures,
            n_predict: Some(20),
            expected: None,
        };
        let answer = quiet(|hooks| chat.turn(turn, hooks)).unwrap();
        // The last question has no answer in the prompt.
        let expected = match rest.strip_suffix("<|end|>\n") {
            Some(answer) => answer,
            None => golden.row["greedy_text"].as_str().unwrap(),
        };
        assert_eq!(answer.text.trim(), expected, "{question}");
    }
    // All of it is in the cache: the prompt's ids, and the last answer, whose end is not fed.
    let n = golden.ids("input_ids").len() + golden.ids("greedy_ids").len() - 1;
    assert_eq!(chat.next_pos() as usize, n);
}
