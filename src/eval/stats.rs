//! Shares with intervals, and tests that say whether a difference is one.

use serde::Serialize;

use crate::noise::Noise;
use crate::quantile::quantile;

/// Of the standard normal distribution, for 95 %.
const Z: f64 = 1.96;
/// Of fewer values llama.cpp's `llama-perplexity` states no standard error.
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

    /// Without what cannot be.
    pub fn within(self, least: f64, most: f64) -> Self {
        Interval {
            low: self.low.clamp(least, most),
            high: self.high.clamp(least, most),
        }
    }
}

/// Where a mean lies, by Student's t: exact for values that are normal and independent. `None` of fewer
/// than two, which have no spread.
pub fn t_interval(values: &[f64]) -> Option<Interval> {
    let parts: Vec<(f64, f64)> = values.iter().map(|&value| (value, 1.0)).collect();
    t_interval_of_ratio(&parts)
}

/// The same of a mean over all tokens, from parts of a text: of each the sum and over how many tokens it is.
/// The standard error is that of a ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6),
/// with the degrees of freedom of the parts.
pub fn t_interval_of_ratio(parts: &[(f64, f64)]) -> Option<Interval> {
    let n = parts.len();
    let sum: f64 = parts.iter().map(|part| part.0).sum();
    let over: f64 = parts.iter().map(|part| part.1).sum();
    if n < 2 || over <= 0.0 {
        return None;
    }
    let ratio = sum / over;
    let squares = parts.iter().map(|(sum, over)| (sum - ratio * over).powi(2));
    let error = (squares.sum::<f64>() * n as f64 / (n - 1) as f64).sqrt() / over;
    let half = student(n - 1) * error;
    Some(Interval {
        low: ratio - half,
        high: ratio + half,
    })
}

/// How many standard errors hold 95 % of Student's t distribution, with at least one degree of freedom.
fn student(freedom: usize) -> f64 {
    // The share within +- t grows with the angle, so that it can be halved down to.
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
    for _ in 0..64 {
        let middle = 0.5 * (low + high);
        match share_within(middle, freedom) < 0.95 {
            true => low = middle,
            false => high = middle,
        }
    }
    (freedom as f64).sqrt() * low.tan()
}

/// The share of Student's t distribution within +- t, for `angle` = atan(t / sqrt(freedom)): Abramowitz and
/// Stegun 1964, 26.7.3 and 26.7.4.
fn share_within(angle: f64, freedom: usize) -> f64 {
    let (sin, cos) = angle.sin_cos();
    let odd = freedom % 2 == 1;
    let (mut term, mut sum) = (if odd { cos } else { 1.0 }, 0.0);
    for k in (if odd { 2 } else { 1 }..freedom).step_by(2) {
        sum += term;
        term *= cos * cos * k as f64 / (k + 1) as f64;
    }
    match odd {
        true => (angle + sin * sum) / std::f64::consts::FRAC_PI_2,
        false => sin * sum,
    }
}

/// A value and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// What was found.
    pub value: f64,
    /// Its standard error. `None`: too few values to state one.
    pub error: Option<f64>,
}

impl Estimate {
    /// The mean of values, with the standard error that `llama-perplexity --kl-divergence` states: none of
    /// fewer than 11.
    pub fn with_standard_error(values: &[f64]) -> Self {
        Self::of_at_least(FEWEST, values)
    }

    /// The same as `llama-perplexity` states it without a file to compare with: of two values and more.
    pub fn of_any_number(values: &[f64]) -> Self {
        Self::of_at_least(2, values)
    }

    fn of_at_least(fewest: usize, values: &[f64]) -> Self {
        let n = values.len();
        let middle = mean(values);
        let spread = mean(&values.iter().map(|x| x * x).collect::<Vec<_>>()) - middle * middle;
        // Rounding may leave it a hair below 0.
        let error = || (spread.max(0.0) / (n - 1) as f64).sqrt();
        Estimate {
            value: middle,
            error: (n >= fewest).then(error),
        }
    }

    /// Of e to the power of this.
    pub fn exp(self) -> Self {
        let value = self.value.exp();
        Estimate {
            value,
            error: self.error.map(|error| value * error),
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

    /// scipy.stats.t.ppf(0.975, n)
    #[test]
    fn students_quantiles_are_scipys() {
        for (n, expected) in [
            (1, 12.706_204_736),
            (2, 4.302_652_730),
            (3, 3.182_446_305),
            (4, 2.776_445_105),
            (7, 2.364_624_252),
            (30, 2.042_272_456),
            (100, 1.983_971_519),
            (1000, 1.962_339_081),
        ] {
            let found = student(n);
            assert!((found - expected).abs() < 1e-8, "{n}: {found}");
        }
    }

    /// The textbook's: mean +- t s / sqrt(n).
    #[test]
    fn means_lie_where_theory_says() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-8, "{a} {b}");
        let two = t_interval(&[1.0, 3.0]).unwrap();
        near(two.low, 2.0 - 12.706_204_736);
        near(two.high, 2.0 + 12.706_204_736);
        assert_eq!(two.within(0.0, 9.0).low, 0.0);
        let five = t_interval(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let half = 2.776_445_105 * 0.5f64.sqrt();
        near(five.low, 3.0 - half);
        near(five.high, 3.0 + half);
        assert_eq!(t_interval(&[1.0]), None);
        assert_eq!(t_interval_of_ratio(&[(0.0, 0.0); 3]), None);
    }

    /// Parts of several lengths: 95 of 100 intervals hold what the parts were drawn around, also of few.
    #[test]
    fn intervals_of_ratios_hold_what_they_say() {
        let mut noise = Noise::new(3);
        for n in [3, 5, 20] {
            let mut held = 0;
            for _ in 0..4000 {
                let parts: Vec<(f64, f64)> = (0..n)
                    .map(|_| {
                        let tokens = 40.0 + noise.below(20) as f64;
                        (tokens * (2.0 + f64::from(noise.normal())), tokens)
                    })
                    .collect();
                let found = t_interval_of_ratio(&parts).unwrap();
                held += usize::from(found.low <= 2.0 && 2.0 <= found.high);
            }
            // Four standard errors of 4,000 trials, and what the lengths move.
            assert!((3720..=3880).contains(&held), "{n}: {held}");
        }
    }

    #[test]
    fn few_values_have_no_standard_error() {
        let ten: Vec<f64> = (0..10).map(f64::from).collect();
        assert_eq!(Estimate::with_standard_error(&ten).error, None);
        let error = Estimate::of_any_number(&ten).error.unwrap();
        assert!((error - (8.25f64 / 9.0).sqrt()).abs() < 1e-12);
        assert_eq!(Estimate::of_any_number(&ten[..1]).error, None);
        let eleven: Vec<f64> = (0..11).map(f64::from).collect();
        let error = Estimate::with_standard_error(&eleven).error.unwrap();
        assert!((error - 1.0).abs() < 1e-12);
        let same = Estimate::with_standard_error(&[2.0; 20]);
        assert_eq!(same.error, Some(0.0));
        assert_eq!(same.exp().error, Some(0.0));
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
