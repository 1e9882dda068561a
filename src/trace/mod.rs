//! What a controller saw and decided, in a file (`--trace`): written as the run goes, read back
//! with every size checked. `docs/trace.md` describes the format.
//!
//! A file is a magic, a version and blocks. A block is a few numbers and deflated postcard
//! records; each has its own checksum, so that what was written before an interruption is whole.

mod block;
mod check;
mod read;
mod record;
mod values;
mod write;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::controller::Controller;
use crate::error::{Error, Result};
use crate::policy::{Limits, PolicyOptions, PolicySpec, evicts_nothing};

pub use read::{Cut, Reader, read};
pub use record::{Jpeg, Record};
pub use values::{Counts, Precision, Values};
pub use write::{Writer, check as check_target};

const MAGIC: &[u8; 8] = b"HAE-TRAC";

/// The version that is written. Earlier ones are read as well: 1 has no [`Record::Looked`], 2 no
/// [`Record::Again`], and 3 was left out, so that one wrong bit makes no other version of this.
pub const VERSION: u32 = 4;

const OLDEST: u32 = 1;

/// Rows at the end of a prompt that are seen one by one while `full` is recorded: enough for
/// every observation window in use.
pub const SINGLE_ROWS: usize = 32;

/// Cells and layers beyond these are no model's; they bound what a reader allocates.
const MOST_CELLS: usize = 1 << 24;
const MOST_LAYERS: u32 = 4096;

/// Records what happens under a controller from now on. The engine reads the attention of
/// `header.layers`.
///
/// # Errors
/// As [`Writer::create`].
pub fn record(controller: &mut Controller, path: &Path, header: Header) -> Result<()> {
    if header.is_full() {
        controller.observe_for_recorder(header.layers.clone(), SINGLE_ROWS);
    }
    controller.record(Box::new(Writer::create(path, header)?));
    Ok(())
}

/// What a trace begins with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// hae's version.
    pub build: String,
    /// The model's file, as it was named.
    pub model: String,
    /// Layers of the model.
    pub n_layer: u32,
    /// Cells that the cache could hold.
    pub n_cells: usize,
    /// The policy's name.
    pub policy: String,
    /// The policy's parameters. Kept as JSON in the file: other versions may know others.
    #[serde(with = "as_json")]
    pub options: PolicyOptions,
    /// Layers whose attention was read, ascending.
    pub layers: Vec<u32>,
    /// How exactly attention is kept.
    pub precision: Precision,
}

impl Header {
    /// That of a recording by this version of hae; `model` is the name to show, `layers` are those
    /// whose attention the engine reads.
    pub fn new(model: String, limits: Limits, policy: &PolicySpec, layers: Vec<u32>) -> Self {
        Header {
            build: env!("CARGO_PKG_VERSION").into(),
            model,
            n_layer: limits.n_layer,
            n_cells: limits.n_cells,
            policy: policy.name.clone(),
            options: policy.options.clone(),
            layers,
            // Nobody decided anything by the attention that `full` shows.
            precision: match evicts_nothing(&policy.name) {
                true => Precision::Rounded,
                false => Precision::Exact,
            },
        }
    }

    /// Whether the policy kept everything, so that the attention of any other policy's run can
    /// be found in it.
    pub fn is_full(&self) -> bool {
        evicts_nothing(&self.policy)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let bad = |reason: String| Err(Error::file(path, format!("is damaged: {reason}")));
        if !(1..=MOST_CELLS).contains(&self.n_cells) {
            return bad(format!("a cache of {} cells", self.n_cells));
        }
        if !(1..=MOST_LAYERS).contains(&self.n_layer) {
            return bad(format!("a model of {} layers", self.n_layer));
        }
        let ascending = self.layers.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.layers.last().is_some_and(|&last| last >= self.n_layer) {
            return bad(format!("layers {:?} of {}", self.layers, self.n_layer));
        }
        Ok(())
    }
}

mod as_json {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};

    use crate::policy::PolicyOptions;

    pub fn serialize<S: Serializer>(options: &PolicyOptions, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&serde_json::to_string(options).map_err(ser::Error::custom)?)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PolicyOptions, D::Error> {
        let text = String::deserialize(from)?;
        serde_json::from_str(&text).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
