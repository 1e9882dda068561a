//! The eviction oracle of tests/golden/masked: what the logits have to be when positions are
//! evicted, computed by numpy with the positions masked.

use serde::Deserialize;

use super::npz::{self, Array};

#[derive(Debug, Deserialize)]
pub struct Scenario {
    pub name: String,
    /// The golden prompt's id.
    pub prompt: String,
    /// Tokens to feed one by one behind the prompt, whatever is sampled.
    pub ids: Vec<i32>,
    pub evictions: Vec<Eviction>,
    /// Positions of the prompt that are never prefilled; the others keep theirs.
    pub holes: Vec<i32>,
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
    assert_eq!(scenarios.len(), 24);
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
