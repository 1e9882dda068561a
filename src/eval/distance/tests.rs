//! A scripted engine whose logits depend on what is in its cache, against the formulas written
//! down once more.

use std::ops::Range;

use serde_json::{Value, json};

use super::*;
use crate::cache::Cell;
use crate::controller::Controller;
use crate::engine::scripted::{EOG, Scripted, hashed};
use crate::engine::{Batch, Capabilities, KvBytes, Observation, SeqId, Vocabulary};
use crate::policy::{EvictionPolicy, Observe, Plan};

const N_VOCAB: usize = 16;

/// Its logits are sums over the positions in the cache, as the full cache numbers them.
struct Sums {
    inner: Scripted,
    logits: Vec<f32>,
    /// Of this position on, the answer ends.
    ends: Pos,
}

impl Sums {
    fn new() -> Self {
        Sums {
            inner: Scripted::new(64, 8).patched(),
            logits: Vec::new(),
            ends: 30,
        }
    }
}

fn logit(token: usize, held: &[Pos]) -> f32 {
    held.iter()
        .map(|&pos| 4.0 * hashed(token as u64, 1, pos) as f32)
        .sum()
}

impl Engine for Sums {
    fn decode(
        &mut self,
        batch: Batch<'_>,
        cells: &mut Vec<Cell>,
        seen: &mut Observation,
    ) -> Result<()> {
        self.inner.decode(batch, cells, seen)?;
        let occupied = self.inner.occupied();
        let mut held: Vec<Pos> = occupied.iter().map(|&(_, pos)| pos).collect();
        // The order in which floats are summed up matters.
        held.sort_unstable();
        self.logits = (0..N_VOCAB).map(|token| logit(token, &held)).collect();
        if held.iter().any(|&pos| pos >= self.ends) {
            self.logits[EOG as usize] = 1e3;
        } else {
            self.logits[EOG as usize] = -1e3;
        }
        Ok(())
    }

    fn logits(&self) -> Result<&[f32]> {
        Ok(&self.logits)
    }

    fn vocabulary(&self) -> Option<&(dyn Vocabulary + '_)> {
        self.inner.vocabulary()
    }

    fn remove(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        self.inner.remove(seq, ranges)
    }

    fn shift(&mut self, seq: SeqId, from: Pos, by: Pos) -> Result<()> {
        self.inner.shift(seq, from, by)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            shifts: self.inner.capabilities().shifts,
            ..Capabilities::default()
        }
    }

    fn rewind(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
        self.inner.rewind(seq, from, left)
    }

    fn n_cells(&self) -> usize {
        self.inner.n_cells()
    }

    fn n_batch(&self) -> usize {
        self.inner.n_batch()
    }

    fn kv_bytes(&self) -> KvBytes {
        self.inner.kv_bytes()
    }
}

/// Takes these positions out after the prompt, and one more after each token; moves the rest down
/// if it is told to.
struct Loses {
    at_prompt: Vec<Pos>,
    in_steps: Vec<Pos>,
    shift: Option<Shift>,
}

impl Loses {
    fn evict(cache: &Ledger, pos: &[Pos], plan: &mut Plan) {
        let lost = cache.entries().filter(|entry| pos.contains(&entry.pos));
        plan.evict.extend(lost.map(|entry| entry.cell));
    }
}

impl EvictionPolicy for Loses {
    fn name(&self) -> &'static str {
        "loses"
    }

    fn params(&self) -> Value {
        json!({})
    }

    fn observe(&self) -> Observe {
        Observe::Nothing
    }

    fn evicts(&self) -> bool {
        true
    }

    fn shifts(&self) -> bool {
        self.shift.is_some()
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        Loses::evict(cache, &self.at_prompt, plan);
        plan.shift = self.shift;
        Ok(())
    }

    fn after_step(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        if !self.in_steps.is_empty() {
            let pos = self.in_steps.remove(0);
            Loses::evict(cache, &[pos], plan);
        }
        Ok(())
    }
}

fn session(policy: Box<dyn EvictionPolicy>) -> Session<Sums> {
    let engine = Sums::new();
    let n_cells = engine.n_cells();
    Session::new(engine, Controller::new(policy, n_cells))
}

fn prompt() -> Vec<Segment> {
    vec![Segment::Tokens((1..=20).collect())]
}

fn said() -> Said {
    let mut full = session(Box::new(AttentiveFull::all(2)));
    let said = listen(&mut full, &prompt(), 99, &|| false)
        .unwrap()
        .unwrap();
    // Tokens 20 to 30 go in; the last prediction ends the answer.
    assert!(said.ended && said.tokens.len() == 12, "{said:?}");
    assert_eq!(said.fed().len(), 11);
    assert_eq!(said.pending(), None);
    assert_eq!(said.attention.len(), 11);
    said
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let powers: Vec<f64> = logits
        .iter()
        .map(|&x| (f64::from(x) - most).exp())
        .collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|x| x / sum).collect()
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * a.abs().max(1e-3), "{a} {b}");
}

#[test]
fn the_full_cache_is_at_no_distance_of_itself() {
    let said = said();
    let mut again = session(Box::new(AttentiveFull::all(2)));
    let mut places = Places::default();
    let followed = follow(&mut again, &prompt(), &said, &mut places, &|| false).unwrap();
    let distance = followed.unwrap().distance().unwrap();
    assert!(distance.kl.iter().all(|&kl| kl == 0.0), "{distance:?}");
    assert!(distance.lost.iter().all(|&lost| lost == 0.0));
    assert_eq!((distance.kl_mean, distance.kl_p99), (0.0, 0.0));
    assert_eq!((distance.top1, distance.ppl_ratio), (1.0, 1.0));
    assert_eq!(distance.first_differing, None);
    assert_eq!((distance.n_tokens, distance.lost.len()), (12, 11));
}

#[test]
fn distances_are_what_the_formulas_say() {
    let said = said();
    let at_prompt: Vec<Pos> = vec![2, 3, 7, 11, 12, 18];
    let in_steps: Vec<Pos> = vec![5, 20, 0, 21];
    let mut policy = session(Box::new(Loses {
        at_prompt: at_prompt.clone(),
        in_steps: in_steps.clone(),
        shift: None,
    }));
    let mut places = Places::default();
    let followed = follow(&mut policy, &prompt(), &said, &mut places, &|| false).unwrap();
    let distance = followed.unwrap().distance().unwrap();

    let (mut kls, mut losts, mut same) = (Vec::new(), Vec::new(), Vec::new());
    let (mut own, mut other) = (0.0, 0.0);
    for (i, &token) in said.tokens.iter().enumerate() {
        let newest = 19 + i as Pos;
        let all: Vec<Pos> = (0..=newest).collect();
        // The first prediction comes before anything leaves; what a step takes out, the next misses.
        let gone: Vec<Pos> = match i {
            0 => Vec::new(),
            _ => {
                let steps = in_steps.iter().take(i - 1);
                at_prompt.iter().chain(steps).copied().collect()
            }
        };
        let held: Vec<Pos> = all
            .iter()
            .copied()
            .filter(|pos| !gone.contains(pos))
            .collect();
        let logits = |held: &[Pos]| -> Vec<f32> {
            let mut logits: Vec<f32> = (0..N_VOCAB).map(|t| logit(t, held)).collect();
            logits[EOG as usize] = if newest >= 30 { 1e3 } else { -1e3 };
            logits
        };
        let (p, q) = (softmax(&logits(&all)), softmax(&logits(&held)));
        let terms = p.iter().zip(&q).filter(|(p, _)| **p > 0.0);
        kls.push(terms.map(|(p, q)| p * (p / q).ln()).sum::<f64>().max(0.0));
        own += p[token as usize].ln();
        other += q[token as usize].ln();
        let best = (0..N_VOCAB).rev().max_by(|&a, &b| q[a].total_cmp(&q[b]));
        same.push(best == Some(token as usize));
        if i > 0 {
            let paid = |pos: Pos| hashed(0, newest, pos);
            let sum: f64 = all.iter().map(|&pos| paid(pos)).sum();
            let lost = gone.iter().map(|&pos| paid(pos)).sum::<f64>() / sum;
            losts.push(lost);
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!(
        mean(&kls) > 1e-3 && mean(&losts) > 0.05,
        "{kls:?} {losts:?}"
    );
    assert!(
        kls.iter()
            .zip(&distance.kl)
            .all(|(a, &b)| (a - f64::from(b)).abs() < 1e-6)
    );
    near(distance.kl_mean, mean(&kls));
    near(distance.ppl_ratio, ((own - other) / 12.0).exp());
    near(distance.log_prob_full, own);
    near(distance.log_prob, other);
    // Attention comes as f32.
    assert!((distance.attention_lost.unwrap() - mean(&losts)).abs() < 1e-6);
    assert_eq!(distance.first_differing, same.iter().position(|same| !same));
    assert!(
        same.contains(&false),
        "a policy that predicts the same shows nothing"
    );
    near(
        distance.top1,
        same.iter().filter(|&&s| s).count() as f64 / 12.0,
    );
    kls.sort_by(f64::total_cmp);
    near(distance.kl_median, (kls[5] + kls[6]) / 2.0);
    near(distance.kl_p99, kls[10] + 0.89 * (kls[11] - kls[10]));
}

/// A policy that moves tokens loses the attention of those it took out, not of those it moved.
#[test]
fn moved_tokens_are_not_lost() {
    let said = said();
    let lost = |shift: Option<Shift>| {
        let mut policy = session(Box::new(Loses {
            at_prompt: vec![4, 5, 6],
            in_steps: Vec::new(),
            shift,
        }));
        let mut places = Places::default();
        let followed = follow(&mut policy, &prompt(), &said, &mut places, &|| false).unwrap();
        followed.unwrap().distance().unwrap().lost
    };
    let moved = lost(Some(Shift { from: 7, by: 3 }));
    assert_eq!(moved, lost(None));
    assert!(moved.iter().all(|&lost| lost > 0.0));
}

#[test]
fn what_is_no_number_is_refused() {
    let mut followed = Followed::default();
    assert!(followed.add(&[0.0, 1.0], &[0.0], 0).is_err());
    assert!(followed.add(&[0.0, 1.0], &[0.0, f32::NAN], 0).is_err());
    assert!(followed.add(&[0.0, 1.0], &[0.0, 1.0], 2).is_err());
    assert!(followed.add(&[0.0, 1.0], &[0.0, 1.0], -1).is_err());
    assert!(likeliest(&[]).is_err());
    assert!(Followed::default().distance().is_none());
}

/// scipy.special.rel_entr(softmax(p), softmax(q)).sum()
#[test]
fn the_divergence_is_scipys() {
    let (p, q) = ([1.0, 2.0, 3.0, -4.0, 0.5], [0.9, 2.5, 2.0, -1.0, 0.5]);
    let divergence = kl(&log_softmax(&p), &log_softmax(&q));
    near(divergence, 0.23997166142938378);
    assert_eq!(kl(&log_softmax(&p), &log_softmax(&p)), 0.0);
    // A token that cannot come adds nothing.
    let never = [1.0, f32::NEG_INFINITY];
    assert_eq!(
        kl(&log_softmax(&never), &log_softmax(&[1.0, 1.0])),
        std::f64::consts::LN_2
    );
}
