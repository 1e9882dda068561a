//! The loops over cells of a batch's attention. Each takes its columns as arguments of a function of its
//! own: the compiler then knows that they do not overlap, and vectorises.

use crate::cache::Pos;
use crate::cache::entry::EMPTY;

/// How many of the ascending query rows could see a token at `pos`; none for an empty cell.
pub(super) fn rows(queries: &[Pos], pos: Pos) -> usize {
    match pos {
        EMPTY => 0,
        pos => queries.len() - queries.partition_point(|&query| query < pos),
    }
}

/// Whether one query could see a token at `pos`. An empty cell's position is beyond every other, as `u32`.
#[inline(always)]
fn sees(query: Pos, pos: Pos) -> bool {
    pos as u32 <= query as u32
}

/// What sums and maxima are changed by. All columns are of the same cells: `[cells]`.
pub(super) struct Columns<'a> {
    pub pos: &'a [Pos],
    /// Attention of this batch.
    pub add: &'a [f32],
    /// Its largest of one row.
    pub peak: &'a [f32],
    pub sum: &'a mut [f32],
    pub max: &'a mut [f32],
    pub exposure: &'a mut [f32],
    pub latest: &'a mut [f32],
}

/// Whether every token that the query could see would have a finite score.
#[inline(never)]
pub(super) fn is_finite(
    (pos, query): (&[Pos], Pos),
    (sum, decay): (&[f32], f32),
    (add, peak): (&[f32], &[f32]),
) -> bool {
    // Bits of infinities and what is not a number: an exponent of ones.
    const ONES: u32 = 0x7f80_0000;
    let n = pos.len();
    let (sum, add, peak) = (&sum[..n], &add[..n], &peak[..n]);
    let mut strange = 0;
    for i in 0..n {
        let total = (sum[i] * decay + add[i]).to_bits() & ONES == ONES;
        let peak = peak[i].to_bits() & ONES == ONES;
        strange |= u32::from(sees(query, pos[i]) & (total | peak));
    }
    strange == 0
}

/// A decoding step's: one comparison a cell.
pub(super) fn add_of_one(columns: Columns<'_>, query: Pos, decay: f32) {
    let Columns {
        pos,
        add,
        peak,
        sum,
        max,
        exposure,
        latest,
    } = columns;
    sums((pos, query), add, (sum, decay), latest);
    maxima((pos, query), peak, max, (exposure, decay));
}

#[inline(never)]
fn sums(
    (pos, query): (&[Pos], Pos),
    add: &[f32],
    (sum, decay): (&mut [f32], f32),
    latest: &mut [f32],
) {
    let n = pos.len();
    let (add, sum, latest) = (&add[..n], &mut sum[..n], &mut latest[..n]);
    for i in 0..n {
        let add = if sees(query, pos[i]) { add[i] } else { 0.0 };
        latest[i] += add;
        sum[i] = sum[i] * decay + add;
    }
}

#[inline(never)]
fn maxima(
    (pos, query): (&[Pos], Pos),
    peak: &[f32],
    max: &mut [f32],
    (exposure, decay): (&mut [f32], f32),
) {
    let n = pos.len();
    let (peak, max, exposure) = (&peak[..n], &mut max[..n], &mut exposure[..n]);
    for i in 0..n {
        let (peak, rows) = if sees(query, pos[i]) {
            (peak[i], 1.0)
        } else {
            (0.0, 0.0)
        };
        max[i] = if peak > max[i] { peak } else { max[i] };
        exposure[i] = exposure[i] * decay + rows;
    }
}

/// That of several rows, `rows(pos)` of which could see a token.
pub(super) fn add_of_some(columns: Columns<'_>, rows: impl Fn(Pos) -> usize, decay: f32) {
    let Columns {
        pos,
        add,
        peak,
        sum,
        max,
        exposure,
        latest,
    } = columns;
    for (i, &pos) in pos.iter().enumerate() {
        let rows = rows(pos);
        let (add, peak) = if rows > 0 {
            (add[i], peak[i])
        } else {
            (0.0, 0.0)
        };
        latest[i] += add;
        sum[i] = sum[i] * decay + add;
        max[i] = max[i].max(peak);
        exposure[i] = exposure[i] * decay + rows as f32;
    }
}
