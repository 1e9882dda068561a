//! The eviction controller: keeps the ledger, asks the policy, and says which positions to remove.
//!
//! It touches no model. Whoever drives the model reports what went into which cell
//! ([`Controller::inserted`]) and what attention was seen ([`Controller::observed`]), and removes
//! the ranges that [`Controller::after_prefill`] and [`Controller::after_step`] return. The ledger
//! then already counts them as gone.
//!
//! What it is told and what it decides can be recorded ([`Recorder`]); without a recorder that
//! costs one comparison a call.

mod record;

use std::ops::Range;

pub use record::{After, Event, Recorder};

use crate::cache::{Cell, Counts, Ledger, Modality, Observation, Pos, SavedLedger, ranges};
use crate::error::Result;
use crate::policy::{DapMode, EvictionPolicy, Held, Observe, Plan, Queries, Shift};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prefill,
    Decode,
}

/// Where the rows of a batch come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// What they all are.
    pub modality: Modality,
    /// Which picture, for visual tokens.
    pub image: Option<u32>,
    /// The rows belong to a picture whose rows share positions (M-RoPE).
    pub shared: bool,
}

impl Origin {
    /// Rows of text.
    pub const TEXT: Origin = Origin {
        modality: Modality::Text,
        image: None,
        shared: false,
    };

    /// Of picture number `image`, one position a row.
    pub const fn picture(image: u32) -> Self {
        Origin {
            modality: Modality::Vision,
            image: Some(image),
            shared: false,
        }
    }
}

/// What the controller did, for reports.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
    /// The policy's name.
    pub policy: &'static str,
    /// Every parameter of the policy with its value.
    pub params: serde_json::Value,
    /// Cells by modality and state, and the most that were ever taken.
    pub cells: Counts,
    /// Tokens removed before and right after prompts.
    pub evicted_after_prefill: usize,
    /// Tokens removed while decoding.
    pub evicted_in_decoding: usize,
    /// Tokens decoded again, or put back from host memory, for a later question.
    pub recalled: usize,
    /// Decoding steps that removed tokens: each is one batch of removals.
    pub flushes: usize,
    /// Times that a token came back from the recycle bin.
    pub restores: usize,
    /// The most cells that were taken at once outside of prefills: what `--kv-budget` bounds.
    pub peak_decoding: usize,
}

/// A token that was just removed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evicted {
    /// The cell that it lay in, free now.
    pub cell: Cell,
    /// The position that it had.
    pub pos: Pos,
    /// What it was.
    pub modality: Modality,
    /// The attention that it had, a mean over the queries that could see it.
    pub asked: f32,
}

/// Books and policy of one sequence: what its tokens are, and which of them go.
pub struct Controller {
    ledger: Ledger,
    policy: Box<dyn EvictionPolicy>,
    observe: Observe,
    observes_decoding: bool,
    decay: f32,
    phase: Phase,
    plan: Plan,
    evicted: Vec<Evicted>,
    positions: Vec<Pos>,
    ranges: Vec<Range<Pos>>,
    evicted_after_prefill: usize,
    evicted_in_decoding: usize,
    flushes: usize,
    peak_decoding: usize,
    recorder: Option<Box<dyn Recorder>>,
    single_rows: usize,
}

impl Controller {
    /// A controller of an empty cache of `n_cells` cells. All memory is taken here: a decoding
    /// step takes none.
    pub fn new(policy: Box<dyn EvictionPolicy>, n_cells: usize) -> Self {
        Controller {
            ledger: Ledger::new(n_cells),
            observe: policy.observe(),
            observes_decoding: policy.observes_decoding(),
            decay: policy.decay(),
            policy,
            phase: Phase::Prefill,
            plan: Plan {
                bin: Vec::with_capacity(n_cells),
                restore: Vec::with_capacity(n_cells),
                evict: Vec::with_capacity(n_cells),
                shift: None,
            },
            evicted: Vec::with_capacity(n_cells),
            positions: Vec::with_capacity(n_cells),
            ranges: Vec::with_capacity(n_cells),
            evicted_after_prefill: 0,
            evicted_in_decoding: 0,
            flushes: 0,
            peak_decoding: 0,
            recorder: None,
            single_rows: 0,
        }
    }

    /// Reports everything from now on to `recorder`.
    pub fn record(&mut self, recorder: Box<dyn Recorder>) {
        self.recorder = Some(recorder);
    }

    /// For a recording under a policy that looks at no attention: that of these layers is read
    /// nevertheless, of every row. The last `single_rows` rows of a prompt go in one at a time, so
    /// that each is seen by itself.
    pub fn observe_for_recorder(&mut self, layers: Vec<u32>, single_rows: usize) {
        let queries = Queries::EVERY;
        self.observe = Observe::Layers { layers, queries };
        self.observes_decoding = true;
        self.single_rows = single_rows;
    }

    /// Whether there is a recorder.
    pub fn is_recorded(&self) -> bool {
        self.recorder.is_some()
    }

    /// Tells the recorder what others know: texts and pictures.
    pub fn tell(&mut self, event: Event<'_>) {
        if let Some(recorder) = &mut self.recorder {
            recorder.record(event);
        }
    }

    /// Ends the recording, if there is one.
    ///
    /// # Errors
    /// What went wrong with it at any time.
    pub fn finish_recording(&mut self) -> Result<()> {
        match self.recorder.take() {
            Some(mut recorder) => recorder.finish(),
            None => Ok(()),
        }
    }

    /// The policy's name.
    pub fn policy(&self) -> &'static str {
        self.policy.name()
    }

    /// The books, as of the last call.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The attention that the policy wants of the prompt.
    pub fn observe(&self) -> &Observe {
        &self.observe
    }

    /// The last rows of a prompt that have to go in one at a time.
    pub fn single_rows(&self) -> usize {
        self.single_rows
    }

    /// Whether the attention of decoded tokens is wanted too.
    pub fn observes_decoding(&self) -> bool {
        self.observes_decoding
    }

    /// When the policy prunes a prompt.
    pub fn dap_mode(&self) -> DapMode {
        self.policy.prune_when()
    }

    /// Whether a new turn may call evicted tokens back.
    pub fn recalls(&self) -> bool {
        self.policy.recalls()
    }

    /// Whether the policy moves tokens to other positions.
    pub fn shifts(&self) -> bool {
        self.policy.shifts()
    }

    /// Tells the policy how many tokens will be decoded after the next prompt, if that is known.
    pub fn expect(&mut self, tokens: Option<usize>) {
        self.policy.expect(tokens);
        self.tell(Event::Expected(tokens));
    }

    /// The position of the next token, whatever was evicted.
    pub fn next_pos(&self) -> Pos {
        self.ledger.newest().map_or(0, |newest| newest + 1)
    }

    /// Starts a user turn: tokens that go in now are the prompt's.
    pub fn begin_turn(&mut self) {
        self.ledger.begin_turn();
        self.ledger.begin_observation();
        self.phase = Phase::Prefill;
        self.tell(Event::Turn);
    }

    /// Writes down one batch: the token at position `pos[i]` lies in `cells[i]`.
    ///
    /// # Errors
    /// As [`Ledger::insert`].
    pub fn inserted(&mut self, cells: &[Cell], pos: &[Pos], origin: Origin) -> Result<()> {
        let Origin {
            modality,
            image,
            shared,
        } = origin;
        for (&cell, &pos) in cells.iter().zip(pos) {
            match shared {
                true => self.ledger.insert_shared(cell, pos, image)?,
                false => self.ledger.insert(cell, pos, modality, image)?,
            }
        }
        self.tell(Event::Inserted { cells, pos, origin });
        if self.phase == Phase::Decode {
            self.note_peak();
        }
        Ok(())
    }

    /// Adds the attention that was seen in the batch whose cells were just inserted.
    ///
    /// # Errors
    /// [`crate::Error::NanScore`]
    pub fn observed(&mut self, seen: &Observation) -> Result<()> {
        let decay = match self.phase {
            Phase::Prefill => 1.0,
            Phase::Decode => {
                self.ledger.begin_observation();
                self.decay
            }
        };
        self.ledger.observe(seen, decay)?;
        self.tell(Event::Observed(seen));
        Ok(())
    }

    /// Lets the policy make room for a prompt of this many rows; otherwise as
    /// [`Controller::after_prefill`].
    ///
    /// # Errors
    /// As [`Controller::after_prefill`].
    pub fn before_prefill(&mut self, rows: usize) -> Result<&[Range<Pos>]> {
        self.plan.clear();
        self.policy
            .before_prefill(&self.ledger, rows, &mut self.plan)?;
        self.evicted_after_prefill += self.plan.evict.len();
        self.apply()?;
        Ok(&self.ranges)
    }

    /// Asks the policy which visual tokens of a prompt to leave out, by attention that was seen
    /// in a trial run: `trial` is the ledger of that run. Gives their positions, sorted.
    ///
    /// # Errors
    /// The policy's own.
    pub fn prune(&mut self, trial: &Ledger) -> Result<Vec<Pos>> {
        self.plan.clear();
        let held = Held::with_trial(&self.ledger, trial);
        self.policy.prune(trial, held, &mut self.plan)?;
        let pos = |&cell: &Cell| trial.get(cell).map(|entry| entry.pos);
        let mut pruned: Vec<Pos> = self.plan.evict.iter().filter_map(pos).collect();
        pruned.sort_unstable();
        self.tell(Event::Judged {
            trial,
            pruned: &pruned,
        });
        Ok(pruned)
    }

    /// Counts visual tokens that were pruned before the prefill; `pos` are their positions.
    pub fn skipped(&mut self, pos: &[Pos]) {
        self.ledger.skipped(pos);
        self.evicted_after_prefill += pos.len();
        self.tell(Event::Skipped(pos));
    }

    /// Removes these positions before a prompt goes in. Gives them as sorted, disjoint ranges.
    ///
    /// # Errors
    /// [`crate::Error::Cell`] for a token that cannot go.
    pub fn remove(&mut self, cells: &[Cell]) -> Result<&[Range<Pos>]> {
        self.plan.clear();
        self.plan.evict.extend_from_slice(cells);
        self.evicted_after_prefill += cells.len();
        self.apply()?;
        self.tell(Event::Removed(cells));
        Ok(&self.ranges)
    }

    /// Writes down that evicted tokens are back in the cache.
    ///
    /// # Errors
    /// As [`Ledger::recall`].
    pub fn recalled(&mut self, cells: &[Cell], pos: &[Pos], origin: Origin) -> Result<()> {
        for (&cell, &pos) in cells.iter().zip(pos) {
            self.ledger
                .recall(cell, pos, origin.modality, origin.image)?;
        }
        self.tell(Event::Recalled { cells, pos, origin });
        Ok(())
    }

    /// Whether what was pruned for the question should come back: `said` tokens of the answer are in.
    pub fn asks_back(&self, said: Pos) -> bool {
        usize::try_from(said).is_ok_and(|said| self.policy.asks_back(said))
    }

    /// Marks visual tokens that separate parts of a picture: `separators[i]` is that of `cells[i]`,
    /// none where it is empty.
    ///
    /// # Errors
    /// As [`Ledger::mark_separator`].
    pub fn mark_separators(&mut self, cells: &[Cell], separators: &[bool]) -> Result<()> {
        for (&cell, _) in cells.iter().zip(separators).filter(|&(_, &is)| is) {
            self.ledger.mark_separator(cell)?;
        }
        if !separators.is_empty() {
            self.tell(Event::Separators { cells, separators });
        }
        Ok(())
    }

    /// Lets this turn's question judge the pictures of earlier turns anew.
    pub fn reopen_pictures(&mut self) {
        self.ledger.reopen_pictures();
        self.tell(Event::Reopened);
    }

    /// Follows tokens that the engine moved to other cells.
    ///
    /// # Errors
    /// As [`Ledger::moved`].
    pub fn moved(&mut self, moves: &[(Cell, Cell)]) -> Result<()> {
        self.ledger.moved(moves)?;
        if !moves.is_empty() {
            self.tell(Event::Moved(moves));
        }
        Ok(())
    }

    /// The positions that the last plan removed, as sorted, disjoint ranges.
    pub fn planned(&self) -> &[Range<Pos>] {
        &self.ranges
    }

    /// What the last plan moves after the removals.
    pub fn shift(&self) -> Option<Shift> {
        self.plan.shift
    }

    /// The tokens that the last plan removed.
    pub fn evicted(&self) -> &[Evicted] {
        &self.evicted
    }

    /// Lets the policy act on a complete prompt; `pruned` says that it was pruned before it went
    /// in. Gives the positions to remove, as sorted and disjoint ranges.
    ///
    /// # Errors
    /// The policy's own, and [`crate::Error::Cell`] for a plan that cannot be.
    pub fn after_prefill(&mut self, pruned: bool) -> Result<&[Range<Pos>]> {
        self.phase = Phase::Decode;
        self.plan.clear();
        if !pruned {
            let held = Held::of(&self.ledger);
            self.policy.prune(&self.ledger, held, &mut self.plan)?;
        }
        self.policy.after_prefill(&self.ledger, &mut self.plan)?;
        self.evicted_after_prefill += self.plan.evict.len();
        self.planned_after(After::Prompt { pruned })?;
        self.note_peak();
        Ok(&self.ranges)
    }

    /// Lets the policy act on a decoded token; otherwise as [`Controller::after_prefill`].
    ///
    /// # Errors
    /// As [`Controller::after_prefill`].
    pub fn after_step(&mut self) -> Result<&[Range<Pos>]> {
        self.plan.clear();
        self.policy.after_step(&self.ledger, &mut self.plan)?;
        self.evicted_in_decoding += self.plan.evict.len();
        self.flushes += usize::from(!self.plan.evict.is_empty());
        self.planned_after(After::Step)?;
        Ok(&self.ranges)
    }

    fn planned_after(&mut self, after: After) -> Result<()> {
        self.apply()?;
        if let Some(recorder) = &mut self.recorder {
            let plan = &self.plan;
            recorder.record(Event::Planned { after, plan });
        }
        Ok(())
    }

    fn note_peak(&mut self) {
        let cells = self.ledger.counts().cells();
        self.peak_decoding = self.peak_decoding.max(cells);
    }

    /// The ledger refuses what cannot be: an empty cell, a wrong state, the newest position.
    /// Evictions come first, so that a cell that is also to be binned or restored is found empty.
    /// What moves to other positions does so last.
    fn apply(&mut self) -> Result<()> {
        self.positions.clear();
        self.evicted.clear();
        for &cell in &self.plan.evict {
            let entry = self.ledger.get(cell);
            let pos = self.ledger.remove(cell)?;
            self.positions.push(pos);
            self.evicted.push(Evicted {
                cell,
                pos,
                modality: entry.map_or(Modality::Text, |entry| entry.modality),
                asked: entry.map_or(0.0, |entry| entry.sum / entry.seen.max(1.0)),
            });
        }
        for &cell in &self.plan.restore {
            self.ledger.restore(cell)?;
        }
        for &cell in &self.plan.bin {
            self.ledger.bin(cell)?;
        }
        ranges::coalesce(&mut self.positions, &mut self.ranges);
        match self.plan.shift {
            Some(Shift { from, by }) => self.ledger.shift(from, by),
            None => Ok(()),
        }
    }

    /// Goes on from a saved ledger, whose tokens lie in these cells now.
    ///
    /// # Errors
    /// As [`Ledger::load`].
    pub fn load(&mut self, saved: &SavedLedger, cells: &[Cell]) -> Result<()> {
        self.clear();
        self.phase = Phase::Decode;
        self.ledger.load(saved, cells)?;
        self.tell(Event::Loaded { saved, cells });
        Ok(())
    }

    /// Takes back every token from position `from` on and gives the number of cells still in use.
    pub fn rewind(&mut self, from: Pos) -> usize {
        self.ledger.rewind(from);
        self.tell(Event::Rewound(from));
        self.ledger.counts().cells()
    }

    /// The same for tokens of an answer that go through the model again, at the same positions.
    pub fn read_again(&mut self, from: Pos) -> usize {
        self.ledger.rewind(from);
        self.tell(Event::Again(from));
        self.ledger.counts().cells()
    }

    /// Forgets everything: the cache was emptied.
    pub fn clear(&mut self) {
        self.ledger.clear();
        self.phase = Phase::Prefill;
        self.evicted_after_prefill = 0;
        self.evicted_in_decoding = 0;
        self.flushes = 0;
        self.peak_decoding = 0;
        self.tell(Event::Cleared);
    }

    /// The last plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What happened since the cache was last empty.
    pub fn report(&self) -> Report {
        let cells = self.ledger.counts();
        Report {
            policy: self.policy.name(),
            params: self.policy.params(),
            cells,
            evicted_after_prefill: self.evicted_after_prefill,
            evicted_in_decoding: self.evicted_in_decoding,
            flushes: self.flushes,
            restores: cells.restored.total(),
            recalled: cells.recalled.total(),
            peak_decoding: self.peak_decoding,
        }
    }
}
