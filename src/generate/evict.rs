//! What leaves the cache: plans carried out.

use super::Session;
use super::order::Order;
use super::store::Leaving;
use crate::cache::{Cell, Modality};
use crate::engine::Engine;
use crate::error::Result;
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

    /// Takes what the controller's last plan removed out of the engine, after saving what the
    /// host keeps, and lets the engine move the rest together.
    pub(super) fn remove_planned(&mut self) -> Result<()> {
        let shift = self.controller.shift();
        if self.controller.planned().is_empty() && shift.is_none() {
            return Ok(());
        }
        if self.controller.recalls() {
            self.keep_evicted()?;
        }
        self.engine
            .remove(self.feed.seq, self.controller.planned())?;
        if let Some(Shift { from, by }) = shift {
            self.engine.shift(self.feed.seq, from, by)?;
        }
        self.engine.compact(self.feed.seq, &mut self.moves)?;
        self.controller.moved(&self.moves)
    }

    /// Copies what the controller's last plan removed to the store.
    fn keep_evicted(&mut self) -> Result<()> {
        for is_text in [true, false] {
            let evicted = self.controller.evicted().iter();
            let leaving = evicted.filter(|e| (e.modality == Modality::Text) == is_text);
            let leaving = leaving.map(|e| Leaving {
                cell: e.cell,
                pos: e.pos,
                asked: e.asked,
            });
            self.store
                .keep(&mut self.engine, leaving.collect(), is_text)?;
        }
        self.feed.waiting = self.store.bytes_in_ram();
        self.feed.note_bytes(&self.engine);
        Ok(())
    }
}
