//! What becomes of each tensor: where its values come from, which type they get, and the pass
//! that converts them slice by slice.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use super::OutType;
use super::blocks::Blocks;
use super::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use crate::llama::gguf::{self, TensorType};

/// Values converted at a time; what a conversion holds in memory is some times this.
const SLICE: usize = 1 << 20;

/// A tensor of the output.
#[derive(Debug)]
pub struct Planned<'a> {
    pub name: String,
    pub kind: TensorType,
    /// Fastest dimension first, as in ggml.
    pub dims: Vec<u64>,
    source: Source<'a>,
}

#[derive(Debug)]
enum Source<'a> {
    Checkpoint {
        checkpoint: &'a Checkpoint,
        name: String,
        stored: Stored,
    },
    Values(Vec<f32>),
    Random(Blocks),
}

/// What plans a tensor: from its name in a checkpoint, its shape (slowest dimension first), its
/// name in the GGUF, and its role.
pub type Plan<'p, 'a> = dyn FnMut(&str, &[u32], &str, Role) -> Result<Planned<'a>> + 'p;

/// The type that a tensor asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Norms, biases, embeddings of a single vector: always F32.
    Vector,
    /// Gets the requested type.
    Matrix,
    /// A convolution's kernel. ggml's conv_2d takes F16 and F32 only; as llama.cpp's converter
    /// does, F16 is chosen where everything else is F16.
    Kernel,
    /// Added to activations rather than multiplied: F32, as llama.cpp's converter has it.
    Positions,
}

impl Role {
    fn kind(self, outtype: OutType, dims: &[u64]) -> TensorType {
        match (self, outtype) {
            (Role::Vector | Role::Positions, _) | (_, OutType::F32) => TensorType::F32,
            (_, OutType::F16) => TensorType::F16,
            (Role::Kernel, _) => TensorType::F32,
            (Role::Matrix, OutType::Bf16) => TensorType::BF16,
            (Role::Matrix, OutType::Q8_0) if TensorType::Q8_0.tensor_bytes(dims).is_some() => {
                TensorType::Q8_0
            }
            (Role::Matrix, OutType::Q8_0) => TensorType::F16,
        }
    }
}

impl<'a> Planned<'a> {
    /// The tensor `from` of the checkpoint, which must have this shape (slowest dimension first).
    ///
    /// # Errors
    /// [`Error::File`] if the checkpoint has no such tensor or another shape or type.
    pub fn stored(
        checkpoint: &'a Checkpoint,
        from: &str,
        shape: &[u32],
        name: impl Into<String>,
        role: Role,
        outtype: OutType,
    ) -> Result<Self> {
        let shape: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
        let stored = checkpoint.expect(from, &shape)?.clone();
        let dims: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        let kind = role.kind(outtype, &dims);
        Ok(Self {
            name: name.into(),
            kind,
            dims,
            source: Source::Checkpoint {
                checkpoint,
                name: from.to_owned(),
                stored,
            },
        })
    }

    /// A vector of F32.
    pub fn values(name: impl Into<String>, values: Vec<f32>) -> Self {
        Self {
            name: name.into(),
            kind: TensorType::F32,
            dims: vec![values.len() as u64],
            source: Source::Values(values),
        }
    }

    /// Made-up values.
    pub fn random(name: impl Into<String>, kind: TensorType, dims: Vec<u64>, from: Blocks) -> Self {
        Self {
            name: name.into(),
            kind,
            dims,
            source: Source::Random(from),
        }
    }

    /// The same values as one vector.
    pub fn flattened(mut self) -> Self {
        self.dims = vec![self.elements()];
        self
    }

    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Converts the values and hands them to `out`, slice by slice.
    ///
    /// # Errors
    /// [`Error::Io`] from reading, [`Error::File`] for values that are not finite or do not fit the
    /// type, and whatever `out` returns.
    pub fn convert(&self, out: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut encoded = Vec::new();
        let row = self.dims[0] as usize;
        let (checkpoint, name, stored) = match &self.source {
            Source::Values(values) => {
                encode(values, row, self.kind, &mut encoded)?;
                return out(&encoded);
            }
            Source::Random(blocks) => return blocks.fill(self.kind, &self.dims, out),
            Source::Checkpoint {
                checkpoint,
                name,
                stored,
            } => (checkpoint, name, stored),
        };
        let wrong =
            |what: String| Error::file(checkpoint.path(stored), format!("tensor {name} {what}"));
        let width = if stored.dtype == Dtype::F32 { 4 } else { 2 };
        let total = self.elements() as usize;
        let step = (SLICE / row).max(1) * row;
        let mut raw = Vec::new();
        let mut values = Vec::new();
        for start in (0..total).step_by(step) {
            let n = step.min(total - start);
            raw.resize(n * width, 0);
            checkpoint.read(stored, (start * width) as u64, &mut raw)?;
            decode(&raw, stored.dtype, &mut values);
            if !values.iter().all(|v| v.is_finite()) {
                return Err(wrong(
                    "holds NaN or infinity, expected finite values".into(),
                ));
            }
            if self.kind == TensorType::F16 && stored.dtype != Dtype::F16 {
                let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                if f16::from_f32(largest).is_infinite() {
                    return Err(wrong(format!(
                        "holds {largest}, which F16 cannot: convert to bf16 or f32"
                    )));
                }
            }
            encoded.clear();
            encode(&values, row, self.kind, &mut encoded)?;
            out(&encoded)?;
        }
        Ok(())
    }
}

/// Little-endian bytes of the checkpoint to F32. The three types of [`Checkpoint::expect`].
fn decode(raw: &[u8], dtype: Dtype, values: &mut Vec<f32>) {
    values.clear();
    match dtype {
        Dtype::F16 => {
            let halves: Vec<f16> = raw
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]))
                .collect();
            values.resize(halves.len(), 0.0);
            halves.convert_to_f32_slice(values);
        }
        Dtype::BF16 => values.extend(
            raw.chunks_exact(2)
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        ),
        _ => values.extend(
            raw.chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        ),
    }
}

/// F32 to the bytes of one of the four types that [`Role::kind`] gives.
fn encode(values: &[f32], row: usize, kind: TensorType, out: &mut Vec<u8>) -> Result<()> {
    match kind {
        TensorType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            out.extend(halves.iter().flat_map(|h| h.to_le_bytes()));
        }
        TensorType::BF16 => {
            out.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()))
        }
        TensorType::Q8_0 => gguf::quantize(kind, values, row, out)?,
        _ => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
    }
    Ok(())
}
