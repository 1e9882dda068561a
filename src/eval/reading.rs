//! Texts that a model reads: windows of one, and how well what stands there is predicted.
//!
//! Each window is a prompt, which goes in at once, and the text behind it, which is fed token by
//! token, whatever the model would have said: decoding, where a policy evicts and layers look up.
//! With a prompt of half the window and one token more this is what llama.cpp's `perplexity` scores.

use serde::Serialize;

use super::pooled::Pooled;
use super::record::Distance;
use super::stats::{Estimate, Interval, mean};
use crate::attend::Shares;
use crate::engine::Token;
use crate::quantile::quantile;

/// A part of a text, as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// What goes in first.
    pub prompt: Vec<Token>,
    /// What is predicted.
    pub text: Vec<Token>,
}

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tokens of a prompt, what the model wants in front of it among them.
    pub prompt: usize,
    /// Tokens that are predicted behind it.
    pub predict: usize,
}

impl Cut {
    /// Windows one behind the other, without what is left at the end. Each begins with `front`,
    /// which is the token that begins texts, where the model wants one.
    pub fn windows(self, text: &[Token], front: &[Token]) -> Vec<Window> {
        let own = self.prompt.saturating_sub(front.len());
        let whole = text.chunks_exact((own + self.predict).max(1));
        whole
            .map(|tokens| {
                let (prompt, text) = tokens.split_at(own);
                Window {
                    prompt: [front, prompt].concat(),
                    text: text.to_vec(),
                }
            })
            .collect()
    }
}

/// One window under one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reading {
    /// From 0.
    pub window: usize,
    /// The policy, as tables name it.
    pub contender: String,
    /// To the full cache that attends to everything, which read the same.
    pub distance: Distance,
    /// Logarithms of the probabilities that the policy gave the text's tokens.
    pub log_probs: Vec<f32>,
    /// What decoding steps attended to, where they looked cells up.
    pub attended: Option<Shares>,
    /// Cells that were in use at the end.
    pub cells: usize,
}

/// All windows under one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The policy, as tables name it.
    pub contender: String,
    /// How many.
    pub windows: usize,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Perplexity of the text.
    pub ppl: f64,
    /// Its standard error as llama.cpp's `llama-perplexity` states it, which takes tokens for
    /// independent. None of a single token.
    pub ppl_error: Option<f64>,
    /// Perplexity up to and with each window.
    pub ppl_so_far: Vec<f64>,
    /// The perplexity over that of the full cache.
    pub ppl_ratio: f64,
    /// Of `ppl_ratio`, by Student's t over windows. None of a single window, as below.
    pub ppl_ratio_interval: Option<Interval>,
    /// Kullback-Leibler divergence of the predictions from the full cache's, in nats: the mean.
    pub kl_mean: f64,
    /// Of `kl_mean`.
    pub kl_interval: Option<Interval>,
    /// The median.
    pub kl_median: f64,
    /// The 99th percentile.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// Share of the predictions whose likeliest token is the full cache's.
    pub top1: f64,
    /// Of `top1`.
    pub top1_interval: Option<Interval>,
    /// Cells that a looking layer attended to, of all in view: the mean over windows.
    pub attended: Option<f64>,
    /// Cells in use at the end of a window: the mean.
    pub cells: f64,
}

impl Row {
    /// `None` where this policy read nothing.
    pub fn of(contender: &str, readings: &[Reading]) -> Option<Self> {
        let own: Vec<&Reading> = readings
            .iter()
            .filter(|reading| reading.contender == contender)
            .collect();
        let windows = own.len();
        let distances = || own.iter().map(|reading| &reading.distance);
        let pooled = Pooled::of(distances())?;
        let n = pooled.tokens as f64;
        let full: f64 = distances().map(|d| d.log_prob_full).sum();
        let nll = own.iter().flat_map(|reading| &reading.log_probs);
        let nll: Vec<f64> = nll.map(|&log_prob| -f64::from(log_prob)).collect();
        let nll = Estimate::of_any_number(&nll);
        let (mut sum, mut n_so_far) = (0.0, 0);
        let ppl_so_far = distances().map(|d| {
            sum += d.log_prob;
            n_so_far += d.n_tokens;
            (-sum / n_so_far as f64).exp()
        });
        let ppl_so_far: Vec<f64> = ppl_so_far.collect();
        let log_prob = sum;
        let shares: Vec<f64> = own
            .iter()
            .filter_map(|reading| reading.attended.map(|shares| shares.all))
            .collect();
        let cells: Vec<f64> = own.iter().map(|reading| reading.cells as f64).collect();
        Some(Row {
            contender: contender.to_owned(),
            windows,
            tokens: pooled.tokens,
            ppl: (-log_prob / n).exp(),
            ppl_error: nll.exp().error,
            ppl_so_far,
            ppl_ratio: ((full - log_prob) / n).exp(),
            ppl_ratio_interval: pooled
                .interval(|d| d.log_prob_full - d.log_prob)
                .map(Interval::exp),
            kl_mean: mean(&pooled.kl),
            kl_interval: pooled.kl_interval(),
            kl_median: quantile(&pooled.kl, 0.5),
            kl_p99: quantile(&pooled.kl, 0.99),
            kl_max: pooled.kl_max(),
            top1: pooled.top1(),
            top1_interval: pooled.top1_interval(),
            attended: (!shares.is_empty()).then(|| mean(&shares)),
            cells: mean(&cells),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_and_begin_as_the_model_wants() {
        let text: Vec<Token> = (10..30).collect();
        let cut = Cut {
            prompt: 4,
            predict: 3,
        };
        let windows = cut.windows(&text, &[1]);
        let prompts: Vec<&[Token]> = windows.iter().map(|w| &w.prompt[..]).collect();
        assert_eq!(prompts, [[1, 10, 11, 12], [1, 16, 17, 18], [1, 22, 23, 24]]);
        assert_eq!(windows[2].text, [25, 26, 27]);
        assert_eq!(cut.windows(&text, &[])[1].prompt, [17, 18, 19, 20]);
        assert!(cut.windows(&text[..5], &[1]).is_empty());
    }

    #[test]
    fn rows_are_over_tokens() {
        let distance = |kl: &[f32], log_prob: f64, top1: f64| Distance {
            kl_mean: kl.iter().map(|&x| f64::from(x)).sum::<f64>() / kl.len() as f64,
            kl_median: 0.0,
            kl_p99: 0.0,
            top1,
            ppl_ratio: 1.0,
            attention_lost: None,
            first_differing: None,
            kl: kl.to_vec(),
            lost: Vec::new(),
            log_prob_full: -2.0 * kl.len() as f64,
            log_prob,
            n_tokens: kl.len(),
        };
        let reading = |window, distance: Distance| Reading {
            window,
            contender: "h2o".into(),
            log_probs: vec![
                (distance.log_prob / distance.n_tokens as f64) as f32;
                distance.n_tokens
            ],
            distance,
            attended: None,
            cells: 10 * window,
        };
        let readings = [
            reading(1, distance(&[0.0, 0.5, 0.25, 0.25], -9.0, 0.75)),
            reading(2, distance(&[1.0], -3.0, 0.0)),
        ];
        assert_eq!(Row::of("full", &readings), None);
        let row = Row::of("h2o", &readings).unwrap();
        assert_eq!((row.windows, row.tokens), (2, 5));
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(row.ppl, (12f64 / 5.0).exp());
        near(row.ppl_ratio, (2f64 / 5.0).exp());
        assert_eq!(row.ppl_so_far.len(), 2);
        near(row.ppl_so_far[0], (9f64 / 4.0).exp());
        near(row.ppl_so_far[1], row.ppl);
        // Negative log probabilities of 2.25 four times and of 3: a variance of 0.09 over 5 - 1.
        near(row.ppl_error.unwrap(), (12f64 / 5.0).exp() * 0.15);
        near(row.kl_mean, 0.4);
        near(row.kl_max, 1.0);
        near(row.kl_median, 0.25);
        near(row.top1, 0.6);
        near(row.cells, 15.0);
        let interval = row.kl_interval.unwrap();
        assert!(interval.low < 0.4 && 0.4 < interval.high);
        let interval = row.top1_interval.unwrap();
        assert_eq!((interval.low, interval.high), (0.0, 1.0));
        // Differences 1 and 1 of 4 and 1 tokens: 0.4 is their mean, 0.6 what each lies off it.
        let interval = row.ppl_ratio_interval.unwrap();
        let half = 12.706_204_736 * (0.72f64 * 2.0).sqrt() / 5.0;
        assert!((interval.low.ln() - (0.4 - half)).abs() < 1e-8);
        assert!((interval.high.ln() - (0.4 + half)).abs() < 1e-8);
        let one = Row::of("h2o", &readings[..1]).unwrap();
        assert_eq!((one.kl_interval, one.ppl_ratio_interval), (None, None));
    }
}
