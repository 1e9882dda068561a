//! Which cell of the KV cache holds what: pure bookkeeping, no model.
//!
//! llama.cpp's cells span all layers, so one entry here stands for a token's K and V in every
//! layer, and removing it removes the token from every layer (the paper's index broadcasting).

mod bin;
mod counts;
mod entry;
mod ledger;
mod observation;
pub mod ranges;

pub use bin::{BinOptions, BinStore};
pub use counts::{Counts, PerModality};
pub use entry::{Columns, Entries, Entry};
pub use ledger::{Ledger, SavedLedger};
pub use observation::Observation;

/// A token's position in its sequence (llama.cpp's `llama_pos`).
pub type Pos = i32;

/// The last position that a file may name: there is room for a prompt behind it before the numbers
/// end.
pub const LAST_POS: Pos = Pos::MAX - (1 << 24);

/// Index of a cell in the KV cache.
pub type Cell = u32;

/// Where a token comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// A token of the vocabulary.
    Text,
    /// A row of a picture's embeddings.
    Vision,
}

/// What the controller has decided about an occupied cell. A binned token is still attended to
/// and still scored; only a flush of the recycle bin removes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not in the recycle bin.
    Live,
    /// In the recycle bin: the next flush removes it, unless it comes back first.
    Binned,
}
