use super::*;
use crate::cache::PerModality;

fn observation(sum: &[f32], max: &[f32], queries: &[Pos]) -> Observation {
    Observation {
        sum: sum.to_vec(),
        max: max.to_vec(),
        queries: queries.to_vec(),
        ..Observation::default()
    }
}

/// Text at positions 0, 1, 2 in cells 0, 2, 1.
fn three() -> Ledger {
    let mut ledger = Ledger::new(8);
    for (cell, pos) in [(0, 0), (2, 1), (1, 2)] {
        ledger.insert(cell, pos, Modality::Text, None).unwrap();
    }
    ledger
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn what_cannot_be_inserted() {
    let mut ledger = three();
    let mut insert = |cell, pos| message(ledger.insert(cell, pos, Modality::Text, None));
    assert_eq!(
        insert(2, 3),
        "cache bookkeeping: cell 2 got position 3 but holds position 1"
    );
    assert_eq!(
        insert(3, 2),
        "cache bookkeeping: cell 3 got position 2, expected 3 or a newer one"
    );
    assert!(insert(8, 3).contains("beyond the 8 cells"));
    assert!(insert(3, Pos::MAX).contains("expected 3"));
    assert!(message(Ledger::new(1).insert(0, -1, Modality::Text, None)).contains("expected 0"));
    assert_eq!(ledger.counts(), three().counts());
}

#[test]
fn the_newest_stays() {
    let mut ledger = three();
    assert!(message(ledger.remove(1)).contains("newest position 2"));
    assert!(message(ledger.bin(1)).contains("newest position 2"));
    assert_eq!(ledger.remove(2).unwrap(), 1);
    assert_eq!(ledger.newest(), Some(2));
}

#[test]
fn states_and_counts() {
    let mut ledger = Ledger::new(4);
    ledger.insert(0, 5, Modality::Vision, Some(3)).unwrap();
    ledger.begin_turn();
    ledger.insert(1, 6, Modality::Text, None).unwrap();
    ledger.insert(2, 7, Modality::Text, None).unwrap();
    assert_eq!(ledger.get(0).map(|e| (e.turn, e.image)), Some((0, Some(3))));
    assert_eq!(ledger.get(1).map(|e| (e.turn, e.image)), Some((1, None)));
    assert_eq!(
        (ledger.first(), ledger.newest(), ledger.turn()),
        (Some(5), Some(7), 1)
    );

    assert!(message(ledger.restore(0)).contains("is live"));
    ledger.bin(0).unwrap();
    assert!(message(ledger.bin(0)).contains("in the recycle bin"));
    assert_eq!(ledger.counts().binned, PerModality { text: 0, vision: 1 });
    ledger.restore(0).unwrap();
    ledger.bin(1).unwrap();
    assert_eq!(ledger.remove(1).unwrap(), 6);
    assert_eq!(ledger.remove(0).unwrap(), 5);
    assert!(message(ledger.remove(0)).contains("is empty"));
    assert!(message(ledger.bin(77)).contains("is empty"));

    let counts = ledger.counts();
    assert_eq!(counts.live, PerModality { text: 1, vision: 0 });
    assert_eq!(counts.binned.total(), 0);
    assert_eq!(counts.evicted, PerModality { text: 1, vision: 1 });
    assert_eq!(counts.restored, PerModality { text: 0, vision: 1 });
    assert_eq!((counts.cells(), counts.peak), (1, 3));

    ledger.clear();
    assert_eq!(
        (ledger.counts(), ledger.newest()),
        (Counts::default(), None)
    );
    ledger.insert(0, 0, Modality::Text, None).unwrap();
}

#[test]
fn exposure_counts_the_rows_that_could_see_a_cell() {
    let mut ledger = three();
    ledger
        .observe(
            &observation(&[1.0, 0.25, 0.5], &[0.5, 0.25, 0.25], &[0, 1, 2]),
            1.0,
        )
        .unwrap();
    let seen: Vec<_> = ledger
        .entries()
        .map(|e| (e.pos, e.seen, e.sum, e.max))
        .collect();
    assert_eq!(
        seen,
        [
            (0, 3.0, 1.0, 0.5),
            (2, 1.0, 0.25, 0.25),
            (1, 2.0, 0.5, 0.25)
        ]
    );
    ledger
        .observe(&observation(&[0.5, 0.5, 0.0], &[0.5, 0.5, 0.0], &[2]), 0.5)
        .unwrap();
    let seen: Vec<_> = ledger
        .entries()
        .map(|e| (e.pos, e.seen, e.sum, e.max))
        .collect();
    assert_eq!(
        seen,
        [
            (0, 2.5, 1.0, 0.5),
            (2, 1.5, 0.625, 0.5),
            (1, 2.0, 0.25, 0.25)
        ]
    );
    // No rows, no change.
    let before: Vec<_> = ledger.entries().collect();
    ledger
        .observe(&observation(&[9.0], &[9.0], &[]), 0.5)
        .unwrap();
    assert_eq!(ledger.entries().collect::<Vec<_>>(), before);
}

#[test]
fn observations_of_another_length() {
    // Longer: cells that nothing was ever put into, whatever they hold.
    let mut ledger = three();
    let (sum, max) = (
        [0.5, 0.2, 0.3, f32::NAN, 9.0],
        [0.5, 0.2, 0.3, f32::NAN, 9.0],
    );
    ledger.observe(&observation(&sum, &max, &[2]), 1.0).unwrap();
    assert_eq!(
        ledger.entries().map(|e| e.sum).collect::<Vec<_>>(),
        [0.5, 0.2, 0.3]
    );
    ledger.insert(3, 3, Modality::Text, None).unwrap();
    assert_eq!(ledger.get(3).map(|e| (e.sum, e.seen)), Some((0.0, 0.0)));
    // Shorter: the last cell was not in view, but decays like the others.
    ledger
        .observe(&observation(&[0.5, 0.5, 0.0], &[0.5, 0.5, 0.0], &[3]), 0.5)
        .unwrap();
    assert_eq!(ledger.get(2).map(|e| (e.sum, e.seen)), Some((0.15, 1.5)));
    assert_eq!(ledger.get(3).map(|e| (e.sum, e.seen)), Some((0.0, 0.0)));
}

#[test]
fn a_removed_cell_starts_from_nothing() {
    let mut ledger = three();
    ledger
        .observe(&observation(&[0.5, 0.2, 0.3], &[0.5, 0.2, 0.3], &[2]), 1.0)
        .unwrap();
    ledger.remove(2).unwrap();
    ledger
        .observe(&observation(&[0.5, 0.2, 0.3], &[0.5, 0.2, 0.3], &[2]), 1.0)
        .unwrap();
    ledger.insert(2, 3, Modality::Text, None).unwrap();
    assert_eq!(
        ledger.get(2).map(|e| (e.sum, e.max, e.seen)),
        Some((0.0, 0.0, 0.0))
    );
}

#[test]
fn scores_that_are_no_numbers() {
    let clean = three();
    for queries in [&[2][..], &[1, 2]] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (sum, max) in [([0.1, 0.1, bad], [0.1; 3]), ([0.1; 3], [0.1, 0.1, bad])] {
                let mut ledger = clean.clone();
                let error = ledger
                    .observe(&observation(&sum, &max, queries), 1.0)
                    .unwrap_err();
                assert!(matches!(error, Error::NanScore { pos: 1, value } if !value.is_finite()));
                assert!(ledger.entries().eq(clean.entries()), "unchanged");
            }
        }
    }
    // A sum that only becomes infinite.
    let mut ledger = clean.clone();
    let huge = observation(&[f32::MAX; 3], &[1.0; 3], &[2]);
    ledger.observe(&huge, 1.0).unwrap();
    assert!(matches!(
        ledger.observe(&huge, 1.0),
        Err(Error::NanScore { pos: 0, .. })
    ));
    // Not visible to the query: whatever stands there does not count.
    let mut ledger = clean;
    ledger
        .observe(
            &observation(&[1.0, f32::NAN, 0.0], &[1.0, 0.0, 0.0], &[1]),
            1.0,
        )
        .unwrap();
    assert_eq!(ledger.get(1).map(|e| e.sum), Some(0.0));
}

#[test]
fn rewinding_takes_back_the_end() {
    let mut ledger = three();
    let before = ledger.clone();
    ledger.insert(3, 3, Modality::Vision, Some(0)).unwrap();
    ledger.insert(5, 4, Modality::Text, None).unwrap();
    ledger.bin(3).unwrap();
    ledger.rewind(3);
    let counts = |ledger: &Ledger| (ledger.counts().live, ledger.counts().binned);
    assert_eq!(counts(&ledger), counts(&before));
    assert_eq!(ledger.counts().evicted, PerModality::default());
    assert_eq!((ledger.newest(), ledger.first()), (Some(2), Some(0)));
    assert!(ledger.entries().eq(before.entries()));
    // The position is free again, and the newest of the rest must stay.
    ledger.insert(5, 3, Modality::Text, None).unwrap();
    ledger.rewind(3);
    assert!(message(ledger.remove(1)).contains("newest position 2"));
    ledger.rewind(0);
    assert_eq!((ledger.newest(), ledger.first()), (None, None));
    assert_eq!(ledger.counts().cells(), 0);
}

#[test]
fn the_latest_attention_is_that_of_the_newest_observation() {
    let mut ledger = three();
    let latest = |ledger: &Ledger| ledger.entries().map(|e| e.latest).collect::<Vec<_>>();
    // The batches of one prompt add up, without a decay.
    ledger.begin_observation();
    ledger
        .observe(&observation(&[0.5, 0.0, 0.5], &[0.5; 3], &[1]), 0.5)
        .unwrap();
    ledger
        .observe(&observation(&[0.25, 0.5, 0.25], &[0.5; 3], &[2]), 0.5)
        .unwrap();
    assert_eq!(latest(&ledger), [0.75, 0.5, 0.75]);
    ledger.begin_observation();
    ledger
        .observe(&observation(&[0.25, 0.5, 0.25], &[0.5; 3], &[2]), 1.0)
        .unwrap();
    assert_eq!(latest(&ledger), [0.25, 0.5, 0.25]);
    // A token takes it along, and leaves nothing behind.
    ledger.remove(0).unwrap();
    ledger.moved(&[(2, 0)]).unwrap();
    assert_eq!(latest(&ledger), [0.25, 0.5]);
    ledger.insert(2, 3, Modality::Text, None).unwrap();
    assert_eq!(latest(&ledger), [0.25, 0.5, 0.0]);
}

#[test]
fn positions_move_down_into_a_gap_only() {
    let mut ledger = Ledger::new(8);
    for pos in 0..6 {
        ledger
            .insert(pos as Cell, pos, Modality::Text, None)
            .unwrap();
    }
    let positions = |ledger: &Ledger| ledger.entries().map(|e| e.pos).collect::<Vec<_>>();
    assert!(
        message(ledger.shift(4, 2)).contains("cell 2 holds position 2, where positions from 4")
    );
    ledger.remove(2).unwrap();
    assert!(message(ledger.shift(4, 2)).contains("cell 3 holds position 3"));
    ledger.remove(3).unwrap();
    for (from, by) in [(4, 0), (4, -1), (1, 2)] {
        assert!(ledger.shift(from, by).is_err(), "{from} by {by}");
    }
    assert_eq!(positions(&ledger), [0, 1, 4, 5]);
    ledger.shift(4, 2).unwrap();
    assert_eq!(positions(&ledger), [0, 1, 2, 3]);
    assert_eq!((ledger.first(), ledger.newest()), (Some(0), Some(3)));
    // The newest is still known by its cell.
    assert!(message(ledger.remove(5)).contains("newest position 3"));
    ledger.insert(2, 4, Modality::Text, None).unwrap();
}
