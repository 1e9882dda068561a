//! What is in the cache before anything is timed.

use super::Test;
use crate::cache::{Cell, Pos};
use crate::controller::Origin;
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};
use crate::generate::{Segment, Session};

/// Tokens that go through the model where the others are copies of them.
const DECODED: usize = 64;

/// Fills an empty session; false: cancelled.
pub(super) fn fill<E: Engine>(
    session: &mut Session<E>,
    test: &Test,
    tokens: &mut dyn FnMut() -> Token,
    cancelled: &dyn Fn() -> bool,
) -> Result<bool> {
    let whole = test.before();
    let decoded = match test.depth_copies {
        true => whole.min(DECODED),
        false => whole,
    };
    let earlier = Segment::Tokens((0..decoded).map(|_| tokens()).collect());
    if !session.prefill(&[earlier], cancelled)? {
        return Ok(false);
    }
    session.engine.logits()?;
    copy(session, whole - decoded)?;
    Ok(true)
}

/// Lets `n` more positions hold what the first ones do.
fn copy<E: Engine>(session: &mut Session<E>, mut n: usize) -> Result<()> {
    let entries = session.controller.ledger().entries();
    let held: Vec<Cell> = entries.map(|entry| entry.cell).collect();
    let mut rows = Vec::new();
    if n > 0 && !session.engine.save_rows(&held, &mut rows)? {
        let reason = "this cache cannot be copied, measure without";
        return Err(Error::option("depth_copies", reason));
    }
    let row = (rows.len() / held.len().max(1)).max(1);
    let mut cells = Vec::new();
    while n > 0 {
        let first = session.controller.next_pos();
        let pos: Vec<Pos> = (first..).take(n.min(held.len())).collect();
        for (row, pos) in rows.chunks_mut(row).zip(&pos) {
            if let Some(place) = row.first_chunk_mut() {
                *place = pos.to_ne_bytes();
            }
        }
        let copied = &rows[..pos.len() * row];
        let seq = session.sequence();
        session.engine.restore_rows(seq, &pos, copied, &mut cells)?;
        session.controller.inserted(&cells, &pos, Origin::TEXT)?;
        n -= pos.len();
    }
    Ok(())
}
