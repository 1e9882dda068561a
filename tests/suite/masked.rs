//! The eviction oracle of tests/golden/masked: what the logits have to be when positions are
//! evicted, computed by numpy with the positions masked.

use hae::cache::ranges::coalesce;
use hae::engine::{Batch, Engine, Input, Observation};
use serde::Deserialize;

use crate::model::{converted, engine, exact, goldens, load, load_vision, prefill};
use crate::npz::{self, Array};
use crate::precision;

#[derive(Debug, Deserialize)]
pub struct Scenario {
    pub name: String,
    /// The golden prompt's id.
    pub prompt: String,
    /// Tokens to feed one by one behind the prompt, whatever is sampled.
    pub ids: Vec<i32>,
    pub evictions: Vec<Eviction>,
    /// Positions of the prompt that only the layers before `behind` see, which is none where they
    /// are never prefilled; the others keep theirs.
    pub holes: Vec<i32>,
    pub behind: u32,
    /// Whether `attention` of [`Expected`] is there.
    pub attention: bool,
}

#[derive(Debug, Deserialize)]
pub struct Eviction {
    /// Happens before this element of `ids` is fed.
    pub step: usize,
    /// Ascending.
    pub positions: Vec<i32>,
}

/// What numpy computed for one scenario.
pub struct Expected {
    /// `[steps, vocab]`, after each fed token.
    pub logits: Array,
    /// `[steps, layers, positions]`, mean over heads, 0 where evicted.
    pub attention: Option<Array>,
    /// `[vocab]`, at the prompt's last position; only with holes.
    pub prefill: Option<Array>,
}

/// All scenarios with their expected values.
pub fn scenarios() -> Vec<(Scenario, Expected)> {
    #[derive(Deserialize)]
    struct Index {
        scenarios: Vec<Scenario>,
    }
    let text = std::fs::read_to_string(npz::golden("masked/masked.json")).unwrap();
    let index: Index = serde_json::from_str(&text).unwrap();
    let mut arrays = npz::read("masked/masked.npz");
    index
        .scenarios
        .into_iter()
        .map(|s| {
            let expected = Expected {
                logits: arrays.remove(&s.name).unwrap(),
                attention: arrays.remove(&format!("{}_attention", s.name)),
                prefill: arrays.remove(&format!("{}_prefill", s.name)),
            };
            (s, expected)
        })
        .collect()
}

#[test]
fn the_oracle_is_whole_and_agrees_with_the_golden_answers() {
    let index = std::fs::read_to_string(npz::golden("tiny-phi3v/index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let prompts = index["prompts"].as_array().unwrap();
    let scenarios = scenarios();
    assert_eq!(scenarios.len(), 30);
    for (s, expected) in &scenarios {
        let steps = s.ids.len();
        assert_eq!(expected.logits.shape, [steps, 1024], "{}", s.name);
        assert_eq!(
            expected.prefill.is_some(),
            !s.holes.is_empty(),
            "{}",
            s.name
        );
        let prompt = prompts
            .iter()
            .find(|p| p["id"] == s.prompt.as_str())
            .unwrap();
        let n = prompt["input_ids"].as_array().unwrap().len();
        for eviction in &s.evictions {
            assert!(eviction.positions.is_sorted_by(|a, b| a < b), "{}", s.name);
            let newest = n + eviction.step - 1;
            assert!(
                *eviction.positions.last().unwrap() < newest as i32,
                "{}: evicts the newest",
                s.name
            );
        }
        if s.name == "story0_full" {
            for (step, next) in prompt["greedy_ids"].as_array().unwrap()[1..=steps]
                .iter()
                .enumerate()
            {
                let row = expected.logits.row(step);
                let best = (0..row.len())
                    .max_by(|&a, &b| row[a].total_cmp(&row[b]))
                    .unwrap();
                assert_eq!(best as u64, next.as_u64().unwrap(), "step {step}");
            }
        }
        assert_eq!(s.attention, expected.attention.is_some());
        if let Some(attention) = &expected.attention {
            assert_eq!(attention.shape, [steps, 6, n + steps]);
            for row in attention.data.chunks(n + steps) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                let gone = &s.evictions[0].positions;
                assert!(gone.iter().all(|&p| row[p as usize] == 0.0));
            }
        }
    }
}

/// Removing positions through the engine equals masking them in numpy: F32 cache, 1e-3.
#[test]
fn eviction_equals_masked_attention() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let goldens = goldens();
    let mut compared = 0;
    for (s, expected) in scenarios().into_iter().filter(|(s, _)| s.holes.is_empty()) {
        let golden = goldens.iter().find(|g| g.id() == s.prompt).unwrap();
        let segments = golden.segments(&model, &mut vision);
        let mut options = exact(1024);
        if s.attention {
            options.score_layers = vec![0, 3];
        }
        let mut engine = engine(&model, options);
        let mut seen = Observation::default();
        let start = prefill(&mut engine, &segments, &mut seen, |_| false);
        // Cells fill in order, and holes are taken again lowest first.
        let mut pos_of_cell: Vec<Option<i32>> = (0..start).map(Some).collect();
        for (step, (&id, pos)) in s.ids.iter().zip(start..).enumerate() {
            for eviction in s.evictions.iter().filter(|e| e.step == step) {
                let (mut positions, mut ranges) = (eviction.positions.clone(), Vec::new());
                coalesce(&mut positions, &mut ranges);
                assert!(ranges.len() <= eviction.positions.len());
                engine.remove(0, &ranges).unwrap();
                for cell in &mut pos_of_cell {
                    if cell.is_some_and(|pos| eviction.positions.contains(&pos)) {
                        *cell = None;
                    }
                }
            }
            let mut cells = Vec::new();
            let queries: &[u32] = if s.attention { &[0] } else { &[] };
            let batch = Batch {
                seq: 0,
                input: Input::Tokens(&[id]),
                pos: &[pos],
                queries,
                logits: true,
                lookup: None,
            };
            engine.decode(batch, &mut cells, &mut seen).unwrap();
            let cell = cells[0] as usize;
            pos_of_cell.resize(pos_of_cell.len().max(cell + 1), None);
            assert_eq!(pos_of_cell[cell], None, "{}: cell {cell} is taken", s.name);
            pos_of_cell[cell] = Some(pos);

            let error = npz::max_abs_diff(engine.logits().unwrap(), expected.logits.row(step));
            assert!(
                error < precision::logits(1e-3),
                "{} step {step}: {error}",
                s.name
            );
            if let Some(attention) = &expected.attention {
                let n = attention.shape[2];
                let row = attention.row(step);
                let mut ours = vec![0.0; n];
                for (cell, pos) in pos_of_cell.iter().enumerate() {
                    if let Some(pos) = pos {
                        ours[*pos as usize] = seen.sum[cell];
                    }
                }
                let mean: Vec<f32> = (0..n).map(|p| (row[p] + row[3 * n + p]) / 2.0).collect();
                let error = npz::max_abs_diff(&ours, &mean);
                assert!(
                    error < precision::attention(1e-4),
                    "{} step {step}: {error}",
                    s.name
                );
            }
        }
        compared += 1;
    }
    assert_eq!(compared, 21);
}
