//! What a policy goes on with behind a part of a text, greedily, and how long it says what the full
//! cache says.

use std::collections::HashSet;

use serde::Serialize;

use super::pooled::Pooled;
use super::record::Distance;
use super::stats::{Interval, Share, mean, t_interval};
use crate::engine::Token;
use crate::quantile::median;

/// Tokens of a part that is looked for again.
pub const GRAM: usize = 4;

/// One window under one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Continuation {
    /// From 0.
    pub window: usize,
    /// The policy, as tables name it.
    pub contender: String,
    /// What it said.
    pub text: String,
    /// Tokens of it, the one that ends it among them.
    pub tokens: usize,
    /// Whether the model ended it.
    pub ended: bool,
    /// Tokens before the first that the full cache does not say; all where there is none.
    pub same: usize,
    /// Whether it is the full cache's text.
    pub equal: bool,
    /// [`repeated`] of it.
    pub repeated: f64,
    /// On the full cache's text, which the policy was fed.
    pub distance: Distance,
}

/// The share of a text's parts of `n` tokens that stand in it before: 1 - different ones / all. 0 of a
/// text with fewer tokens. This is seq-rep-n of Welleck et al., Neural Text Generation with
/// Unlikelihood Training (2019), who take n = 4.
pub fn repeated(tokens: &[Token], n: usize) -> f64 {
    let all = tokens.windows(n.max(1));
    let (n_all, different) = (all.len(), all.collect::<HashSet<_>>().len());
    match n_all {
        0 => 0.0,
        _ => 1.0 - different as f64 / n_all as f64,
    }
}

/// How many tokens two texts have in common from their beginning, and whether they are equal.
pub fn alike(a: &[Token], b: &[Token]) -> (usize, bool) {
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    (same, a.len() == b.len() && same == a.len())
}

/// All windows under one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The policy, as tables name it.
    pub contender: String,
    /// How many.
    pub windows: usize,
    /// Those whose text is the full cache's.
    pub equal: Share,
    /// Tokens before the first that differs, all of a text that is equal: the mean.
    pub same_mean: f64,
    /// Of `same_mean`, by Student's t over windows. None of a single window.
    pub same_interval: Option<Interval>,
    /// The median.
    pub same_median: f64,
    /// Tokens of a text: the mean.
    pub tokens: f64,
    /// Texts that the model ended.
    pub ended: Share,
    /// [`repeated`]: the mean.
    pub repeated: f64,
    /// Of `repeated`.
    pub repeated_interval: Option<Interval>,
    /// Kullback-Leibler divergence from the full cache's predictions on its own texts, in nats: the
    /// mean over tokens.
    pub kl_mean: f64,
    /// Of `kl_mean`, by windows.
    pub kl_interval: Option<Interval>,
    /// The largest.
    pub kl_max: f64,
    /// Share of these predictions whose likeliest token is the full cache's.
    pub top1: f64,
}

impl Row {
    /// `None` where this policy said nothing.
    pub fn of(contender: &str, all: &[Continuation]) -> Option<Self> {
        let own: Vec<&Continuation> = all.iter().filter(|c| c.contender == contender).collect();
        let windows = own.len();
        let pooled = Pooled::of(own.iter().map(|c| &c.distance))?;
        let each =
            |of: &dyn Fn(&Continuation) -> f64| -> Vec<f64> { own.iter().map(|c| of(c)).collect() };
        let interval = |of: &dyn Fn(&Continuation) -> f64, most: f64| {
            t_interval(&each(of)).map(|interval| interval.within(0.0, most))
        };
        let count = |of: &dyn Fn(&Continuation) -> bool| {
            Share::of(own.iter().filter(|c| of(c)).count(), windows)
        };
        let same = |c: &Continuation| c.same as f64;
        Some(Row {
            contender: contender.to_owned(),
            windows,
            equal: count(&|c| c.equal),
            same_mean: mean(&each(&same)),
            same_interval: interval(&same, f64::INFINITY),
            same_median: median(each(&same)).unwrap_or_default(),
            tokens: mean(&each(&|c| c.tokens as f64)),
            ended: count(&|c| c.ended),
            repeated: mean(&each(&|c| c.repeated)),
            repeated_interval: interval(&|c| c.repeated, 1.0),
            kl_mean: mean(&pooled.kl),
            kl_interval: pooled.kl_interval(),
            kl_max: pooled.kl_max(),
            top1: pooled.top1(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_come_again_are_counted() {
        assert_eq!(repeated(&[1, 2, 3], 4), 0.0);
        assert_eq!(repeated(&[1, 2, 3, 4, 5, 6], 4), 0.0);
        // 1 2 3 4, 2 3 4 1, 3 4 1 2, 4 1 2 3, and the first again.
        assert!((repeated(&[1, 2, 3, 4, 1, 2, 3, 4], 4) - 0.2).abs() < 1e-12);
        // One of seven is new.
        assert!((repeated(&[7; 10], 4) - 6.0 / 7.0).abs() < 1e-12);
    }

    #[test]
    fn texts_are_alike_up_to_the_first_that_differs() {
        assert_eq!(alike(&[1, 2, 3], &[1, 2, 3]), (3, true));
        assert_eq!(alike(&[1, 2, 3], &[1, 5, 3]), (1, false));
        // One that ended is not the other, whose beginning it is.
        assert_eq!(alike(&[1, 2], &[1, 2, 3]), (2, false));
        assert_eq!(alike(&[], &[1]), (0, false));
    }

    #[test]
    fn rows_are_over_windows_and_tokens() {
        let distance = |kl: &[f32], top1: f64| Distance {
            kl_mean: kl.iter().map(|&x| f64::from(x)).sum::<f64>() / kl.len() as f64,
            kl_median: 0.0,
            kl_p99: 0.0,
            top1,
            ppl_ratio: 1.0,
            attention_lost: None,
            first_differing: None,
            kl: kl.to_vec(),
            lost: Vec::new(),
            log_prob_full: 0.0,
            log_prob: 0.0,
            n_tokens: kl.len(),
        };
        let one = |window, same, equal, tokens, repeated, distance| Continuation {
            window,
            contender: "h2o".into(),
            text: String::new(),
            tokens,
            ended: window == 0,
            same,
            equal,
            repeated,
            distance,
        };
        let all = [
            one(0, 4, true, 4, 0.0, distance(&[0.0; 4], 1.0)),
            one(1, 1, false, 9, 0.5, distance(&[0.5, 1.5], 0.5)),
            one(2, 2, false, 5, 0.1, distance(&[0.2, 0.2], 0.5)),
        ];
        assert_eq!(Row::of("full", &all), None);
        let row = Row::of("h2o", &all).unwrap();
        assert_eq!((row.windows, row.equal.hits, row.ended.hits), (3, 1, 1));
        assert_eq!((row.same_median, row.tokens), (2.0, 6.0));
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-7, "{a} {b}");
        near(row.same_mean, 7.0 / 3.0);
        near(row.repeated, 0.2);
        near(row.kl_mean, 0.3);
        near(row.kl_max, 1.5);
        near(row.top1, 0.75);
        let interval = row.same_interval.unwrap();
        assert!(interval.low < row.same_mean && row.same_mean < interval.high);
        // Short texts far from the full cache and a long one near it: the windows' own means are nowhere near
        // the mean over tokens.
        let mut all: Vec<Continuation> = (0..7)
            .map(|i| one(i, 0, false, 1, 0.0, distance(&[2.0 + 0.01 * i as f32], 0.0)))
            .collect();
        all.push(one(7, 0, false, 500, 0.0, distance(&[0.0; 500], 0.0)));
        let row = Row::of("h2o", &all).unwrap();
        near(row.kl_mean, 14.21 / 507.0);
        let interval = row.kl_interval.unwrap();
        assert!(interval.low <= row.kl_mean && row.kl_mean <= interval.high);
        assert!(interval.high < 1.0, "{interval:?}");
        // By hand, of three: means 0, 1 and 0.2 over 4, 2 and 2 tokens.
        let three = [
            one(0, 0, false, 4, 0.0, distance(&[0.0; 4], 0.0)),
            one(1, 0, false, 2, 0.0, distance(&[0.5, 1.5], 0.0)),
            one(2, 0, false, 2, 0.0, distance(&[0.2, 0.2], 0.0)),
        ];
        let row = Row::of("h2o", &three).unwrap();
        // Residuals -1.2, 1.4 and -0.2; t of two degrees of freedom.
        let half = 4.302_652_730 * (3.44f64 * 1.5).sqrt() / 8.0;
        let interval = row.kl_interval.unwrap();
        assert_eq!(interval.low, 0.0);
        near(interval.high, 0.3 + half);
    }
}
