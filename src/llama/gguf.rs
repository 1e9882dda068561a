//! GGUF files through ggml's own API (`ggml/include/gguf.h`): [`Gguf`] reads metadata and the
//! table of tensors, [`Writer`] builds them. Tensor data never passes through ggml here: a reader
//! only learns where it lies, and a writer appends it to the metadata as a stream ([`DataWriter`]),
//! so that converting a model of 8 GB needs memory for one slice of one tensor.
//!
//! ggml trusts its caller: a getter of the wrong type aborts the process, and so does a duplicate
//! tensor name. [`header`] checks a file before ggml sees it, the two owners check each call.

pub(super) mod fingerprint;
pub mod header;
mod parts;
mod read;
mod write;

use std::ffi::{CStr, CString};
use std::path::Path;

use llama_cpp_sys_2 as sys;

use crate::error::{Error, Result};

pub use fingerprint::fingerprint;
pub use parts::{PartName, parts};
pub use read::{Gguf, Glimpse, TensorInfo, Value};
pub use write::{DataWriter, Writer};

/// Where a file does not say otherwise, tensor data is aligned to this many bytes
/// (`GGUF_DEFAULT_ALIGNMENT`).
pub const ALIGNMENT: usize = 32;

/// `GGML_MAX_NAME`, with the terminating zero.
const MAX_TENSOR_NAME: usize = 64;

/// `GGML_MAX_DIMS`.
pub const MAX_DIMS: usize = 4;

/// A `ggml_type` that this build of ggml knows and that has not been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorType(sys::ggml_type);

impl TensorType {
    /// 32 bits a value.
    pub const F32: Self = Self(sys::GGML_TYPE_F32);
    /// 16 bits a value, IEEE's.
    pub const F16: Self = Self(sys::GGML_TYPE_F16);
    /// 16 bits a value, the upper half of an F32.
    pub const BF16: Self = Self(sys::GGML_TYPE_BF16);
    /// Blocks of 32 values, 8.5 bits each.
    pub const Q8_0: Self = Self(sys::GGML_TYPE_Q8_0);
    /// Blocks of 32 values, 4.5 bits each.
    pub const Q4_0: Self = Self(sys::GGML_TYPE_Q4_0);
    /// Blocks of 256 values, 4.5 bits each.
    pub const Q4_K: Self = Self(sys::GGML_TYPE_Q4_K);
    /// Blocks of 256 values, 5.5 bits each.
    pub const Q5_K: Self = Self(sys::GGML_TYPE_Q5_K);
    /// Blocks of 256 values, 6.5625 bits each.
    pub const Q6_K: Self = Self(sys::GGML_TYPE_Q6_K);

    /// Types that [`quantize`] makes. ggml aborts on some others: those that need an importance
    /// matrix, and those that nothing quantizes to.
    const MADE: [Self; 8] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// The type with this number in a file, or `None` where ggml has none (removed types
    /// have a block size of zero).
    pub fn from_raw(raw: u32) -> Option<Self> {
        let raw = raw as sys::ggml_type;
        if raw >= sys::GGML_TYPE_COUNT {
            return None;
        }
        // SAFETY: ggml_blck_size asserts 0 <= type < GGML_TYPE_COUNT, which was checked.
        (unsafe { sys::ggml_blck_size(raw) } > 0).then_some(Self(raw))
    }

    /// ggml's number of the type.
    pub(super) fn raw(self) -> sys::ggml_type {
        self.0
    }

    /// ggml's name of the type, in lower case (`f16`, `q8_0`).
    pub fn name(self) -> &'static str {
        // SAFETY: a TensorType is always a known type, for which ggml returns a static C string.
        let name = unsafe { CStr::from_ptr(sys::ggml_type_name(self.0)) };
        name.to_str().unwrap_or("?")
    }

    /// Elements in a block; a row's length is a multiple of it.
    pub fn block_len(self) -> u64 {
        // SAFETY: a TensorType is always a known type; its block size is positive.
        unsafe { sys::ggml_blck_size(self.0) as u64 }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        // SAFETY: a TensorType is always a known type.
        unsafe { sys::ggml_type_size(self.0) as u64 }
    }

    /// Bytes of a tensor with these dimensions, fastest first. `None` where a row is not a whole
    /// number of blocks or the size does not fit.
    pub fn tensor_bytes(self, dims: &[u64]) -> Option<u64> {
        let row = *dims.first()?;
        if !row.is_multiple_of(self.block_len()) {
            return None;
        }
        let row_bytes = (row / self.block_len()).checked_mul(self.block_bytes())?;
        dims[1..]
            .iter()
            .try_fold(row_bytes, |n, &d| n.checked_mul(d))
    }
}

/// Appends rows of `row_len` values to `out` in the type `kind`, with ggml's own quantizer.
///
/// # Errors
/// [`Error::Llama`] for a type that cannot be made so, or values that are not whole rows of whole
/// blocks.
pub fn quantize(kind: TensorType, values: &[f32], row_len: usize, out: &mut Vec<u8>) -> Result<()> {
    let failed = |reason| Err(Error::llama("ggml_quantize_chunk", reason));
    if !TensorType::MADE.contains(&kind) {
        return failed(format!("{} is not made here", kind.name()));
    }
    let rows = values.len().checked_div(row_len).unwrap_or(0);
    let bytes = kind.tensor_bytes(&[row_len as u64, rows as u64]);
    let (Some(bytes), true) = (bytes, rows * row_len == values.len()) else {
        return failed(format!(
            "{} values in rows of {row_len}: expected whole rows of whole blocks of {}",
            values.len(),
            kind.block_len()
        ));
    };
    let start = out.len();
    out.resize(start + bytes as usize, 0);
    // SAFETY: `values` holds rows * row_len floats and `out` from `start` exactly the bytes of as
    // many rows of the type (both computed above); row_len is a multiple of the block. ggml reads
    // and writes only those, start row 0, and none of these types needs an importance matrix.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            kind.0,
            values.as_ptr(),
            out[start..].as_mut_ptr().cast(),
            0,
            rows as i64,
            row_len as i64,
            std::ptr::null(),
        )
    };
    if written as u64 != bytes {
        return failed(format!("wrote {written} bytes, expected {bytes}"));
    }
    Ok(())
}

/// A path as llama.cpp takes it.
pub(super) fn c_path(path: &Path) -> Result<CString> {
    let text = path
        .to_str()
        .ok_or_else(|| Error::file(path, "path is not UTF-8, which llama.cpp expects"))?;
    CString::new(text).map_err(|_| Error::file(path, "path holds a zero byte"))
}
