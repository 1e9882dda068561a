//! A trial run: the first layers of the model read a conversation as if nothing had ever been
//! evicted, so that the policy can judge its visual tokens before they cost anything.

use super::feed::{Cut, Feed, Wish};
use super::history::Placed;
use crate::cache::{Cell, Ledger, Pos};
use crate::controller::Origin;
use crate::engine::{Engine, Observation};
use crate::error::{Error, Result};
use crate::policy::Queries;

/// What a trial run saw.
pub(super) struct Trial {
    /// Every token of the conversation, with the attention of the new prompt.
    pub ledger: Ledger,
    /// Positions of the query rows.
    queries: Vec<Pos>,
    /// Each token's position and cell, ascending.
    places: Vec<(Pos, Cell)>,
    /// Whether what is kept goes on from where the run came to.
    pub goes_on: bool,
    /// Bytes of the run's own cache.
    pub bytes: u64,
}

impl Trial {
    /// Runs `engine` over what went in before and over the new prompt. `None`: cancelled.
    ///
    /// # Errors
    /// The engine's own.
    pub fn run(
        engine: &mut (dyn Engine + '_),
        history: &[Placed<'_>],
        prompt: &[Placed<'_>],
        queries: Queries,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Option<Self>> {
        let mut trial = Trial {
            ledger: Ledger::new(engine.n_cells()),
            queries: Vec::new(),
            places: Vec::new(),
            goes_on: false,
            bytes: 0,
        };
        let mut feed = Feed::default();
        let new = prompt.iter().map(|placed| (placed, Some(queries)));
        let old = history.iter().map(|placed| (placed, None));
        let mut behind: usize = prompt.iter().map(|placed| placed.segment.len()).sum();
        for (placed, queries) in old.chain(new) {
            if queries.is_some() {
                behind -= placed.segment.len();
            }
            let wish = Wish {
                base: placed.base,
                keep: &|_| true,
                queries,
                single_rows: 0,
                behind,
                // It has no logits.
                is_last: false,
            };
            for cut in Cut::all(&placed.segment, &wish, engine.n_batch()) {
                if cancelled() {
                    return Ok(None);
                }
                feed.cut(&placed.segment, &cut, None)?;
                feed.run(engine, Some(&placed.segment))?;
                feed.check(engine)?;
                trial.record(&feed, placed.segment.origin())?;
            }
        }
        trial.places.sort_unstable();
        trial.bytes = feed.peak_bytes;
        Ok(Some(trial))
    }

    fn record(&mut self, feed: &Feed, origin: Origin) -> Result<()> {
        let ledger = &mut self.ledger;
        for (&cell, &pos) in feed.cells.iter().zip(&feed.pos) {
            ledger.insert(cell, pos, origin.modality, origin.image)?;
            self.places.push((pos, cell));
        }
        for (&cell, _) in feed.cells.iter().zip(&feed.separators).filter(|&(_, &s)| s) {
            ledger.mark_separator(cell)?;
        }
        self.queries.extend_from_slice(&feed.seen.queries);
        ledger.observe(&feed.seen, 1.0)
    }

    fn cell_at(&self, pos: Pos) -> Option<Cell> {
        let found = self.places.binary_search_by_key(&pos, |&(pos, _)| pos);
        found.ok().map(|i| self.places[i].1)
    }

    /// The run's cells of the tokens at these positions.
    ///
    /// # Errors
    /// For a position that the run has not seen.
    pub fn cells_at(&self, pos: &[Pos], cells: &mut Vec<Cell>) -> Result<()> {
        cells.clear();
        for &pos in pos {
            let missing = || Error::contract(format!("position {pos} in no trial run"));
            cells.push(self.cell_at(pos).ok_or_else(missing)?);
        }
        Ok(())
    }

    /// The same attention by the cells of another cache: what is absent there is left out.
    pub fn seen_by(&self, cache: &Ledger) -> Observation {
        let mut seen = Observation {
            sum: vec![0.0; cache.span()],
            max: vec![0.0; cache.span()],
            queries: self.queries.clone(),
            ..Observation::default()
        };
        for entry in cache.entries() {
            let cell = self.cell_at(entry.pos);
            if let Some(token) = cell.and_then(|cell| self.ledger.get(cell)) {
                seen.sum[entry.cell as usize] = token.sum;
                seen.max[entry.cell as usize] = token.max;
            }
        }
        seen
    }
}
