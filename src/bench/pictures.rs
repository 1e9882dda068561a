//! Pictures that show nothing: noise for a vision encoder, or noise in place of its output where
//! the model has none.

use std::iter::Enumerate;
use std::vec::IntoIter;

use crate::error::{Error, Result};
use crate::generate::Segment;
use crate::image::{Limits, Picture};
use crate::llama::{Model, Part, Piece, Vision};
use crate::noise::Noise;

/// What a prompt's pictures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pictures {
    /// Pixels, encoded by the model's vision file.
    Noise {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// Crops that it may be cut into; `None`: what the vision file says.
        num_crops: Option<u32>,
    },
    /// Embeddings, this many for each picture.
    Embeddings {
        /// Rows of each picture, 1 or more.
        n: usize,
    },
}

impl Pictures {
    /// # Errors
    /// [`Error::Option`] for sizes that no picture file may have either.
    pub fn check(self) -> Result<()> {
        match self {
            Pictures::Noise { width, height, .. } => Limits::default()
                .check_size(width, height)
                .map_err(|reason| Error::option("image_size", reason)),
            Pictures::Embeddings { n: 0 } => {
                Err(Error::option("image_tokens", "0, expected at least 1"))
            }
            Pictures::Embeddings { .. } => Ok(()),
        }
    }

    /// Rows that one picture takes in a prompt.
    ///
    /// # Errors
    /// As [`Vision::tokenize`], and [`Error::Option`] for pixels without a vision file.
    pub fn tokens(self, vision: Option<&Vision>) -> Result<usize> {
        match self {
            Pictures::Embeddings { n } => Ok(n),
            Pictures::Noise {
                width,
                height,
                num_crops,
            } => {
                let picture = noise(width, height, num_crops, 0);
                let pieces = cut(vision.ok_or_else(no_vision)?, &picture)?;
                Ok(pieces.iter().map(Piece::len).sum())
            }
        }
    }

    /// Makes the pictures of a prompt, before the clock starts.
    pub(super) fn make(self, n: usize, model: &Model, seed: u64) -> Made {
        let seeds = (0..n as u64).map(|i| seed.wrapping_mul(31).wrapping_add(i));
        match self {
            Pictures::Noise {
                width,
                height,
                num_crops,
            } => {
                let pictures = seeds.map(|seed| noise(width, height, num_crops, seed));
                Made::Pixels(pictures.collect::<Vec<_>>().into_iter().enumerate())
            }
            Pictures::Embeddings { n: rows } => {
                let images = (0..).zip(seeds);
                let values = rows.saturating_mul(model.n_embd());
                let segments = images.map(|(image, seed)| {
                    let mut noise = Noise::new(seed);
                    Segment::Image {
                        embeddings: (0..values).map(|_| noise.normal()).collect(),
                        n: rows,
                        image,
                        axes: None,
                        separators: Vec::new(),
                    }
                });
                Made::Segments(segments.collect::<Vec<_>>().into_iter())
            }
        }
    }
}

/// The pictures of all prompts of a test that were not shown yet.
pub(super) enum Made {
    Pixels(Enumerate<IntoIter<Picture>>),
    Segments(IntoIter<Segment>),
}

impl Made {
    /// What the next prompt takes for its `n` pictures.
    pub(super) fn encode(&mut self, n: usize, vision: Option<&mut Vision>) -> Result<Vec<Segment>> {
        let pictures = match self {
            Made::Segments(segments) => return Ok(segments.take(n).collect()),
            Made::Pixels(_) if n == 0 => return Ok(Vec::new()),
            Made::Pixels(pictures) => pictures.take(n),
        };
        let vision = vision.ok_or_else(no_vision)?;
        let mut segments = Vec::new();
        for (image, picture) in pictures {
            let image = u32::try_from(image).unwrap_or(u32::MAX);
            for piece in cut(vision, &picture)? {
                segments.push(match piece {
                    Piece::Text(tokens) => Segment::Tokens(tokens),
                    Piece::Image(tokens) => crate::turn::segment(vision.encode(&tokens)?, image),
                });
            }
        }
        Ok(segments)
    }
}

/// The picture with the tokens that the model puts around it.
fn cut(vision: &Vision, picture: &Picture) -> Result<Vec<Piece>> {
    let mut pieces = vision.tokenize(&[Part::Picture(picture)], false)?;
    pieces.retain(|piece| !piece.is_empty());
    Ok(pieces)
}

fn noise(width: u32, height: u32, num_crops: Option<u32>, seed: u64) -> Picture {
    let mut noise = Noise::new(seed);
    let n = 3 * width as usize * height as usize;
    let mut rgb: Vec<u8> = Vec::with_capacity(n + 8);
    while rgb.len() < n {
        rgb.extend(noise.bits().to_le_bytes());
    }
    rgb.truncate(n);
    Picture {
        width,
        height,
        rgb,
        num_crops,
    }
}

fn no_vision() -> Error {
    Error::option(
        "images",
        "pictures need a vision file: give one with `mmproj`, or `image_tokens` for made-up embeddings",
    )
}
