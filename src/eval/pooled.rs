//! Distances of several windows of a text, taken together: means over all their tokens, intervals over
//! windows.

use super::record::Distance;
use super::stats::{Interval, t_interval_of_ratio};

/// Those of one policy.
pub(super) struct Pooled<'a> {
    distances: Vec<&'a Distance>,
    /// Predictions in all of them.
    pub tokens: usize,
    /// The Kullback-Leibler divergence of each prediction, sorted.
    pub kl: Vec<f64>,
}

impl<'a> Pooled<'a> {
    /// `None` of no prediction.
    pub fn of(distances: impl Iterator<Item = &'a Distance>) -> Option<Self> {
        let distances: Vec<&Distance> = distances.collect();
        let tokens = distances.iter().map(|d| d.n_tokens).sum();
        let mut kl: Vec<f64> = distances.iter().flat_map(|d| each_kl(d)).collect();
        kl.sort_by(f64::total_cmp);
        (tokens > 0).then_some(Pooled {
            distances,
            tokens,
            kl,
        })
    }

    /// Of a mean over tokens, from the sums of windows, which may have different lengths.
    pub fn interval(&self, sum: impl Fn(&Distance) -> f64) -> Option<Interval> {
        let parts = self.distances.iter().map(|d| (sum(d), d.n_tokens as f64));
        t_interval_of_ratio(&parts.collect::<Vec<_>>())
    }

    /// Of the mean divergence.
    pub fn kl_interval(&self) -> Option<Interval> {
        let interval = self.interval(|d| each_kl(d).sum());
        interval.map(|interval| interval.within(0.0, f64::INFINITY))
    }

    /// The largest divergence.
    pub fn kl_max(&self) -> f64 {
        self.kl.last().copied().unwrap_or_default()
    }

    /// Share of the predictions whose likeliest token is the full cache's.
    pub fn top1(&self) -> f64 {
        self.distances.iter().map(|d| same(d)).sum::<f64>() / self.tokens as f64
    }

    /// Of that.
    pub fn top1_interval(&self) -> Option<Interval> {
        let interval = self.interval(same);
        interval.map(|interval| interval.within(0.0, 1.0))
    }
}

fn each_kl(distance: &Distance) -> impl Iterator<Item = f64> + '_ {
    distance.kl.iter().map(|&kl| f64::from(kl))
}

/// Predictions whose likeliest token is the full cache's.
fn same(distance: &Distance) -> f64 {
    distance.top1 * distance.n_tokens as f64
}
