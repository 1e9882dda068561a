//! What comes back into the cache: for a new question, or for an answer that goes on for long.

use std::time::Instant;

use super::Session;
use super::feed::{Cut, Wish};
use super::prompt::Segment;
use super::store::Kept;
use crate::cache::Pos;
use crate::controller::Origin;
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};

impl<E: Engine> Session<E> {
    /// Rows of evicted text, the latest first, that wait and that fit beside `added` others.
    pub(super) fn returning_text(&self, added: usize) -> usize {
        if !self.controller.recalls() {
            return 0;
        }
        let taken = self.controller.ledger().counts().cells() + added;
        let free = self.cells().saturating_sub(taken);
        let mut rows = 0;
        for batch in self.store.texts_newest_first() {
            if rows + batch > free {
                break;
            }
            rows += batch;
        }
        rows
    }

    /// Puts so many rows of evicted text back.
    pub(super) fn recall_text(&mut self, mut rows: usize) -> Result<()> {
        while rows > 0
            && let Some(text) = self.store.take_text()
        {
            rows = rows.saturating_sub(text.len());
            match self.engine.make_room(text.len()) {
                Ok(()) => self.put_rows(&text, Origin::TEXT)?,
                Err(Error::ContextFull { .. }) => {
                    self.store.put_back(text);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts the rows of pictures that wait back at these positions, which are sorted. Gives the
    /// positions that are left, whose rows nobody has.
    ///
    /// # Errors
    /// [`Error::ContextFull`] where there is no room, and the engine's own.
    pub(super) fn restore_pictures(&mut self, wanted: &[Pos]) -> Result<Vec<Pos>> {
        let kept = self
            .store
            .take_vision(|pos| wanted.binary_search(&pos).is_ok());
        if kept.is_empty() {
            return Ok(wanted.to_vec());
        }
        let spans = self.history.pieces().iter().filter(|p| p.is_picture());
        let spans: Vec<(Pos, Pos, Origin)> = spans
            .map(|p| (p.base, p.end(), p.segment.origin()))
            .collect();
        for (base, end, origin) in spans {
            let from = kept.partition_point(|row| row.pos < base);
            let to = kept.partition_point(|row| row.pos < end);
            self.put_rows(&kept[from..to], origin)?;
        }
        let ledger = self.controller.ledger();
        let held: std::collections::HashSet<Pos> = ledger.entries().map(|e| e.pos).collect();
        let missing = wanted.iter().filter(|pos| !held.contains(pos));
        Ok(missing.copied().collect())
    }

    /// Rows out of the store into free cells, in pieces. Those that cannot be read stay away.
    fn put_rows(&mut self, rows: &[Kept], origin: Origin) -> Result<()> {
        let mut pos = Vec::new();
        let mut bytes = Vec::new();
        for piece in rows.chunks(self.store.rows_a_piece()) {
            if !self.store.give(piece, &mut bytes) {
                continue;
            }
            pos.clear();
            pos.extend(piece.iter().map(|row| row.pos));
            let cells = &mut self.feed.cells;
            self.engine
                .restore_rows(self.feed.seq, &pos, &bytes, cells)?;
            self.controller.recalled(cells, &pos, origin)?;
            self.mark_separators(&pos)?;
        }
        self.feed.waiting = self.store.bytes_in_ram();
        self.feed.note_bytes(&self.engine);
        Ok(())
    }

    /// Marks the separators among the rows just restored.
    fn mark_separators(&mut self, pos: &[Pos]) -> Result<()> {
        let Some(&first) = pos.first() else {
            return Ok(());
        };
        let pieces = self.history.pieces();
        let piece = pieces.iter().find(|p| (p.base..p.end()).contains(&first));
        let Some(placed) = piece.filter(|p| !p.segment.separators().is_empty()) else {
            return Ok(());
        };
        let separators = placed.segment.separators();
        let row = |pos: &Pos| usize::try_from(pos - placed.base).unwrap_or(usize::MAX);
        let marks = pos
            .iter()
            .map(|pos| separators.get(row(pos)) == Some(&true));
        self.feed.separators.clear();
        self.feed.separators.extend(marks);
        self.controller
            .mark_separators(&self.feed.cells, &self.feed.separators)
    }

    /// Batches of evicted visual tokens that are decoded again at their old positions, with the
    /// piece of the history that each is cut of.
    pub(super) fn past_cuts(&self, recalled: &[Pos]) -> Vec<(usize, Cut)> {
        let n_batch = self.engine.n_batch();
        let mut cuts = Vec::new();
        let history = self.history.pieces().iter().enumerate();
        for (i, placed) in history.filter(|(_, placed)| placed.is_picture()) {
            let wish = Wish {
                base: placed.base,
                keep: &|pos| recalled.binary_search(&pos).is_ok(),
                queries: None,
                single_rows: 0,
                behind: 0,
                is_last: false,
            };
            let own = Cut::all(&placed.segment, &wish, n_batch).into_iter();
            cuts.extend(own.map(|cut| (i, cut)));
        }
        cuts
    }

    /// Before a token of an answer goes in: where the policy finds that the answer needs more than
    /// its question showed, everything that was pruned of the pictures comes back, if it fits.
    /// The answer so far has not seen it, so its tokens go through the model again. From then on
    /// the cache is that of a conversation in which nothing was pruned.
    pub(super) fn recall_for_answer(&mut self) -> Result<()> {
        let said = self.controller.next_pos() - self.answer;
        if self.has_recalled || !self.controller.asks_back(said) {
            return Ok(());
        }
        self.has_recalled = true;
        let wanted = self.evicted_pictures();
        let held = self.controller.ledger().counts().cells();
        if wanted.is_empty() || held + wanted.len() + 1 > self.cells() {
            return Ok(());
        }
        let start = Instant::now();
        let tokens = self.history.last_tokens(self.answer).map(<[_]>::to_vec);
        let tokens = tokens.unwrap_or_default();
        if !tokens.is_empty() {
            let left = self.controller.read_again(self.answer);
            self.engine.rewind(self.feed.seq, self.answer, left)?;
        }
        self.engine.make_room(wanted.len() + tokens.len() + 1)?;
        let missing = self.restore_pictures(&wanted)?;
        for (i, cut) in self.past_cuts(&missing) {
            let segment = self.history.pieces()[i].segment.clone();
            self.feed.cut(&segment, &cut, None)?;
            self.feed.run(&mut self.engine, Some(&segment))?;
            self.feed.check(&self.engine)?;
            self.store.decoded(cut.len());
            let (feed, controller) = (&self.feed, &mut self.controller);
            controller.recalled(&feed.cells, &feed.pos, segment.origin())?;
            controller.mark_separators(&feed.cells, &feed.separators)?;
        }
        self.read_again(tokens)?;
        self.store.paused(start.elapsed());
        Ok(())
    }

    /// Lets tokens of the answer go through the model again, as if they had just been read.
    fn read_again(&mut self, tokens: Vec<Token>) -> Result<()> {
        let segment = Segment::Tokens(tokens);
        let wish = Wish {
            base: self.answer,
            keep: &|_| true,
            queries: None,
            single_rows: 0,
            behind: 0,
            is_last: false,
        };
        for cut in Cut::all(&segment, &wish, self.engine.n_batch()) {
            self.feed.cut(&segment, &cut, None)?;
            self.feed.run(&mut self.engine, Some(&segment))?;
            self.feed.check(&self.engine)?;
            self.controller
                .inserted(&self.feed.cells, &self.feed.pos, Origin::TEXT)?;
        }
        Ok(())
    }
}
