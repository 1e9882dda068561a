//! Trial runs: the first layers read a prompt before it goes in.

use super::Engine;
use crate::error::Result;

/// Trial runs of an engine, one at a time.
pub trait TrialRuns {
    /// An engine for a trial run: the same model, cut off after the last layer whose attention is
    /// read, with an empty cache of its own for `n_cells` tokens. It has no logits. With `goes_on`
    /// its tokens can come as [`super::Input::Trial`] until it ends.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn begin(&mut self, n_cells: usize, goes_on: bool) -> Result<&mut (dyn Engine + '_)>;

    /// The trial run is over: its memory goes back.
    ///
    /// # Errors
    /// The engine's own.
    fn end(&mut self) -> Result<()>;

    /// Trial runs will come: an engine that keeps what is slow to make for them makes it now.
    ///
    /// # Errors
    /// As [`TrialRuns::begin`].
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }
}
