//! Reading: metadata and the table of tensors.

use std::collections::HashMap;
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::header::{self, Header};
use super::{MAX_DIMS, TensorType, c_path};
use crate::error::{Error, Result};
use crate::llama::log;

/// A value of the metadata. Integers are widened; strings that are not UTF-8 have their bad bytes
/// replaced.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of any width.
    Unsigned(u64),
    /// Of any width.
    Signed(i64),
    /// Of either width.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Of one type.
    Array(Vec<Value>),
}

/// Where a tensor's data lies and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// As the file has it.
    pub name: String,
    /// Of its values.
    pub kind: TensorType,
    /// Fastest dimension first; trailing ones are left out.
    pub dims: Vec<u64>,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// That it takes in the file.
    pub bytes: u64,
}

/// An open GGUF's metadata: the one owner of a `gguf_context` that was read from a file.
#[derive(Debug)]
pub struct Gguf {
    ctx: NonNull<sys::gguf_context>,
    path: PathBuf,
    header: Header,
    /// Where each key is. ggml looks through all of them.
    ids: HashMap<String, i64>,
}

/// The beginning of a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Glimpse {
    /// The type as ggml calls it (`u32`, `str`, `arr`); of an array, that of its elements.
    pub kind: String,
    /// Elements of an array; `None`: no array.
    pub len: Option<usize>,
    /// All of it, or an array's first elements.
    pub value: Value,
}

// SAFETY: a gguf_context is plain memory without thread-local state; ggml's getters take it as
// const and this type never changes it.
unsafe impl Send for Gguf {}
unsafe impl Sync for Gguf {}

impl Drop for Gguf {
    fn drop(&mut self) {
        // SAFETY: `ctx` came from gguf_init_from_file and is freed only here.
        unsafe { sys::gguf_free(self.ctx.as_ptr()) }
    }
}

impl Gguf {
    /// Reads the metadata of `path`, after [`header::check`].
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let header = header::check(path)?;
        let c_path = c_path(path)?;
        let params = sys::gguf_init_params {
            no_alloc: true,
            ctx: std::ptr::null_mut(),
        };
        log::forget();
        // SAFETY: `c_path` is a C string that outlives the call. With a null ctx ggml reads the
        // metadata only. Counts, lengths, types and extents were checked above, so that none of
        // ggml's assertions can fail and its allocations stay below a few times MAX_METADATA.
        let ctx = unsafe { sys::gguf_init_from_file(c_path.as_ptr(), params) };
        let ctx = NonNull::new(ctx)
            .ok_or_else(|| Error::file(path, log::take_reason("ggml cannot read it as a GGUF")))?;
        let mut gguf = Self {
            ctx,
            path: path.to_owned(),
            header,
            ids: HashMap::new(),
        };
        gguf.ids = gguf.keys().into_iter().zip(0..).collect();
        Ok(gguf)
    }

    /// What the file says of itself.
    pub fn header(&self) -> Header {
        self.header
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys, in the file's order.
    pub fn keys(&self) -> Vec<String> {
        // SAFETY: `ctx` is valid while self lives; ids run from 0 to n_kv - 1, for each of which
        // ggml returns a C string that lives as long as the context.
        unsafe {
            (0..sys::gguf_get_n_kv(self.ctx.as_ptr()))
                .map(|id| text(sys::gguf_get_key(self.ctx.as_ptr(), id)))
                .collect()
        }
    }

    /// The value of `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<Value> {
        self.first(key, usize::MAX)
    }

    /// The value of `key`, of an array only as many elements at its beginning.
    fn first(&self, key: &str, most: usize) -> Option<Value> {
        let id = *self.ids.get(key)?;
        let ctx = self.ctx.as_ptr();
        // SAFETY: `id` is a valid key of a live context.
        let kind = unsafe { sys::gguf_get_kv_type(ctx, id) };
        if kind == sys::GGUF_TYPE_ARRAY {
            return Some(Value::Array(self.array(id, most)));
        }
        // SAFETY: ggml aborts on a getter of another type; each arm calls the one of its type.
        Some(unsafe {
            match kind {
                sys::GGUF_TYPE_UINT8 => Value::Unsigned(sys::gguf_get_val_u8(ctx, id).into()),
                sys::GGUF_TYPE_UINT16 => Value::Unsigned(sys::gguf_get_val_u16(ctx, id).into()),
                sys::GGUF_TYPE_UINT32 => Value::Unsigned(sys::gguf_get_val_u32(ctx, id).into()),
                sys::GGUF_TYPE_UINT64 => Value::Unsigned(sys::gguf_get_val_u64(ctx, id)),
                sys::GGUF_TYPE_INT8 => Value::Signed(sys::gguf_get_val_i8(ctx, id).into()),
                sys::GGUF_TYPE_INT16 => Value::Signed(sys::gguf_get_val_i16(ctx, id).into()),
                sys::GGUF_TYPE_INT32 => Value::Signed(sys::gguf_get_val_i32(ctx, id).into()),
                sys::GGUF_TYPE_INT64 => Value::Signed(sys::gguf_get_val_i64(ctx, id)),
                sys::GGUF_TYPE_FLOAT32 => Value::Float(sys::gguf_get_val_f32(ctx, id).into()),
                sys::GGUF_TYPE_FLOAT64 => Value::Float(sys::gguf_get_val_f64(ctx, id)),
                sys::GGUF_TYPE_BOOL => Value::Bool(sys::gguf_get_val_bool(ctx, id)),
                sys::GGUF_TYPE_STRING => Value::Text(text(sys::gguf_get_val_str(ctx, id))),
                _ => return None,
            }
        })
    }

    /// The type of `key`'s value and its beginning, however long it is; of an array `most` elements. `None`: the
    /// file does not have it.
    pub fn glimpse(&self, key: &str, most: usize) -> Option<Glimpse> {
        let id = *self.ids.get(key)?;
        let ctx = self.ctx.as_ptr();
        // SAFETY: `id` is a valid key of a live context, and an array where that is asked; every type in a file that
        // was opened has a name, a static C string.
        let (kind, len) = unsafe {
            let kind = sys::gguf_get_kv_type(ctx, id);
            let is_array = kind == sys::GGUF_TYPE_ARRAY;
            let len = is_array.then(|| sys::gguf_get_arr_n(ctx, id));
            let kind = match is_array {
                true => sys::gguf_get_arr_type(ctx, id),
                false => kind,
            };
            (text(sys::gguf_type_name(kind)), len)
        };
        Some(Glimpse {
            kind,
            len,
            value: self.first(key, most)?,
        })
    }

    /// How many strings the array at `key` has, and each of them as it lies there. `None`: there is none, or it holds
    /// something else.
    ///
    /// # Panics
    /// The function, when it is asked for one behind the last.
    pub fn strings<'g>(&'g self, key: &str) -> Option<(usize, impl Fn(usize) -> &'g CStr)> {
        let id = *self.ids.get(key)?;
        let ctx = self.ctx.as_ptr();
        // SAFETY: `id` is a valid key of a live context, and an array where that is asked.
        let n = unsafe {
            let is_array = sys::gguf_get_kv_type(ctx, id) == sys::GGUF_TYPE_ARRAY;
            let is_text = is_array && sys::gguf_get_arr_type(ctx, id) == sys::GGUF_TYPE_STRING;
            is_text.then(|| sys::gguf_get_arr_n(ctx, id))?
        };
        let at = move |i| {
            assert!(i < n, "{i} of {n} strings");
            // SAFETY: an index below the length of an array of strings; they live as long as the context does.
            unsafe { CStr::from_ptr(sys::gguf_get_arr_str(ctx, id, i)) }
        };
        Some((n, at))
    }

    fn array(&self, id: i64, most: usize) -> Vec<Value> {
        let ctx = self.ctx.as_ptr();
        // SAFETY: the caller found an array at `id`; these two only ask for that.
        let (kind, n) = unsafe {
            (
                sys::gguf_get_arr_type(ctx, id),
                sys::gguf_get_arr_n(ctx, id).min(most),
            )
        };
        if kind == sys::GGUF_TYPE_STRING {
            // SAFETY: an array of strings with indices below its length.
            return unsafe {
                (0..n)
                    .map(|i| Value::Text(text(sys::gguf_get_arr_str(ctx, id, i))))
                    .collect()
            };
        }
        // SAFETY: not an array of strings, for which alone ggml would abort. `data` points to n
        // elements of `kind`, stored without padding or alignment in a vector of bytes, hence
        // read_unaligned; bools are stored as bytes.
        unsafe {
            let data = sys::gguf_get_arr_data(ctx, id);
            macro_rules! each {
                ($t:ty, $v:expr) => {
                    (0..n)
                        .map(|i| $v(data.cast::<$t>().add(i).read_unaligned()))
                        .collect()
                };
            }
            match kind {
                sys::GGUF_TYPE_UINT8 => each!(u8, |v| Value::Unsigned(u64::from(v))),
                sys::GGUF_TYPE_UINT16 => each!(u16, |v| Value::Unsigned(u64::from(v))),
                sys::GGUF_TYPE_UINT32 => each!(u32, |v| Value::Unsigned(u64::from(v))),
                sys::GGUF_TYPE_UINT64 => each!(u64, Value::Unsigned),
                sys::GGUF_TYPE_INT8 => each!(i8, |v| Value::Signed(i64::from(v))),
                sys::GGUF_TYPE_INT16 => each!(i16, |v| Value::Signed(i64::from(v))),
                sys::GGUF_TYPE_INT32 => each!(i32, |v| Value::Signed(i64::from(v))),
                sys::GGUF_TYPE_INT64 => each!(i64, Value::Signed),
                sys::GGUF_TYPE_FLOAT32 => each!(f32, |v| Value::Float(f64::from(v))),
                sys::GGUF_TYPE_FLOAT64 => each!(f64, Value::Float),
                sys::GGUF_TYPE_BOOL => each!(u8, |v| Value::Bool(v != 0)),
                _ => Vec::new(),
            }
        }
    }

    /// The text at `key`.
    ///
    /// # Errors
    /// [`Error::File`] if the key is missing or holds something else.
    pub fn text(&self, key: &str) -> Result<String> {
        match self.get(key) {
            Some(Value::Text(s)) => Ok(s),
            other => Err(self.unexpected(key, "a string", other)),
        }
    }

    /// The non-negative integer at `key`, whatever its width.
    ///
    /// # Errors
    /// [`Error::File`] if the key is missing or holds something else.
    pub fn unsigned(&self, key: &str) -> Result<u64> {
        match self.get(key) {
            Some(Value::Unsigned(v)) => Ok(v),
            Some(Value::Signed(v)) if v >= 0 => Ok(v as u64),
            other => Err(self.unexpected(key, "a non-negative integer", other)),
        }
    }

    /// The floating-point number at `key`.
    ///
    /// # Errors
    /// [`Error::File`] if the key is missing or holds something else.
    pub fn float(&self, key: &str) -> Result<f64> {
        match self.get(key) {
            Some(Value::Float(v)) => Ok(v),
            other => Err(self.unexpected(key, "a float", other)),
        }
    }

    fn unexpected(&self, key: &str, expected: &str, found: Option<Value>) -> Error {
        let found = match found {
            None => "is missing".to_owned(),
            Some(Value::Array(v)) => format!("is an array of {}", v.len()),
            Some(v) => format!("is {v:?}"),
        };
        Error::file(&self.path, format!("{key} {found}, expected {expected}"))
    }

    /// The tensors, in the file's order.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let ctx = self.ctx.as_ptr();
        // SAFETY: ids run from 0 to n_tensors - 1 of a live context. The name is a C string, ne
        // points to GGML_MAX_DIMS numbers; both live as long as the context.
        unsafe {
            (0..sys::gguf_get_n_tensors(ctx))
                .filter_map(|id| {
                    let ne = std::slice::from_raw_parts(sys::gguf_get_tensor_ne(ctx, id), MAX_DIMS);
                    let used = ne.iter().rposition(|&d| d != 1).map_or(1, |i| i + 1);
                    Some(TensorInfo {
                        name: text(sys::gguf_get_tensor_name(ctx, id)),
                        kind: TensorType::from_raw(sys::gguf_get_tensor_type(ctx, id) as u32)?,
                        dims: ne[..used].iter().map(|&d| d as u64).collect(),
                        offset: self.header.data_offset
                            + sys::gguf_get_tensor_offset(ctx, id) as u64,
                        bytes: sys::gguf_get_tensor_size(ctx, id) as u64,
                    })
                })
                .collect()
        }
    }
}

/// # Safety
/// `s` is a valid C string.
unsafe fn text(s: *const std::ffi::c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(s) }.to_string_lossy().into_owned()
}
