//! How many tokens are where, as reports show it.

use super::Modality;

/// One number for text and one for visual tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PerModality {
    /// Of text tokens.
    pub text: usize,
    /// Of visual tokens.
    pub vision: usize,
}

impl PerModality {
    /// The number of one modality.
    pub fn of(&self, modality: Modality) -> usize {
        match modality {
            Modality::Text => self.text,
            Modality::Vision => self.vision,
        }
    }

    /// The same, to be changed.
    pub fn of_mut(&mut self, modality: Modality) -> &mut usize {
        match modality {
            Modality::Text => &mut self.text,
            Modality::Vision => &mut self.vision,
        }
    }

    /// Both together.
    pub fn total(&self) -> usize {
        self.text + self.vision
    }

    /// With so many text tokens less.
    pub fn without_text(self, n: usize) -> Self {
        PerModality {
            text: self.text.saturating_sub(n),
            ..self
        }
    }
}

/// Cells of the cache now, and what has happened to them since it was last empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Cells in the cache and not in the recycle bin.
    pub live: PerModality,
    /// Cells in the recycle bin: still in the cache and still attended to.
    pub binned: PerModality,
    /// Tokens that are not in the cache any more, or never went in: pruned before the prefill,
    /// or removed.
    pub evicted: PerModality,
    /// Times that a token came back from the recycle bin.
    pub restored: PerModality,
    /// Times that an evicted token was put into the cache again, for a new question.
    pub recalled: PerModality,
    /// The most cells that were ever taken at once.
    pub peak: usize,
}

impl Counts {
    /// Cells taken now: live and binned.
    pub fn cells(&self) -> usize {
        self.live.total() + self.binned.total()
    }
}
