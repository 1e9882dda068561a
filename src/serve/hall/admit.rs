//! Which question gets which slot, and the cells that it may take.

use super::chooser::{Chooser, Notes};
use super::desk::Asker;
use super::mind::Mind;
use super::room::{Stage, Watch, Work};
use super::stops::Stops;
use super::units::{self, Held, Unit};
use super::work::{Prompt, Waiting, Worker, slot};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::policy::evicts_nothing;
use crate::serve::ask::{Ask, Told};
use crate::turn::check_reach;

/// A slot is chosen for what it holds of a prompt from this part of it on; with less, another
/// conversation is worth more than it.
const WORTH: usize = 10;

/// What became of a question that was looked at.
enum Fate {
    /// The slot that it names is busy.
    NotYet,
    /// It waits for a slot or for cells, and all behind it do.
    Waits,
    /// It cannot be answered.
    Failed(Error),
}

/// Cells that a question takes.
struct Claim {
    cells: usize,
    /// Tokens of its answer that are in them.
    limit: Option<usize>,
}

impl<M: Mind> Worker<M> {
    /// Takes waiting questions into free slots, in their order. One that waits for cells lets nobody
    /// overtake it, and nobody is let in while an answer waits for cells.
    pub fn admit(&mut self) {
        let paused = |work: &Work<M::Picture>| work.paused;
        if self
            .rooms
            .iter()
            .any(|room| room.work.as_ref().is_some_and(paused))
        {
            return;
        }
        let mut passed_over = std::collections::VecDeque::new();
        while let Some(mut waiting) = self.waiting.pop_front() {
            if !waiting.asker.listens() {
                continue;
            }
            match self.look_at(&mut waiting) {
                Ok((i, kept)) => self.seat(i, kept, waiting),
                Err(Fate::NotYet) => passed_over.push_back(waiting),
                Err(Fate::Waits) => {
                    self.waiting.push_front(waiting);
                    break;
                }
                Err(Fate::Failed(error)) => waiting.asker.tell(Told::Failed(error)),
            }
        }
        passed_over.append(&mut self.waiting);
        self.waiting = passed_over;
    }

    /// The slot for a question, and how many units of its prompt stay there. The cells that it needs are
    /// free then.
    fn look_at(&mut self, waiting: &mut Waiting<M::Picture>) -> Result<(usize, usize), Fate> {
        let busy = |i: usize| {
            self.rooms[i].work.is_some() || self.errands.iter().any(|errand| errand.slot == i)
        };
        let free: Vec<usize> = (0..self.rooms.len()).filter(|&i| !busy(i)).collect();
        match waiting.ask.slot {
            Some(i) if i >= self.rooms.len() => {
                let reason = format!("{i}, expected less than {}", self.rooms.len());
                return Err(Fate::Failed(Error::option("slot", reason)));
            }
            Some(i) if !free.contains(&i) => return Err(Fate::NotYet),
            None if free.is_empty() => return Err(Fate::Waits),
            _ => {}
        }
        let prompt = match waiting.prompt.take() {
            Some(prompt) => prompt,
            None => self.read(&waiting.ask).map_err(Fate::Failed)?,
        };
        let ask = &waiting.ask;
        let ask_slot = ask.slot;
        let cache = ask.cache_prompt;
        let usable = |i: usize| match cache {
            true => self.rooms[i].usable(&prompt.units, &prompt.policy),
            false => 0,
        };
        let chosen = ask_slot.or_else(|| {
            let idle_longest = || free.iter().copied().min_by_key(|&i| self.rooms[i].used);
            self.holder(&free, &prompt, cache).or_else(idle_longest)
        });
        let Some(i) = chosen else {
            return Err(Fate::Waits);
        };
        let kept = usable(i);
        let claim = self.claim(i, kept, &prompt, waiting.ask.n_predict);
        let claim = claim.map_err(Fate::Failed)?;
        // What is too long for the cache is better told so.
        if let Some(reach) = self.mind.reach().filter(|_| !prompt.controller.shifts()) {
            check_reach(units::end(&prompt.units) as usize, reach).map_err(Fate::Failed)?;
        }
        // What it holds now is part of the claim.
        let more = claim.cells.saturating_sub(self.rooms[i].claims());
        waiting.prompt = Some(prompt);
        let short = more > self.free();
        if short && self.shrinks() {
            return Err(Fate::Waits);
        }
        let spared = match short {
            true => self.wanted(),
            false => Vec::new(),
        };
        match self.make_room(i, more, &spared) {
            true => Ok((i, kept)),
            false => Err(Fate::Waits),
        }
    }

    /// Whether a prompt goes in that is pruned behind its last token. What it leaves then is worth
    /// waiting for: what idle slots hold would have to be read again.
    fn shrinks(&self) -> bool {
        self.rooms.iter().any(|room| {
            let reads = |work: &Work<M::Picture>| !matches!(work.stage, Stage::Answer);
            let evicts = !evicts_nothing(&room.held.policy.name);
            evicts && room.work.as_ref().is_some_and(reads)
        })
    }

    /// The slot of these that holds most of a prompt, if it is worth going on from.
    fn holder(&self, slots: &[usize], prompt: &Prompt<M::Picture>, cache: bool) -> Option<usize> {
        let usable = |i: usize| self.rooms[i].usable(&prompt.units, &prompt.policy);
        let slots = slots.iter().copied().filter(|_| cache);
        let best = slots.max_by_key(|&i| (usable(i), self.rooms[i].used));
        best.filter(|&i| usable(i) * WORTH >= prompt.units.len())
    }

    /// Idle slots that questions behind this one would go on from: of as many questions as there are slots,
    /// since what was read of a picture takes memory.
    fn wanted(&mut self) -> Vec<usize> {
        let n = self.rooms.len();
        let idle: Vec<usize> = (0..n).filter(|&i| self.rooms[i].work.is_none()).collect();
        let mut all = std::mem::take(&mut self.waiting);
        let mut wanted = Vec::new();
        for waiting in all.iter_mut().take(n) {
            if waiting.prompt.is_none() {
                // What cannot be read hears of it at its turn.
                waiting.prompt = self.read(&waiting.ask).ok();
            }
            let cache = waiting.ask.cache_prompt;
            let holder = |prompt| self.holder(&idle, prompt, cache);
            wanted.extend(waiting.prompt.as_ref().and_then(holder));
        }
        self.waiting = all;
        wanted
    }

    fn read(&self, ask: &Ask) -> Result<Prompt<M::Picture>> {
        let policy = ask.policy.as_ref().unwrap_or(&self.policy).clone();
        if let Some(policy) = &ask.policy {
            policy.check()?;
        }
        if let Some(attend) = &ask.attend {
            self.mind.check_attend(attend)?;
        }
        let controller = self.mind.controller(&policy)?;
        let pieces = self.mind.read(&ask.prompt)?;
        let units = units::units(&pieces);
        if units.is_empty() {
            let reason = "is empty, expected at least one token";
            return Err(Error::option("the prompt", reason));
        }
        Ok(Prompt {
            pieces,
            units,
            policy,
            controller,
        })
    }

    /// What a question would take in this slot: its whole prompt with what may come back for it, and its
    /// answer. An answer without a limit, or with one that cannot be reached even alone, is promised a slot's
    /// equal share, or one token.
    fn claim(
        &self,
        i: usize,
        kept: usize,
        prompt: &Prompt<M::Picture>,
        n_predict: Option<usize>,
    ) -> Result<Claim> {
        let n_cells = self.mind.look().n_cells();
        let new = &prompt.units[kept..];
        let rows = units::rows(new);
        let old = units::rows(&prompt.units[..kept]);
        let (held, back) = match evicts_nothing(&prompt.policy.name) || kept == 0 {
            true => (old, 0),
            false => {
                let held = self.rooms[i].counts().cells();
                let recalls = prompt.controller.recalls();
                (held, if recalls { old.saturating_sub(held) } else { 0 })
            }
        };
        // What of the pictures goes in is decided later, and older tokens make room for others.
        let open = prompt.controller.shifts()
            || prompt.controller.dap_mode().has_trial() && new.iter().any(Unit::is_picture);
        if held + rows > n_cells && !open {
            let needed = held + rows;
            let n_ctx = n_cells;
            return Err(Error::PromptTooLong { needed, n_ctx });
        }
        let base = held + back + rows;
        let limit = n_predict.filter(|n| base.saturating_add(*n) <= n_cells);
        let answer = limit.unwrap_or_else(|| self.share().saturating_sub(base).max(1));
        Ok(Claim {
            cells: (base + answer).min(n_cells),
            limit,
        })
    }

    /// Lets a slot have a question, if it holds what it was chosen for.
    fn seat(&mut self, i: usize, kept: usize, mut waiting: Waiting<M::Picture>) {
        let Some(prompt) = waiting.prompt.take() else {
            return;
        };
        match self.settle(i, kept, &prompt) {
            Ok(now) if now == kept => {}
            Ok(_) => {
                // It is empty now, and all of the prompt may need more cells than the rest of it.
                waiting.prompt = Some(prompt);
                return self.waiting.push_front(waiting);
            }
            Err(error) => return waiting.asker.tell(Told::Failed(error)),
        }
        let Waiting { ask, asker, .. } = waiting;
        let mut asker = Some(asker);
        let begun = self.begin(i, kept, ask, prompt, &mut asker);
        if let (Err(error), Some(asker)) = (begun, &mut asker) {
            asker.tell(Told::Failed(error));
        }
    }

    fn begin(
        &mut self,
        i: usize,
        kept: usize,
        ask: Ask,
        prompt: Prompt<M::Picture>,
        asker: &mut Option<Asker>,
    ) -> Result<()> {
        let claim = self.claim(i, kept, &prompt, ask.n_predict)?;
        let (cached, n_prompt) = (
            units::rows(&prompt.units[..kept]),
            units::rows(&prompt.units),
        );
        let Some(told) = asker else {
            return Err(Error::contract("a question of nobody"));
        };
        told.tell(Told::Slot {
            slot: i,
            cached,
            prompt: n_prompt,
        });
        if !told.listens() {
            return Ok(());
        }
        let notes = Notes::default();
        let sampler = self.mind.sampler(&ask.sampler);
        let chooser = Chooser::new(sampler, ask.constraint, ask.n_probs, notes.clone());
        let Prompt {
            pieces,
            units: all,
            policy,
            controller,
        } = prompt;
        if kept == 0 {
            let seq = self.rooms[i].seq;
            self.rooms[i].slot = slot(&mut self.mind, controller, seq);
            self.rooms[i].hold(Held::nothing(policy));
        }
        let engine = self.mind.engine();
        self.rooms[i].slot.with(engine, |session| {
            session.sampler = Box::new(chooser);
            session.set_share(claim.cells);
            Ok(())
        })?;
        self.used(i);
        self.stats.questions += 1;
        self.stats.cached_tokens += cached as u64;
        let watch = ask.watch.then(|| Watch {
            layouts: self.mind.layouts(&ask.prompt),
        });
        let pieces = units::behind(pieces, kept).into();
        let asker = asker
            .take()
            .ok_or_else(|| Error::contract("a question of nobody"))?;
        self.rooms[i].work = Some(Work {
            asker,
            stage: Stage::Pictures(pieces, Vec::new()),
            new: all[kept..].to_vec(),
            n_predict: ask.n_predict,
            limit: claim.limit,
            reserved: claim.cells,
            paused: false,
            n_prompt,
            said: 0,
            seen: None,
            watch,
            stops: Stops::new(ask.stop),
            notes,
            n_probs: ask.n_probs,
            text: String::new(),
            encode: std::time::Duration::ZERO,
            images: Vec::new(),
        });
        Ok(())
    }

    /// Lets the slot hold the first `kept` units of the prompt and nothing else, or nothing; gives how many.
    fn settle(&mut self, i: usize, kept: usize, prompt: &Prompt<M::Picture>) -> Result<usize> {
        let keeps = kept > 0 && self.rooms[i].held.policy == prompt.policy;
        if keeps && matches!(self.rooms[i].keep(self.mind.engine(), kept), Ok(true)) {
            return Ok(kept);
        }
        self.leave_books(i);
        self.rooms[i].clear(self.mind.engine(), false)?;
        Ok(0)
    }
}
