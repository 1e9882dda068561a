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
