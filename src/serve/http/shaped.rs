//! Biases and penalties on logits, as a constraint around another one.

use std::collections::{HashMap, VecDeque};

use crate::engine::{Constraint, Token};
use crate::error::Result;

/// What is added to logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Shape {
    /// Taken from tokens among the last `back` of the answer.
    pub presence: f32,
    /// The same for each time that a token is among them.
    pub frequency: f32,
    /// Tokens to look back on.
    pub back: usize,
    /// Added to tokens.
    pub bias: Vec<(Token, f32)>,
}

impl Shape {
    /// Whether nothing changes.
    pub fn is_plain(&self) -> bool {
        self.presence == 0.0 && self.frequency == 0.0 && self.bias.is_empty()
    }
}

/// A shape, and what the answer held so far.
pub(super) struct Shaped {
    shape: Shape,
    inner: Option<Box<dyn Constraint>>,
    last: VecDeque<Token>,
    counts: HashMap<Token, u32>,
}

impl Shaped {
    pub fn new(shape: Shape, inner: Option<Box<dyn Constraint>>) -> Self {
        Shaped {
            shape,
            inner,
            last: VecDeque::new(),
            counts: HashMap::new(),
        }
    }
}

impl Constraint for Shaped {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let mut add = |token: Token, x: f32| {
            let logit = usize::try_from(token).ok().and_then(|t| logits.get_mut(t));
            if let Some(logit) = logit {
                *logit += x;
            }
        };
        for &(token, bias) in &self.shape.bias {
            add(token, bias);
        }
        let Shape {
            presence,
            frequency,
            ..
        } = self.shape;
        for (&token, &count) in &self.counts {
            add(token, -presence - frequency * count as f32);
        }
        match &mut self.inner {
            Some(inner) => inner.mask(logits),
            None => Ok(()),
        }
    }

    fn accept(&mut self, token: Token) -> Result<()> {
        if self.shape.presence != 0.0 || self.shape.frequency != 0.0 {
            *self.counts.entry(token).or_default() += 1;
            self.last.push_back(token);
            if self.last.len() > self.shape.back
                && let Some(old) = self.last.pop_front()
                && let Some(count) = self.counts.get_mut(&old)
            {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&old);
                }
            }
        }
        match &mut self.inner {
            Some(inner) => inner.accept(token),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_add_up_with_penalties_of_what_was_said() {
        let shape = Shape {
            presence: 1.0,
            frequency: 0.5,
            back: 2,
            bias: vec![(0, 2.0), (3, f32::NEG_INFINITY), (99, 1.0), (-1, 1.0)],
        };
        let mut shaped = Shaped::new(shape, None);
        for token in [2, 1, 1] {
            shaped.accept(token).unwrap();
        }
        let mut logits = [0.0; 4];
        shaped.mask(&mut logits).unwrap();
        // The first token is out of sight again.
        assert_eq!(logits, [2.0, -2.0, 0.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn the_inner_constraint_has_the_last_word() {
        struct Only(Token);
        impl Constraint for Only {
            fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
                for (token, logit) in (0..).zip(logits) {
                    if token != self.0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
                Ok(())
            }
            fn accept(&mut self, token: Token) -> Result<()> {
                self.0 = token + 1;
                Ok(())
            }
        }
        let shape = Shape {
            bias: vec![(0, 100.0)],
            ..Shape::default()
        };
        let mut shaped = Shaped::new(shape, Some(Box::new(Only(1))));
        shaped.accept(1).unwrap();
        let mut logits = [0.0; 3];
        shaped.mask(&mut logits).unwrap();
        assert_eq!(logits, [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0]);
    }
}
