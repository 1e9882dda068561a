//! From segments to batches: any engine, any part of a segment, at any place.

use super::prompt::Segment;
use super::trial::Trial;
use crate::attend::{Attended, Looked, Lookup};
use crate::cache::{Cell, Modality, Pos};
use crate::engine::{Batch, Engine, Input, Observation, Part, SeqId, Token};
use crate::error::{Error, Result};
use crate::policy::Queries;

/// One batch, before and after it went in, and the buffers of it. Reused.
#[derive(Default)]
pub(super) struct Feed {
    /// The sequence that everything goes into.
    pub seq: SeqId,
    /// Position of each row.
    pub pos: Vec<Pos>,
    /// Rows whose attention is wanted.
    pub queries: Vec<u32>,
    /// Cell of each row.
    pub cells: Vec<Cell>,
    pub seen: Observation,
    /// Whether each row separates parts of a picture; empty for text.
    pub separators: Vec<bool>,
    /// What the batch may leave out, if it looks up.
    pub lookup: Lookup,
    pub looks_up: bool,
    /// What batches with a lookup attended to.
    pub attended: Attended,
    /// What the layers chose in the last batch, for a recorder.
    pub looked: Looked,
    /// Bytes of another cache that is there meanwhile.
    pub beside: u64,
    /// Bytes of evicted rows that wait in main memory.
    pub waiting: u64,
    /// The most bytes that caches were ever allocated, after a batch.
    pub peak_bytes: u64,
    /// Whether the logits of the last row are wanted.
    logits: bool,
    source: Source,
    /// Cells of the trial run that the rows go on from.
    from: Vec<Cell>,
    tokens: Vec<Token>,
    values: Vec<f32>,
    /// Of rows of the segment with several axes.
    axes: Option<Vec<[Pos; 4]>>,
}

/// Where the rows of the batch are.
#[derive(Clone, Copy, Default)]
enum Source {
    /// In `tokens`.
    #[default]
    Tokens,
    /// In `values`, row by row.
    Values,
    /// In the trial run's cells `from`.
    Trial,
    /// These rows of the segment, one after the other.
    Segment { first: usize, end: usize },
}

/// What of a segment goes in, and what is asked of it.
pub(super) struct Wish<'a> {
    /// Position of the segment's first row.
    pub base: Pos,
    /// Which of its positions go in.
    pub keep: &'a dyn Fn(Pos) -> bool,
    pub queries: Option<Queries>,
    /// How many of its last rows go in one at a time.
    pub single_rows: usize,
    /// Rows of the prompt behind this segment.
    pub behind: usize,
    /// The prompt ends with this segment: its last row's logits are wanted.
    pub is_last: bool,
}

/// Rows of a segment that go in as one batch.
pub(super) struct Cut {
    base: Pos,
    rows: Vec<usize>,
    queries: Option<Queries>,
    /// Rows of the prompt behind these.
    behind: usize,
    logits: bool,
}

impl Cut {
    /// The segment's batches, in order, of `n_batch` rows at most.
    pub fn all(segment: &Segment, wish: &Wish<'_>, n_batch: usize) -> Vec<Cut> {
        let rows: Vec<usize> = (0..segment.len())
            .filter(|&row| (wish.keep)(segment.pos(wish.base, row)))
            .collect();
        let mut left = rows.len();
        let (together, single) = rows.split_at(left - wish.single_rows.min(left));
        let cuts = together.chunks(n_batch.max(1)).chain(single.chunks(1));
        let cut = |rows: &[usize]| {
            left -= rows.len();
            Cut {
                base: wish.base,
                rows: rows.to_vec(),
                queries: wish.queries,
                behind: wish.behind + left,
                logits: wish.is_last && left == 0,
            }
        };
        cuts.map(cut).collect()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The rows whose attention is wanted.
    fn queries(&self, modality: Modality) -> std::ops::Range<u32> {
        let rows = self.rows.len();
        let last = match self.queries {
            Some(Queries::All) if modality == Modality::Text => rows,
            Some(Queries::Last) => 1usize.saturating_sub(self.behind),
            Some(Queries::Window(n)) => n.saturating_sub(self.behind).min(rows),
            _ => 0,
        };
        (rows - last) as u32..rows as u32
    }
}

impl Feed {
    /// Makes one token the next batch; whether its attention is wanted.
    pub fn token(&mut self, token: Token, pos: Pos, asked: bool) {
        self.pos.clear();
        self.pos.push(pos);
        self.queries.clear();
        self.queries.extend(asked.then_some(0));
        self.separators.clear();
        self.tokens.clear();
        self.tokens.push(token);
        self.source = Source::Tokens;
        self.logits = true;
    }

    /// Makes these rows of the segment the next batch. `trial`: what they go on from, instead of
    /// from their beginnings.
    ///
    /// # Errors
    /// For rows that the trial run has not seen.
    pub fn cut(&mut self, segment: &Segment, cut: &Cut, trial: Option<&Trial>) -> Result<()> {
        let rows = &cut.rows;
        let picked = rows.iter().map(|&row| segment.pos(cut.base, row));
        self.pos.clear();
        self.pos.extend(picked);
        self.queries.clear();
        self.queries.extend(cut.queries(segment.origin().modality));
        let separators = segment.separators();
        self.separators.clear();
        if !separators.is_empty() {
            self.separators
                .extend(rows.iter().map(|&row| separators[row]));
        }
        self.logits = cut.logits;
        self.looks_up = false;
        self.axes = None;
        let (Some(&first), Some(&last)) = (rows.first(), rows.last()) else {
            return Err(Error::contract("a batch without rows"));
        };
        if let Some(trial) = trial {
            self.source = Source::Trial;
            return trial.cells_at(&self.pos, &mut self.from);
        }
        let end = last + 1;
        if end - first == rows.len() {
            self.source = Source::Segment { first, end };
            self.axes = segment.axes(cut.base, first, end);
            return Ok(());
        }
        match segment {
            Segment::Tokens(tokens) => {
                self.source = Source::Tokens;
                self.tokens.clear();
                self.tokens.extend(rows.iter().map(|&row| tokens[row]));
            }
            // Pictures with several axes are never taken apart.
            Segment::Image { embeddings, n, .. } => {
                self.source = Source::Values;
                let width = embeddings.len() / n;
                self.values.clear();
                for &row in rows {
                    let values = &embeddings[row * width..(row + 1) * width];
                    self.values.extend_from_slice(values);
                }
            }
        }
        Ok(())
    }

    /// The batch as an engine takes it; `segment`: what it was cut of.
    ///
    /// # Errors
    /// For rows of a segment that is not there.
    pub fn part<'a>(&'a mut self, segment: Option<&'a Segment>) -> Result<Part<'a>> {
        let n = self.pos.len();
        let input = match self.source {
            Source::Tokens => Input::Tokens(&self.tokens),
            Source::Trial => Input::Trial(&self.from),
            Source::Values => Input::Embeddings {
                data: &self.values,
                n,
                mrope: None,
            },
            Source::Segment { first, end } => {
                let missing = || Error::contract("rows of a prompt that is gone");
                let segment = segment.ok_or_else(missing)?;
                segment.rows(first, end, self.axes.as_deref())
            }
        };
        Ok(Part {
            batch: Batch {
                seq: self.seq,
                input,
                pos: &self.pos,
                queries: &self.queries,
                logits: self.logits,
                lookup: self.looks_up.then_some(&self.lookup),
            },
            cells: &mut self.cells,
            seen: &mut self.seen,
        })
    }

    /// The batch through the model.
    ///
    /// # Errors
    /// The engine's own.
    pub fn run(&mut self, engine: &mut (dyn Engine + '_), segment: Option<&Segment>) -> Result<()> {
        let Part { batch, cells, seen } = self.part(segment)?;
        engine.decode(batch, cells, seen)
    }

    /// Notes the memory that is taken now.
    pub fn note_bytes(&mut self, engine: &(dyn Engine + '_)) {
        let bytes = engine.kv_bytes().allocated + self.beside + self.waiting;
        self.peak_bytes = self.peak_bytes.max(bytes);
    }

    /// Checks what came of the batch, and notes the memory that it took.
    ///
    /// # Errors
    /// [`Error::Contract`] when not every row has a cell, or a query row no attention.
    pub fn check(&mut self, engine: &(dyn Engine + '_)) -> Result<()> {
        self.looks_up = false;
        self.note_bytes(engine);
        let (rows, cells) = (self.pos.len(), self.cells.len());
        if cells != rows {
            return Err(Error::contract(format!(
                "{cells} cells for a batch of {rows} rows"
            )));
        }
        // Missing attention would let every token look unused.
        let (wanted, seen) = (self.queries.len(), self.seen.queries.len());
        if seen != wanted {
            return Err(Error::contract(format!(
                "attention of {seen} rows, expected {wanted}"
            )));
        }
        Ok(())
    }
}
