//! The middle and the spread of a few measurements.

use crate::quantile::quantile;

/// Quartiles of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The middle value.
    pub median: f64,
    /// The lower quartile.
    pub q1: f64,
    /// The upper quartile.
    pub q3: f64,
}

impl Summary {
    /// A spread, as a share of the median, above which a small difference means nothing.
    pub const NOISY: f64 = 0.1;

    /// Quartiles by linear interpolation between the sorted values. `None` of no values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        if sorted.is_empty() {
            return None;
        }
        let at = |share: f64| quantile(&sorted, share);
        Some(Summary {
            median: at(0.5),
            q1: at(0.25),
            q3: at(0.75),
        })
    }

    /// Distance of the quartiles as a share of the median; 0 where that is 0.
    pub fn spread(&self) -> f64 {
        if self.median > 0.0 {
            (self.q3 - self.q1) / self.median
        } else {
            0.0
        }
    }

    /// Whether the spread exceeds [`Summary::NOISY`].
    pub fn is_noisy(&self) -> bool {
        self.spread() > Self::NOISY
    }
}

/// How many times as long as `first` the values took, pair by pair: measured one after the other,
/// both of a pair saw the machine in the same state. Pairs end with the shorter list.
pub fn ratio(values: &[f64], first: &[f64]) -> Option<Summary> {
    let pairs = values.iter().zip(first).filter(|(_, first)| **first > 0.0);
    let ratios: Vec<f64> = pairs.map(|(value, first)| value / first).collect();
    Summary::of(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// numpy.percentile(values, [25, 50, 75]).
    #[test]
    fn quartiles_are_numpys() {
        let summary = |values: &[f64]| {
            let Summary { q1, median, q3 } = Summary::of(values).unwrap();
            [q1, median, q3]
        };
        assert_eq!(summary(&[3.0]), [3.0; 3]);
        assert_eq!(summary(&[2.0, 1.0]), [1.25, 1.5, 1.75]);
        assert_eq!(summary(&[5.0, 1.0, 2.0, 10.0]), [1.75, 3.5, 6.25]);
        assert_eq!(summary(&[9.0, 1.0, 4.0, 16.0, 25.0]), [4.0, 9.0, 16.0]);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn a_spread_above_a_tenth_is_noisy() {
        let noisy = |values: &[f64]| Summary::of(values).unwrap().is_noisy();
        assert!(!noisy(&[100.0, 101.0, 102.0, 103.0, 200.0]));
        assert!(noisy(&[100.0, 80.0, 120.0, 90.0, 110.0]));
        assert!(!noisy(&[0.0, 0.0]));
        assert!(!noisy(&[7.0]));
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The machine slows down to half its speed on the way; the ratio stays.
        let ratio = ratio(&[5.0, 6.0, 10.0], &[10.0, 12.0, 20.0]).unwrap();
        assert_eq!(ratio, Summary::of(&[0.5]).unwrap());
        assert_eq!(super::ratio(&[1.0], &[]), None);
        assert_eq!(super::ratio(&[1.0], &[0.0]), None);
    }
}
