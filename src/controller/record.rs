//! What a controller reports to whoever records it: what it was told, and what was decided.

use super::Origin;
use crate::cache::{Cell, Ledger, Observation, Pos, SavedLedger};
use crate::error::Result;
use crate::image::{Picture, hd};
use crate::policy::Plan;

/// When a plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum After {
    /// After a prompt; `pruned`: its visual tokens had been judged before it went in.
    Prompt {
        /// Whether a trial run had judged it.
        pruned: bool,
    },
    /// After a decoded token.
    Step,
}

/// One thing that happened. In their order the events tell all that a policy ever saw.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// How many tokens will be decoded after the next prompt, if that is known.
    Expected(Option<usize>),
    /// A user turn begins.
    Turn,
    /// The text of the token at a position; it may end inside of a character.
    Text {
        /// The token's position.
        pos: Pos,
        /// UTF-8, perhaps in part.
        bytes: &'a [u8],
    },
    /// A picture as it was shown, and how its tokens lie on it, where that is known.
    Shown {
        /// The picture's number in the conversation, from 0.
        image: u32,
        /// As it was decoded from its file.
        picture: &'a Picture,
        /// `None` for models whose layout is not known.
        layout: Option<hd::Layout>,
    },
    /// One batch went in: the token at `pos[i]` lies in `cells[i]`.
    Inserted {
        /// `[rows]`
        cells: &'a [Cell],
        /// `[rows]`, ascending.
        pos: &'a [Pos],
        /// What all rows are.
        origin: Origin,
    },
    /// Which of the cells just filled separate parts of a picture.
    Separators {
        /// `[rows]`
        cells: &'a [Cell],
        /// `[rows]`: whether the token of that cell is one.
        separators: &'a [bool],
    },
    /// Attention of the batch that just went in.
    Observed(&'a Observation),
    /// What the layers chose to attend to in the step that just went in.
    Looked {
        /// Layers that chose.
        layers: u32,
        /// `[cells]`, by cell: how many of them attended to it. `None`: it was not theirs to choose,
        /// and all did; so for cells behind the last.
        counts: &'a [Option<u32>],
    },
    /// A trial run was judged: visual tokens at these positions are not needed.
    Judged {
        /// The ledger of the trial run, with its scores.
        trial: &'a Ledger,
        /// Ascending.
        pruned: &'a [Pos],
    },
    /// Visual tokens that never went in.
    Skipped(&'a [Pos]),
    /// Cells emptied before a prompt went in.
    Removed(&'a [Cell]),
    /// Evicted tokens are back.
    Recalled {
        /// `[rows]`, where they lie now.
        cells: &'a [Cell],
        /// `[rows]`, those that they had before.
        pos: &'a [Pos],
        /// What all rows are.
        origin: Origin,
    },
    /// Pictures of earlier turns are judged anew.
    Reopened,
    /// The policy's decision.
    Planned {
        /// What came before it.
        after: After,
        /// Cells that go into the bin, come back, or are emptied.
        plan: &'a Plan,
    },
    /// Tokens moved to other cells, in this order.
    Moved(&'a [(Cell, Cell)]),
    /// Tokens from this position on were taken back.
    Rewound(Pos),
    /// Tokens of an answer from this position on leave their cells and go through the model again:
    /// they are inserted anew.
    Again(Pos),
    /// The cache was emptied.
    Cleared,
    /// An earlier conversation goes on.
    Loaded {
        /// The ledger as it was saved.
        saved: &'a SavedLedger,
        /// Where its tokens lie now, in the order in which it lists them.
        cells: &'a [Cell],
    },
}

/// Gets every event. It must not fail in the middle of a run, so errors wait for the end.
pub trait Recorder: Send {
    /// Takes one event, in the order in which they happen.
    fn record(&mut self, event: Event<'_>);

    /// Nothing more will come.
    ///
    /// # Errors
    /// The first that occurred.
    fn finish(&mut self) -> Result<()>;
}
