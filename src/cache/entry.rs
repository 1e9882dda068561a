//! One cell as others see it, and the walk over all of them.

use std::ops::Range;

use super::{Cell, Modality, Pos, State};

/// Position of an empty cell. As `u32` it is larger than every position, so that "is this cell
/// visible to that query" is one comparison for empty cells too.
pub(super) const EMPTY: Pos = -1;

pub(super) const NO_IMAGE: u32 = u32::MAX;

/// One occupied cell.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Entry {
    /// The cell itself.
    pub cell: Cell,
    /// The position of its token.
    pub pos: Pos,
    /// Where its token comes from.
    pub modality: Modality,
    /// Whether it is in the recycle bin.
    pub state: State,
    /// The user turn that brought the token in.
    pub turn: u32,
    /// Which picture a visual token belongs to.
    pub image: Option<u32>,
    /// A visual token that separates parts of its picture: its embedding occurs there more than
    /// once, so it says where, not what.
    pub separator: bool,
    /// Sum over query rows of the attention paid to the token.
    pub sum: f32,
    /// Maximum over query rows of the attention paid to the token.
    pub max: f32,
    /// Exposure: how many query rows could see the token (a real number under a decay).
    pub seen: f32,
    /// The part of `sum` that came last: from the whole of the newest prompt, or from the newest
    /// decoding step.
    #[serde(skip)]
    pub latest: f32,
}

/// The cells of a [`super::Ledger`], empty ones included, for loops that are to be vectorised.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// `[cells]`, negative where the cell is empty. What else is said of that cell means nothing.
    pub pos: &'a [Pos],
    /// `[cells]`
    pub modality: &'a [Modality],
    /// `[cells]`
    pub state: &'a [State],
    /// `[cells]`, as [`Entry::sum`].
    pub sum: &'a [f32],
    /// `[cells]`, as [`Entry::seen`].
    pub seen: &'a [f32],
}

/// The occupied cells of a [`super::Ledger`].
pub struct Entries<'a> {
    pub(super) cells: Range<usize>,
    pub(super) pos: &'a [Pos],
    pub(super) modality: &'a [Modality],
    pub(super) state: &'a [State],
    pub(super) turns: &'a [u32],
    pub(super) image: &'a [u32],
    pub(super) separator: &'a [bool],
    pub(super) sum: &'a [f32],
    pub(super) max: &'a [f32],
    pub(super) seen: &'a [f32],
    pub(super) latest: &'a [f32],
}

impl Iterator for Entries<'_> {
    type Item = Entry;

    /// Always inlined: what the caller does not look at is then not even read.
    #[inline(always)]
    fn next(&mut self) -> Option<Entry> {
        let i = self.cells.find(|&i| self.pos[i] != EMPTY)?;
        Some(Entry {
            cell: i as Cell,
            pos: self.pos[i],
            modality: self.modality[i],
            state: self.state[i],
            turn: self.turns[i],
            image: (self.image[i] != NO_IMAGE).then_some(self.image[i]),
            separator: self.separator[i],
            sum: self.sum[i],
            max: self.max[i],
            seen: self.seen[i],
            latest: self.latest[i],
        })
    }
}
