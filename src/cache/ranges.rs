//! Positions to remove, as few ranges as possible: every range is one call into llama.cpp.

use std::ops::Range;

use super::Pos;

/// Sorts `positions` and writes them to `out` (cleared first) as sorted, disjoint half-open
/// ranges that do not touch each other.
///
/// A range holds positions that were asked for and nothing else. It never bridges a hole: whether
/// the positions in between are absent or live is not known here, and a removal of absent
/// positions would hide a bookkeeping error instead of showing it.
///
/// `Pos::MAX` has no half-open end; the ledger lets no token have it.
pub fn coalesce(positions: &mut [Pos], out: &mut Vec<Range<Pos>>) {
    out.clear();
    positions.sort_unstable();
    for &pos in positions.iter() {
        match out.last_mut() {
            Some(last) if pos < last.end => {}
            Some(last) if pos == last.end => last.end = pos.saturating_add(1),
            _ => out.push(pos..pos.saturating_add(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges(mut positions: Vec<Pos>) -> Vec<Range<Pos>> {
        let mut out = vec![7..9, 20..30];
        coalesce(&mut positions, &mut out);
        out
    }

    #[test]
    fn neighbours_become_one_range() {
        assert_eq!(ranges(vec![]), vec![]);
        assert_eq!(ranges(vec![5, 7]), vec![5..6, 7..8]);
        assert_eq!(ranges(vec![9, 3, 4, 8, 1]), vec![1..2, 3..5, 8..10]);
        assert_eq!(ranges(vec![2, 2, 3, 3, 9]), vec![2..4, 9..10]);
        assert_eq!(
            ranges(vec![Pos::MAX - 1, 0]),
            vec![0..1, Pos::MAX - 1..Pos::MAX]
        );
    }

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_positions(
            mut positions in prop::collection::vec(0..200i32, 0..150),
        ) {
            let out = ranges(positions.clone());
            prop_assert!(out.iter().all(|r| r.start < r.end));
            prop_assert!(out.windows(2).all(|w| w[0].end < w[1].start), "a gap between any two");
            positions.sort_unstable();
            positions.dedup();
            prop_assert_eq!(out.into_iter().flatten().collect::<Vec<_>>(), positions);
        }
    }
}
