//! How far a policy's predictions are from the full cache's.
//!
//! The full cache answers greedily ([`listen`]); a policy is then fed the same tokens
//! ([`follow`]), so that both predict every token from the same text, whatever the policy would
//! have said itself. What they predict is compared position by position. The text can also be one
//! that is there ([`read()`]).

mod attentive;

use std::collections::HashMap;

use super::record::Distance;
use super::stats::mean;
use crate::cache::{Ledger, Pos};
use crate::engine::{Engine, Token, likeliest};
use crate::error::{Error, Result};
use crate::generate::{Segment, Session};
use crate::policy::Shift;
use crate::quantile::quantile;

pub use attentive::AttentiveFull;

/// The full cache's answer to one prompt, with everything it predicted on the way.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// The predicted tokens; the last one was not fed.
    pub tokens: Vec<Token>,
    /// Whether the last of them ends the answer.
    pub ended: bool,
    /// Logits behind each of them: `[tokens][n_vocab]`.
    logits: Vec<Vec<f32>>,
    /// Of each fed token, the attention that each position got: `[tokens - 1][positions]`; empty
    /// where it was not read.
    attention: Vec<Vec<f32>>,
}

impl Said {
    /// The last token, when the next prompt has to begin with it.
    pub fn pending(&self) -> Option<Token> {
        self.tokens.last().copied().filter(|_| !self.ended)
    }

    /// Bytes that it takes, nearly all of them for logits and attention.
    pub fn bytes(&self) -> usize {
        let rows = self.logits.iter().chain(&self.attention);
        rows.map(|row| size_of_val(row.as_slice())).sum()
    }

    /// A text, with what was predicted of it: `[tokens][n_vocab]`.
    ///
    /// # Errors
    /// [`Error::Contract`] where their numbers differ.
    pub fn of(tokens: &[Token], logits: Vec<Vec<f32>>) -> Result<Self> {
        if tokens.len() != logits.len() {
            let (n, m) = (tokens.len(), logits.len());
            return Err(Error::contract(format!("{m} predictions of {n} tokens")));
        }
        Ok(Said {
            tokens: tokens.to_vec(),
            logits,
            ..Said::default()
        })
    }

    /// What was predicted of each token: `[tokens][n_vocab]`.
    pub fn logits(&self) -> &[Vec<f32>] {
        &self.logits
    }

    /// Tokens that were fed.
    pub fn fed(&self) -> &[Token] {
        &self.tokens[..self.tokens.len().saturating_sub(1)]
    }
}

/// Lets the full cache answer greedily. `None`: cancelled.
///
/// # Errors
/// The session's own.
pub fn listen<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    n_predict: usize,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Said>> {
    tell(session, prompt, n_predict, cancelled, &|_| None)
}

/// Lets the full cache read a text, whatever it would have said. `None`: cancelled.
///
/// # Errors
/// The session's own.
pub fn read<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    text: &[Token],
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Said>> {
    let given = |i: usize| text.get(i).copied();
    tell(session, prompt, text.len(), cancelled, &given)
}

/// Tokens as given by number, or the likeliest, whose end is the answer's.
fn tell<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    n_predict: usize,
    cancelled: &dyn Fn() -> bool,
    given: &dyn Fn(usize) -> Option<Token>,
) -> Result<Option<Said>> {
    let (mut all, mut attention) = (Vec::new(), Vec::new());
    let mut keep = |session: &Session<E>, watched: bool, _: Token| {
        if watched {
            attention.push(by_position(session)?);
        }
        all.push(session.engine.logits()?.to_vec());
        Ok(())
    };
    let told = walk(session, prompt, n_predict, cancelled, given, &mut keep)?;
    Ok(told.map(|(tokens, ended)| Said {
        tokens,
        ended,
        logits: all,
        attention,
    }))
}

/// Lets a session read a text as [`read`] does, and hands over what it predicts of each token:
/// logits `[n_vocab]`. `false`: cancelled.
///
/// # Errors
/// The session's own, and those of `each`.
pub fn predictions<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    text: &[Token],
    cancelled: &dyn Fn() -> bool,
    each: &mut dyn FnMut(&[f32], Token) -> Result<()>,
) -> Result<bool> {
    let given = |i: usize| text.get(i).copied();
    let mut hand =
        |session: &Session<E>, _: bool, token: Token| each(session.engine.logits()?, token);
    let told = walk(session, prompt, text.len(), cancelled, &given, &mut hand)?;
    match told {
        // A text is not over where the context is.
        Some((tokens, _)) if tokens.len() < text.len() => Err(Error::ContextFull {
            n_ctx: session.engine.n_cells(),
        }),
        told => Ok(told.is_some()),
    }
}

/// Lets a session answer greedily: the tokens, and whether the last of them ends the answer. `None`:
/// cancelled.
///
/// # Errors
/// The session's own.
pub fn answer<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    n_predict: usize,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<(Vec<Token>, bool)>> {
    let mut pass = |_: &Session<E>, _: bool, _: Token| Ok(());
    walk(session, prompt, n_predict, cancelled, &|_| None, &mut pass)
}

/// What is done at each prediction: the session that made it, whether attention was read on the way
/// to it, and the token that comes next.
type Each<'a, E> = dyn FnMut(&Session<E>, bool, Token) -> Result<()> + 'a;

/// Tokens as given by number, or the likeliest, whose end is the answer's.
fn walk<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    n_predict: usize,
    cancelled: &dyn Fn() -> bool,
    given: &dyn Fn(usize) -> Option<Token>,
    each: &mut Each<'_, E>,
) -> Result<Option<(Vec<Token>, bool)>> {
    let mut tokens: Vec<Token> = Vec::new();
    if !session.prefill(prompt, cancelled)? {
        return Ok(None);
    }
    while tokens.len() < n_predict {
        if cancelled() {
            return Ok(None);
        }
        let mut watched = false;
        if let Some(&token) = tokens.last() {
            watched = session.controller.observes_decoding();
            match session.step(token) {
                // As an answer that fills the context, it ends here.
                Err(Error::ContextFull { .. }) => break,
                done => done?,
            }
        }
        let given = given(tokens.len());
        let token = given.map_or_else(|| likeliest(session.engine.logits()?), Ok)?;
        each(session, watched, token)?;
        tokens.push(token);
        if given.is_none() && session.vocabulary()?.is_eog(token) {
            return Ok(Some((tokens, true)));
        }
    }
    Ok(Some((tokens, false)))
}

/// The attention of the last token: `[positions]`.
fn by_position<E: Engine>(session: &Session<E>) -> Result<Vec<f32>> {
    let ledger = session.controller.ledger();
    let n = ledger.newest().map_or(0, |pos| pos as usize + 1);
    let mut attention = vec![0.0; n];
    let seen = session.seen();
    for entry in ledger.entries() {
        let paid = seen.sum.get(entry.cell as usize).copied().unwrap_or(0.0);
        match attention.get_mut(entry.pos as usize) {
            Some(sum) => *sum += paid,
            None => return Err(Error::contract(format!("position {} of {n}", entry.pos))),
        }
    }
    Ok(attention)
}

/// What came out of one or several turns under a policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Followed {
    /// KL(full || policy) of each prediction, in nats.
    kl: Vec<f64>,
    /// Whether the likeliest token was the same.
    same: Vec<bool>,
    /// Of each fed token, the full cache's attention to tokens that the policy does not have.
    lost: Vec<f64>,
    log_prob_full: f64,
    /// Of the policy's, for each prediction: the logarithm of the probability of what comes next.
    log_probs: Vec<f64>,
}

/// Feeds a policy's session what the full cache said. `None`: cancelled.
///
/// # Errors
/// The session's own.
pub fn follow<E: Engine>(
    session: &mut Session<E>,
    prompt: &[Segment],
    said: &Said,
    places: &mut Places,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Followed>> {
    let mut followed = Followed::default();
    let rows: usize = prompt.iter().map(Segment::positions).sum();
    places.come(session.controller.next_pos(), rows);
    if !session.prefill(prompt, cancelled)? {
        return Ok(None);
    }
    places.follow(session.controller.shift(), session.controller.ledger());
    for (i, (logits, &token)) in said.logits.iter().zip(&said.tokens).enumerate() {
        if cancelled() {
            return Ok(None);
        }
        if let Some(fed) = i.checked_sub(1) {
            // What is there for the token to see, before the policy acts on it.
            if let Some(attention) = said.attention.get(fed) {
                let held = places.held(session.controller.ledger());
                followed.lost.push(lost(attention, &held));
            }
            places.come(session.controller.next_pos(), 1);
            session.step(said.tokens[fed])?;
            places.follow(session.controller.shift(), session.controller.ledger());
        }
        followed.add(logits, session.engine.logits()?, token)?;
    }
    Ok(Some(followed))
}

/// The share of attention that goes to positions that are not held. The last one is the token
/// that pays it, which sees itself.
fn lost(attention: &[f32], held: &[bool]) -> f64 {
    let past = &attention[..attention.len().saturating_sub(1)];
    let paid = past.iter().enumerate();
    paid.filter(|(pos, _)| !held.get(*pos).copied().unwrap_or(false))
        .fold(0.0, |sum, (_, &paid)| sum + f64::from(paid))
}

/// Which of the full cache's positions a policy's tokens come from: the same, unless the policy
/// moves them.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// From the position now to the full cache's; those that are not here have not moved.
    moved: HashMap<Pos, Pos>,
    /// How far the next position lags behind the full cache's.
    behind: Pos,
}

impl Places {
    /// So many tokens come in from this position on.
    fn come(&mut self, next: Pos, n: usize) {
        if self.behind > 0 {
            let n = Pos::try_from(n).unwrap_or(Pos::MAX);
            let came = (next..next.saturating_add(n)).map(|pos| (pos, pos + self.behind));
            self.moved.extend(came);
        }
    }

    /// Follows what the policy has just moved.
    fn follow(&mut self, shift: Option<Shift>, ledger: &Ledger) {
        let Some(Shift { from, by }) = shift else {
            return;
        };
        // Where the tokens went that moved nothing was left.
        let before = |pos: Pos| if pos >= from - by { pos + by } else { pos };
        let moved = ledger.entries().map(|entry| {
            let was = before(entry.pos);
            (entry.pos, self.moved.get(&was).copied().unwrap_or(was))
        });
        self.moved = moved.collect();
        self.behind += by;
    }

    /// Which of the full cache's positions are there.
    fn held(&self, ledger: &Ledger) -> Vec<bool> {
        let mut held = Vec::new();
        for entry in ledger.entries() {
            let pos = self.moved.get(&entry.pos).copied().unwrap_or(entry.pos) as usize;
            if held.len() <= pos {
                held.resize(pos + 1, false);
            }
            held[pos] = true;
        }
        held
    }
}

impl Followed {
    /// One prediction, logits `[n_vocab]` of both; `token` is what comes next.
    ///
    /// # Errors
    /// [`Error::Contract`] for vocabularies that differ and tokens that they lack.
    pub fn add(&mut self, full: &[f32], policy: &[f32], token: Token) -> Result<()> {
        if full.len() != policy.len() {
            let (n, m) = (full.len(), policy.len());
            return Err(Error::contract(format!("{m} logits beside {n}")));
        }
        let at = usize::try_from(token).unwrap_or(usize::MAX);
        let (p, q) = (log_softmax(full), log_softmax(policy));
        let (Some(own), Some(other)) = (p.get(at), q.get(at)) else {
            return Err(Error::contract(format!("token {token} of {}", p.len())));
        };
        self.log_prob_full += own;
        self.log_probs.push(*other);
        self.same.push(likeliest(policy)? == likeliest(full)?);
        self.kl.push(kl(&p, &q));
        Ok(())
    }

    /// Of each prediction, what the policy gave the token that comes next: logarithms.
    pub fn log_probs(&self) -> &[f64] {
        &self.log_probs
    }

    /// As reports show it. `None` of no prediction.
    pub fn distance(&self) -> Option<Distance> {
        let n = self.kl.len();
        if n == 0 {
            return None;
        }
        let mut sorted = self.kl.clone();
        sorted.sort_by(f64::total_cmp);
        let same = self.same.iter().filter(|&&same| same).count();
        let log_prob: f64 = self.log_probs.iter().sum();
        Some(Distance {
            kl_mean: mean(&self.kl),
            kl_median: quantile(&sorted, 0.5),
            kl_p99: quantile(&sorted, 0.99),
            top1: same as f64 / n as f64,
            ppl_ratio: ((self.log_prob_full - log_prob) / n as f64).exp(),
            attention_lost: (!self.lost.is_empty()).then(|| mean(&self.lost)),
            first_differing: self.same.iter().position(|same| !same),
            kl: self.kl.iter().map(|&x| x as f32).collect(),
            lost: self.lost.iter().map(|&x| x as f32).collect(),
            log_prob_full: self.log_prob_full,
            log_prob,
            n_tokens: n,
        })
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = |&x: &f32| f64::from(x) - f64::from(most);
    let sum: f64 = logits.iter().map(|x| shifted(x).exp()).sum();
    let ln_sum = sum.ln();
    logits.iter().map(|x| shifted(x) - ln_sum).collect()
}

/// KL(p || q) of two distributions by their logarithms, in nats; rounding may leave it a hair
/// below 0, which it cannot be.
fn kl(p: &[f64], q: &[f64]) -> f64 {
    let terms = p.iter().zip(q).filter(|(p, _)| p.is_finite());
    let sum: f64 = terms.map(|(p, q)| p.exp() * (p - q)).sum();
    sum.max(0.0)
}

#[cfg(test)]
mod tests;
