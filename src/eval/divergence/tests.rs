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
    assert_eq!(divergence.statistics(1), None);
    let times = 8;
    for _ in 0..times {
        for ((logits, base), token) in LOGITS.iter().zip(&BASE).zip(TOKENS) {
            divergence.add(&LogProbs::of(base), logits, token).unwrap();
        }
        divergence.end_window();
    }
    let found = divergence.statistics(1).unwrap();
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
    near(found.top1.error, (2.0 / 9.0 / (n - 1.0)).sqrt());
    let deviation = |values: &[f64]| {
        let middle = mean(values);
        (values.iter().map(|x| (x - middle).powi(2)).sum::<f64>() / 3.0 / (n - 1.0)).sqrt()
    };
    near(found.kl.error, deviation(&kl));
    near(found.ppl.error, mean(&nll).exp() * deviation(&nll));
    // Of the ratio: the differences' own.
    let differences: Vec<f64> = nll.iter().zip(&nll_base).map(|(a, b)| a - b).collect();
    near(found.ln_ratio.error, deviation(&differences));
    let [least, middle, most] = {
        let mut sorted = kl.clone();
        sorted.sort_by(f64::total_cmp);
        [sorted[0], sorted[1], sorted[2]]
    };
    near(found.kl_quantiles.min, least);
    near(found.kl_quantiles.median, middle);
    near(found.kl_quantiles.max, most);
    // Every window is the same: there is nothing to draw.
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
    let found = divergence.statistics(1).unwrap();
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
