//! What an engine refuses before llama.cpp sees it, and what it never answers in silence.

use hae::cache::Pos;
use hae::controller::Controller;
use hae::engine::{Batch, Engine, Input, Observation, Token, Vocabulary};
use hae::generate::{Segment, Session};
use hae::llama::{ContextOptions, LlamaEngine, MAX_POS, Model, ScoreSource};
use hae::policy::{self, Limits, PolicyOptions};
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;

use crate::fixture;
use crate::model::{converted, engine, exact, load};
use crate::npz::max_abs_diff;

fn tokens(n: usize) -> Vec<Token> {
    (0..n as Token).map(|i| 3 + i * 31 % 900).collect()
}

fn decode(
    engine: &mut LlamaEngine,
    input: Input<'_>,
    pos: &[Pos],
    queries: &[u32],
) -> hae::Result<Observation> {
    let batch = Batch {
        queries,
        logits: true,
        ..Batch::new(input, pos)
    };
    let mut seen = Observation::default();
    engine.decode(batch, &mut Vec::new(), &mut seen)?;
    Ok(seen)
}

/// A picture of made-up embeddings between two texts.
fn prompt(model: &Model) -> Vec<Segment> {
    let n = 40;
    let values = (0..n * model.n_embd()).map(|i| ((i * 7919 % 1000) as f32 / 1000.0 - 0.5) * 0.1);
    vec![
        Segment::Tokens(tokens(8)),
        Segment::Image {
            image: 0,
            embeddings: values.collect(),
            n,
            axes: None,
            separators: Vec::new(),
        },
        Segment::Tokens(tokens(24)),
    ]
}

/// Policies that judge by attention, on a context that was made without score layers: an error,
/// not a cache that loses its oldest tokens, or none.
#[test]
fn policies_that_read_attention_fail_on_a_context_that_reads_none() {
    let model = load(converted("f32").0);
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: 256,
    };
    let options = PolicyOptions {
        kv_budget: Some("0.5".parse().unwrap()),
        ..PolicyOptions::default()
    };
    for name in [
        "hae", "dap", "ddes", "h2o", "tova", "snapkv", "fastv", "mustdrop",
    ] {
        let policy = policy::create(name, &options, limits).unwrap();
        let engine = engine(&model, exact(256));
        let controller = Controller::new(policy, engine.n_cells());
        let mut session = Session::new(engine, controller);
        let done = session
            .prefill(&prompt(&model), &|| false)
            .and_then(|_| (0..8).try_for_each(|token| session.step(3 + token)));
        let error = done.expect_err(name).to_string();
        assert!(error.contains("without score layers"), "{name}: {error}");
    }
}

/// The rows whose attention was read are said to be so, from either source, and no others.
#[test]
fn only_rows_that_were_read_are_said_to_be() {
    let model = load(converted("f32").0);
    let all = tokens(20);
    let pos: Vec<Pos> = (5..25).collect();
    let mut sources = vec![ScoreSource::Callback];
    sources.push(ScoreSource::Graph);
    for score_source in sources {
        let options = ContextOptions {
            score_layers: vec![0, 1],
            score_source,
            ..exact(256)
        };
        let mut engine = engine(&model, options);
        let seen = decode(&mut engine, Input::Tokens(&all), &pos, &[2, 19]).unwrap();
        assert_eq!(seen.queries, [7, 24], "{score_source:?}");
        let total: f32 = seen.sum.iter().sum();
        assert!((total - 2.0).abs() < 1e-3, "{score_source:?}: {total}");
        let more: Vec<Pos> = (25..45).collect();
        let seen = decode(&mut engine, Input::Tokens(&all), &more, &[]).unwrap();
        assert!(seen.queries.is_empty() && seen.sum.is_empty());
    }
}

/// Tokens, positions, sizes and query rows that cannot be: an error each, and what comes after is
/// what it would have been.
#[test]
fn what_would_throw_or_assert_in_llama_cpp_is_refused() {
    let model = load(converted("f32").0);
    let n_vocab = model.n_vocab() as Token;
    let options = ContextOptions {
        n_batch: 64,
        n_ubatch: 32,
        score_layers: vec![0],
        ..exact(256)
    };
    let mut ours = engine(&model, options.clone());
    let mut twin = engine(&model, options);
    let three: Vec<Token> = tokens(3);
    let many = tokens(65);
    let places: Vec<Pos> = (0..65).collect();
    let floats = vec![0.1; 2 * model.n_embd()];
    let picture = |n: usize, mrope| Input::Embeddings {
        data: &floats,
        n,
        mrope,
    };
    let axes = [[0, 0, 0, 0], [1, MAX_POS, MAX_POS + 1, 0]];
    let below = [[0, 0, 0, 0], [1, -1, 0, 0]];
    let refused: [(&str, Input<'_>, &[Pos], &[u32]); 17] = [
        (
            "a negative token",
            Input::Tokens(&[3, -1, 4]),
            &[0, 1, 2],
            &[],
        ),
        (
            "a token too far",
            Input::Tokens(&[3, n_vocab, 4]),
            &[0, 1, 2],
            &[],
        ),
        ("no token", Input::Tokens(&[]), &[], &[]),
        ("too many tokens", Input::Tokens(&many), &places, &[]),
        (
            "a negative position",
            Input::Tokens(&three),
            &[-1, 0, 1],
            &[],
        ),
        ("descending", Input::Tokens(&three), &[2, 1, 0], &[]),
        ("too few positions", Input::Tokens(&three), &[0, 1], &[]),
        (
            "too large",
            Input::Tokens(&three),
            &[0, 1, MAX_POS + 1],
            &[],
        ),
        ("the largest", Input::Tokens(&three), &[0, 1, Pos::MAX], &[]),
        (
            "a query row too far",
            Input::Tokens(&three),
            &[0, 1, 2],
            &[3],
        ),
        (
            "query rows twice",
            Input::Tokens(&three),
            &[0, 1, 2],
            &[1, 1],
        ),
        (
            "query rows of several",
            Input::Tokens(&many[..64]),
            &places[..64],
            &[63],
        ),
        ("too few values", picture(3, None), &[0, 1, 2], &[]),
        (
            "too many rows to count",
            picture(usize::MAX, None),
            &[0, 1],
            &[],
        ),
        ("an axis too far", picture(2, Some(&axes)), &[0, 1], &[]),
        ("a negative axis", picture(2, Some(&below)), &[0, 1], &[]),
        ("too few axes", picture(2, Some(&axes[..1])), &[0, 1], &[]),
    ];
    for (what, input, pos, queries) in refused {
        assert!(decode(&mut ours, input, pos, queries).is_err(), "{what}");
    }
    for token in [-1, n_vocab, Token::MIN, Token::MAX] {
        let mut out = b"as before".to_vec();
        let error = ours.model().piece(token, &mut out).unwrap_err().to_string();
        assert!(
            error.contains(&format!("token {token} is not in")),
            "{error}"
        );
        assert_eq!(out, b"as before");
        assert!(!ours.model().is_eog(token));
    }
    for engine in [&mut ours, &mut twin] {
        let seen = decode(engine, Input::Tokens(&three), &[0, 1, 2], &[2]).unwrap();
        assert_eq!(seen.queries, [2]);
    }
    assert!(ours.logits().unwrap() == twin.logits().unwrap());
    let mut out = Vec::new();
    for token in 0..n_vocab {
        ours.model().piece(token, &mut out).unwrap();
    }
    assert!(!out.is_empty());
}

/// A mask's shortcut adds to positions: at the largest allowed one a batch gives what its tokens
/// give one by one, and llama.cpp itself refuses those behind.
#[test]
fn positions_up_to_the_largest_are_right_and_those_behind_refused() {
    let model = load(converted("f32").0);
    let three = tokens(3);
    let logits = |first: Pos, together: bool| {
        let mut engine = engine(&model, exact(256));
        let pos: Vec<Pos> = (first..first + 3).collect();
        let n = if together { 3 } else { 1 };
        for (tokens, pos) in three.chunks(n).zip(pos.chunks(n)) {
            decode(&mut engine, Input::Tokens(tokens), pos, &[]).unwrap();
        }
        engine.logits().unwrap().to_vec()
    };
    for first in [100, MAX_POS - 2] {
        let difference = max_abs_diff(&logits(first, true), &logits(first, false));
        assert!(difference < 1e-4, "from {first}: {difference}");
    }
    let model = fixture::load(converted("f32").0);
    let params = LlamaContextParams::default()
        .with_n_ctx(std::num::NonZeroU32::new(256))
        .with_n_batch(64);
    let mut ctx = model.new_context(fixture::backend(), params).unwrap();
    for (pos, possible) in [(MAX_POS + 1, false), (i32::MAX - 7, false), (MAX_POS, true)] {
        let mut batch = LlamaBatch::new(1, 1);
        batch.add(LlamaToken(3), pos, &[0], true).unwrap();
        assert_eq!(ctx.decode(&mut batch).is_ok(), possible, "{pos}");
    }
}

/// Bytes that are no state, as a file could hold them: refused, and the cache is empty.
#[test]
fn a_state_of_other_tokens_is_refused() {
    let model = load(converted("f32").0);
    let mut ours = engine(&model, exact(256));
    let pos: Vec<Pos> = (0..20).collect();
    decode(&mut ours, Input::Tokens(&tokens(20)), &pos, &[]).unwrap();
    let state = ours.save().unwrap();
    for n in [0, 19, 21, 256, 257] {
        let other: Vec<Pos> = (0..n).collect();
        assert!(ours.restore_tokens(&state, &other).is_err(), "{n}");
        let mut map = Vec::new();
        ours.cell_map(&mut map).unwrap();
        assert!(map.iter().all(Option::is_none), "{n}");
    }
    let cells = ours.restore_tokens(&state, &pos).unwrap();
    assert_eq!(cells, (0..20).collect::<Vec<_>>());
}
