//! Attention values in a file: the bytes of the same place next to each other, which deflate
//! likes better, and trailing zeros left out.

use half::bf16;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// How exactly attention is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// Every bit: decisions depended on it.
    Exact,
    /// Rounded to 8 significant bits (bf16): off by a share of at most 2^-8, whatever the size.
    Rounded,
}

/// Values of at least 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Values {
    /// F32, byte by byte: all first bytes, all second ones, and so on.
    Exact(ByteBuf),
    /// Bf16, in the same order.
    Rounded(ByteBuf),
}

impl Values {
    /// Values behind the last one that is not 0 are left out.
    pub fn new(values: &[f32], precision: Precision) -> Self {
        let used = values.iter().rposition(|&value| value != 0.0);
        let values = &values[..used.map_or(0, |last| last + 1)];
        match precision {
            Precision::Exact => {
                Values::Exact(planes(values.iter().map(|value| value.to_le_bytes())))
            }
            Precision::Rounded => {
                let rounded = values.iter().map(|&value| bf16::from_f32(value));
                Values::Rounded(planes(rounded.map(|value| value.to_le_bytes())))
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Values::Exact(bytes) => bytes.len() / 4,
            Values::Rounded(bytes) => bytes.len() / 2,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values; what follows them was 0.
    pub fn iter(&self) -> impl Iterator<Item = f32> + '_ {
        let n = self.len();
        (0..n).map(move |i| match self {
            Values::Exact(bytes) => f32::from_le_bytes(gathered(bytes, n, i)),
            Values::Rounded(bytes) => bf16::from_le_bytes(gathered(bytes, n, i)).to_f32(),
        })
    }
}

/// Of each cell, how many layers attended to it, if it was theirs to choose.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counts(ByteBuf);

impl Counts {
    /// Two bytes a cell, in the order of [`Values`]: 0 where there was no choice, otherwise 1 more
    /// than the count. Cells without a choice behind the last with one are left out.
    pub fn new(counts: &[Option<u32>]) -> Self {
        let used = counts.iter().rposition(Option::is_some);
        let counts = &counts[..used.map_or(0, |last| last + 1)];
        let number = |count: &Option<u32>| {
            let kept = count.map_or(0, |count| count.saturating_add(1));
            u16::try_from(kept).unwrap_or(u16::MAX).to_le_bytes()
        };
        Counts(planes(counts.iter().map(number)))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len() / 2
    }

    /// Whether there was no choice at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// By cell; what follows them is `None`.
    pub fn iter(&self) -> impl Iterator<Item = Option<u32>> + '_ {
        let n = self.len();
        let number = move |i| u16::from_le_bytes(gathered(&self.0, n, i));
        (0..n).map(move |i| u32::from(number(i)).checked_sub(1))
    }
}

fn planes<const N: usize>(values: impl ExactSizeIterator<Item = [u8; N]>) -> ByteBuf {
    let n = values.len();
    let mut bytes = vec![0; n * N];
    for (i, value) in values.enumerate() {
        for (plane, byte) in value.into_iter().enumerate() {
            bytes[plane * n + i] = byte;
        }
    }
    ByteBuf::from(bytes)
}

fn gathered<const N: usize>(bytes: &[u8], n: usize, i: usize) -> [u8; N] {
    std::array::from_fn(|plane| bytes[plane * n + i])
}
