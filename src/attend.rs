//! Lookups: in a decoding step each layer attends to the cells that its own query asks for.
//!
//! Nothing is removed. [`Attend`] says how many cells of each modality a layer attends to;
//! [`Attend::plan`] says of each cell whether it may be left out. The engine does the choosing, layer
//! by layer, by the attention that the layer's heads would pay to all cells in view (their mean).

use std::ops::AddAssign;

use crate::cache::{Cell, Entry, Ledger, Modality, Pos};
use crate::error::{Error, Result};
use crate::policy::Amount;

/// Positions at the end of a prompt whose text counts as the question: always attended to.
const QUESTION: Pos = 64;

/// What decoding steps attend to. The default is everything.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Attend {
    /// Visual cells that a layer attends to: a number, or a share of those in view. `None`: all.
    pub vision: Option<Amount>,
    /// The same of text, beside the cells that are always attended to.
    pub text: Option<Amount>,
    /// The last cells, always attended to.
    pub recent: usize,
    /// The first positions, always attended to.
    pub sinks: usize,
    /// Layers before this one attend to everything.
    pub first_layer: u32,
}

impl Default for Attend {
    fn default() -> Self {
        Attend {
            vision: None,
            text: None,
            recent: 16,
            sinks: 4,
            first_layer: 0,
        }
    }
}

/// Whether a layer may leave a cell out. The numbers are those of `llama_hae_attend_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Every layer attends to it.
    Always = 0,
    /// A visual cell to choose from.
    Vision = 1,
    /// A text cell to choose from.
    Text = 2,
}

/// One decoding step's lookups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// `[cells]`, by cell; cells behind it are attended to always.
    pub kinds: Vec<Kind>,
    /// Visual cells that a layer attends to, of those that may be left out: no more than there are.
    pub n_vision: usize,
    /// The same of text.
    pub n_text: usize,
}

/// What one step attended to, added up over the layers that chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Layers that chose.
    pub layers: u32,
    /// `[cells]`, by cell: how many of these layers attended to it. `None`: it was not theirs to
    /// choose, and all did; so for cells behind the last.
    pub counts: Vec<Option<u32>>,
}

impl Looked {
    /// Begins a step with these choices.
    pub fn begin(&mut self, lookup: &Lookup) {
        self.layers = 0;
        self.counts.clear();
        let choices = lookup.kinds.iter();
        self.counts
            .extend(choices.map(|&kind| (kind != Kind::Always).then_some(0)));
    }

    /// Adds the cells that one layer attended to.
    pub fn add(&mut self, set: &[Cell]) {
        self.layers += 1;
        for &cell in set {
            if let Some(Some(count)) = self.counts.get_mut(cell as usize) {
                *count += 1;
            }
        }
    }
}

/// Cells in view and cells attended to, added up over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attended {
    /// Steps that looked something up.
    pub steps: u64,
    /// Cells in view, summed over these steps.
    pub in_view: u64,
    /// Cells attended to by a layer that looks up.
    pub attended: u64,
    /// The visual ones of `in_view`.
    pub in_view_vision: u64,
    /// The visual ones of `attended`.
    pub attended_vision: u64,
}

/// [`Attended`] as reports show it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Shares {
    /// Decoding steps that looked something up.
    pub steps: u64,
    /// Cells that a looking layer attended to, of all in view.
    pub all: f64,
    /// The same of the visual cells; none where there are none.
    pub vision: Option<f64>,
}

impl Attended {
    /// `None` where no step looked anything up.
    pub fn shares(&self) -> Option<Shares> {
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Some(Shares {
            steps: self.steps,
            all: share(self.attended, self.in_view)?,
            vision: share(self.attended_vision, self.in_view_vision),
        })
    }
}

impl AddAssign for Attended {
    fn add_assign(&mut self, other: Attended) {
        self.steps += other.steps;
        self.in_view += other.in_view;
        self.attended += other.attended;
        self.in_view_vision += other.in_view_vision;
        self.attended_vision += other.attended_vision;
    }
}

impl Attend {
    /// As few as the answers of the development set allow (docs/lookups.md).
    pub const FEW: Attend = Attend {
        vision: Some(Amount::Share(0.15)),
        text: Some(Amount::Share(0.25)),
        recent: 16,
        sinks: 4,
        first_layer: 0,
    };

    /// Itself, where a step may attend to less than everything.
    pub fn if_any(self) -> Option<Attend> {
        (!self.is_whole()).then_some(self)
    }

    /// Whether every step attends to everything.
    pub fn is_whole(&self) -> bool {
        self.vision.is_none() && self.text.is_none()
    }

    /// # Errors
    /// [`Error::Option`] for amounts that cannot be, or a layer that the model does not have.
    pub fn check(&self, n_layer: u32) -> Result<()> {
        for (flag, amount) in [("attend", self.vision), ("attend_text", self.text)] {
            if let Some(amount) = amount {
                amount.check(flag)?;
            }
        }
        if self.first_layer > n_layer {
            let reason = format!("layer {}, the model has {n_layer}", self.first_layer);
            return Err(Error::option("attend_from", reason));
        }
        Ok(())
    }

    /// Fills `lookup` for the token behind the newest one; `answer` is the position that the answer
    /// began at. False: the step attends to everything.
    pub fn plan(
        &self,
        ledger: &Ledger,
        answer: Pos,
        lookup: &mut Lookup,
        attended: &mut Attended,
    ) -> bool {
        if self.is_whole() {
            return false;
        }
        lookup.kinds.clear();
        lookup.kinds.resize(ledger.span(), Kind::Always);
        let next = ledger.newest().map_or(0, |newest| newest + 1);
        let (mut vision, mut text) = (0, 0);
        let mut ends = Ends::new(self, ledger, next);
        for entry in ledger.entries() {
            let kind = match ends.holds(entry.pos) {
                true => Kind::Always,
                false => self.kind(&entry, answer),
            };
            match kind {
                Kind::Always => continue,
                Kind::Vision => vision += 1,
                Kind::Text => text += 1,
            }
            lookup.kinds[entry.cell as usize] = kind;
        }
        let of = |amount: Option<Amount>, n: usize| amount.map_or(n, |amount| amount.of(n).min(n));
        lookup.n_vision = of(self.vision, vision);
        lookup.n_text = of(self.text, text);
        let left_out = (vision - lookup.n_vision) as u64;
        let left_out_text = (text - lookup.n_text) as u64;
        if left_out + left_out_text == 0 {
            return false;
        }
        let counts = ledger.counts();
        let in_view = counts.cells() as u64 + 1;
        let in_view_vision = (counts.live.vision + counts.binned.vision) as u64;
        *attended += Attended {
            steps: 1,
            in_view,
            attended: in_view - left_out - left_out_text,
            in_view_vision,
            attended_vision: in_view_vision - left_out,
        };
        true
    }

    /// Of a cell at neither end.
    fn kind(&self, entry: &Entry, answer: Pos) -> Kind {
        let question = answer.saturating_sub(QUESTION)..answer;
        match entry.modality {
            Modality::Vision if self.vision.is_some() => Kind::Vision,
            Modality::Text if question.contains(&entry.pos) => Kind::Always,
            Modality::Text if self.text.is_some() => Kind::Text,
            _ => Kind::Always,
        }
    }
}

/// The cells of the first positions and of the last ones, asked for in the order of cells.
///
/// A position is one cell, except in pictures with several axes (M-RoPE), most of whose rows share
/// their last position. Of these no more cells are held than positions were asked for, or a question
/// shorter than the recent positions would hold a whole picture. Nothing is removed or moved in
/// such a cache, so that its cells are in the order of the tokens.
struct Ends {
    /// Positions before this one are the first.
    first: Pos,
    /// Cells of them that are still to be held.
    n_first: usize,
    /// From this position on they are the last.
    last: Pos,
    /// Cells of them that come before those that are held.
    n_skipped: usize,
}

impl Ends {
    fn new(attend: &Attend, ledger: &Ledger, next: Pos) -> Self {
        let number = |n: usize| Pos::try_from(n).unwrap_or(Pos::MAX);
        let last = next.saturating_sub(number(attend.recent));
        let n_last = ledger.entries().filter(|entry| entry.pos >= last).count();
        Ends {
            first: number(attend.sinks),
            n_first: attend.sinks,
            last,
            n_skipped: n_last.saturating_sub(attend.recent),
        }
    }

    fn holds(&mut self, pos: Pos) -> bool {
        let take = |left: &mut usize| {
            let any = *left > 0;
            *left -= usize::from(any);
            any
        };
        let first = pos < self.first && take(&mut self.n_first);
        let last = pos >= self.last && !take(&mut self.n_skipped);
        first || last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cells 0..8 text, 8..28 a picture, 28..40 text, positions as the cells.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(64);
        ledger.begin_turn();
        for cell in 0..40u32 {
            let (modality, image) = match cell {
                8..28 => (Modality::Vision, Some(0)),
                _ => (Modality::Text, None),
            };
            let placed = ledger.insert(cell, cell as Pos, modality, image);
            assert!(placed.is_ok());
        }
        ledger
    }

    fn plan(attend: Attend, answer: Pos) -> Option<(Lookup, Attended)> {
        let (mut lookup, mut attended) = (Lookup::default(), Attended::default());
        attend
            .plan(&ledger(), answer, &mut lookup, &mut attended)
            .then_some((lookup, attended))
    }

    #[test]
    fn everything_is_attended_to_by_default_and_where_the_number_is_large_enough() {
        assert_eq!(plan(Attend::default(), 30), None);
        let attend = Attend {
            vision: Some(Amount::Cells(20)),
            text: Some(Amount::Share(1.0)),
            ..Attend::default()
        };
        assert_eq!(plan(attend, 30), None);
    }

    #[test]
    fn sinks_recent_cells_and_the_question_are_never_left_out() {
        let attend = Attend {
            vision: Some(Amount::Share(0.25)),
            text: Some(Amount::Cells(1)),
            recent: 6,
            sinks: 2,
            first_layer: 0,
        };
        // The whole text lies among the last 64 tokens before the answer.
        let (lookup, attended) = plan(attend, 32).unwrap_or_default();
        assert_eq!((lookup.n_vision, lookup.n_text), (5, 1));
        assert!((8..28).all(|cell| lookup.kinds[cell] == Kind::Vision));
        let always = lookup.kinds.iter().filter(|&&kind| kind == Kind::Always);
        // Text of the question; of the answer, positions 32 and 33 are neither recent nor asked.
        assert_eq!(always.count(), 8 + 4 + 6);
        assert_eq!(lookup.kinds[32], Kind::Text);
        assert_eq!(attended.in_view, 41);
        assert_eq!(attended.attended, 41 - 15 - 1);
        assert_eq!((attended.in_view_vision, attended.attended_vision), (20, 5));
    }

    #[test]
    fn sets_add_up_over_layers_where_there_was_a_choice() {
        let lookup = Lookup {
            kinds: vec![Kind::Always, Kind::Vision, Kind::Text, Kind::Vision],
            n_vision: 1,
            n_text: 1,
        };
        let mut looked = Looked::default();
        for _ in 0..2 {
            looked.begin(&lookup);
            looked.add(&[0, 1, 2, 4]);
            looked.add(&[0, 2, 3, 4]);
            looked.add(&[0, 2, 3, 4]);
            assert_eq!(looked.layers, 3);
            assert_eq!(looked.counts, [None, Some(1), Some(3), Some(2)]);
        }
    }

    /// Two pictures of 12 rows on 3 positions each, between texts of 2.
    #[test]
    fn rows_that_share_a_position_are_not_all_at_an_end() {
        let mut ledger = Ledger::new(64);
        ledger.begin_turn();
        let (mut cell, mut next) = (0, 0);
        for segment in 0..5 {
            let image = (segment % 2 == 1).then_some(segment);
            for row in 0..if image.is_some() { 12 } else { 2 } {
                let pos = next + row.min(2);
                let placed = match (image, row) {
                    (Some(_), 3..) => ledger.insert_shared(cell, pos, image),
                    (Some(_), _) => ledger.insert(cell, pos, Modality::Vision, image),
                    (None, _) => ledger.insert(cell, pos, Modality::Text, None),
                };
                assert!(placed.is_ok());
                cell += 1;
            }
            next += if image.is_some() { 3 } else { 2 };
        }
        let attend = Attend {
            vision: Some(Amount::Cells(1)),
            recent: 4,
            sinks: 5,
            ..Attend::default()
        };
        let (mut lookup, mut attended) = (Lookup::default(), Attended::default());
        assert!(attend.plan(&ledger, next, &mut lookup, &mut attended));
        // Text 0 and 1 and three rows of the first picture; two rows of the second and the last text.
        let chosen_from = |cell: &usize| lookup.kinds[*cell] == Kind::Vision;
        let cells: Vec<usize> = (0..30).filter(chosen_from).collect();
        let expected: Vec<usize> = (5..14).chain(16..26).collect();
        assert_eq!(cells, expected);
        assert_eq!((attended.in_view, attended.attended), (31, 31 - 18));
    }
}
