//! What the generation loop needs of a model. [`crate::llama`] implements it with llama.cpp,
//! [`scripted`] with a table, so that everything above runs in tests without a model.

mod lent;
mod pass;
pub mod scripted;
mod trials;
mod words;

use std::ops::Range;

use crate::attend::{Attend, Lookup};
use crate::cache::{Cell, Pos};
use crate::error::{Error, Result};

pub use pass::Pass;
pub use trials::TrialRuns;
pub use words::{Constraint, Greedy, Sampler, Vocabulary, likeliest};

pub use crate::cache::Observation;

/// A vocabulary id (llama.cpp's `llama_token`).
pub type Token = i32;

/// A sequence of the cache (llama.cpp's `llama_seq_id`), which holds one conversation. Engines for
/// a single one call it 0.
pub type SeqId = i32;

/// Consecutive input of one modality.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Text: `[n]` ids of the vocabulary.
    Tokens(&'a [Token]),
    /// Row-major `[n, n_embd]` projected visual embeddings. `mrope` holds the absolute
    /// `[t, y, x, z]` positions of each row for models whose pictures have two axes.
    Embeddings {
        /// `[n, n_embd]`
        data: &'a [f32],
        /// Rows.
        n: usize,
        /// `[n]`; `None` for models with one axis.
        mrope: Option<&'a [[Pos; 4]]>,
    },
    /// The tokens in these cells of the trial run's cache, from where it came to: the layers that
    /// it went through are not computed again. Where [`TrialRuns::begin`] was told so.
    Trial(&'a [Cell]),
}

impl Input<'_> {
    /// Rows of the input: tokens, or visual embeddings.
    pub fn len(&self) -> usize {
        match self {
            Input::Tokens(t) => t.len(),
            Input::Embeddings { n, .. } => *n,
            Input::Trial(cells) => cells.len(),
        }
    }

    /// Whether it has no rows: no engine takes such a batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One call of [`Engine::decode`]: rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The sequence that the rows belong to, and the only one that they attend to.
    pub seq: SeqId,
    /// The rows themselves.
    pub input: Input<'a>,
    /// Position of each row, ascending: `[input.len()]`. A row of a picture with several axes
    /// has here what it counts as in the sequence.
    pub pos: &'a [Pos],
    /// Rows of this batch (ascending, < `input.len()`) whose attention is wanted; empty: none.
    pub queries: &'a [u32],
    /// Whether the logits of the last row are wanted.
    pub logits: bool,
    /// What each layer may leave out, for a batch of one token; `None`: nothing.
    pub lookup: Option<&'a Lookup>,
}

impl<'a> Batch<'a> {
    /// Rows of sequence 0, of which nothing is asked.
    pub const fn new(input: Input<'a>, pos: &'a [Pos]) -> Self {
        Batch {
            seq: 0,
            input,
            pos,
            queries: &[],
            logits: false,
            lookup: None,
        }
    }
}

/// A batch that goes through the model together with others, and where what comes of it goes: as
/// in [`Engine::decode`].
#[derive(Debug)]
pub struct Part<'a> {
    /// What goes in.
    pub batch: Batch<'a>,
    /// The cell of each of its rows: `[batch.input.len()]`.
    pub cells: &'a mut Vec<Cell>,
    /// The attention of its query rows.
    pub seen: &'a mut Observation,
}

/// KV memory, in bytes, from the backend's own figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct KvBytes {
    /// Bytes that one cell takes over all layers, K and V.
    pub per_cell: u64,
    /// Bytes of the buffers that hold the cache now.
    pub allocated: u64,
}

/// What an engine can do beside taking tokens in at the end and out again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// A batch may have holes between its positions, and lie before the newest one: what was
    /// evicted can then be decoded again, or left out from the start.
    pub any_position: bool,
    /// Tokens can be moved to other positions.
    pub shifts: bool,
    /// What went through a trial run can go on from there.
    pub continues_trials: bool,
    /// Attention comes out part by part. Otherwise one part of a pass may have query rows.
    pub scores_by_part: bool,
}

/// A model and its KV cache. The cells are shared by its sequences: each token lies in one cell,
/// and is of one sequence.
pub trait Engine {
    /// Runs the batch and stores its K and V. Fills `cells` with the cell of each row, in order,
    /// and `seen` with the attention of `batch.queries` (cleared first, untouched rows mean none
    /// was asked for).
    ///
    /// # Errors
    /// [`crate::Error::ContextFull`] when no cells are left; the cache is then unchanged.
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()>;

    /// Runs batches of several sequences, each as [`Engine::decode`] would, in one pass over the
    /// model's weights. Their cells follow one another in the order of the parts.
    ///
    /// # Errors
    /// [`Error::Contract`] for parts that [`Pass::check`] refuses, or several in an engine of one
    /// sequence; otherwise as [`Engine::decode`]. Nothing of any part is in the cache then.
    fn decode_parts(&mut self, parts: &mut [Part<'_>]) -> Result<()> {
        match parts {
            [part] => self.decode(part.batch, part.cells, part.seen),
            _ => {
                let n = parts.len();
                let what = format!("{n} parts for an engine of one sequence");
                Err(Error::contract(what))
            }
        }
    }

    /// What decoding steps attend to, where that is not everything: the loop then says with each
    /// step which cells may be left out.
    fn attend(&self) -> Option<&Attend> {
        None
    }

    /// Gives the cells that each layer which chose attended to in the last batch, ascending, one
    /// layer after the other. Nothing where the engine keeps none. Only after a batch with a lookup.
    ///
    /// # Errors
    /// The engine's own.
    fn sets(&mut self, _each: &mut dyn FnMut(&[Cell])) -> Result<()> {
        Ok(())
    }

    /// Logits of the last row of the last batch, if it asked for them: `[n_vocab]`. Of several
    /// parts, those of the last that asked.
    ///
    /// # Errors
    /// When there are none.
    fn logits(&self) -> Result<&[f32]> {
        Err(Error::contract("logits of an engine that has none"))
    }

    /// The same of the sequence's part.
    ///
    /// # Errors
    /// When it had none since the last batch.
    fn logits_of(&self, seq: SeqId) -> Result<&[f32]> {
        match seq {
            0 => self.logits(),
            _ => Err(no_logits(seq)),
        }
    }

    /// What its tokens mean; `None`: nothing can be said with it.
    fn vocabulary(&self) -> Option<&(dyn Vocabulary + '_)> {
        None
    }

    /// A sampler for a conversation that begins.
    fn sampler(&self) -> Box<dyn Sampler> {
        Box::new(Greedy)
    }

    /// Removes the positions from the sequence, in every layer. Ranges are sorted and disjoint.
    fn remove(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()>;

    /// Takes back everything from position `from` on; `left` cells of the sequence stay. Unlike
    /// [`Engine::remove`] this may take the newest position: the next batch starts at `from`. From 0
    /// on the sequence is empty, and another conversation can have it.
    fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()>;

    /// What it can do; it stays the same for the engine's life.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// Moves every token of the sequence at position `from` or behind it down by `by`; none lies
    /// where they go. The cached keys follow their positions.
    ///
    /// # Errors
    /// Without [`Capabilities::shifts`].
    fn shift(&mut self, _seq: SeqId, _from: Pos, _by: Pos) -> Result<()> {
        Err(Error::contract("a shift of an engine that cannot"))
    }

    /// Trial runs, where they can be had.
    fn trials(&mut self) -> Option<&mut (dyn TrialRuns + '_)> {
        None
    }

    /// Makes room for `n` more tokens at once, where the cache grows in steps otherwise.
    ///
    /// # Errors
    /// [`crate::Error::ContextFull`] when there can be no room; the cache is unchanged.
    fn make_room(&mut self, _n: usize) -> Result<()> {
        Ok(())
    }

    /// After removals: moves tokens together and gives memory back where that pays. Fills `moves`
    /// as [`Engine::moved`] does; the other sequences ask for theirs.
    ///
    /// # Errors
    /// The engine's own; the cache is then unchanged.
    fn compact(&mut self, _seq: SeqId, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        moves.clear();
        Ok(())
    }

    /// The cells that tokens of the sequence went from and to since it last asked, to be followed
    /// in this order: others that share the cache may have moved them. `moves` is cleared first.
    fn moved(&mut self, _seq: SeqId, moves: &mut Vec<(Cell, Cell)>) {
        moves.clear();
    }

    /// Appends the K and V rows of these cells to `out`, as many bytes for each; the first of them
    /// are its position ([`Pos::to_ne_bytes`]). False: the engine cannot.
    ///
    /// # Errors
    /// The engine's own.
    fn save_rows(&mut self, _cells: &[Cell], _out: &mut Vec<u8>) -> Result<bool> {
        Ok(false)
    }

    /// Puts saved rows into free cells again, at these positions; fills `cells` with them.
    ///
    /// # Errors
    /// [`crate::Error::ContextFull`] when there is no room; the cache is then unchanged.
    fn restore_rows(
        &mut self,
        _seq: SeqId,
        _pos: &[Pos],
        _rows: &[u8],
        _cells: &mut Vec<Cell>,
    ) -> Result<()> {
        Err(Error::contract("rows for an engine that saves none"))
    }

    /// Cells that the cache can hold.
    fn n_cells(&self) -> usize;

    /// Cells that the sequence can have: those that the others leave.
    fn cells_for(&self, _seq: SeqId) -> usize {
        self.n_cells()
    }

    /// Rows that one call of [`Engine::decode`] takes at most.
    fn n_batch(&self) -> usize;

    /// The memory of the whole cache, all sequences together.
    fn kv_bytes(&self) -> KvBytes;
}

/// Logits of a sequence that the last batch was not of, or that asked for none.
pub(crate) fn no_logits(seq: SeqId) -> Error {
    Error::contract(format!("the last batch has no logits of sequence {seq}"))
}
