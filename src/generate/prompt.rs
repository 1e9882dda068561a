//! What a turn begins with: tokens and pictures in order.

use crate::cache::{Modality, PerModality, Pos};
use crate::engine::{Input, Token};
use crate::error::{Error, Result};

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Segment {
    Tokens(Vec<Token>),
    /// Row-major `[n, n_embd]` projected embeddings of picture number `image`. `axes` is there
    /// for models whose pictures have two axes (M-RoPE).
    Image {
        embeddings: Vec<f32>,
        n: usize,
        image: u32,
        axes: Option<Axes>,
    },
}

/// Positions of a picture's rows where they do not follow one another (M-RoPE).
#[derive(Clone, Debug, PartialEq)]
pub struct Axes {
    /// `[t, y, x, z]` of each row for a picture at position 0: `[n]`.
    pub rows: Vec<[Pos; 4]>,
    /// The axes that move with the picture's place in the sequence.
    pub moves: [bool; 4],
    /// Positions that the picture takes in the sequence, 1 to `n`.
    pub n_pos: Pos,
}

/// Where the rows of a batch stand in the sequence.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// One position a row, after the newest.
    Next,
    /// Rows from `first` on of a picture whose rows share `n_pos` positions from `base` on.
    Shared { base: Pos, first: usize, n_pos: Pos },
}

impl Segment {
    /// Rows that the segment takes, each of them a cell.
    pub fn len(&self) -> usize {
        match self {
            Segment::Tokens(tokens) => tokens.len(),
            Segment::Image { n, .. } => *n,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions that the segment takes.
    pub fn positions(&self) -> usize {
        match self {
            Segment::Image {
                axes: Some(axes), ..
            } => usize::try_from(axes.n_pos).unwrap_or(0),
            _ => self.len(),
        }
    }

    /// Where rows from `first` on stand, and their absolute positions on all axes if they have
    /// several; `base` is the position of the segment's first row.
    pub(super) fn place(
        &self,
        base: Pos,
        first: usize,
        end: usize,
    ) -> (Place, Option<Vec<[Pos; 4]>>) {
        match self {
            Segment::Image {
                axes: Some(axes), ..
            } => {
                let absolute = |row: &[Pos; 4]| {
                    std::array::from_fn(|axis| match axes.moves[axis] {
                        true => row[axis].saturating_add(base),
                        false => row[axis],
                    })
                };
                let rows = axes.rows[first..end].iter().map(absolute).collect();
                (
                    Place::Shared {
                        base,
                        first,
                        n_pos: axes.n_pos,
                    },
                    Some(rows),
                )
            }
            _ => (Place::Next, None),
        }
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
    pub(super) fn rows<'a>(
        &'a self,
        start: usize,
        end: usize,
        mrope: Option<&'a [[Pos; 4]]>,
    ) -> Input<'a> {
        match self {
            Segment::Tokens(tokens) => Input::Tokens(&tokens[start..end]),
            Segment::Image { embeddings, n, .. } => {
                let width = embeddings.len() / n;
                Input::Embeddings {
                    data: &embeddings[start * width..end * width],
                    n: end - start,
                    mrope,
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
                axes,
            } => {
                if let Some(Axes { rows, n_pos, .. }) = axes {
                    let fits = usize::try_from(*n_pos).is_ok_and(|p| (1..=*n).contains(&p));
                    if rows.len() != *n || !fits {
                        let rows = rows.len();
                        let reason = format!(
                            "picture {image} has {rows} places on {n_pos} positions for {n} rows"
                        );
                        return Err(Error::option("prompt", reason));
                    }
                }
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
