//! What a turn begins with: tokens and pictures in order.

use crate::cache::{PerModality, Pos};
use crate::controller::Origin;
use crate::engine::{Input, Token};
use crate::error::{Error, Result};

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Segment {
    /// Text: ids of the vocabulary.
    Tokens(Vec<Token>),
    /// Row-major `[n, n_embd]` projected embeddings of picture number `image`. `axes` is there
    /// for models whose pictures have two axes (M-RoPE).
    Image {
        /// `[n, n_embd]`, row-major.
        embeddings: Vec<f32>,
        /// Rows.
        n: usize,
        /// The picture's number in the conversation, from 0.
        image: u32,
        /// `None`: each row takes the position after that of the row before it.
        axes: Option<Axes>,
        /// Rows that show nothing but separate parts of the picture, ascending; none where the
        /// model's layout is not known.
        separators: Vec<u32>,
    },
}

/// Positions of a picture's rows where they do not follow one another (M-RoPE).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Axes {
    /// `[t, y, x, z]` of each row for a picture at position 0: `[n]`.
    pub rows: Vec<[Pos; 4]>,
    /// The axes that move with the picture's place in the sequence.
    pub moves: [bool; 4],
    /// Positions that the picture takes in the sequence, 1 to `n`.
    pub n_pos: Pos,
}

impl Segment {
    /// Rows that the segment takes, each of them a cell.
    pub fn len(&self) -> usize {
        match self {
            Segment::Tokens(tokens) => tokens.len(),
            Segment::Image { n, .. } => *n,
        }
    }

    /// Whether it has no rows.
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

    /// The position of a row; `base` is that of the first. Rows of a picture with several axes
    /// share the segment's positions: which row counts as which does not matter, since no policy
    /// may remove single ones of them, but the last position must be reached.
    pub(super) fn pos(&self, base: Pos, row: usize) -> Pos {
        let row = row.min(self.positions().saturating_sub(1));
        base.saturating_add(Pos::try_from(row).unwrap_or(Pos::MAX))
    }

    /// The absolute positions of rows `first..end` on all axes, if they have several.
    pub(super) fn axes(&self, base: Pos, first: usize, end: usize) -> Option<Vec<[Pos; 4]>> {
        let Segment::Image {
            axes: Some(axes), ..
        } = self
        else {
            return None;
        };
        let absolute = |row: &[Pos; 4]| {
            std::array::from_fn(|axis| match axes.moves[axis] {
                true => row[axis].saturating_add(base),
                false => row[axis],
            })
        };
        Some(axes.rows[first..end].iter().map(absolute).collect())
    }

    /// Which rows separate parts of a picture: `[n]`, or nothing for text.
    pub(super) fn separators(&self) -> Vec<bool> {
        let Segment::Image { n, separators, .. } = self else {
            return Vec::new();
        };
        let mut all = vec![false; *n];
        for &row in separators {
            // In range, for a segment that was checked.
            if let Some(is) = all.get_mut(row as usize) {
                *is = true;
            }
        }
        all
    }

    pub(super) fn origin(&self) -> Origin {
        match self {
            Segment::Tokens(_) => Origin::TEXT,
            Segment::Image { image, axes, .. } => Origin {
                shared: axes.is_some(),
                ..Origin::picture(*image)
            },
        }
    }

    /// Rows `start..end`, for a segment that was checked.
    pub fn rows<'a>(
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
                separators,
            } => {
                let ascend = separators.is_sorted_by(|a, b| a < b);
                let in_range = |&last: &u32| (last as usize) < *n;
                if !ascend || !separators.last().is_none_or(in_range) {
                    let reason = format!(
                        "picture {image} has separators that are no rows of its {n}, in order"
                    );
                    return Err(Error::option("the prompt", reason));
                }
                if let Some(Axes { rows, n_pos, .. }) = axes {
                    let fits = usize::try_from(*n_pos).is_ok_and(|p| (1..=*n).contains(&p));
                    if rows.len() != *n || !fits {
                        let rows = rows.len();
                        let reason = format!(
                            "picture {image} has {rows} places on {n_pos} positions for {n} rows"
                        );
                        return Err(Error::option("the prompt", reason));
                    }
                }
                if *n == 0 && embeddings.is_empty() {
                    return Ok(());
                }
                if *n == 0 || embeddings.is_empty() || embeddings.len() % n != 0 {
                    let values = embeddings.len();
                    let reason = format!("picture {image} has {values} values for {n} rows");
                    return Err(Error::option("the prompt", reason));
                }
                Ok(())
            }
            Segment::Tokens(_) => Ok(()),
        }
    }
}

/// Rows of the prompt.
pub(super) fn count(prompt: &[Segment]) -> PerModality {
    let mut counts = PerModality::default();
    for segment in prompt {
        *counts.of_mut(segment.origin().modality) += segment.len();
    }
    counts
}
