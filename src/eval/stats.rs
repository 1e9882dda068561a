//! Shares with intervals, and tests that say whether a difference is one.

use serde::Serialize;

use crate::noise::Noise;
use crate::quantile::quantile;

/// Of the standard normal distribution, for 95 %.
const Z: f64 = 1.96;
/// Of fewer values no standard error is stated.
const FEWEST: usize = 11;

/// Hits out of `n`, with the 95 % interval of Wilson (1927).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// How many of [`Share::n`].
    pub hits: usize,
    /// How many there were.
    pub n: usize,
    /// `hits / n`.
    pub share: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Share {
    /// Of nothing, everything is possible: 0 to 1.
    pub fn of(hits: usize, n: usize) -> Self {
        let (low, high) = match n {
            0 => (0.0, 1.0),
            _ => wilson(hits as f64, n as f64),
        };
        Share {
            hits,
            n,
            share: hits as f64 / n.max(1) as f64,
            low,
            high,
        }
    }
}

fn wilson(hits: f64, n: f64) -> (f64, f64) {
    let p = hits / n;
    let d = 1.0 + Z * Z / n;
    let middle = (p + Z * Z / (2.0 * n)) / d;
    let half = Z / d * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// McNemar's exact test (two-sided, binomial): the probability that chance splits the questions
/// on which two policies differ at least as unevenly, when neither is better. `first`, `second`:
/// how many only the one, only the other answers right.
pub fn mcnemar(first: usize, second: usize) -> f64 {
    let n = first + second;
    // Terms of the binomial distribution by their logarithms: 2^-n alone would be 0 for large n.
    let mut ln_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=first.min(second) {
        tail += ln_term.exp();
        ln_term += ((n - k) as f64 / (k + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

/// Adjusts the p values of several tests (Holm 1979), so that the chance of calling any
/// difference where there is none stays below the level.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![1.0; p.len()];
    let mut so_far: f64 = 0.0;
    for (rank, &i) in order.iter().enumerate() {
        so_far = so_far.max((p.len() - rank) as f64 * p[i]).min(1.0);
        adjusted[i] = so_far;
    }
    adjusted
}

/// A difference with the 95 % interval that resampling gives it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Second minus first.
    pub difference: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// How likely a difference as large is where there is none.
    pub p: f64,
}

/// One story under two policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Facts that it should state.
    pub required: usize,
    /// Those stated under the one and the other.
    pub first: usize,
    /// Those stated under the other.
    pub second: usize,
}

/// Times that the stories are drawn anew.
pub const RESAMPLES: usize = 10_000;

/// The paired bootstrap: how the share of stated facts differs, second minus first, when the
/// stories had been others of the same kind. Stories are drawn with both their results.
///
/// `p` is twice the smaller share of the draws that lie on one side of 0, those at 0 on both.
/// `None` of fewer than two stories, which have no spread.
pub fn bootstrap(pairs: &[Pair], seed: u64) -> Option<Difference> {
    if pairs.len() < 2 {
        return None;
    }
    let difference = |drawn: &mut dyn Iterator<Item = &Pair>| {
        let (mut required, mut first, mut second) = (0, 0, 0);
        for pair in drawn {
            required += pair.required;
            first += pair.first;
            second += pair.second;
        }
        (second as f64 - first as f64) / required.max(1) as f64
    };
    let mut noise = Noise::new(seed);
    let mut draws: Vec<f64> = (0..RESAMPLES)
        .map(|_| difference(&mut (0..pairs.len()).map(|_| &pairs[noise.below(pairs.len())])))
        .collect();
    draws.sort_by(f64::total_cmp);
    let share = |of: &dyn Fn(f64) -> bool| {
        let n = draws.iter().filter(|&&d| of(d)).count();
        (n + 1) as f64 / (RESAMPLES + 1) as f64
    };
    let tail = share(&|d| d <= 0.0).min(share(&|d| d >= 0.0));
    Some(Difference {
        difference: difference(&mut pairs.iter()),
        low: quantile(&draws, 0.025),
        high: quantile(&draws, 0.975),
        p: (2.0 * tail).min(1.0),
    })
}

/// Where a mean lies, with 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Of e to the power of what lies there.
    pub fn exp(self) -> Self {
        Interval {
            low: self.low.exp(),
            high: self.high.exp(),
        }
    }
}

/// The bootstrap: where the mean had come to lie, had the values been others of the same kind.
/// `None` of fewer than two, which have no spread.
pub fn of_mean(values: &[f64], seed: u64) -> Option<Interval> {
    if values.len() < 2 {
        return None;
    }
    let mut noise = Noise::new(seed);
    let mut draw = || {
        let drawn = (0..values.len()).map(|_| values[noise.below(values.len())]);
        drawn.sum::<f64>() / values.len() as f64
    };
    let mut draws: Vec<f64> = (0..RESAMPLES).map(|_| draw()).collect();
    draws.sort_by(f64::total_cmp);
    Some(Interval {
        low: quantile(&draws, 0.025),
        high: quantile(&draws, 0.975),
    })
}

/// A value and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// What was found.
    pub value: f64,
    /// Its standard error; 0 of fewer than 11 values.
    pub error: f64,
}

impl Estimate {
    /// The mean of values.
    pub fn of_mean(values: &[f64]) -> Self {
        let n = values.len();
        let middle = mean(values);
        let spread = mean(&values.iter().map(|x| x * x).collect::<Vec<_>>()) - middle * middle;
        Estimate {
            value: middle,
            error: match n >= FEWEST && spread > 0.0 {
                true => (spread / (n - 1) as f64).sqrt(),
                false => 0.0,
            },
        }
    }

    /// Of e to the power of this.
    pub fn exp(self) -> Self {
        let value = self.value.exp();
        Estimate {
            value,
            error: value * self.error,
        }
    }
}

/// 0 of none.
pub fn mean(values: &[f64]) -> f64 {
    match values.len() {
        0 => 0.0,
        n => values.iter().sum::<f64>() / n as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy.stats.binomtest(hits, n).proportion_ci(0.95, "wilson"), whose z has more digits.
    #[test]
    fn intervals_are_wilsons() {
        for (hits, n, low, high) in [
            (0, 10, 0.0, 0.277_532_799_862_889_24),
            (129, 135, 0.906_428_641_545_761_9, 0.979_473_891_060_493_2),
            (135, 135, 0.972_332_047_982_475_1, 1.0),
            (656, 657, 0.991_429_307_812_077, 0.999_731_266_721_005_9),
        ] {
            let share = Share::of(hits, n);
            let near = |a: f64, b: f64| (a - b).abs() < 2e-5;
            assert!(near(share.low, low) && near(share.high, high), "{share:?}");
            assert!(share.low <= share.share && share.share <= share.high);
        }
        let nothing = Share::of(0, 0);
        assert_eq!((nothing.low, nothing.high), (0.0, 1.0));
    }

    /// scipy.stats.binomtest(min(b, c), b + c, 0.5).pvalue
    #[test]
    fn mcnemar_is_scipys_binomial_test() {
        for (b, c, p) in [
            (0, 0, 1.0),
            (0, 1, 1.0),
            (1, 5, 0.21875),
            (3, 12, 0.035_156_25),
            (10, 10, 1.0),
            (40, 75, 0.001_412_957_498_607_674),
            (700, 800, 0.010_559_255_466_711_506),
        ] {
            let (one, other) = (mcnemar(b, c), mcnemar(c, b));
            assert_eq!(one, other);
            assert!(
                (one - p).abs() < 1e-9 * p.max(1e-3),
                "{b} {c}: {one}, expected {p}"
            );
        }
        assert!(mcnemar(2, 1500) < 1e-300);
    }

    /// statsmodels.stats.multitest.multipletests(p, method="holm")
    #[test]
    fn holm_is_statsmodels() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005, 0.8]);
        for (a, b) in adjusted.iter().zip([0.04, 0.09, 0.09, 0.025, 0.8]) {
            assert!((a - b).abs() < 1e-12, "{adjusted:?}");
        }
        assert!(holm(&[]).is_empty());
    }

    /// Of two values a draw is the one, the other or their middle; of many normal ones the interval
    /// is the textbook's.
    #[test]
    fn means_lie_where_theory_says() {
        let two = of_mean(&[1.0, 3.0], 7).unwrap();
        assert_eq!((two.low, two.high), (1.0, 3.0));
        let mut noise = Noise::new(5);
        let values: Vec<f64> = (0..400).map(|_| f64::from(noise.normal())).collect();
        let interval = of_mean(&values, 7).unwrap();
        let middle = mean(&values);
        let deviation = values.iter().map(|x| (x - middle).powi(2)).sum::<f64>() / 400.0;
        let half = Z * (deviation / 400.0).sqrt();
        for (ours, theirs) in [
            (interval.low, middle - half),
            (interval.high, middle + half),
        ] {
            assert!((ours - theirs).abs() < 0.01, "{ours} {theirs}");
        }
        assert_eq!(of_mean(&values[..1], 7), None);
    }

    #[test]
    fn few_values_have_no_standard_error() {
        let ten: Vec<f64> = (0..10).map(f64::from).collect();
        assert_eq!(Estimate::of_mean(&ten).error, 0.0);
        let eleven: Vec<f64> = (0..11).map(f64::from).collect();
        assert!((Estimate::of_mean(&eleven).error - 1.0).abs() < 1e-12);
        assert_eq!(Estimate::of_mean(&[2.0; 20]).error, 0.0);
    }

    /// With few stories every sample can be counted: all draws of two out of two.
    #[test]
    fn the_bootstrap_draws_as_often_as_chance_says() {
        let pair = |first, second| Pair {
            required: 100,
            first,
            second,
        };
        // Draws: both the first (1/4) +0.1, both the second (1/4) -0.3, one each (1/2) -0.1.
        let drawn = bootstrap(&[pair(50, 60), pair(80, 50)], 7).unwrap();
        assert!((drawn.difference + 0.1).abs() < 1e-12);
        assert!((drawn.low + 0.3).abs() < 1e-12 && (drawn.high - 0.1).abs() < 1e-12);
        // Twice the quarter of draws at or above 0; 4 standard errors of 10,000 draws.
        assert!((drawn.p - 0.5).abs() < 0.035, "{}", drawn.p);
        assert_eq!(bootstrap(&[pair(50, 60), pair(80, 50)], 7), Some(drawn));

        let same = bootstrap(&[pair(50, 50), pair(80, 80), pair(1, 1)], 7).unwrap();
        assert_eq!(
            (same.difference, same.low, same.high, same.p),
            (0.0, 0.0, 0.0, 1.0)
        );
        let worse: Vec<Pair> = (0..20).map(|i| pair(90, 60 + i)).collect();
        assert!(bootstrap(&worse, 7).unwrap().p < 0.001);
        assert_eq!(bootstrap(&worse[..1], 7), None);
    }
}
