//! Following a trace record by record: a controller that is told what was told, and decides
//! either by itself or as the trace says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cache::{Cell, Ledger, Pos};
use crate::controller::{After, Controller};
use crate::error::{Error, Result};
use crate::policy::{EvictionPolicy, Held, Observe, Plan};
use crate::trace::Record;

/// A cache that lives through a trace.
pub struct Player {
    controller: Controller,
    dictated: Option<Arc<Mutex<Dictated>>>,
}

/// Decisions that are read out, not made.
#[derive(Default)]
struct Dictated {
    plan: Plan,
    /// Cells of the trial run.
    judged: Vec<Cell>,
}

struct ByDictate(Arc<Mutex<Dictated>>);

impl ByDictate {
    fn dictated(&self) -> MutexGuard<'_, Dictated> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EvictionPolicy for ByDictate {
    fn name(&self) -> &'static str {
        "recorded"
    }

    fn params(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn observe(&self) -> Observe {
        Observe::Nothing
    }

    fn prune(&mut self, _: &Ledger, _: Held, plan: &mut Plan) -> Result<()> {
        plan.evict.append(&mut self.dictated().judged);
        Ok(())
    }

    fn after_prefill(&mut self, _: &Ledger, plan: &mut Plan) -> Result<()> {
        std::mem::swap(plan, &mut self.dictated().plan);
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, plan: &mut Plan) -> Result<()> {
        std::mem::swap(plan, &mut self.dictated().plan);
        Ok(())
    }
}

impl Player {
    /// A cache that does what the trace says.
    pub fn new(records: &[Record]) -> Self {
        let dictated = Arc::new(Mutex::new(Dictated::default()));
        let policy = Box::new(ByDictate(Arc::clone(&dictated)));
        Player {
            controller: Controller::new(policy, highest_cell(records)),
            dictated: Some(dictated),
        }
    }

    /// A cache under a policy that decides anew.
    pub(super) fn under(policy: Box<dyn EvictionPolicy>, records: &[Record]) -> Self {
        Player {
            controller: Controller::new(policy, highest_cell(records)),
            dictated: None,
        }
    }

    /// As it is after the records so far.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Takes one record in. Gives the positions that a judged trial run gives up now.
    ///
    /// # Errors
    /// When the record does not fit those before it.
    pub fn take(&mut self, record: &Record) -> Result<Option<Vec<Pos>>> {
        let controller = &mut self.controller;
        match record {
            Record::Expected(tokens) => controller.expect(*tokens),
            Record::Turn => controller.begin_turn(),
            Record::Inserted { cells, pos, origin } => {
                same_length(cells, pos)?;
                controller.inserted(cells, pos, *origin)?;
            }
            Record::Recalled { cells, pos, origin } => {
                same_length(cells, pos)?;
                controller.recalled(cells, pos, *origin)?;
            }
            Record::Separators(cells) => {
                controller.mark_separators(cells, &vec![true; cells.len()])?;
            }
            Record::Observed { queries, sum, max } => {
                controller.observed(&Record::observation(queries, sum, max.as_ref()))?;
            }
            Record::Judged {
                trial,
                latest,
                pruned,
            } => {
                let mut trial = trial.clone();
                for (entry, &latest) in trial.entries.iter_mut().zip(latest) {
                    entry.latest = latest;
                }
                let cells: Vec<Cell> = trial.entries.iter().map(|entry| entry.cell).collect();
                let span = cells.iter().max().map_or(0, |&cell| cell as usize + 1);
                if span > 2 * cells.len() + 4096 {
                    return Err(Error::contract("cells of a trial run far from each other"));
                }
                let mut ledger = Ledger::new(span);
                ledger.load(&trial, &cells)?;
                if let Some(dictated) = &self.dictated {
                    let mut pruned = pruned.clone();
                    pruned.sort_unstable();
                    let judged = ledger
                        .entries()
                        .filter(|e| pruned.binary_search(&e.pos).is_ok());
                    dictated
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .judged = judged.map(|e| e.cell).collect();
                }
                return controller.prune(&ledger).map(Some);
            }
            Record::Skipped(pos) => controller.skipped(pos),
            Record::Removed(cells) => {
                controller.remove(cells)?;
            }
            Record::Reopened => controller.reopen_pictures(),
            Record::Planned { after, .. } => {
                if let (Some(dictated), Some(plan)) = (&self.dictated, record.plan()) {
                    dictated.lock().unwrap_or_else(PoisonError::into_inner).plan = plan;
                }
                match after {
                    After::Prompt { pruned } => controller.after_prefill(*pruned)?,
                    After::Step => controller.after_step()?,
                };
            }
            Record::Moved(moves) => controller.moved(moves)?,
            Record::Rewound(from) => {
                controller.rewind(*from);
            }
            Record::Again(from) => {
                controller.read_again(*from);
            }
            Record::Cleared => controller.clear(),
            Record::Loaded { saved, cells } => controller.load(saved, cells)?,
            Record::Header(_)
            | Record::Text { .. }
            | Record::Shown { .. }
            | Record::Looked { .. }
            | Record::End => {}
        }
        Ok(None)
    }
}

fn same_length(cells: &[Cell], pos: &[Pos]) -> Result<()> {
    match cells.len() == pos.len() {
        true => Ok(()),
        false => Err(Error::contract(format!(
            "{} cells for {} tokens",
            cells.len(),
            pos.len()
        ))),
    }
}

/// Cells that the records speak of: as many as the cache needs, whatever it could hold.
fn highest_cell(records: &[Record]) -> usize {
    // A cell is taken by a token, and cells are given out in order.
    let tokens: usize = records
        .iter()
        .map(|record| match record {
            Record::Inserted { cells, .. }
            | Record::Recalled { cells, .. }
            | Record::Loaded { cells, .. } => cells.len(),
            _ => 0,
        })
        .sum();
    let highest = records
        .iter()
        .flat_map(|record| match record {
            Record::Inserted { cells, .. }
            | Record::Recalled { cells, .. }
            | Record::Loaded { cells, .. } => cells.as_slice(),
            _ => &[],
        })
        .max();
    highest
        .map_or(0, |&cell| cell as usize + 1)
        .min(2 * tokens + 4096)
}
