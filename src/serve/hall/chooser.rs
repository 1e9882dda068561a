//! How a question's tokens are chosen: within its constraint, with how likely they were.

use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::{Constraint, Sampler, Token};
use crate::error::Result;

/// The token that was chosen last, and the likeliest ones, with the natural logarithms of their
/// probabilities before anything was cut or masked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Noted {
    pub chosen: Option<(Token, f32)>,
    pub likeliest: Vec<(Token, f32)>,
}

/// Where a [`Chooser`] leaves what it noted.
#[derive(Clone, Default)]
pub(super) struct Notes(Arc<Mutex<Noted>>);

impl Notes {
    /// What was noted since the last call.
    pub fn take(&self) -> Noted {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A sampler that keeps to a constraint and notes probabilities.
pub(super) struct Chooser {
    sampler: Box<dyn Sampler>,
    constraint: Option<Box<dyn Constraint>>,
    n_probs: usize,
    notes: Notes,
    /// Logits, without those that may not come. Reused.
    masked: Vec<f32>,
}

impl Chooser {
    /// Notes `n_probs` tokens with each that it chooses; 0: nothing.
    pub fn new(
        sampler: Box<dyn Sampler>,
        constraint: Option<Box<dyn Constraint>>,
        n_probs: usize,
        notes: Notes,
    ) -> Self {
        Chooser {
            sampler,
            constraint,
            n_probs,
            notes,
            masked: Vec::new(),
        }
    }
}

impl Sampler for Chooser {
    fn sample(&mut self, logits: &[f32]) -> Result<Token> {
        let token = match &mut self.constraint {
            None => self.sampler.sample(logits)?,
            Some(constraint) => {
                self.masked.clear();
                self.masked.extend_from_slice(logits);
                constraint.mask(&mut self.masked)?;
                let token = self.sampler.sample(&self.masked)?;
                constraint.accept(token)?;
                token
            }
        };
        if self.n_probs > 0 {
            let noted = noted(logits, token, self.n_probs);
            *self.notes.0.lock().unwrap_or_else(PoisonError::into_inner) = noted;
        }
        Ok(token)
    }

    fn chosen(&self) -> Vec<Token> {
        self.sampler.chosen()
    }

    fn reset(&mut self) {
        self.sampler.reset();
    }

    fn resume(&mut self, chosen: &[Token]) -> Result<()> {
        self.sampler.resume(chosen)
    }
}

fn noted(logits: &[f32], token: Token, n: usize) -> Noted {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
    let log_sum = sum.ln() as f32 + most;
    let likely = |&(_, logit): &(Token, f32)| logit - log_sum;
    let all = (0..).zip(logits.iter().copied());
    let chosen = all.clone().find(|&(id, _)| id == token);
    let mut top: Vec<(Token, f32)> = all.collect();
    let before = |a: &(Token, f32), b: &(Token, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if n < top.len() {
        top.select_nth_unstable_by(n, before);
        top.truncate(n);
    }
    top.sort_unstable_by(before);
    Noted {
        chosen: chosen.map(|choice| (token, likely(&choice))),
        likeliest: top
            .iter()
            .map(|choice| (choice.0, likely(choice)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Greedy;
    use crate::error::Error;

    /// Only odd tokens, each once.
    struct Odd(Vec<Token>);

    impl Constraint for Odd {
        fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
            for (token, logit) in (0..).zip(logits) {
                if token % 2 == 0 || self.0.contains(&token) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            Ok(())
        }

        fn accept(&mut self, token: Token) -> Result<()> {
            if token % 2 == 0 {
                return Err(Error::contract("an even token"));
            }
            self.0.push(token);
            Ok(())
        }
    }

    #[test]
    fn probabilities_are_those_before_the_constraint() {
        let notes = Notes::default();
        let constraint = Some(Box::new(Odd(Vec::new())) as Box<dyn Constraint>);
        let mut chooser = Chooser::new(Box::new(Greedy), constraint, 2, notes.clone());
        let logits = [0.0, 1.0, 2.0, 0.5].map(|x: f32| x + 40.0);
        assert_eq!(chooser.sample(&logits).unwrap(), 1);
        let Noted { chosen, likeliest } = notes.take();
        let sum: f32 = [0.0f32, 1.0, 2.0, 0.5].map(f32::exp).iter().sum();
        let near = |(id, p): (Token, f32), (token, x): (Token, f32)| {
            id == token && (p - (x - sum.ln())).abs() < 1e-5
        };
        assert!(near(chosen.unwrap(), (1, 1.0)));
        assert!(near(likeliest[0], (2, 2.0)) && near(likeliest[1], (1, 1.0)));
        assert_eq!(likeliest.len(), 2);
        assert_eq!(chooser.sample(&logits).unwrap(), 3);
        assert_eq!(notes.take().likeliest.len(), 2);
        assert_eq!(notes.take(), Noted::default());
    }
}
