//! A model made of two functions, for tests: what it attends to and what it says.
//!
//! Its cache is real: cells are given out lowest hole first, as llama.cpp does, run out, and are
//! freed by position. What llama.cpp would refuse or silently get wrong is an error here: a hole
//! between the newest position and a batch (unless it is `patched`), a removal of a position that
//! is absent or newest.

use std::ops::Range;
use std::rc::Rc;

use super::{
    Batch, Capabilities, Engine, Input, KvBytes, Observation, Part, Pass, SeqId, Token, TrialRuns,
    Vocabulary, no_logits,
};
use crate::cache::{Cell, Pos};
use crate::error::{Error, Result};

/// The token that ends a generation.
pub const EOG: Token = 0;

const N_VOCAB: usize = 256;

/// One call of the engine, for tests to look at.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// A batch that went in.
    Decode {
        /// The position of its first row.
        pos: Pos,
        /// Its rows.
        n: usize,
        /// Whether they were visual embeddings.
        embeddings: bool,
        /// Whether they came from a trial run.
        continued: bool,
        /// The rows whose attention was wanted.
        queries: Vec<u32>,
        /// Whether logits were wanted.
        logits: bool,
    },
    /// Ranges that were removed.
    Remove(Vec<Range<Pos>>),
    /// Everything from this position on was taken back.
    Rewind(Pos),
    /// Tokens that moved to lower positions.
    Shift {
        /// The first position that moved.
        from: Pos,
        /// How far down, in positions.
        by: Pos,
    },
}

/// How much the token at position `query` attends to the one at `key`, before normalisation.
pub type Attention = Rc<dyn Fn(Pos, Pos) -> f64>;

/// The token that is said after the token at this position, of a vocabulary of 256.
pub type Says = Box<dyn Fn(Pos) -> Token>;

/// The engine: real cells, scripted attention and words.
pub struct Scripted {
    /// Per cell: the position of its token.
    cells: Vec<Option<Pos>>,
    /// Per cell: the sequence of its token, or of the last that it held.
    seqs: Vec<SeqId>,
    /// Moves that their sequences have not asked for yet.
    moved: Vec<(SeqId, (Cell, Cell))>,
    n_batch: usize,
    attention: Attention,
    says: Says,
    /// The text of each token, by default ` <token>`.
    pieces: Vec<Vec<u8>>,
    /// `[N_VOCAB]` for each part of the last pass that asked for them.
    logits: Vec<(SeqId, Vec<f32>)>,
    patched: bool,
    shifts: bool,
    fails: Option<usize>,
    trial: Option<Box<Scripted>>,
    goes_on: bool,
    /// Everything that was asked of it, oldest first.
    pub calls: Vec<Call>,
    /// How often the weights were read: once for all batches of a pass.
    pub passes: usize,
}

impl Scripted {
    /// An empty cache. Attention is a hash of both positions, every token said is 1.
    pub fn new(n_cells: usize, n_batch: usize) -> Self {
        Scripted {
            cells: vec![None; n_cells],
            seqs: vec![0; n_cells],
            moved: Vec::new(),
            n_batch,
            attention: Rc::new(|query, key| hashed(0, query, key)),
            says: Box::new(|_| 1),
            pieces: (0..N_VOCAB)
                .map(|token| format!(" {token}").into_bytes())
                .collect(),
            logits: Vec::new(),
            patched: false,
            shifts: true,
            fails: None,
            trial: None,
            goes_on: false,
            calls: Vec::new(),
            passes: 0,
        }
    }

    /// With everything that the patched library can do: any position, trial runs, compaction,
    /// rows that leave and come back.
    pub fn patched(mut self) -> Self {
        self.patched = true;
        self
    }

    /// As a model whose cached keys cannot be moved to other positions.
    pub fn without_shift(mut self) -> Self {
        self.shifts = false;
        self
    }

    /// Lets this pass fail, counted from 0, once, with nothing taken in.
    pub fn with_failure(mut self, pass: usize) -> Self {
        self.fails = Some(pass);
        self
    }

    /// Gives it this attention. Rows are normalised over what the query can see.
    pub fn with_attention(mut self, attention: impl Fn(Pos, Pos) -> f64 + 'static) -> Self {
        self.attention = Rc::new(attention);
        self
    }

    /// Gives it these words.
    pub fn with_says(mut self, says: impl Fn(Pos) -> Token + 'static) -> Self {
        self.says = Box::new(says);
        self
    }

    /// Gives the tokens from `first` on these texts.
    pub fn with_pieces(mut self, first: Token, pieces: &[&[u8]]) -> Self {
        for (token, piece) in (first as usize..N_VOCAB).zip(pieces) {
            self.pieces[token] = piece.to_vec();
        }
        self
    }

    /// Occupied cells with their positions, ascending by cell.
    pub fn occupied(&self) -> Vec<(Cell, Pos)> {
        let cells = self.cells.iter().enumerate();
        cells
            .filter_map(|(cell, pos)| pos.map(|pos| (cell as Cell, pos)))
            .collect()
    }

    /// The same of one sequence.
    pub fn occupied_by(&self, seq: SeqId) -> Vec<(Cell, Pos)> {
        let all = self.occupied().into_iter();
        all.filter(|&(cell, _)| self.seqs[cell as usize] == seq)
            .collect()
    }

    /// Rows that went in.
    pub fn n_decoded(&self) -> usize {
        let calls = self.calls.iter();
        let rows = calls.map(|call| match call {
            Call::Decode { n, .. } => *n,
            _ => 0,
        });
        rows.sum()
    }

    /// Empties the cache.
    pub fn clear(&mut self) {
        self.cells.fill(None);
        self.moved.clear();
        self.logits.clear();
    }

    /// The positions of a trial run's tokens.
    fn continued(&self, cells: &[Cell]) -> Result<Vec<Pos>> {
        let trial = self.trial.as_deref().filter(|trial| trial.goes_on);
        let at = |&cell: &Cell| trial?.cells.get(cell as usize).copied().flatten();
        let places: Option<Vec<Pos>> = cells.iter().map(at).collect();
        places.ok_or_else(|| Error::contract(format!("cells {cells:?} of a trial")))
    }

    fn newest(&self, seq: SeqId) -> Option<Pos> {
        self.held(seq).max()
    }

    fn held(&self, seq: SeqId) -> impl Iterator<Item = Pos> + '_ {
        let cells = self.cells.iter().zip(&self.seqs);
        cells.filter_map(move |(pos, &of)| pos.filter(|_| of == seq))
    }

    /// The sequence's cells.
    fn cells_of(&mut self, seq: SeqId) -> impl Iterator<Item = &mut Option<Pos>> + '_ {
        let cells = self.cells.iter_mut().zip(&self.seqs);
        cells.filter_map(move |(cell, &of)| (of == seq).then_some(cell))
    }

    /// What llama.cpp would refuse of a batch, or where its rows go.
    fn places(&self, batch: &Batch<'_>) -> Result<Vec<Pos>> {
        let n = batch.input.len();
        if n != batch.pos.len() {
            let places = batch.pos.len();
            return Err(Error::contract(format!("{places} positions for {n} rows")));
        }
        if n == 0 || n > self.n_batch {
            let most = self.n_batch;
            return Err(Error::contract(format!(
                "a batch of {n} rows, expected 1 to {most}"
            )));
        }
        let places: Vec<Pos> = match batch.input {
            // As llama.cpp counts a picture with several axes: by the furthest of them.
            Input::Embeddings {
                mrope: Some(rows), ..
            } => rows
                .iter()
                .map(|row| row.iter().copied().fold(0, Pos::max))
                .collect(),
            Input::Trial(cells) => self.continued(cells)?,
            _ => batch.pos.to_vec(),
        };
        if let (Input::Trial(_), true) = (batch.input, places != batch.pos) {
            let pos = batch.pos;
            return Err(Error::contract(format!("{places:?} of a trial at {pos:?}")));
        }
        let expected = |newest: &Pos| newest + 1 != places.iter().copied().fold(Pos::MAX, Pos::min);
        if self.patched {
            let taken = |pos: &&Pos| self.held(batch.seq).any(|held| held == **pos);
            let ascending = places.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascending || places.iter().any(|pos| taken(&pos)) {
                return Err(Error::contract(format!("a batch at {places:?}")));
            }
        } else if let Some(newest) = self.newest(batch.seq).filter(expected) {
            let pos = batch.pos;
            return Err(Error::contract(format!(
                "a batch at {pos:?} after position {newest}"
            )));
        }
        let ascending = batch.queries.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || batch.queries.last().is_some_and(|&row| row as usize >= n) {
            let rows = batch.queries;
            return Err(Error::contract(format!("query rows {rows:?} of {n}")));
        }
        Ok(places)
    }

    /// What a part that is in the cache attends to and says.
    fn answer(&mut self, part: &mut Part<'_>) {
        let batch = part.batch;
        if !batch.queries.is_empty() {
            let queries = batch.queries.iter().map(|&row| batch.pos[row as usize]);
            self.pay(batch.seq, queries, part.seen);
        }
        let n = batch.input.len();
        if batch.logits {
            let said = (self.says)(batch.pos[n - 1]) as usize % N_VOCAB;
            let logit = |token| if token == said { 1.0 } else { 0.0 };
            let logits = (0..N_VOCAB).map(logit).collect();
            self.logits.push((batch.seq, logits));
        }
        self.calls.push(Call::Decode {
            pos: batch.pos[0],
            n,
            embeddings: matches!(batch.input, Input::Embeddings { .. }),
            continued: matches!(batch.input, Input::Trial(_)),
            queries: batch.queries.to_vec(),
            logits: batch.logits,
        });
    }

    /// Softmax attention of each query row over the cells that it can see, as the trait wants it.
    fn pay(&self, seq: SeqId, queries: impl Iterator<Item = Pos>, seen: &mut Observation) {
        // Like llama.cpp, a view somewhat longer than the highest cell in use.
        let used = self
            .cells
            .iter()
            .rposition(Option::is_some)
            .map_or(0, |last| last + 1);
        let view = used.next_multiple_of(8).min(self.cells.len());
        seen.sum.resize(view, 0.0);
        seen.max.resize(view, 0.0);
        let mut weights = vec![0.0; view];
        for query in queries {
            let cells = self.cells.iter().zip(&self.seqs);
            for (weight, (pos, &of)) in weights.iter_mut().zip(cells) {
                *weight = match pos {
                    Some(key) if *key <= query && of == seq => (self.attention)(query, *key),
                    _ => 0.0,
                };
            }
            let total: f64 = weights.iter().sum();
            for (cell, weight) in weights.iter().enumerate() {
                let share = (weight / total) as f32;
                seen.sum[cell] += share;
                // Not f32::max, which would lose a NaN.
                if share > seen.max[cell] || share.is_nan() {
                    seen.max[cell] = share;
                }
            }
            seen.queries.push(query);
        }
    }
}

impl Engine for Scripted {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        self.decode_parts(&mut [Part { batch, cells, seen }])
    }

    fn decode_parts(&mut self, parts: &mut [Part<'_>]) -> Result<()> {
        for part in parts.iter_mut() {
            part.cells.clear();
            part.seen.clear();
        }
        self.logits.clear();
        let each = parts.iter().map(|part| self.places(&part.batch));
        let places = each.collect::<Result<Vec<_>>>()?;
        let rows = Pass::new(self.n_batch, self.patched).check(parts)?;
        let free = (0..self.cells.len()).filter(|&cell| self.cells[cell].is_none());
        let free: Vec<usize> = free.take(rows).collect();
        if free.len() < rows {
            let n_ctx = self.cells.len();
            return Err(Error::ContextFull { n_ctx });
        }
        self.passes += 1;
        if self.fails.is_some_and(|pass| pass + 1 == self.passes) {
            return Err(Error::llama("decode", "a failure of the script"));
        }
        let mut free = free.into_iter();
        for (part, places) in parts.iter_mut().zip(places) {
            for (cell, pos) in free.by_ref().take(places.len()).zip(places) {
                self.cells[cell] = Some(pos);
                self.seqs[cell] = part.batch.seq;
                part.cells.push(cell as Cell);
            }
        }
        for part in parts {
            self.answer(part);
        }
        Ok(())
    }

    fn logits(&self) -> Result<&[f32]> {
        let last = self.logits.last().map(|(_, logits)| logits.as_slice());
        last.ok_or_else(|| Error::contract("logits that no batch asked for"))
    }

    fn logits_of(&self, seq: SeqId) -> Result<&[f32]> {
        let own = self.logits.iter().find(|(of, _)| *of == seq);
        let own = own.map(|(_, logits)| logits.as_slice());
        own.ok_or_else(|| no_logits(seq))
    }

    fn vocabulary(&self) -> Option<&(dyn Vocabulary + '_)> {
        Some(self)
    }

    fn remove(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        let newest = self.newest(seq);
        let mut end = Pos::MIN;
        for range in ranges {
            if range.start < end || range.is_empty() {
                return Err(Error::contract(format!("removal of {ranges:?}")));
            }
            end = range.end;
            for pos in range.clone() {
                match self.cells_of(seq).find(|cell| **cell == Some(pos)) {
                    Some(cell) if Some(pos) != newest => *cell = None,
                    Some(_) => return Err(Error::contract(format!("removal of newest, {pos}"))),
                    None => return Err(Error::contract(format!("removal of absent {pos}"))),
                }
            }
        }
        self.calls.push(Call::Remove(ranges.to_vec()));
        Ok(())
    }

    fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
        for cell in self.cells_of(seq) {
            *cell = cell.filter(|&pos| pos < from);
        }
        if from == 0 {
            self.moved.retain(|&(of, _)| of != seq);
        }
        let held = self.held(seq).count();
        if held != left {
            return Err(Error::contract(format!("{held} cells left, not {left}")));
        }
        self.calls.push(Call::Rewind(from));
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            any_position: self.patched,
            shifts: self.shifts,
            continues_trials: self.patched,
            scores_by_part: self.patched,
        }
    }

    fn shift(&mut self, seq: SeqId, from: Pos, by: Pos) -> Result<()> {
        let free = self.held(seq).all(|pos| !(from - by..from).contains(&pos));
        if !self.shifts || by <= 0 || !free {
            return Err(Error::contract(format!("a shift of {from} by {by}")));
        }
        let moved = self.cells_of(seq).flatten().filter(|pos| **pos >= from);
        moved.for_each(|pos| *pos -= by);
        self.calls.push(Call::Shift { from, by });
        Ok(())
    }

    fn trials(&mut self) -> Option<&mut (dyn TrialRuns + '_)> {
        match self.patched {
            true => Some(self),
            false => None,
        }
    }

    /// The highest tokens into the lowest holes.
    fn compact(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        while self.patched {
            let hole = self.cells.iter().position(Option::is_none);
            let last = self.cells.iter().rposition(Option::is_some);
            let (Some(to), Some(from)) = (hole, last) else {
                break;
            };
            if from < to {
                break;
            }
            self.cells.swap(from, to);
            self.seqs[to] = self.seqs[from];
            self.moved.push((self.seqs[to], (from as Cell, to as Cell)));
        }
        self.moved(seq, moves);
        Ok(())
    }

    fn moved(&mut self, seq: SeqId, moves: &mut Vec<(Cell, Cell)>) {
        moves.clear();
        self.moved.retain(|&(of, moved)| {
            if of == seq {
                moves.push(moved);
            }
            of != seq
        });
    }

    /// A row is its position.
    fn save_rows(&mut self, cells: &[Cell], out: &mut Vec<u8>) -> Result<bool> {
        for &cell in cells.iter().filter(|_| self.patched) {
            let Some(pos) = self.cells.get(cell as usize).copied().flatten() else {
                return Err(Error::contract(format!("the row of empty cell {cell}")));
            };
            out.extend(pos.to_ne_bytes());
        }
        Ok(self.patched)
    }

    fn restore_rows(
        &mut self,
        seq: SeqId,
        pos: &[Pos],
        rows: &[u8],
        cells: &mut Vec<Cell>,
    ) -> Result<()> {
        let saved: Vec<u8> = pos.iter().flat_map(|pos| pos.to_ne_bytes()).collect();
        if saved != rows {
            return Err(Error::contract(format!("other rows for {pos:?}")));
        }
        let free = (0..self.cells.len()).filter(|&cell| self.cells[cell].is_none());
        cells.clear();
        cells.extend(free.take(pos.len()).map(|cell| cell as Cell));
        if cells.len() < pos.len() {
            let n_ctx = self.cells.len();
            return Err(Error::ContextFull { n_ctx });
        }
        for (&cell, &pos) in cells.iter().zip(pos) {
            self.cells[cell as usize] = Some(pos);
            self.seqs[cell as usize] = seq;
        }
        Ok(())
    }

    fn n_cells(&self) -> usize {
        self.cells.len()
    }

    fn cells_for(&self, seq: SeqId) -> usize {
        let all = self.cells.iter().flatten().count();
        self.cells.len() - all + self.held(seq).count()
    }

    fn n_batch(&self) -> usize {
        self.n_batch
    }

    fn kv_bytes(&self) -> KvBytes {
        const PER_CELL: u64 = 64;
        KvBytes {
            per_cell: PER_CELL,
            allocated: PER_CELL * self.cells.len() as u64,
        }
    }
}

impl Vocabulary for Scripted {
    fn is_eog(&self, token: Token) -> bool {
        token == EOG
    }

    fn piece(&self, token: Token, out: &mut Vec<u8>) -> Result<()> {
        match self.pieces.get(token as usize) {
            Some(piece) => out.extend_from_slice(piece),
            None => return Err(Error::contract(format!("token {token} of {N_VOCAB}"))),
        }
        Ok(())
    }
}

impl TrialRuns for Scripted {
    fn begin(&mut self, n_cells: usize, goes_on: bool) -> Result<&mut (dyn Engine + '_)> {
        let mut engine = Scripted::new(n_cells, self.n_batch).patched();
        engine.attention = Rc::clone(&self.attention);
        engine.goes_on = goes_on;
        Ok(self.trial.insert(Box::new(engine)).as_mut())
    }

    fn end(&mut self) -> Result<()> {
        self.trial = None;
        Ok(())
    }
}

/// A reproducible weight in (0, 1] with a long tail: most tokens matter little, few matter much.
pub fn hashed(seed: u64, query: Pos, key: Pos) -> f64 {
    // splitmix64's finaliser.
    let mut x = seed ^ (query as u64) << 32 ^ key as u64;
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let uniform = (x ^ x >> 31) as f64 / u64::MAX as f64;
    (6.0 * (uniform - 1.0)).exp()
}
