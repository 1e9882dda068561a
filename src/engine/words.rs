//! From logits to tokens, and from tokens to text.

use super::Token;
use crate::error::{Error, Result};

/// What tokens mean.
pub trait Vocabulary {
    /// Whether the token ends a generation.
    fn is_eog(&self, token: Token) -> bool;

    /// Appends the token's text bytes (possibly part of a UTF-8 character) to `out`.
    ///
    /// # Errors
    /// For a token that is not in the vocabulary.
    fn piece(&self, token: Token, out: &mut Vec<u8>) -> Result<()>;
}

/// Chooses the tokens of one conversation.
pub trait Sampler: Send {
    /// Chooses from the logits of a row, `[n_vocab]`, and remembers what it chose.
    ///
    /// # Errors
    /// When nothing can be chosen.
    fn sample(&mut self, logits: &[f32]) -> Result<Token>;

    /// What it chose since it was last empty, oldest first, as far as it looks back.
    fn chosen(&self) -> Vec<Token> {
        Vec::new()
    }

    /// Forgets what it chose.
    fn reset(&mut self) {}

    /// Goes on as if it had chosen these, oldest first.
    ///
    /// # Errors
    /// For a token that is not in the vocabulary.
    fn resume(&mut self, _chosen: &[Token]) -> Result<()> {
        Ok(())
    }
}

/// Always the likeliest token, the first of several.
#[derive(Clone, Copy, Debug, Default)]
pub struct Greedy;

impl Sampler for Greedy {
    fn sample(&mut self, logits: &[f32]) -> Result<Token> {
        likeliest(logits)
    }
}

/// The token with the highest logit, the first of equal ones.
///
/// # Errors
/// [`Error::Contract`] when there are none, or one is not a number.
pub fn likeliest(logits: &[f32]) -> Result<Token> {
    let mut best: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(Error::contract(format!("logit {token} is not a number")));
        }
        if best.is_none_or(|(_, most)| logit > most) {
            best = Some((token, logit));
        }
    }
    best.and_then(|(token, _)| Token::try_from(token).ok())
        .ok_or_else(|| Error::contract("no logits"))
}

/// What an answer must keep to: a grammar, a schema, an expression.
pub trait Constraint: Send {
    /// Puts the logits, `[n_vocab]`, of every token that may not come now to minus infinity.
    ///
    /// # Errors
    /// When no token may come.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// The token that was chosen.
    ///
    /// # Errors
    /// For one that may not come.
    fn accept(&mut self, token: Token) -> Result<()>;
}
