//! From segments to batches: any engine, any part of a segment, at any place.

use super::prompt::Segment;
use super::trial::Trial;
use crate::attend::{Attended, Lookup};
use crate::cache::{Cell, Modality, Pos};
use crate::controller::Origin;
use crate::engine::{Batch, Engine, Input, Observation, SeqId, Token};
use crate::error::{Error, Result};
use crate::policy::Queries;

/// One batch after it went in, and the buffers of it. Reused.
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
    /// What the next batch may leave out, if it looks up.
    pub lookup: Lookup,
    pub looks_up: bool,
    /// What batches with a lookup attended to.
    pub attended: Attended,
    /// Bytes of another cache that is there meanwhile.
    pub beside: u64,
    /// The most bytes that caches were ever allocated, after a batch.
    pub peak_bytes: u64,
    /// Cells of the trial run that the rows go on from.
    from: Vec<Cell>,
    tokens: Vec<Token>,
    values: Vec<f32>,
}

/// What of a segment goes in, and what is asked of it.
pub(super) struct Part<'a> {
    pub segment: &'a Segment,
    /// Position of the segment's first row.
    pub base: Pos,
    /// Which of its positions go in.
    pub keep: &'a dyn Fn(Pos) -> bool,
    pub queries: Option<Queries>,
    /// What the rows go on from, instead of from their beginnings.
    pub trial: Option<&'a Trial>,
    /// How many of its last rows go in one at a time.
    pub single_rows: usize,
    /// Rows of the prompt behind this segment.
    pub behind: usize,
    /// The prompt ends with this segment: its last row's logits are wanted.
    pub is_last: bool,
}

/// What happens with a batch that went in.
type Sink<'a> = dyn FnMut(&Feed, Origin) -> Result<()> + 'a;

impl Feed {
    /// The part's batches, one after the other; false: cancelled.
    pub fn part(
        &mut self,
        engine: &mut (dyn Engine + '_),
        part: &Part<'_>,
        cancelled: &dyn Fn() -> bool,
        sink: &mut Sink<'_>,
    ) -> Result<bool> {
        let n_batch = engine.n_batch().max(1);
        let segment = part.segment;
        let rows: Vec<usize> = (0..segment.len())
            .filter(|&row| (part.keep)(segment.pos(part.base, row)))
            .collect();
        let separators = segment.separators();
        let mut left = rows.len();
        let (together, single) = rows.split_at(left - part.single_rows.min(left));
        for rows in together.chunks(n_batch).chain(single.chunks(1)) {
            if cancelled() {
                return Ok(false);
            }
            left -= rows.len();
            let is_last = part.is_last && left == 0;
            let behind = part.behind + left;
            self.select_queries(part.queries, segment.origin().modality, rows.len(), behind);
            self.pos.clear();
            self.pos
                .extend(rows.iter().map(|&row| segment.pos(part.base, row)));
            self.separators.clear();
            if !separators.is_empty() {
                self.separators
                    .extend(rows.iter().map(|&row| separators[row]));
            }
            self.rows(engine, part, rows, is_last)?;
            sink(self, segment.origin())?;
        }
        Ok(true)
    }

    /// The rows whose attention is wanted.
    fn select_queries(
        &mut self,
        wanted: Option<Queries>,
        modality: Modality,
        rows: usize,
        behind: usize,
    ) {
        self.queries.clear();
        let last = match wanted {
            Some(Queries::All) if modality == Modality::Text => rows,
            Some(Queries::Last) => 1usize.saturating_sub(behind),
            Some(Queries::Window(n)) => n.saturating_sub(behind).min(rows),
            _ => 0,
        };
        self.queries.extend((rows - last) as u32..rows as u32);
    }

    fn rows(
        &mut self,
        engine: &mut (dyn Engine + '_),
        part: &Part<'_>,
        rows: &[usize],
        logits: bool,
    ) -> Result<()> {
        let (Some(&first), Some(&last)) = (rows.first(), rows.last()) else {
            return Ok(());
        };
        if let Some(trial) = part.trial {
            let mut from = std::mem::take(&mut self.from);
            trial.cells_at(&self.pos, &mut from)?;
            let done = self.run(engine, Input::Trial(&from), logits);
            self.from = from;
            return done;
        }
        if last - first + 1 == rows.len() {
            let axes = part.segment.axes(part.base, first, last + 1);
            let input = part.segment.rows(first, last + 1, axes.as_deref());
            return self.run(engine, input, logits);
        }
        match part.segment {
            Segment::Tokens(tokens) => {
                let mut picked = std::mem::take(&mut self.tokens);
                picked.clear();
                picked.extend(rows.iter().map(|&row| tokens[row]));
                let done = self.run(engine, Input::Tokens(&picked), logits);
                self.tokens = picked;
                done
            }
            Segment::Image { embeddings, n, .. } => {
                let width = embeddings.len() / n;
                let mut picked = std::mem::take(&mut self.values);
                picked.clear();
                for &row in rows {
                    picked.extend_from_slice(&embeddings[row * width..(row + 1) * width]);
                }
                // Pictures with several axes are never taken apart.
                let input = Input::Embeddings {
                    data: &picked,
                    n: rows.len(),
                    mrope: None,
                };
                let done = self.run(engine, input, logits);
                self.values = picked;
                done
            }
        }
    }

    /// One batch at `self.pos`, asked for `self.queries`.
    pub fn run(
        &mut self,
        engine: &mut (dyn Engine + '_),
        input: Input<'_>,
        logits: bool,
    ) -> Result<()> {
        let batch = Batch {
            seq: self.seq,
            input,
            pos: &self.pos,
            queries: &self.queries,
            logits,
            lookup: self.looks_up.then_some(&self.lookup),
        };
        engine.decode(batch, &mut self.cells, &mut self.seen)?;
        let bytes = engine.kv_bytes().allocated + self.beside;
        self.peak_bytes = self.peak_bytes.max(bytes);
        let (rows, cells) = (input.len(), self.cells.len());
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
