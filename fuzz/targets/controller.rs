//! The controller and its ledger against a naive model: a list of tokens. The bytes are operations and plans,
//! most of which make sense; what cannot be is refused by both, and both are emptied then.

#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use arbitrary::{Result as Drawn, Unstructured};
use hae::cache::{Cell, Counts, Ledger, Modality, Observation, Pos, State};
use hae::controller::{Controller, Origin};
use hae::policy::{EvictionPolicy, Observe, Plan, Shift};
use libfuzzer_sys::fuzz_target;

const CELLS: u32 = 12;

/// A policy that plans what it is told.
struct Told(Arc<Mutex<Plan>>);

impl EvictionPolicy for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    fn params(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn observe(&self) -> Observe {
        Observe::Nothing
    }

    fn after_prefill(&mut self, _: &Ledger, plan: &mut Plan) -> hae::Result<()> {
        plan.clone_from(&self.0.lock().unwrap());
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, plan: &mut Plan) -> hae::Result<()> {
        plan.clone_from(&self.0.lock().unwrap());
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Token {
    pos: Pos,
    modality: Modality,
    image: Option<u32>,
    state: State,
    turn: u32,
    separator: bool,
    sum: f32,
    max: f32,
    seen: f32,
    latest: f32,
}

/// What cannot be.
struct Wrong;

#[derive(Clone, Default)]
struct Naive {
    tokens: BTreeMap<Cell, Token>,
    /// The token that came last.
    newest: Option<Cell>,
    first: Option<Pos>,
    turn: u32,
    counts: Counts,
}

impl Naive {
    fn newest(&self) -> Option<Pos> {
        self.newest.map(|cell| self.tokens[&cell].pos)
    }

    fn put(
        &mut self,
        cell: Cell,
        pos: Pos,
        modality: Modality,
        image: Option<u32>,
    ) -> Result<(), Wrong> {
        if cell >= CELLS || self.tokens.contains_key(&cell) || !(0..Pos::MAX).contains(&pos) {
            return Err(Wrong);
        }
        let token = Token {
            pos,
            modality,
            image,
            state: State::Live,
            turn: self.turn,
            separator: false,
            sum: 0.0,
            max: 0.0,
            seen: 0.0,
            latest: 0.0,
        };
        self.tokens.insert(cell, token);
        *self.counts.live.of_mut(modality) += 1;
        self.counts.peak = self.counts.peak.max(self.tokens.len());
        Ok(())
    }

    fn insert(&mut self, cell: Cell, pos: Pos, origin: Origin) -> Result<(), Wrong> {
        let least = match (self.newest(), origin.shared) {
            (None, _) => 0,
            (Some(newest), true) => newest,
            (Some(newest), false) => newest.checked_add(1).ok_or(Wrong)?,
        };
        if pos < least {
            return Err(Wrong);
        }
        let modality = if origin.shared {
            Modality::Vision
        } else {
            origin.modality
        };
        self.put(cell, pos, modality, origin.image)?;
        self.newest = Some(cell);
        self.first.get_or_insert(pos);
        Ok(())
    }

    fn recall(&mut self, cell: Cell, pos: Pos, origin: Origin) -> Result<(), Wrong> {
        if self.newest().is_none_or(|newest| pos >= newest) {
            return Err(Wrong);
        }
        self.put(cell, pos, origin.modality, origin.image)?;
        self.first = self.first.map(|first| first.min(pos));
        let evicted = self.counts.evicted.of_mut(origin.modality);
        *evicted = evicted.saturating_sub(1);
        *self.counts.recalled.of_mut(origin.modality) += 1;
        Ok(())
    }

    fn observe(&mut self, seen: &Observation, decay: f32) -> Result<(), Wrong> {
        if seen.queries.is_empty() {
            return Ok(());
        }
        let n = seen.sum.len().min(seen.max.len());
        let rows = |pos: Pos| seen.queries.iter().filter(|&&query| query >= pos).count();
        let mut after = self.tokens.clone();
        for (&cell, token) in &mut after {
            let i = cell as usize;
            let rows = if i < n { rows(token.pos) } else { 0 };
            let (add, peak) = if rows > 0 {
                (seen.sum[i], seen.max[i])
            } else {
                (0.0, 0.0)
            };
            if !(token.sum * decay + add).is_finite() || !peak.is_finite() {
                return Err(Wrong);
            }
            token.sum = token.sum * decay + add;
            token.max = if peak > token.max { peak } else { token.max };
            token.seen = token.seen * decay + rows as f32;
            token.latest += add;
        }
        self.tokens = after;
        Ok(())
    }

    fn plan(&mut self, plan: &Plan) -> Result<(), Wrong> {
        for &cell in &plan.evict {
            let token = *self.tokens.get(&cell).ok_or(Wrong)?;
            if self.newest == Some(cell) {
                return Err(Wrong);
            }
            self.tokens.remove(&cell);
            self.leave(&token);
            *self.counts.evicted.of_mut(token.modality) += 1;
        }
        for &cell in &plan.restore {
            let token = self
                .tokens
                .get_mut(&cell)
                .filter(|t| t.state == State::Binned)
                .ok_or(Wrong)?;
            token.state = State::Live;
            *self.counts.binned.of_mut(token.modality) -= 1;
            *self.counts.live.of_mut(token.modality) += 1;
            *self.counts.restored.of_mut(token.modality) += 1;
        }
        for &cell in &plan.bin {
            let newest = self.newest;
            let token = self
                .tokens
                .get_mut(&cell)
                .filter(|t| t.state == State::Live)
                .ok_or(Wrong)?;
            if newest == Some(cell) {
                return Err(Wrong);
            }
            token.state = State::Binned;
            *self.counts.live.of_mut(token.modality) -= 1;
            *self.counts.binned.of_mut(token.modality) += 1;
        }
        if let Some(Shift { from, by }) = plan.shift {
            let to = from.saturating_sub(by);
            if by <= 0 || to < 0 || self.tokens.values().any(|t| (to..from).contains(&t.pos)) {
                return Err(Wrong);
            }
            for token in self.tokens.values_mut().filter(|t| t.pos >= from) {
                token.pos -= by;
            }
        }
        Ok(())
    }

    fn leave(&mut self, token: &Token) {
        match token.state {
            State::Live => *self.counts.live.of_mut(token.modality) -= 1,
            State::Binned => *self.counts.binned.of_mut(token.modality) -= 1,
        }
    }

    fn rewind(&mut self, from: Pos) {
        let gone: Vec<Cell> = self
            .tokens
            .iter()
            .filter(|(_, t)| t.pos >= from)
            .map(|(&c, _)| c)
            .collect();
        for cell in gone {
            let token = self.tokens.remove(&cell).unwrap();
            self.leave(&token);
        }
        // The later cell where rows of a picture share the newest position.
        self.newest = self
            .tokens
            .iter()
            .max_by_key(|(cell, t)| (t.pos, **cell))
            .map(|(&c, _)| c);
        if self.newest.is_none() {
            self.first = None;
        }
    }

    /// Together at the front, in the order of the cells.
    fn compacted(&mut self) -> Vec<(Cell, Cell)> {
        let cells: Vec<Cell> = self.tokens.keys().copied().collect();
        let mut moves = Vec::new();
        for (to, from) in (0..).zip(cells) {
            if from != to {
                let token = self.tokens.remove(&from).unwrap();
                self.tokens.insert(to, token);
                moves.push((from, to));
                if self.newest == Some(from) {
                    self.newest = Some(to);
                }
            }
        }
        moves
    }

    fn compare(&self, controller: &Controller) {
        let ledger = controller.ledger();
        let held: BTreeMap<Cell, Token> = ledger
            .entries()
            .map(|e| {
                let token = Token {
                    pos: e.pos,
                    modality: e.modality,
                    image: e.image,
                    state: e.state,
                    turn: e.turn,
                    separator: e.separator,
                    sum: e.sum,
                    max: e.max,
                    seen: e.seen,
                    latest: e.latest,
                };
                (e.cell, token)
            })
            .collect();
        assert_eq!(held, self.tokens);
        assert_eq!(ledger.counts(), self.counts);
        assert_eq!(ledger.newest(), self.newest());
        assert_eq!(ledger.first(), self.first);
        assert_eq!(ledger.turn(), self.turn);
    }
}

fn cell(u: &mut Unstructured<'_>) -> Drawn<Cell> {
    u.int_in_range(0..=CELLS)
}

fn cells(u: &mut Unstructured<'_>) -> Drawn<Vec<Cell>> {
    let n = u.int_in_range(0..=4)?;
    (0..n).map(|_| cell(u)).collect()
}

/// Mostly what may come next.
fn positions(u: &mut Unstructured<'_>, n: usize, next: Pos) -> Drawn<Vec<Pos>> {
    let from = match u.int_in_range(0..=9)? {
        0 => u.arbitrary()?,
        1 => next.saturating_sub(u.int_in_range(0..=3)?),
        _ => next.saturating_add(u.int_in_range(0..=1)?),
    };
    Ok((0..n as Pos).map(|i| from.saturating_add(i)).collect())
}

fn origin(u: &mut Unstructured<'_>) -> Drawn<Origin> {
    Ok(match u.int_in_range(0..=3)? {
        0 => Origin::picture(u.int_in_range(0..=2)?),
        1 => Origin {
            shared: true,
            ..Origin::picture(u.int_in_range(0..=2)?)
        },
        _ => Origin::TEXT,
    })
}

fn value(u: &mut Unstructured<'_>) -> Drawn<f32> {
    Ok(match u.int_in_range(0..=40)? {
        0 => f32::NAN,
        1 => f32::MAX,
        n => n as f32 / 64.0,
    })
}

fn play(u: &mut Unstructured<'_>) -> Drawn<()> {
    let told = Arc::new(Mutex::new(Plan::default()));
    let mut controller = Controller::new(Box::new(Told(Arc::clone(&told))), CELLS as usize);
    let mut naive = Naive::default();
    let mut decoding = false;
    while !u.is_empty() {
        let next = controller.next_pos();
        let (ours, theirs): (hae::Result<()>, Result<(), Wrong>) = match u.int_in_range(0..=15)? {
            0 => {
                controller.begin_turn();
                naive.turn += 1;
                naive.tokens.values_mut().for_each(|t| t.latest = 0.0);
                decoding = false;
                (Ok(()), Ok(()))
            }
            1..=4 => {
                let free: Vec<Cell> = (0..CELLS)
                    .filter(|c| !naive.tokens.contains_key(c))
                    .collect();
                let cells = match u.ratio(9, 10)? {
                    true => free.into_iter().take(u.int_in_range(0..=4)?).collect(),
                    false => cells(u)?,
                };
                let (pos, origin) = (positions(u, cells.len(), next)?, origin(u)?);
                let theirs = cells
                    .iter()
                    .zip(&pos)
                    .try_for_each(|(&c, &p)| naive.insert(c, p, origin));
                (controller.inserted(&cells, &pos, origin), theirs)
            }
            5..=6 => {
                let n = u.int_in_range(0..=CELLS as usize)?;
                let mut values = || (0..n).map(|_| value(u)).collect::<Drawn<Vec<f32>>>();
                let (sum, max) = (values()?, values()?);
                let rows = u.int_in_range(0..=2)?;
                let queries = (0..rows)
                    .map(|i| next - rows + i)
                    .filter(|&query| query >= 0)
                    .collect();
                let seen = Observation {
                    sum,
                    max,
                    queries,
                    ..Observation::default()
                };
                if decoding {
                    naive.tokens.values_mut().for_each(|t| t.latest = 0.0);
                }
                (controller.observed(&seen), naive.observe(&seen, 1.0))
            }
            7..=9 => {
                let binned = naive
                    .tokens
                    .iter()
                    .filter(|(_, t)| t.state == State::Binned);
                let binned: Vec<Cell> = binned.map(|(&c, _)| c).collect();
                let shift = match u.ratio(1, 8)? {
                    true => Some(Shift {
                        from: u.int_in_range(-1..=16)?,
                        by: u.int_in_range(-1..=4)?,
                    }),
                    false => None,
                };
                let plan = Plan {
                    bin: cells(u)?,
                    restore: binned.into_iter().take(u.int_in_range(0..=2)?).collect(),
                    evict: cells(u)?,
                    shift,
                };
                told.lock().unwrap().clone_from(&plan);
                let ours = match u.arbitrary()? {
                    true => {
                        decoding = true;
                        controller.after_prefill(true).map(|_| ())
                    }
                    false => controller.after_step().map(|_| ()),
                };
                if ours.is_ok() {
                    let ranges = controller.planned();
                    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                    let n: usize = ranges.iter().map(|r| (r.end - r.start) as usize).sum();
                    assert!(n <= plan.evict.len());
                }
                (ours, naive.plan(&plan))
            }
            10 => {
                let evict = cells(u)?;
                let ours = controller.remove(&evict).map(|_| ());
                (
                    ours,
                    naive.plan(&Plan {
                        evict,
                        ..Plan::default()
                    }),
                )
            }
            11 => {
                let (cells, origin) = (cells(u)?, origin(u)?);
                let pos = positions(u, cells.len(), next / 2)?;
                let theirs = cells
                    .iter()
                    .zip(&pos)
                    .try_for_each(|(&c, &p)| naive.recall(c, p, origin));
                (controller.recalled(&cells, &pos, origin), theirs)
            }
            12 => {
                let from = u.int_in_range(-1..=24)?;
                naive.rewind(from);
                assert_eq!(controller.rewind(from), naive.tokens.len());
                (Ok(()), Ok(()))
            }
            13 => (controller.moved(&naive.compacted()), Ok(())),
            14 => {
                let cells = cells(u)?;
                let separators = vec![true; cells.len()];
                let theirs = cells.iter().try_for_each(|c| {
                    naive.tokens.get_mut(c).ok_or(Wrong)?.separator = true;
                    Ok(())
                });
                (controller.mark_separators(&cells, &separators), theirs)
            }
            _ => {
                controller.reopen_pictures();
                let turn = naive.turn;
                for token in naive
                    .tokens
                    .values_mut()
                    .filter(|t| t.modality == Modality::Vision)
                {
                    *token = Token {
                        turn,
                        sum: 0.0,
                        max: 0.0,
                        seen: 0.0,
                        latest: 0.0,
                        ..*token
                    };
                }
                (Ok(()), Ok(()))
            }
        };
        assert_eq!(ours.is_err(), theirs.is_err(), "{ours:?}");
        if ours.is_err() {
            controller.clear();
            naive = Naive::default();
            decoding = false;
        }
        naive.compare(&controller);
    }
    Ok(())
}

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let _ = play(&mut Unstructured::new(data));
});
