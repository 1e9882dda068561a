//! The file in which llama.cpp's `llama-perplexity` keeps predictions (`--kl-divergence-base FILE`),
//! so that what was measured there and here can be compared.
//!
//! All numbers are little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `_logits_` |
//! | 4, 4, 4 | `n_ctx`: tokens of a chunk; `n_vocab`; `n_chunk` |
//! | 4 × `n_chunk` × `n_ctx` | the chunks' tokens, the first of each as the text has it |
//! | for each scored token | scale and least log probability (two F32), then for each token of the vocabulary 16 bits: log probability = least + scale × bits; one more where `n_vocab` is odd |
//!
//! Scored are, of each chunk, the tokens behind the one in its middle, by what was predicted of
//! them: `n_ctx - 1 - n_ctx / 2`. What is 16 nats or more below the likeliest is cut off there.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::reading::Window;
use crate::engine::Token;
use crate::error::{Error, Result};
use crate::outfile::OutFile;

const MAGIC: &[u8; 8] = b"_logits_";
const HEADER: u64 = 20;
/// Nats below the likeliest token from which on all are alike.
const DEPTH: f32 = 16.0;
const STEPS: f32 = 65535.0;
/// Log probabilities above 0 by more than rounding are none.
const ROUNDING: f32 = 0.01;

/// How much is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of a chunk.
    pub n_ctx: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Chunks.
    pub n_chunks: usize,
}

impl Shape {
    /// Tokens of a chunk that are scored.
    pub fn scored(self) -> usize {
        (self.n_ctx - self.n_ctx / 2).saturating_sub(1)
    }

    /// Of the bytes of one scored token.
    fn row(self) -> usize {
        8 + 2 * self.n_vocab.next_multiple_of(2)
    }

    /// Of a whole file; `None`: more than can be counted.
    fn bytes(self) -> Option<u64> {
        let [n_ctx, n_chunks, scored, row] =
            [self.n_ctx, self.n_chunks, self.scored(), self.row()].map(|n| n as u64);
        let chunk = scored.checked_mul(row)?.checked_add(4 * n_ctx)?;
        chunk.checked_mul(n_chunks)?.checked_add(HEADER)
    }
}

/// A text as `llama-perplexity` cuts it: chunks one behind the other, at most so many. `text` begins
/// as the model wants texts to begin.
pub fn chunks(text: &[Token], n_ctx: usize, most: usize) -> Vec<Vec<Token>> {
    let whole = text.chunks_exact(n_ctx.max(1)).take(most);
    whole.map(<[Token]>::to_vec).collect()
}

/// What of a chunk goes in first and what is predicted. `bos` stands in the place of its first token,
/// where the model wants one.
pub fn window(chunk: &[Token], bos: Option<Token>) -> Window {
    let (prompt, text) = chunk.split_at((chunk.len() / 2 + 1).min(chunk.len()));
    let mut prompt = prompt.to_vec();
    if let (Some(bos), Some(first)) = (bos, prompt.first_mut()) {
        *first = bos;
    }
    Window {
        prompt,
        text: text.to_vec(),
    }
}

/// The largest logit, and what the logarithm of the sum of all exponentials is above it.
pub(super) fn log_sum_exp(logits: &[f32]) -> (f32, f32) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - most).exp())).sum();
    (most, sum.ln() as f32)
}

/// What was predicted of one token: `[n_vocab]` logarithms of probabilities.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogProbs {
    scale: f32,
    least: f32,
    bits: Vec<u16>,
}

impl LogProbs {
    /// Of logits `[n_vocab]`, rounded as the file has them.
    pub fn of(logits: &[f32]) -> Self {
        let (most, rest) = log_sum_exp(logits);
        let least = logits.iter().copied().fold(f32::INFINITY, f32::min);
        let least = least.max(most - DEPTH);
        let scale = (most - least) / STEPS;
        let bits = |x: f32| match scale > 0.0 && x > least {
            // Within 0 to 65535 but for rounding, which the conversion cuts off.
            true => ((x - least) * (1.0 / scale)).round_ties_even() as u16,
            false => 0,
        };
        LogProbs {
            scale,
            least: least - most - rest,
            bits: logits.iter().map(|&x| bits(x)).collect(),
        }
    }

    /// In the order of the vocabulary.
    pub fn iter(&self) -> impl Iterator<Item = f32> + '_ {
        let value = |&bits: &u16| self.scale * f32::from(bits) + self.least;
        self.bits.iter().map(value)
    }

    /// Of one token, where the vocabulary has it.
    pub fn get(&self, token: Token) -> Option<f32> {
        self.iter().nth(usize::try_from(token).ok()?)
    }

    /// Tokens of the vocabulary.
    pub fn len(&self) -> usize {
        self.bits.len()
    }

    /// Whether it tells nothing.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }
}

/// Writes such a file, which appears when it is whole.
#[derive(Debug)]
pub struct Writer {
    out: OutFile,
    shape: Shape,
    bytes: Vec<u8>,
    left: usize,
}

impl Writer {
    /// Writes what comes before the predictions. `chunks`: `[n_chunks][n_ctx]`.
    ///
    /// # Errors
    /// Those of [`OutFile::create`], [`Error::Io`], and [`Error::File`] for more than the format can
    /// count.
    pub fn create(path: &Path, n_vocab: usize, chunks: &[Vec<Token>]) -> Result<Self> {
        let shape = Shape {
            n_ctx: chunks.first().map_or(0, Vec::len),
            n_vocab,
            n_chunks: chunks.len(),
        };
        if chunks.iter().any(|chunk| chunk.len() != shape.n_ctx) {
            return Err(Error::contract("chunks of several lengths"));
        }
        let counts = [shape.n_ctx, shape.n_vocab, shape.n_chunks].map(i32::try_from);
        let mut head = MAGIC.to_vec();
        for count in counts {
            let count =
                count.map_err(|_| Error::file(path, "has too many tokens for its format"))?;
            head.extend(count.to_le_bytes());
        }
        head.extend(
            chunks
                .iter()
                .flatten()
                .flat_map(|token| token.to_le_bytes()),
        );
        let writer = Writer {
            out: OutFile::create(path)?,
            shape,
            bytes: Vec::new(),
            left: shape.n_chunks * shape.scored(),
        };
        writer.write(&head)?;
        Ok(writer)
    }

    /// Adds what was predicted of the next scored token: logits `[n_vocab]`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, logits: &[f32]) -> Result<()> {
        if logits.len() != self.shape.n_vocab || self.left == 0 {
            let (n, left) = (logits.len(), self.left);
            return Err(Error::contract(format!(
                "{n} logits with {left} tokens left"
            )));
        }
        self.left -= 1;
        let row = LogProbs::of(logits);
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        bytes.extend(row.scale.to_le_bytes());
        bytes.extend(row.least.to_le_bytes());
        bytes.extend(row.bits.iter().flat_map(|bits| bits.to_le_bytes()));
        bytes.resize(self.shape.row(), 0);
        let done = self.write(&bytes);
        self.bytes = bytes;
        done
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Contract`] where predictions are missing.
    pub fn commit(self) -> Result<()> {
        match self.left {
            0 => self.out.commit(),
            left => Err(Error::contract(format!("{left} tokens were not predicted"))),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        let mut to = BufWriter::new(self.out.file());
        let written = to.write_all(bytes).and_then(|()| to.flush());
        written.map_err(|e| Error::io(self.out.target(), e))
    }
}

/// Reads such a file, wherever it was written.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    shape: Shape,
    bytes: Vec<u8>,
}

impl Reader {
    /// Reads and checks the numbers in front, and that the file is as long as they say.
    ///
    /// Nothing is allocated by them yet. A file may be long and hold nothing (a sparse one): before chunks and
    /// predictions are read, [`Reader::shape`] is to be compared with the model.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::File`] for a file that is none of these, or not a whole one.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let wrong = |reason: String| Error::file(path, reason);
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut file = BufReader::new(file);
        let mut head = [0; HEADER as usize];
        let read = length >= HEADER && file.read_exact(&mut head).is_ok();
        if !read || head[..8] != *MAGIC {
            let expected = "expected predictions of llama-perplexity's";
            return Err(wrong(format!("does not begin with _logits_, {expected}")));
        }
        let number = |at: usize| {
            let bytes: [u8; 4] = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            usize::try_from(i32::from_le_bytes(bytes)).unwrap_or(0)
        };
        let shape = Shape {
            n_ctx: number(8),
            n_vocab: number(12),
            n_chunks: number(16),
        };
        let Shape {
            n_ctx,
            n_vocab,
            n_chunks,
        } = shape;
        if shape.scored() == 0 || n_vocab == 0 || n_chunks == 0 {
            let found = format!("{n_chunks} chunks of {n_ctx} tokens of {n_vocab}");
            return Err(wrong(format!("holds {found}, expected at least 1 of 3")));
        }
        if shape.bytes() != Some(length) {
            let expected = match shape.bytes() {
                Some(bytes) => format!("expected {bytes}"),
                None => "which no file has".to_owned(),
            };
            let found = format!("{n_chunks} chunks of {n_ctx} tokens of {n_vocab}");
            return Err(wrong(format!("has {length} bytes for {found}, {expected}")));
        }
        Ok(Reader {
            path: path.to_owned(),
            file,
            shape,
            bytes: Vec::new(),
        })
    }

    /// How much there is.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// A chunk's tokens: `[n_ctx]`. The next prediction is then the first of the same chunk.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`] for tokens that the vocabulary lacks, and [`Error::Contract`] behind the
    /// last.
    pub fn chunk(&mut self, number: usize) -> Result<Vec<Token>> {
        let Shape {
            n_ctx,
            n_vocab,
            n_chunks,
        } = self.shape;
        if number >= n_chunks {
            return Err(Error::contract(format!("chunk {number} of {n_chunks}")));
        }
        self.seek_to(HEADER + 4 * (n_ctx * number) as u64)?;
        let mut bytes = vec![0; 4 * n_ctx];
        let read = self.file.read_exact(&mut bytes);
        read.map_err(|e| Error::io(&self.path, e))?;
        let words = bytes.chunks_exact(4);
        let tokens: Vec<Token> = words
            .map(|word| Token::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        let strange = |token: &&Token| usize::try_from(**token).map_or(true, |t| t >= n_vocab);
        if let Some(token) = tokens.iter().find(strange) {
            let reason = format!("has the token {token}, expected less than {n_vocab}");
            return Err(Error::file(&self.path, reason));
        }
        self.seek(number)?;
        Ok(tokens)
    }

    /// Goes to the first prediction of a chunk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn seek(&mut self, chunk: usize) -> Result<()> {
        let Shape {
            n_ctx, n_chunks, ..
        } = self.shape;
        let rows = chunk.min(n_chunks) * self.shape.scored();
        let at = HEADER + 4 * (n_ctx * n_chunks) as u64 + rows as u64 * self.shape.row() as u64;
        self.seek_to(at)
    }

    fn seek_to(&mut self, at: u64) -> Result<()> {
        let sought = self.file.seek(SeekFrom::Start(at));
        sought.map(drop).map_err(|e| Error::io(&self.path, e))
    }

    /// The next prediction.
    ///
    /// # Errors
    /// [`Error::Io`], also behind the last; [`Error::File`] for numbers that are no log probabilities.
    pub fn read(&mut self) -> Result<LogProbs> {
        self.bytes.resize(self.shape.row(), 0);
        let read = self.file.read_exact(&mut self.bytes);
        read.map_err(|e| Error::io(&self.path, e))?;
        let (head, bits) = self.bytes.split_at(8);
        let float =
            |at: usize| f32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (scale, least) = (float(0), float(4));
        if !(scale.is_finite() && scale >= 0.0 && least.is_finite()) {
            let reason = format!("scale {scale} and least {least}, expected finite numbers");
            return Err(Error::file(&self.path, reason));
        }
        let most = least + STEPS * scale;
        if most > ROUNDING {
            let reason = format!("a log probability of {most}, expected none above 0");
            return Err(Error::file(&self.path, reason));
        }
        let bits = bits.chunks_exact(2).take(self.shape.n_vocab);
        Ok(LogProbs {
            scale,
            least,
            bits: bits
                .map(|two| u16::from_le_bytes([two[0], two[1]]))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests;
