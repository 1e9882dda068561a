//! What a turn begins with: tokens and pictures in order.

use crate::cache::{Modality, PerModality};
use crate::engine::{Input, Token};
use crate::error::{Error, Result};

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Segment {
    Tokens(Vec<Token>),
    /// Row-major `[n, n_embd]` projected embeddings of picture number `image`.
    Image {
        embeddings: Vec<f32>,
        n: usize,
        image: u32,
    },
}

impl Segment {
    /// Positions that the segment takes.
    pub fn len(&self) -> usize {
        match self {
            Segment::Tokens(tokens) => tokens.len(),
            Segment::Image { n, .. } => *n,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn modality(&self) -> Modality {
        match self {
            Segment::Tokens(_) => Modality::Text,
            Segment::Image { .. } => Modality::Vision,
        }
    }

    pub(super) fn image(&self) -> Option<u32> {
        match self {
            Segment::Tokens(_) => None,
            Segment::Image { image, .. } => Some(*image),
        }
    }

    /// Rows `start..end`, for a segment that was checked.
    pub(super) fn rows(&self, start: usize, end: usize) -> Input<'_> {
        match self {
            Segment::Tokens(tokens) => Input::Tokens(&tokens[start..end]),
            Segment::Image { embeddings, n, .. } => {
                let width = embeddings.len() / n;
                Input::Embeddings {
                    data: &embeddings[start * width..end * width],
                    n: end - start,
                }
            }
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self {
            Segment::Image {
                embeddings,
                n,
                image,
            } => {
                if *n == 0 && embeddings.is_empty() {
                    return Ok(());
                }
                if *n == 0 || embeddings.is_empty() || embeddings.len() % n != 0 {
                    let values = embeddings.len();
                    let reason = format!("picture {image} has {values} values for {n} rows");
                    return Err(Error::option("prompt", reason));
                }
                Ok(())
            }
            Segment::Tokens(_) => Ok(()),
        }
    }
}

/// Positions that the prompt takes.
pub(super) fn count(prompt: &[Segment]) -> PerModality {
    let mut counts = PerModality::default();
    for segment in prompt {
        *counts.of_mut(segment.modality()) += segment.len();
    }
    counts
}
