//! What a batch paid attention to.

use super::Pos;

/// Attention that the query rows of one batch paid to each cell. Buffers are reused.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// Per cell: sum over query rows of the softmax attention, averaged over heads and over the
    /// scoring layers. Length: cells in view (cells beyond it were not seen); empty cells and those
    /// of other sequences hold 0.
    pub sum: Vec<f32>,
    /// Per cell: maximum over query rows of the same average.
    pub max: Vec<f32>,
    /// The sums of each scoring layer by itself, averaged over heads: layer behind layer, in ascending
    /// order, each with as many values as `sum`. Their mean over layers is `sum`, to rounding. Empty
    /// unless the context was asked for them.
    pub layers: Vec<f32>,
    /// Positions of the query rows, ascending.
    pub queries: Vec<Pos>,
}

impl Observation {
    /// Forgets all; the buffers keep their room.
    pub fn clear(&mut self) {
        self.sum.clear();
        self.max.clear();
        self.layers.clear();
        self.queries.clear();
    }
}
