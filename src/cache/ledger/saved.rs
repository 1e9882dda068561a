//! A ledger in a file and back. What comes out of a file is counted again and checked: it may be
//! anything.

use super::Ledger;
use crate::cache::counts::Counts;
use crate::cache::entry::{Entry, NO_IMAGE};
use crate::cache::{Cell, LAST_POS, Modality, State};
use crate::error::{Error, Result};

/// Events that no conversation comes to; sums of such counts do not overflow.
const MOST: usize = u32::MAX as usize;

/// A ledger's content, to be kept in a file.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SavedLedger {
    /// Ascending by cell.
    pub entries: Vec<Entry>,
    turn: u32,
    first: Option<crate::cache::Pos>,
    counts: Counts,
}

impl Ledger {
    /// What [`Ledger::load`] takes.
    pub fn save(&self) -> SavedLedger {
        SavedLedger {
            entries: self.entries().collect(),
            turn: self.turn,
            first: self.first,
            counts: self.counts,
        }
    }

    /// Becomes what was saved, with the tokens in these cells: `[saved entries]`, ascending.
    ///
    /// # Errors
    /// When a cell is beyond the cache, there are more or fewer of them than tokens, or what was
    /// saved cannot be: it is empty then.
    pub fn load(&mut self, saved: &SavedLedger, cells: &[Cell]) -> Result<()> {
        self.clear();
        saved.check(cells)?;
        let loaded = self.fill(saved, cells);
        if loaded.is_err() {
            self.clear();
        }
        loaded
    }

    fn fill(&mut self, saved: &SavedLedger, cells: &[Cell]) -> Result<()> {
        for (entry, &cell) in saved.entries.iter().zip(cells) {
            self.place(cell, entry.pos, 0, entry.modality, entry.image)?;
            let i = cell as usize;
            (self.state[i], self.turns[i]) = (entry.state, entry.turn);
            self.separator[i] = entry.separator;
            (self.sum[i], self.max[i], self.seen[i]) = (entry.sum, entry.max, entry.seen);
            self.latest[i] = entry.latest;
        }
        let newest = self.entries().max_by_key(|entry| (entry.pos, entry.cell));
        self.newest = newest.map(|entry| (entry.pos, entry.cell));
        (self.turn, self.first, self.counts) = (saved.turn, saved.first, saved.counts);
        Ok(())
    }
}

impl SavedLedger {
    /// Whether it can be what a ledger held.
    fn check(&self, cells: &[Cell]) -> Result<()> {
        let wrong = |reason: String| Err(Error::contract(reason));
        let tokens = self.entries.len();
        if cells.len() != tokens {
            return wrong(format!("{} cells for {tokens} tokens", cells.len()));
        }
        for entry in &self.entries {
            entry.check(self.turn)?;
        }
        self.check_positions()?;
        let counts = &self.counts;
        let recount = |state: State, modality: Modality| {
            let same = |e: &&Entry| e.state == state && e.modality == modality;
            self.entries.iter().filter(same).count()
        };
        for modality in [Modality::Text, Modality::Vision] {
            for (name, state, said) in [
                ("live", State::Live, counts.live),
                ("binned", State::Binned, counts.binned),
            ] {
                let (said, held) = (said.of(modality), recount(state, modality));
                if said != held {
                    return wrong(format!("{said} {name} tokens, of which {held} are there"));
                }
            }
            let past = [counts.evicted, counts.restored, counts.recalled];
            if let Some(n) = past.map(|c| c.of(modality)).iter().find(|&&n| n > MOST) {
                return wrong(format!("{n} tokens that came or went"));
            }
        }
        if counts.peak < tokens || counts.peak > MOST {
            return wrong(format!(
                "a peak of {} cells with {tokens} taken",
                counts.peak
            ));
        }
        // The turns that follow are counted on from there.
        match self.turn <= u32::MAX / 2 {
            true => Ok(()),
            false => wrong(format!("turn {}", self.turn)),
        }
    }

    /// Positions are those of one token each, but for the rows of one picture, and the newest token
    /// is live: the model counts on from it.
    fn check_positions(&self) -> Result<()> {
        let mut order: Vec<&Entry> = self.entries.iter().collect();
        order.sort_by_key(|entry| entry.pos);
        for pair in order.windows(2) {
            let shared = pair[0].modality == Modality::Vision
                && pair[1].modality == Modality::Vision
                && pair[0].image == pair[1].image;
            if pair[0].pos == pair[1].pos && !shared {
                let reason = format!("holds position {}, which another cell holds", pair[1].pos);
                return Err(Error::cell(pair[1].cell, reason));
            }
        }
        let (oldest, newest) = (order.first(), order.last());
        if let Some(newest) = newest.filter(|newest| newest.state != State::Live) {
            let reason = "holds the newest position, expected a live token";
            return Err(Error::cell(newest.cell, reason));
        }
        let first = self.first.map(|first| (0..=LAST_POS).contains(&first));
        let fits = match (oldest, self.first) {
            (Some(oldest), Some(first)) => first <= oldest.pos,
            (oldest, first) => oldest.is_none() && first.is_none(),
        };
        match fits && first != Some(false) {
            true => Ok(()),
            false => {
                let reason = format!(
                    "began at position {:?}, the oldest token is at {:?}",
                    self.first,
                    oldest.map(|entry| entry.pos)
                );
                Err(Error::contract(reason))
            }
        }
    }
}

impl Entry {
    /// `turn` is the current one.
    fn check(&self, turn: u32) -> Result<()> {
        let wrong = |reason: String| Err(Error::cell(self.cell, reason));
        if !(0..=LAST_POS).contains(&self.pos) {
            return wrong(format!(
                "holds position {}, expected 0 to {LAST_POS}",
                self.pos
            ));
        }
        let scores = [self.sum, self.max, self.seen, self.latest];
        if let Some(value) = scores.iter().find(|x| !(x.is_finite() && **x >= 0.0)) {
            let pos = self.pos;
            return wrong(format!("has a score of {value} at position {pos}"));
        }
        if self.turn > turn {
            return wrong(format!(
                "is of turn {}, the current one is {turn}",
                self.turn
            ));
        }
        let text = self.modality == Modality::Text;
        match text && (self.image.is_some() || self.separator) || self.image == Some(NO_IMAGE) {
            true => wrong(format!("holds text of a picture, {:?}", self.image)),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Pos;

    /// Three tokens of text and two of a picture, one of them in the bin, one gone.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(16);
        ledger.begin_turn();
        for pos in 0..3 {
            ledger
                .insert(pos as Cell, pos, Modality::Text, None)
                .unwrap();
        }
        for pos in 3..5 {
            ledger
                .insert(pos as Cell, pos, Modality::Vision, Some(0))
                .unwrap();
        }
        ledger.insert(5, 5, Modality::Text, None).unwrap();
        ledger.bin(4).unwrap();
        ledger.remove(1).unwrap();
        ledger
    }

    fn refusal(change: impl FnOnce(&mut SavedLedger)) -> String {
        let mut saved = ledger().save();
        change(&mut saved);
        let cells: Vec<Cell> = (0..saved.entries.len() as Cell).collect();
        let mut ledger = Ledger::new(16);
        let error = ledger.load(&saved, &cells).unwrap_err().to_string();
        assert_eq!((ledger.span(), ledger.counts()), (0, Counts::default()));
        error
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let ledger = ledger();
        let saved = ledger.save();
        let cells: Vec<Cell> = saved.entries.iter().map(|e| e.cell).collect();
        let mut loaded = Ledger::new(16);
        loaded.load(&saved, &cells).unwrap();
        assert_eq!(loaded.save(), saved);
        let mut empty = Ledger::new(16);
        empty.load(&Ledger::new(4).save(), &[]).unwrap();
    }

    #[test]
    fn counts_are_recounted() {
        let counts: [fn(&mut SavedLedger); 7] = [
            |s| s.counts.live.text = 4,
            |s| s.counts.live.vision = 0,
            |s| s.counts.binned.vision = 2,
            |s| s.counts.binned.text = usize::MAX,
            |s| s.counts.evicted.text = usize::MAX,
            |s| s.counts.peak = 1,
            |s| s.turn = u32::MAX,
        ];
        for change in counts {
            let line = refusal(change);
            assert!(line.starts_with("broken contract: "), "{line}");
        }
    }

    #[test]
    fn scores_are_finite_and_not_negative() {
        for value in [f32::NAN, f32::INFINITY, -1.0] {
            let set: [fn(&mut Entry, f32); 4] = [
                |e, x| e.sum = x,
                |e, x| e.max = x,
                |e, x| e.seen = x,
                |e, x| e.latest = x,
            ];
            for set in set {
                let line = refusal(|s| set(&mut s.entries[2], value));
                assert!(line.contains("has a score of"), "{line}");
            }
        }
    }

    #[test]
    fn states_positions_and_pictures_fit_together() {
        let at = |pos: Pos| move |s: &mut SavedLedger| s.entries[4].pos = pos;
        for pos in [-1, LAST_POS + 1, Pos::MAX - 1, Pos::MAX] {
            assert!(refusal(at(pos)).contains("holds position"), "{pos}");
        }
        assert!(refusal(at(0)).contains("which another cell holds"));
        // The rows of one picture may share a position, if its model has two axes.
        let mut shared = ledger().save();
        shared.entries[2].pos = 4;
        Ledger::new(16).load(&shared, &[0, 1, 2, 3, 4]).unwrap();
        let line = refusal(|s| s.entries[4].state = State::Binned);
        assert!(line.contains("expected a live token"), "{line}");
        assert!(refusal(|s| s.entries[0].turn = 2).contains("is of turn 2"));
        assert!(refusal(|s| s.entries[0].image = Some(0)).contains("text of a picture"));
        assert!(refusal(|s| s.entries[0].separator = true).contains("text of a picture"));
        assert!(refusal(|s| s.entries[2].image = Some(NO_IMAGE)).contains("picture"));
        for first in [None, Some(1), Some(-1)] {
            let line = refusal(|s| s.first = first);
            assert!(line.contains("began at position"), "{line}");
        }
        assert!(refusal(|s| s.entries.truncate(3)).contains("tokens, of which"));
    }
}
