//! What leaves the cache and what comes back from the host: plans carried out.

use super::order::Order;
use super::{HostBin, Session};
use crate::cache::{Cell, Modality, Pos};
use crate::controller::{Evicted, Origin};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::policy::Shift;

impl<E: Engine> Session<E> {
    /// Removes visual tokens of earlier turns that a trial run found useless for this one.
    pub(super) fn drop_pruned(&mut self, order: &Order) -> Result<()> {
        let newest = self.controller.ledger().newest();
        let cells: Vec<Cell> = self
            .controller
            .ledger()
            .entries()
            .filter(|entry| order.pruned.binary_search(&entry.pos).is_ok())
            .filter(|entry| Some(entry.pos) != newest)
            .map(|entry| entry.cell)
            .collect();
        if cells.is_empty() {
            return Ok(());
        }
        self.controller.remove(&cells)?;
        self.remove_planned()
    }

    /// Rows of evicted text, the latest first, that the host has and that fit beside `added`
    /// others.
    pub(super) fn returning_text(&self, added: usize) -> usize {
        if !self.controller.recalls() {
            return 0;
        }
        let taken = self.controller.ledger().counts().cells() + added;
        let free = self.cells().saturating_sub(taken);
        let mut rows = 0;
        for saved in self.host_bin.saved().rev() {
            if rows + saved.pos.len() > free {
                break;
            }
            rows += saved.pos.len();
        }
        rows
    }

    /// Puts so many rows of evicted text back.
    pub(super) fn recall_text(&mut self, mut rows: usize) -> Result<()> {
        while rows > 0
            && let Some(saved) = self.host_bin.pop()
        {
            rows = rows.saturating_sub(saved.pos.len());
            let restored = self.engine.restore_rows(
                self.feed.seq,
                &saved.pos,
                &saved.rows,
                &mut self.feed.cells,
            );
            match restored {
                Ok(()) => {
                    self.controller
                        .recalled(&self.feed.cells, &saved.pos, Origin::TEXT)?;
                }
                Err(Error::ContextFull { .. }) => {
                    self.host_bin.push(saved);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes what the controller's last plan removed out of the engine, after saving what the
    /// host keeps, and lets the engine move the rest together.
    pub(super) fn remove_planned(&mut self) -> Result<()> {
        let shift = self.controller.shift();
        if self.controller.planned().is_empty() && shift.is_none() {
            return Ok(());
        }
        if self.controller.recalls() {
            keep_text(
                &mut self.host_bin,
                &mut self.engine,
                self.controller.evicted(),
            )?;
        }
        self.engine
            .remove(self.feed.seq, self.controller.planned())?;
        if let Some(Shift { from, by }) = shift {
            self.engine.shift(self.feed.seq, from, by)?;
        }
        self.engine.compact(self.feed.seq, &mut self.moves)?;
        self.controller.moved(&self.moves)
    }
}

fn keep_text(bin: &mut HostBin, engine: &mut dyn Engine, evicted: &[Evicted]) -> Result<()> {
    if bin.is_off() {
        return Ok(());
    }
    let text = evicted.iter().filter(|e| e.modality == Modality::Text);
    let (cells, pos): (Vec<Cell>, Vec<Pos>) = text.map(|e| (e.cell, e.pos)).unzip();
    bin.keep(engine, &cells, &pos)
}
