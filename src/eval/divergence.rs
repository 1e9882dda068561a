//! What llama.cpp's `llama-perplexity` says of a text: perplexity with its standard error, and with
//! `--kl-divergence` how far predictions are from those in a file ([`super::log_probs`]). The same
//! quantities by the same formulas, so that figures can be put beside published ones.
//!
//! Standard errors take predictions for independent: they are those of the text at hand, and
//! smaller than what another text would show.

use serde::Serialize;

use super::log_probs::{LogProbs, log_sum_exp};
use super::stats::{Estimate, Interval, mean, t_interval_of_ratio};
use crate::engine::{Token, likeliest};
use crate::error::{Error, Result};
use crate::quantile::quantile;

/// Log probabilities of this and less count as none.
const NONE: f32 = -16.0;

/// How the covariance of two means is stated; 0 of fewer than 10 pairs.
fn covariance(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len();
    if n < 10 {
        return 0.0;
    }
    let products: Vec<f64> = a.iter().zip(b).map(|(a, b)| a * b).collect();
    (mean(&products) - mean(a) * mean(b)) / (n - 1) as f64
}

/// Predictions beside those of a file, collected one by one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Divergence {
    /// Negative log probability of each token.
    nll: Vec<f64>,
    nll_base: Vec<f64>,
    /// KL(base || these), in nats.
    kl: Vec<f64>,
    /// How much likelier the text's token is than in the base.
    dp: Vec<f64>,
    /// 1 where the likeliest token is the base's.
    same: Vec<f64>,
    /// Where windows end, in numbers of predictions.
    ends: Vec<usize>,
}

impl Divergence {
    /// One prediction: logits `[n_vocab]` beside the base's; `token` is what comes next.
    ///
    /// # Errors
    /// [`Error::Contract`] for vocabularies that differ, logits that are no numbers, and a token of
    /// neither.
    pub fn add(&mut self, base: &LogProbs, logits: &[f32], token: Token) -> Result<()> {
        if base.len() != logits.len() {
            let (n, m) = (base.len(), logits.len());
            return Err(Error::contract(format!("{m} logits beside {n}")));
        }
        let own = usize::try_from(token).ok().and_then(|at| logits.get(at));
        let (Some(&own), Some(at_base)) = (own, base.get(token)) else {
            return Err(Error::contract(format!("token {token} of {}", base.len())));
        };
        let first = likeliest(logits)?;
        let (most, rest) = log_sum_exp(logits);
        // What makes logits log probabilities when it is taken off.
        let all = most + rest;
        let (nll, nll_base) = (f64::from(all - own), f64::from(-at_base));
        let kl = base.iter().zip(logits).filter(|(p, _)| *p > NONE);
        let kl = kl.map(|(p, &q)| f64::from(p.exp() * (p - q + all))).sum();
        let mut of_base = (0, f32::NEG_INFINITY);
        for (i, p) in base.iter().enumerate() {
            if p > of_base.1 {
                of_base = (i, p);
            }
        }
        self.nll.push(nll);
        self.nll_base.push(nll_base);
        self.kl.push(kl);
        self.dp.push((-nll).exp() - (-nll_base).exp());
        let same = usize::try_from(first) == Ok(of_base.0);
        self.same.push(f64::from(u8::from(same)));
        Ok(())
    }

    /// A window is over.
    pub fn end_window(&mut self) {
        self.ends.push(self.nll.len());
    }

    /// What came of each window by itself.
    pub fn windows(&self) -> Vec<Part> {
        let starts = [0].into_iter().chain(self.ends.iter().copied());
        let parts = starts.zip(&self.ends).map(|(from, &to)| Part {
            tokens: to - from,
            ppl: mean(&self.nll[from..to]).exp(),
            ppl_base: mean(&self.nll_base[from..to]).exp(),
            kl: mean(&self.kl[from..to]),
            top1: mean(&self.same[from..to]),
        });
        parts.collect()
    }

    /// What came out; `None` of nothing.
    pub fn statistics(&self) -> Option<Statistics> {
        let n = self.nll.len();
        if n == 0 {
            return None;
        }
        let (nll, base) = (
            Estimate::with_standard_error(&self.nll),
            Estimate::with_standard_error(&self.nll_base),
        );
        let together = covariance(&self.nll, &self.nll_base);
        let (ppl, ppl_base) = (nll.exp(), base.exp());
        // Of a difference of two that go together. Rounding may leave it a hair below 0.
        let apart = |a: Option<f64>, b: Option<f64>, ab: f64| {
            let (a, b) = (a?, b?);
            Some((a * a + b * b - 2.0 * ab).max(0.0).sqrt())
        };
        let ln_ratio = Estimate {
            value: nll.value - base.value,
            error: apart(nll.error, base.error, together),
        };
        let squares: Vec<f64> = self.dp.iter().map(|dp| dp * dp).collect();
        let square = Estimate::with_standard_error(&squares);
        let rms = square.value.sqrt();
        let same = mean(&self.same);
        let windows = self.windows();
        let interval = |of: &dyn Fn(&Part) -> f64| {
            let parts = windows.iter().map(|w| {
                let n = w.tokens as f64;
                (of(w) * n, n)
            });
            t_interval_of_ratio(&parts.collect::<Vec<_>>())
        };
        // What the file rounds may leave a mean a hair below 0.
        let least = mean(&self.kl).min(0.0);
        let (no_limit, share) = (f64::INFINITY, 1.0);
        Some(Statistics {
            tokens: n,
            windows: self.ends.len(),
            ppl,
            ppl_base,
            correlation: match (nll.error, base.error) {
                (Some(a), Some(b)) if a * b > 0.0 => Some(together / (a * b)),
                _ => None,
            },
            ln_ratio,
            ppl_ratio: ln_ratio.exp(),
            ppl_ratio_interval: interval(&|w| (w.ppl / w.ppl_base).ln()).map(Interval::exp),
            ppl_difference: Estimate {
                value: ppl.value - ppl_base.value,
                error: apart(
                    ppl.error,
                    ppl_base.error,
                    ppl.value * ppl_base.value * together,
                ),
            },
            kl: Estimate::with_standard_error(&self.kl),
            kl_interval: interval(&|w| w.kl).map(|interval| interval.within(least, no_limit)),
            kl_quantiles: Quantiles::of(&self.kl),
            dp: Estimate::with_standard_error(&self.dp),
            dp_quantiles: Quantiles::of(&self.dp),
            dp_rms: Estimate {
                value: rms,
                error: square.error.map(|error| match rms > 0.0 {
                    true => 0.5 / rms * error,
                    false => 0.0,
                }),
            },
            top1: Estimate {
                value: same,
                error: (n > 1).then(|| (same * (1.0 - same) / (n - 1) as f64).sqrt()),
            },
            top1_interval: interval(&|w| w.top1).map(|interval| interval.within(0.0, share)),
        })
    }
}

/// A window's own means.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Part {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Perplexity.
    pub ppl: f64,
    /// In the base.
    pub ppl_base: f64,
    /// Divergence from the base, in nats.
    pub kl: f64,
    /// Share of the predictions whose likeliest token is the base's.
    pub top1: f64,
}

/// What `llama-perplexity --kl-divergence` prints, and intervals by Student's t over windows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Chunks.
    pub windows: usize,
    /// `Mean PPL(Q)`.
    pub ppl: Estimate,
    /// `Mean PPL(base)`.
    pub ppl_base: Estimate,
    /// `Cor(ln(PPL(Q)), ln(PPL(base)))`; none of too few tokens.
    pub correlation: Option<f64>,
    /// `Mean ln(PPL(Q)/PPL(base))`.
    pub ln_ratio: Estimate,
    /// `Mean PPL(Q)/PPL(base)`.
    pub ppl_ratio: Estimate,
    /// Of `ppl_ratio`, by windows. None of a single one.
    pub ppl_ratio_interval: Option<Interval>,
    /// `Mean PPL(Q)-PPL(base)`.
    pub ppl_difference: Estimate,
    /// `Mean KLD`, in nats.
    pub kl: Estimate,
    /// Of `kl`, by windows.
    pub kl_interval: Option<Interval>,
    /// `Maximum KLD` to `Minimum KLD`.
    pub kl_quantiles: Quantiles,
    /// `Mean Δp`, a share.
    pub dp: Estimate,
    /// `Maximum Δp` to `Minimum Δp`.
    pub dp_quantiles: Quantiles,
    /// `RMS Δp`.
    pub dp_rms: Estimate,
    /// `Same top p`, a share.
    pub top1: Estimate,
    /// Of `top1`, by windows.
    pub top1_interval: Option<Interval>,
}

/// Where values lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// The largest.
    pub max: f64,
    /// 99.9 % are no larger.
    pub p99_9: f64,
    /// 99 %.
    pub p99: f64,
    /// 95 %.
    pub p95: f64,
    /// 90 %.
    pub p90: f64,
    /// 75 %.
    pub p75: f64,
    /// Half of them.
    pub median: f64,
    /// 25 %.
    pub p25: f64,
    /// 10 %.
    pub p10: f64,
    /// 5 %.
    pub p5: f64,
    /// 1 %.
    pub p1: f64,
    /// 0.1 %.
    pub p0_1: f64,
    /// The least.
    pub min: f64,
}

impl Quantiles {
    fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| quantile(&sorted, share);
        Quantiles {
            max: at(1.0),
            p99_9: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            p75: at(0.75),
            median: at(0.5),
            p25: at(0.25),
            p10: at(0.1),
            p5: at(0.05),
            p1: at(0.01),
            p0_1: at(0.001),
            min: at(0.0),
        }
    }
}

#[cfg(test)]
mod tests;
