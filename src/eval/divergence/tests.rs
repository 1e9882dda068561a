use super::*;

const LOGITS: [[f32; 4]; 3] = [
    [1.0, 2.0, -3.0, 0.5],
    [0.25, 0.5, 0.0, -0.25],
    [-1.0, 3.0, 2.5, 0.0],
];
const BASE: [[f32; 4]; 3] = [
    [1.5, 1.0, -3.0, 0.0],
    [0.0, 0.5, 0.0, -0.5],
    [-1.0, 2.0, 3.5, -30.0],
];
const TOKENS: [Token; 3] = [0, 3, 1];

fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 3e-4, "{a}, expected {b}");
}

fn log_probs(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    logits.iter().map(|&x| f64::from(x) - sum.ln()).collect()
}

/// The definitions, without what the file rounds.
#[test]
fn statistics_are_what_they_are_called() {
    let mut divergence = Divergence::default();
    assert_eq!(divergence.statistics(), None);
    let times = 8;
    for _ in 0..times {
        for ((logits, base), token) in LOGITS.iter().zip(&BASE).zip(TOKENS) {
            divergence.add(&LogProbs::of(base), logits, token).unwrap();
        }
        divergence.end_window();
    }
    let found = divergence.statistics().unwrap();
    let n = 3.0 * f64::from(times);
    let (mut nll, mut nll_base, mut kl, mut dp) = (vec![], vec![], vec![], vec![]);
    for ((logits, base), token) in LOGITS.iter().zip(&BASE).zip(TOKENS) {
        let (q, p) = (log_probs(logits), log_probs(base));
        let at = usize::try_from(token).unwrap();
        nll.push(-q[at]);
        nll_base.push(-p[at]);
        kl.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum());
        dp.push(q[at].exp() - p[at].exp());
    }
    assert_eq!((found.tokens, found.windows), (24, 8));
    near(found.ppl.value, mean(&nll).exp());
    near(found.ppl_base.value, mean(&nll_base).exp());
    near(found.ppl_ratio.value, (mean(&nll) - mean(&nll_base)).exp());
    near(
        found.ppl_difference.value,
        mean(&nll).exp() - mean(&nll_base).exp(),
    );
    near(found.kl.value, mean(&kl));
    near(found.dp.value, mean(&dp));
    let rms = (dp.iter().map(|x| x * x).sum::<f64>() / 3.0).sqrt();
    near(found.dp_rms.value, rms);
    // The first and the third prefer other tokens.
    near(found.top1.value, 1.0 / 3.0);
    near(found.top1.error.unwrap(), (2.0 / 9.0 / (n - 1.0)).sqrt());
    let deviation = |values: &[f64]| {
        let middle = mean(values);
        (values.iter().map(|x| (x - middle).powi(2)).sum::<f64>() / 3.0 / (n - 1.0)).sqrt()
    };
    near(found.kl.error.unwrap(), deviation(&kl));
    near(found.ppl.error.unwrap(), mean(&nll).exp() * deviation(&nll));
    // Of the ratio: the differences' own.
    let differences: Vec<f64> = nll.iter().zip(&nll_base).map(|(a, b)| a - b).collect();
    near(found.ln_ratio.error.unwrap(), deviation(&differences));
    let [least, middle, most] = {
        let mut sorted = kl.clone();
        sorted.sort_by(f64::total_cmp);
        [sorted[0], sorted[1], sorted[2]]
    };
    near(found.kl_quantiles.min, least);
    near(found.kl_quantiles.median, middle);
    near(found.kl_quantiles.max, most);
    // Every window is the same: nothing lies off the mean.
    let interval = found.kl_interval.unwrap();
    near(interval.low, mean(&kl));
    near(interval.high, mean(&kl));
}

#[test]
fn what_a_policy_does_not_change_is_no_distance() {
    let mut divergence = Divergence::default();
    for _ in 0..4 {
        for (logits, token) in LOGITS.iter().zip(TOKENS) {
            divergence
                .add(&LogProbs::of(logits), logits, token)
                .unwrap();
        }
    }
    let found = divergence.statistics().unwrap();
    assert!(found.kl.value.abs() < 1e-4 && found.kl_quantiles.max < 1e-4);
    assert!((found.ppl_ratio.value - 1.0).abs() < 1e-4);
    assert_eq!(found.top1.value, 1.0);
    // No window was ended.
    assert_eq!((found.windows, found.kl_interval), (0, None));
    assert!(found.correlation.unwrap() > 0.999);
}

#[test]
fn other_vocabularies_are_refused() {
    let mut divergence = Divergence::default();
    let base = LogProbs::of(&BASE[0]);
    assert!(divergence.add(&base, &LOGITS[0][..3], 0).is_err());
    assert!(divergence.add(&base, &LOGITS[0], 4).is_err());
    assert!(divergence.add(&base, &LOGITS[0], -1).is_err());
    assert!(divergence.add(&base, &[f32::NAN; 4], 0).is_err());
    assert_eq!(divergence, Divergence::default());
}

/// The numbers of tests/golden/perplexity/divergence.py, which makes the same rows.
#[test]
fn statistics_are_those_of_another_program() {
    let made = |i: u16, j: u16| f32::from((i * 37 + j * 11) % 29) / 4.0 - 3.5;
    let moved = |i: u16, j: u16| (f32::from((i * 7 + j * 13) % 9) - 4.0) / 4.0;
    let mut divergence = Divergence::default();
    for i in 0..12 {
        let logits: Vec<f32> = (0..5).map(|j| made(i, j)).collect();
        let mut base: Vec<f32> = (0..5).map(|j| made(i, j) + moved(i, j)).collect();
        if i == 5 {
            base[2] = -30.0;
        }
        let token = Token::from((3 * i + 1) % 5);
        let base = LogProbs::of(&base);
        divergence.add(&base, &logits, token).unwrap();
        if i % 4 == 3 {
            divergence.end_window();
        }
    }
    let found = serde_json::to_value(divergence.statistics()).unwrap();
    let expected = include_str!("../../../tests/golden/perplexity/divergence.json");
    let expected: serde_json::Value = serde_json::from_str(expected).unwrap();
    let near = |name: &str, found: &serde_json::Value, expected: &serde_json::Value| {
        let (a, b) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
        let bound = 1e-6 * b.abs().max(1.0);
        assert!((a - b).abs() < bound, "{name}: {a}, expected {b}");
    };
    for (name, expected) in expected.as_object().unwrap() {
        let found = &found[name];
        match expected {
            serde_json::Value::Array(both) => {
                let parts = match name.ends_with("interval") {
                    true => ["low", "high"],
                    false => ["value", "error"],
                };
                for (part, expected) in parts.iter().zip(both) {
                    near(name, &found[part], expected);
                }
            }
            serde_json::Value::Object(quantiles) => {
                for (part, expected) in quantiles {
                    near(&format!("{name} {part}"), &found[part], expected);
                }
            }
            one => near(name, found, one),
        }
    }
}
