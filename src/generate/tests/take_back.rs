//! A conversation that goes on from the beginning of what it holds.

use super::*;

fn said(policy: &str, options: &PolicyOptions, n_predict: usize) -> Session<Scripted> {
    let says = |pos: Pos| 1 + pos % 7;
    let engine = Scripted::new(200, 8).patched().with_says(says);
    let mut session = session(engine, policy, options).with_store(BinOptions::ram(1 << 12));
    let prompt = [tokens(5), picture(30), tokens(4)];
    let (said, _) = turn(&mut session, &prompt, Some(n_predict), &|| false);
    assert_eq!(said.unwrap().tokens.len(), n_predict);
    session
}

fn held(session: &Session<Scripted>) -> Vec<Pos> {
    let mut ledger: Vec<Pos> = session
        .controller
        .ledger()
        .entries()
        .map(|e| e.pos)
        .collect();
    let mut cells: Vec<Pos> = session
        .engine
        .occupied()
        .iter()
        .map(|&(_, pos)| pos)
        .collect();
    ledger.sort_unstable();
    cells.sort_unstable();
    assert_eq!(ledger, cells);
    cells
}

#[test]
fn what_follows_is_what_would_have_followed() {
    let mut session = said("full", &PolicyOptions::default(), 10);
    assert_eq!(session.controller.next_pos(), 48);
    assert!(session.take_back(48).unwrap());
    assert!(!session.take_back(49).unwrap());
    assert_eq!(held(&session).len(), 48);
    assert!(session.take_back(36).unwrap());
    assert_eq!(held(&session), (0..36).collect::<Vec<_>>());
    let (again, _) = turn(&mut session, &[tokens(3)], Some(10), &|| false);
    assert_eq!(
        again.unwrap().tokens,
        (38..48).map(|pos| 1 + pos % 7).collect::<Vec<_>>()
    );
    assert!(session.take_back(0).unwrap());
    assert_eq!(
        (held(&session).len(), session.controller.next_pos()),
        (0, 0)
    );
}

#[test]
fn nothing_goes_on_from_what_was_evicted() {
    let mut session = said("hae", &PolicyOptions::default(), 10);
    let before = held(&session);
    let gone: Vec<Pos> = (5..35)
        .filter(|pos| before.binary_search(pos).is_err())
        .collect();
    assert!(!gone.is_empty());
    for pos in gone {
        assert!(!session.take_back(pos + 1).unwrap());
    }
    assert_eq!(held(&session), before);
    // The end of the answer can go, and the conversation knows of it no more.
    assert!(session.take_back(45).unwrap());
    assert_eq!(session.controller.next_pos(), 45);
    assert_eq!(session.history().pieces().last().unwrap().end(), 45);
    let (next, _) = turn(&mut session, &[tokens(3)], Some(2), &|| false);
    assert_eq!(next.unwrap().tokens.len(), 2);
    assert_eq!(session.history().pieces().last().unwrap().end(), 49);
}

/// Rows of the answer that wait outside of the cache are not those of the next one.
#[test]
fn rows_that_wait_are_taken_back_too() {
    let options = PolicyOptions {
        kv_budget: Some(Amount::Cells(24)),
        bin_size: 4,
        sinks: 2,
        recent: 4,
        ..PolicyOptions::default()
    };
    let mut session = said("hae", &options, 60);
    let waits = |session: &Session<Scripted>| session.store().positions().max();
    let newest = waits(&session).unwrap();
    let kept = |pos: Pos| held(&session).binary_search(&pos).is_ok();
    let from = (40..newest).rev().find(|&from| kept(from - 1)).unwrap();
    assert!(session.take_back(from).unwrap());
    assert!(waits(&session).is_none_or(|pos| pos < from));
    assert_eq!(session.controller.next_pos(), from);
    turn(&mut session, &[tokens(3)], Some(20), &|| false)
        .0
        .unwrap();
}
