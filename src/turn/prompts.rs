//! From text and pictures to what goes into the model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::generate::{Axes, Segment};
use crate::image::Picture;
use crate::llama::{ImageEmbeddings, Model, Mrope, Piece, Vision};
use crate::prompt::tokenize;

/// Reads prompts and encodes their pictures, and remembers both where the same is asked several
/// times.
#[derive(Default)]
pub struct Prompts {
    vision: Option<Vision>,
    kept: Option<Kept>,
}

/// What was made of a question, for the next policy that is asked it.
#[derive(Default)]
struct Kept {
    prompts: HashMap<Key, Arc<Encoded>>,
    /// By content, of this question and the one before it.
    pictures: HashMap<Content, Picked>,
}

/// What decides a prompt of one question.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The text that goes in, and whether it is the conversation's first.
    pub text: String,
    pub first: bool,
    /// The number of its first picture.
    pub images: u32,
}

/// What a piece of embeddings shows: pictures by their hash, and which piece of theirs it is.
pub type Content = ([u8; 32], usize);

struct Picked {
    /// As picture 0.
    segment: Segment,
    time: Duration,
    used: bool,
}

/// A piece of a prompt as a cache sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub rows: usize,
    pub positions: usize,
    pub is_image: bool,
}

/// A prompt that was read.
pub(super) enum Read {
    New(Vec<Piece>, Duration),
    Known(Arc<Encoded>),
}

impl Read {
    pub fn shapes(&self) -> Vec<Shape> {
        let shape = |piece: &Piece| Shape {
            rows: piece.len(),
            positions: piece.positions(),
            is_image: matches!(piece, Piece::Image(_)),
        };
        match self {
            Read::New(pieces, _) => pieces.iter().map(shape).collect(),
            Read::Known(encoded) => encoded.shapes.clone(),
        }
    }
}

/// A prompt whose pictures were encoded.
#[derive(Clone, Debug, Default)]
pub(super) struct Encoded {
    shapes: Vec<Shape>,
    pub segments: Vec<Segment>,
    /// Visual tokens of each picture.
    pub images: Vec<usize>,
    /// What tokenizing and encoding took when it was done.
    pub time: Duration,
}

impl Prompts {
    /// For a model with this vision file, if there is one. Nothing is remembered.
    pub fn new(vision: Option<Vision>) -> Self {
        Prompts { vision, kept: None }
    }

    /// Remembers prompts and pictures until [`Prompts::next_question`].
    pub fn keeping(vision: Option<Vision>) -> Self {
        Prompts {
            vision,
            kept: Some(Kept::default()),
        }
    }

    /// The vision file, if there is one.
    pub fn vision(&self) -> Option<&Vision> {
        self.vision.as_ref()
    }

    /// Forgets prompts, and pictures that the last question did not show.
    pub fn next_question(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.prompts.clear();
            kept.pictures
                .retain(|_, picture| std::mem::take(&mut picture.used));
        }
    }

    /// Tokenizes a prompt; its pictures are cut up, not yet encoded. `now` is read before and after.
    ///
    /// # Errors
    /// As [`tokenize`].
    pub(super) fn read(
        &self,
        model: &Model,
        key: &Key,
        pictures: &[&Picture],
        now: &dyn Fn() -> Duration,
    ) -> Result<Read> {
        let known = self.kept.as_ref().and_then(|kept| kept.prompts.get(key));
        if let Some(known) = known {
            return Ok(Read::Known(Arc::clone(known)));
        }
        let start = now();
        let pieces = tokenize(model, self.vision(), &key.text, pictures, key.first)?;
        Ok(Read::New(pieces, now().saturating_sub(start)))
    }

    /// Encodes the pictures of a prompt, which has these shapes. Cancelled on the way, what is there does not matter: the
    /// loop asks again before it feeds anything.
    ///
    /// # Errors
    /// As [`Vision::encode`].
    pub(super) fn encode(
        &mut self,
        read: Read,
        shapes: Vec<Shape>,
        key: Key,
        pictures: &[&Picture],
        now: &dyn Fn() -> Duration,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Arc<Encoded>> {
        let (pieces, time) = match read {
            Read::New(pieces, time) => (pieces, time),
            Read::Known(known) => return Ok(known),
        };
        let mut encoded = Encoded {
            shapes,
            time,
            ..Encoded::default()
        };
        let mut whole = true;
        let contents = match &self.kept {
            Some(_) => {
                let n = encoded.shapes.iter().filter(|shape| shape.is_image);
                contents(n.count(), pictures.iter().copied())
            }
            None => Vec::new(),
        };
        for piece in pieces {
            let tokens = match piece {
                Piece::Text(tokens) => {
                    encoded.segments.push(Segment::Tokens(tokens));
                    continue;
                }
                Piece::Image(tokens) => tokens,
            };
            let number = encoded.images.len();
            encoded.images.push(tokens.n);
            if cancelled() {
                // Keeps the prompt from being empty, which would be an error.
                encoded.segments.push(Segment::Tokens(vec![0]));
                whole = false;
                break;
            }
            let Some(vision) = &mut self.vision else {
                return Err(Error::contract("a picture without a vision file"));
            };
            let content = contents.get(number).copied();
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let number = key.images.saturating_add(number);
            let start = now();
            let mut fresh = |number| -> Result<(Segment, Duration)> {
                let segment = segment(vision.encode(&tokens)?, number);
                Ok((segment, now().saturating_sub(start)))
            };
            let (segment, time) = match (&mut self.kept, content) {
                (Some(kept), Some(content)) => {
                    let picked = match kept.pictures.entry(content) {
                        Entry::Occupied(known) => known.into_mut(),
                        Entry::Vacant(place) => {
                            let (segment, time) = fresh(0)?;
                            let used = true;
                            place.insert(Picked {
                                segment,
                                time,
                                used,
                            })
                        }
                    };
                    picked.used = true;
                    (numbered(&picked.segment, number), picked.time)
                }
                _ => fresh(number)?,
            };
            encoded.time += time;
            encoded.segments.push(segment);
        }
        let encoded = Arc::new(encoded);
        if let (true, Some(kept)) = (whole, &mut self.kept) {
            kept.prompts.insert(key, Arc::clone(&encoded));
        }
        Ok(encoded)
    }
}

/// What each of the `n` image pieces of a prompt shows. Most models make one piece of a picture; of those that
/// make several nobody knows which piece belongs to which picture, so there all of them name it.
pub fn contents<'p>(n: usize, pictures: impl Iterator<Item = &'p Picture>) -> Vec<Content> {
    let hashes: Vec<[u8; 32]> = pictures.map(Picture::sha256).collect();
    if hashes.len() == n {
        return hashes.into_iter().map(|hash| (hash, 0)).collect();
    }
    let all: [u8; 32] = Sha256::digest(hashes.as_flattened()).into();
    (0..n).map(|piece| (all, piece)).collect()
}

/// An encoded picture as the loops take it.
pub fn segment(encoded: ImageEmbeddings, image: u32) -> Segment {
    let ImageEmbeddings {
        data,
        n,
        n_pos,
        mrope,
        separators,
    } = encoded;
    Segment::Image {
        embeddings: data,
        n,
        image,
        axes: mrope.map(|Mrope { rows, moves }| Axes { rows, moves, n_pos }),
        separators,
    }
}

/// The same picture under another number.
pub fn numbered(segment: &Segment, number: u32) -> Segment {
    let mut segment = segment.clone();
    if let Segment::Image { image, .. } = &mut segment {
        *image = number;
    }
    segment
}
