//! What a slot holds, in a file.

use std::borrow::BorrowMut;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::units::{self, Held};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::Session;
use crate::llama::LlamaEngine;
use crate::policy::PolicySpec;
use crate::prompt::Transcript;
use crate::saved::{Kind, Saved};

const KIND: Kind = Kind {
    magic: *b"HAE-SLOT",
    version: 1,
    name: "slot",
};

/// A slot's conversation out of a file.
#[derive(Serialize, Deserialize)]
pub(super) struct Kept {
    held: Held,
    saved: Saved,
}

/// Writes it, and gives the file's bytes.
///
/// # Errors
/// Those of [`Saved::of`], and of the file.
pub(super) fn save<E: Engine + BorrowMut<LlamaEngine>>(
    session: &mut Session<E>,
    held: &Held,
    path: &Path,
) -> Result<u64> {
    let images = u32::try_from(units::pictures(&held.units)).unwrap_or(u32::MAX);
    let kept = Kept {
        held: held.clone(),
        saved: Saved::of(session, Transcript::default(), None, images)?,
    };
    KIND.write(&kept, path)
}

/// Reads it. Gives the cells that it takes, and the file's bytes.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] for what is no such file.
pub(super) fn read(path: &Path) -> Result<(Kept, usize, u64)> {
    let (kept, bytes): (Kept, u64) = KIND.read(path)?;
    let Held {
        units,
        before_answer,
        ..
    } = &kept.held;
    if *before_answer > units.len() {
        return Err(Error::file(path, "is damaged: an answer behind its end"));
    }
    let cells = kept.saved.ledger.entries.len();
    Ok((kept, cells, bytes))
}

/// What such a file holds: the policy that ruled it, and the conversation.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] for what is no such file.
pub fn opened(path: &Path) -> Result<(PolicySpec, Saved)> {
    let (kept, ..) = read(path)?;
    Ok((kept.held.policy, kept.saved))
}

impl Kept {
    /// The policy that has to rule it.
    pub fn policy(&self) -> &PolicySpec {
        &self.held.policy
    }

    /// Lets an empty session go on from here.
    ///
    /// # Errors
    /// As [`Saved::put_back`].
    pub fn put_back<E: Engine + BorrowMut<LlamaEngine>>(
        self,
        session: &mut Session<E>,
    ) -> Result<Held> {
        self.saved.put_back(session)?;
        Ok(self.held)
    }
}
