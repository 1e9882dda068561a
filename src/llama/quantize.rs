//! Quantizing a GGUF with `llama_model_quantize`.
//!
//! That function catches its own C++ exceptions and returns 1, but asserts on some values of the
//! metadata; `check` refuses those files first. Without an importance matrix llama.cpp refuses
//! the types below about 3 bits, so they are refused here by name.

mod log;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use llama_cpp_sys_2 as sys;

use super::gguf::{Gguf, c_path};
use super::{hparams, weights};
use crate::error::{Error, Result};
use crate::outfile::{FilesInUse, OutFile};

/// A target by llama.cpp's name for it (`llama-quantize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantType {
    /// llama.cpp's name for it.
    pub name: &'static str,
    ftype: sys::llama_ftype,
    class: Class,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Tensors stay as they are.
    Copy,
    /// One type for all matrices, decided without looking at the model's layers.
    Uniform,
    /// Types by layer and role.
    Mix,
    /// Refused by llama.cpp without an importance matrix.
    Imatrix,
}

const fn new(name: &'static str, ftype: sys::llama_ftype, class: Class) -> QuantType {
    QuantType { name, ftype, class }
}

/// Every name that llama.cpp's tool takes. `Q3_K`, `Q4_K` and `Q5_K` mean the M mixes there, too.
pub const TYPES: &[QuantType] = &[
    new("F32", sys::LLAMA_FTYPE_ALL_F32, Class::Uniform),
    new("F16", sys::LLAMA_FTYPE_MOSTLY_F16, Class::Uniform),
    new("BF16", sys::LLAMA_FTYPE_MOSTLY_BF16, Class::Uniform),
    new("Q8_0", sys::LLAMA_FTYPE_MOSTLY_Q8_0, Class::Uniform),
    new("Q6_K", sys::LLAMA_FTYPE_MOSTLY_Q6_K, Class::Mix),
    new("Q5_K_M", sys::LLAMA_FTYPE_MOSTLY_Q5_K_M, Class::Mix),
    new("Q5_K", sys::LLAMA_FTYPE_MOSTLY_Q5_K_M, Class::Mix),
    new("Q5_K_S", sys::LLAMA_FTYPE_MOSTLY_Q5_K_S, Class::Mix),
    new("Q5_1", sys::LLAMA_FTYPE_MOSTLY_Q5_1, Class::Mix),
    new("Q5_0", sys::LLAMA_FTYPE_MOSTLY_Q5_0, Class::Mix),
    new("Q4_K_M", sys::LLAMA_FTYPE_MOSTLY_Q4_K_M, Class::Mix),
    new("Q4_K", sys::LLAMA_FTYPE_MOSTLY_Q4_K_M, Class::Mix),
    new("Q4_K_S", sys::LLAMA_FTYPE_MOSTLY_Q4_K_S, Class::Mix),
    new("Q4_1", sys::LLAMA_FTYPE_MOSTLY_Q4_1, Class::Mix),
    new("Q4_0", sys::LLAMA_FTYPE_MOSTLY_Q4_0, Class::Mix),
    new("IQ4_NL", sys::LLAMA_FTYPE_MOSTLY_IQ4_NL, Class::Mix),
    new("IQ4_XS", sys::LLAMA_FTYPE_MOSTLY_IQ4_XS, Class::Mix),
    new("MXFP4_MOE", sys::LLAMA_FTYPE_MOSTLY_MXFP4_MOE, Class::Mix),
    new("Q3_K_L", sys::LLAMA_FTYPE_MOSTLY_Q3_K_L, Class::Mix),
    new("Q3_K_M", sys::LLAMA_FTYPE_MOSTLY_Q3_K_M, Class::Mix),
    new("Q3_K", sys::LLAMA_FTYPE_MOSTLY_Q3_K_M, Class::Mix),
    new("Q3_K_S", sys::LLAMA_FTYPE_MOSTLY_Q3_K_S, Class::Mix),
    new("IQ3_M", sys::LLAMA_FTYPE_MOSTLY_IQ3_M, Class::Mix),
    new("IQ3_S", sys::LLAMA_FTYPE_MOSTLY_IQ3_S, Class::Mix),
    new("IQ3_XS", sys::LLAMA_FTYPE_MOSTLY_IQ3_XS, Class::Imatrix),
    new("IQ3_XXS", sys::LLAMA_FTYPE_MOSTLY_IQ3_XXS, Class::Imatrix),
    new("Q2_K", sys::LLAMA_FTYPE_MOSTLY_Q2_K, Class::Mix),
    new("Q2_K_S", sys::LLAMA_FTYPE_MOSTLY_Q2_K_S, Class::Imatrix),
    new("IQ2_M", sys::LLAMA_FTYPE_MOSTLY_IQ2_M, Class::Imatrix),
    new("IQ2_S", sys::LLAMA_FTYPE_MOSTLY_IQ2_S, Class::Imatrix),
    new("IQ2_XS", sys::LLAMA_FTYPE_MOSTLY_IQ2_XS, Class::Imatrix),
    new("IQ2_XXS", sys::LLAMA_FTYPE_MOSTLY_IQ2_XXS, Class::Imatrix),
    new("TQ2_0", sys::LLAMA_FTYPE_MOSTLY_TQ2_0, Class::Mix),
    new("Q2_0", sys::LLAMA_FTYPE_MOSTLY_Q2_0, Class::Mix),
    new("TQ1_0", sys::LLAMA_FTYPE_MOSTLY_TQ1_0, Class::Mix),
    new("IQ1_M", sys::LLAMA_FTYPE_MOSTLY_IQ1_M, Class::Imatrix),
    new("IQ1_S", sys::LLAMA_FTYPE_MOSTLY_IQ1_S, Class::Imatrix),
    new("Q1_0", sys::LLAMA_FTYPE_MOSTLY_Q1_0, Class::Mix),
    new("COPY", sys::LLAMA_FTYPE_ALL_F32, Class::Copy),
];

impl QuantType {
    /// Whether llama.cpp refuses the type without an importance matrix.
    pub fn needs_imatrix(self) -> bool {
        self.class == Class::Imatrix
    }

    /// The type of this name, in any case.
    ///
    /// # Errors
    /// [`Error::Option`] listing the names, or saying that the type needs an importance matrix.
    pub fn parse(name: &str) -> Result<Self> {
        let found = TYPES.iter().find(|t| t.name.eq_ignore_ascii_case(name));
        match found {
            Some(t) if t.needs_imatrix() => Err(Error::option(
                "TYPE",
                format!(
                    "{} needs an importance matrix, which hae does not take: choose Q2_K or wider",
                    t.name
                ),
            )),
            Some(&t) => Ok(t),
            None => {
                let names: Vec<&str> = TYPES
                    .iter()
                    .filter(|t| !t.needs_imatrix())
                    .map(|t| t.name)
                    .collect();
                Err(Error::option(
                    "TYPE",
                    format!("\"{}\" is none of {}", name.escape_debug(), names.join(" ")),
                ))
            }
        }
    }
}

/// Tensors done and in all, for another thread to look at.
#[derive(Debug, Default)]
pub struct Progress {
    /// Tensors that are written.
    pub done: AtomicU32,
    /// Tensors of the model; 0 until that is known.
    pub total: AtomicU32,
}

/// Bytes of both files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of the model that was read.
    pub input: u64,
    /// Of the one that was written.
    pub output: u64,
}

/// What to write, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The type.
    pub kind: QuantType,
    /// 0 means as many as there are.
    pub threads: u32,
    /// Take tensors that are quantized already, from what they say now (llama.cpp's
    /// option of that name). Unpacked to F32 or F16 they keep their values, F16's rounding aside.
    pub allow_requantize: bool,
}

impl Options {
    /// Of this type, from weights that are not quantized, by all threads.
    pub fn of(kind: QuantType) -> Self {
        Options {
            kind,
            threads: 0,
            allow_requantize: false,
        }
    }
}

/// Writes `input` to `output`.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] for an input that is not a model to quantize,
/// and with llama.cpp's reason for what it refuses. No output is left behind then.
pub fn quantize(
    input: &Path,
    output: &Path,
    options: Options,
    progress: &Arc<Progress>,
) -> Result<Sizes> {
    let kind = options.kind;
    let gguf = Gguf::open(input)?;
    check(&gguf, options)?;
    progress
        .total
        .store(gguf.header().n_tensors as u32, Ordering::Relaxed);
    let mut files = FilesInUse::default();
    files.reads("the input", input);
    files.writes("OUTPUT", output)?;
    let file = OutFile::create(output)?;
    let (from, to) = (c_path(input)?, c_path(file.temp_path())?);
    // SAFETY: takes nothing and returns plain data.
    let mut params = unsafe { sys::llama_model_quantize_default_params() };
    params.ftype = kind.ftype;
    params.only_copy = kind.class == Class::Copy;
    params.allow_requantize = options.allow_requantize;
    params.nthread = i32::try_from(options.threads).unwrap_or(i32::MAX);
    let captured = log::capture(progress, || {
        // SAFETY: both paths are C strings and `params` a live struct, all outliving the call. The
        // input was checked for what the function asserts on. It catches exceptions itself.
        unsafe { sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &params) }
    });
    if captured.result != 0 {
        let reason = captured
            .last_error
            .unwrap_or_else(|| "no reason given".into());
        return Err(Error::file(input, refused(&reason)));
    }
    // The result must hold up to the same check as any other file.
    super::gguf::header::check(file.temp_path())?;
    let bytes = |path: &Path| {
        std::fs::metadata(path)
            .map(|m| m.len())
            .map_err(|e| Error::io(path, e))
    };
    let sizes = Sizes {
        input: bytes(input)?,
        output: bytes(file.temp_path())?,
    };
    file.commit()?;
    Ok(sizes)
}

/// llama.cpp's reason in words about the file.
fn refused(reason: &str) -> String {
    let what = reason
        .rsplit("failed to quantize: ")
        .next()
        .unwrap_or(reason);
    let tensor = what.strip_prefix("tensor '");
    if let Some((name, _)) = tensor.and_then(|rest| rest.split_once("' has invalid data")) {
        return format!("tensor {name} holds numbers that are not finite, expected weights");
    }
    // What the C++ library throws where a size or a text in the file cannot be.
    if ["bad_alloc", "vector", "basic_string", "stoi", "map::at"]
        .iter()
        .any(|inside| what.contains(inside))
    {
        return "cannot be quantized: a size in its metadata cannot be, expected a whole GGUF"
            .into();
    }
    format!("cannot be quantized: {what}")
}

/// Refuses what `llama_model_quantize` would abort on, and what it would not do anyway.
fn check(gguf: &Gguf, options: Options) -> Result<()> {
    let kind = options.kind;
    let wrong = |reason: String| Err(Error::file(gguf.path(), reason));
    let arch = gguf.text("general.architecture")?;
    let optional = |key: &str| match gguf.get(key) {
        None => Ok(None),
        Some(_) => gguf.unsigned(key).map(Some),
    };
    let tensors = gguf.tensors();
    if tensors.is_empty() {
        return wrong("has no tensors".into());
    }
    if let Some(n @ 2..) = optional("split.count")? {
        return wrong(format!("is one of {n} parts: merge them first"));
    }
    let quantized = tensors.iter().find(|t| t.kind.block_len() > 1);
    let refused = kind.class != Class::Copy && !options.allow_requantize;
    if let Some(t) = quantized.filter(|_| refused) {
        return wrong(format!(
            "is quantized already ({} is {}): expected F32, F16 or BF16, or `allow_requantize`",
            t.name,
            t.kind.name()
        ));
    }
    if kind.class != Class::Copy {
        weights::check(gguf)?;
    }
    if arch == "clip" {
        // The mixes ask for the number of heads and layers, which llama.cpp does not load for
        // such a file.
        if matches!(kind.class, Class::Uniform | Class::Copy) {
            return Ok(());
        }
        return wrong(format!(
            "is a vision file (mmproj), for which {} is not possible: choose F32, F16, BF16 or Q8_0",
            kind.name
        ));
    }
    hparams::check(gguf, &arch, &gguf.tensors())
}
