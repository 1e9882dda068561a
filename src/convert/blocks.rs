//! Made-up values in any type that ggml quantizes to, as fast as memory is copied: a pool of
//! blocks is quantized from random values, and a tensor is a random sequence of these blocks.

use crate::error::Result;
use crate::llama::gguf::{TensorType, quantize};
use crate::noise::Noise;

/// Values of a block of the pool: a multiple of every type's own block.
const BLOCK: usize = 256;
/// Blocks of a pool. A row of 3072 values has 12, so two rows alike are not to be expected.
const POOL: usize = 1024;

/// How a tensor's values are drawn: mean 0, this standard deviation.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    /// Standard deviation of the values.
    pub deviation: f32,
    /// The same seed gives the same bytes.
    pub seed: u64,
}

impl Blocks {
    /// Hands the bytes of a tensor to `out`, piece by piece.
    ///
    /// # Errors
    /// From [`quantize`] for types that it does not make, and whatever `out` returns.
    pub fn fill(
        self,
        kind: TensorType,
        dims: &[u64],
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut random = Noise::new(self.seed);
        let values: Vec<f32> = (0..BLOCK * POOL)
            .map(|_| random.normal() * self.deviation)
            .collect();
        let mut pool = Vec::new();
        quantize(kind, &values, BLOCK, &mut pool)?;
        let block = pool.len() / POOL;
        // The writer's table has refused dimensions without a size.
        let mut left = kind.tensor_bytes(dims).unwrap_or(0);
        let mut bytes = Vec::with_capacity(POOL * block);
        while left > 0 {
            bytes.clear();
            for _ in 0..POOL {
                let at = random.below(POOL) * block;
                bytes.extend_from_slice(&pool[at..at + block]);
            }
            // A row may end within a block of the pool, but not within one of the type.
            let n = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            out(&bytes[..n])?;
            left -= n as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_mean_and_deviation_asked_for() {
        let blocks = Blocks {
            deviation: 0.5,
            seed: 7,
        };
        let mut values = Vec::new();
        // 1000 values are not a whole number of blocks of the pool.
        let dims = [1000, 300];
        blocks
            .fill(TensorType::F32, &dims, &mut |bytes| {
                let floats = bytes.chunks_exact(4);
                values.extend(floats.map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))));
                Ok(())
            })
            .unwrap();
        assert_eq!(values.len(), 300_000);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        // Four standard errors: of 262144 independent values, of which some are repeated.
        assert!(mean.abs() < 0.006, "{mean}");
        assert!((variance.sqrt() - 0.5).abs() < 0.004, "{variance}");
        let rows: std::collections::HashSet<Vec<u64>> = values
            .chunks(1000)
            .map(|row| row.iter().map(|v| v.to_bits()).collect())
            .collect();
        assert_eq!(rows.len(), 300, "rows are alike");
    }
}
