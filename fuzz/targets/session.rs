//! Session files, behind their checksum: the bytes are what it protects. What can be read and believed is
//! then talked with.

#![no_main]

use std::collections::HashMap;

use hae::cache::{BinOptions, Cell, Pos};
use hae::controller::Controller;
use hae::engine::scripted::Scripted;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::generate::{Segment, Session};
use hae::policy::{Limits, PolicyOptions, create};
use hae::saved::Saved;
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

const CELLS: usize = 64;
const WIDTH: usize = 2;

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    // As it is: headers.
    hae_fuzz::one_line(Saved::decode("f".as_ref(), data));
    let mut bytes = b"HAE-SESS".to_vec();
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(Sha256::digest(data));
    bytes.extend(data);
    if let Some(saved) = hae_fuzz::one_line(Saved::decode("f".as_ref(), &bytes)) {
        hae_fuzz::one_line(go_on(&saved));
    }
});

/// As [`Saved::put_back`], without a model: the engine holds the tokens that the file speaks of, where it
/// can.
fn go_on(saved: &Saved) -> hae::Result<()> {
    let limits = Limits {
        n_layer: 2,
        n_cells: CELLS,
    };
    let policy = create("hae", &PolicyOptions::default(), limits)?;
    let mut engine = Scripted::new(CELLS, 8).patched();
    let mut lies: HashMap<Pos, Cell> = HashMap::new();
    let mut order: Vec<_> = saved.ledger.entries.iter().map(|e| e.pos).collect();
    order.sort_unstable();
    for pos in order {
        let batch = Batch {
            seq: 0,
            input: Input::Tokens(&[1]),
            pos: &[pos],
            queries: &[],
            logits: false,
            lookup: None,
        };
        let mut got = Vec::new();
        engine.decode(batch, &mut got, &mut Observation::default())?;
        lies.extend(got.first().map(|&cell| (pos, cell)));
    }
    let cells: Vec<Cell> = saved.ledger.entries.iter().map(|e| lies[&e.pos]).collect();
    let mut session = Session::new(engine, Controller::new(policy, CELLS));
    session = session.with_store(BinOptions::default());
    session.controller.load(&saved.ledger, &cells)?;
    session.resume(saved.history.clone(), &saved.host_bin)?;
    let whole = saved
        .history
        .pieces()
        .iter()
        .all(|placed| match placed.segment.as_ref() {
            Segment::Image { embeddings, n, .. } => n.checked_mul(WIDTH) == Some(embeddings.len()),
            Segment::Tokens(_) => true,
        });
    if !whole {
        return Ok(());
    }
    if session.prefill(&[Segment::Tokens(vec![1, 2, 3])], &|| false)? {
        for _ in 0..4 {
            session.step(1)?;
        }
    }
    Ok(())
}
