//! Pictures that show nothing: noise for a vision encoder, or noise in place of its output where
//! the model has none.

use crate::error::{Error, Result};
use crate::generate::Segment;
use crate::image::{Limits, Picture};
use crate::llama::{Model, Piece, Vision};
use crate::noise::Noise;

/// What a prompt's pictures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pictures {
    /// Pixels, encoded by the model's vision file.
    Noise { width: u32, height: u32 },
    /// Embeddings, this many for each picture.
    Embeddings { n: usize },
}

impl Pictures {
    /// # Errors
    /// [`Error::Option`] for sizes that no picture file may have either.
    pub fn check(self) -> Result<()> {
        match self {
            Pictures::Noise { width, height } => Limits::default()
                .check_size(width, height)
                .map_err(|reason| Error::option("--image-size", reason)),
            Pictures::Embeddings { n: 0 } => {
                Err(Error::option("--image-tokens", "0, expected at least 1"))
            }
            Pictures::Embeddings { .. } => Ok(()),
        }
    }

    /// Rows that one picture takes in a prompt.
    ///
    /// # Errors
    /// As [`Vision::tokenize`], and [`Error::Option`] for pixels without a vision file.
    pub fn tokens(self, vision: Option<&Vision<'_>>) -> Result<usize> {
        match self {
            Pictures::Embeddings { n } => Ok(n),
            Pictures::Noise { width, height } => {
                let pieces = cut(vision.ok_or_else(no_vision)?, &noise(width, height, 0))?;
                Ok(pieces.iter().map(Piece::len).sum())
            }
        }
    }

    /// Makes the pictures of a prompt, before the clock starts.
    pub(super) fn make(self, n: usize, model: &Model, seed: u64) -> Made {
        let seeds = (0..n as u64).map(|i| seed.wrapping_mul(31).wrapping_add(i));
        match self {
            Pictures::Noise { width, height } => {
                Made::Pixels(seeds.map(|seed| noise(width, height, seed)).collect())
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
                    }
                });
                Made::Segments(segments.collect())
            }
        }
    }
}

/// The pictures of one prompt.
pub(super) enum Made {
    Pixels(Vec<Picture>),
    Segments(Vec<Segment>),
}

impl Made {
    /// What a prompt takes for them. The second time embeddings are gone.
    pub(super) fn encode(&mut self, vision: Option<&mut Vision<'_>>) -> Result<Vec<Segment>> {
        let pictures = match self {
            Made::Segments(segments) => return Ok(std::mem::take(segments)),
            Made::Pixels(pictures) if pictures.is_empty() => return Ok(Vec::new()),
            Made::Pixels(pictures) => pictures,
        };
        let vision = vision.ok_or_else(no_vision)?;
        let mut segments = Vec::new();
        for (image, picture) in (0..).zip(pictures) {
            for piece in cut(vision, picture)? {
                segments.push(match piece {
                    Piece::Text(tokens) => Segment::Tokens(tokens),
                    Piece::Image(tokens) => {
                        crate::conversation::segment(vision.encode(&tokens)?, image)
                    }
                });
            }
        }
        Ok(segments)
    }
}

/// The picture with the tokens that the model puts around it.
fn cut(vision: &Vision<'_>, picture: &Picture) -> Result<Vec<Piece>> {
    let mut pieces = vision.tokenize(Vision::MARKER, &[picture], false)?;
    pieces.retain(|piece| !piece.is_empty());
    Ok(pieces)
}

fn noise(width: u32, height: u32, seed: u64) -> Picture {
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
        num_crops: None,
    }
}

fn no_vision() -> Error {
    Error::option(
        "--images",
        "pictures need a vision file: give one with --mmproj, or --image-tokens for made-up embeddings",
    )
}
