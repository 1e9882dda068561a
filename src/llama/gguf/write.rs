//! Writing: metadata through ggml, tensor data as a stream behind it.

use std::collections::HashSet;
use std::ffi::CString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::{ALIGNMENT, MAX_DIMS, MAX_TENSOR_NAME, TensorType};
use crate::error::{Error, Result};

/// A GGUF being put together: keys and the table of tensors, no data. The one owner of its
/// `gguf_context`.
#[derive(Debug)]
pub struct Writer {
    ctx: NonNull<sys::gguf_context>,
    /// The file meant, for messages.
    path: PathBuf,
    tensors: Vec<(String, u64)>,
    names: HashSet<String>,
    /// Those set, each once.
    keys: HashSet<String>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: `ctx` came from gguf_init_empty and is freed only here.
        unsafe { sys::gguf_free(self.ctx.as_ptr()) }
    }
}

impl Writer {
    /// An empty file; `path` is only named in messages.
    ///
    /// # Errors
    /// [`Error::Llama`] if ggml returns nothing.
    pub fn new(path: &Path) -> Result<Self> {
        // SAFETY: takes nothing; the result is owned by the new Writer.
        let ctx = NonNull::new(unsafe { sys::gguf_init_empty() })
            .ok_or_else(|| Error::llama("gguf_init_empty", "returned null"))?;
        Ok(Self {
            ctx,
            path: path.to_owned(),
            tensors: Vec::new(),
            names: HashSet::new(),
            keys: HashSet::new(),
        })
    }

    /// A key that ggml accepts: not empty (asserted there), no zero byte, and not the alignment,
    /// which ggml would check by aborting and which [`DataWriter`] takes to be [`ALIGNMENT`].
    fn key(&mut self, key: &str) -> Result<CString> {
        if key.is_empty() || key == "general.alignment" {
            return Err(Error::file(
                &self.path,
                format!("key \"{key}\" cannot be set"),
            ));
        }
        let c_key = self.c_string(key, key)?;
        self.keys.insert(key.to_owned());
        Ok(c_key)
    }

    fn c_string(&self, key: &str, text: &str) -> Result<CString> {
        CString::new(text).map_err(|_| {
            Error::file(
                &self.path,
                format!("{} holds a zero byte", key.escape_debug()),
            )
        })
    }

    /// Sets an entry of the metadata: a text.
    pub fn set_text(&mut self, key: &str, value: &str) -> Result<()> {
        let c_value = self.c_string(key, value)?;
        let c_key = self.key(key)?;
        // SAFETY: both are C strings that outlive the call, and ggml copies them.
        unsafe { sys::gguf_set_val_str(self.ctx.as_ptr(), c_key.as_ptr(), c_value.as_ptr()) };
        Ok(())
    }

    /// Sets an entry of the metadata: a number.
    pub fn set_u32(&mut self, key: &str, value: u32) -> Result<()> {
        let c_key = self.key(key)?;
        // SAFETY: the key is a C string that outlives the call, and ggml copies it.
        unsafe { sys::gguf_set_val_u32(self.ctx.as_ptr(), c_key.as_ptr(), value) };
        Ok(())
    }

    /// Sets an entry of the metadata: a number.
    pub fn set_f32(&mut self, key: &str, value: f32) -> Result<()> {
        let c_key = self.key(key)?;
        // SAFETY: as in set_u32.
        unsafe { sys::gguf_set_val_f32(self.ctx.as_ptr(), c_key.as_ptr(), value) };
        Ok(())
    }

    /// Sets an entry of the metadata: true or false.
    pub fn set_bool(&mut self, key: &str, value: bool) -> Result<()> {
        let c_key = self.key(key)?;
        // SAFETY: as in set_u32.
        unsafe { sys::gguf_set_val_bool(self.ctx.as_ptr(), c_key.as_ptr(), value) };
        Ok(())
    }

    /// Sets an entry of the metadata: numbers.
    pub fn set_f32_array(&mut self, key: &str, values: &[f32]) -> Result<()> {
        // SAFETY: a slice of f32, as the type says.
        unsafe { self.set_array(key, sys::GGUF_TYPE_FLOAT32, values) }
    }

    /// Sets an entry of the metadata: numbers.
    pub fn set_i32_array(&mut self, key: &str, values: &[i32]) -> Result<()> {
        // SAFETY: a slice of i32, as the type says.
        unsafe { self.set_array(key, sys::GGUF_TYPE_INT32, values) }
    }

    /// # Safety
    /// `kind` is the GGUF type of `T`, which has no padding.
    unsafe fn set_array<T: Copy>(
        &mut self,
        key: &str,
        kind: sys::gguf_type,
        values: &[T],
    ) -> Result<()> {
        let c_key = self.key(key)?;
        // SAFETY: ggml copies values.len() elements of `kind`, which is T's type by the caller's
        // promise, and the key.
        unsafe {
            sys::gguf_set_arr_data(
                self.ctx.as_ptr(),
                c_key.as_ptr(),
                kind,
                values.as_ptr().cast(),
                values.len(),
            );
        }
        Ok(())
    }

    /// Sets an entry of the metadata: texts.
    pub fn set_text_array(&mut self, key: &str, values: &[String]) -> Result<()> {
        let owned: Vec<CString> = values
            .iter()
            .map(|v| self.c_string(key, v))
            .collect::<Result<_>>()?;
        let c_key = self.key(key)?;
        let mut pointers: Vec<*const std::ffi::c_char> = owned.iter().map(|s| s.as_ptr()).collect();
        // SAFETY: `pointers` holds values.len() C strings owned by `owned`, which lives until after
        // the call; ggml copies them and does not write to the array.
        unsafe {
            sys::gguf_set_arr_str(
                self.ctx.as_ptr(),
                c_key.as_ptr(),
                pointers.as_mut_ptr(),
                pointers.len(),
            );
        }
        Ok(())
    }

    /// Adds a tensor to the table, behind the earlier ones. `dims`: fastest first.
    ///
    /// # Errors
    /// [`Error::File`] if the name is too long or taken, or the type cannot have the shape.
    pub fn add_tensor(&mut self, name: &str, kind: TensorType, dims: &[u64]) -> Result<()> {
        let wrong = |reason: String| Error::file(&self.path, format!("tensor {name}: {reason}"));
        if name.is_empty() || name.len() >= MAX_TENSOR_NAME || name.contains('\0') {
            return Err(wrong("a name has 1 to 63 bytes".into()));
        }
        let bytes = kind.tensor_bytes(dims).filter(|&n| {
            n > 0 && dims.len() <= MAX_DIMS && dims.iter().all(|&d| i64::try_from(d).is_ok())
        });
        let Some(bytes) = bytes else {
            return Err(wrong(format!(
                "type {} cannot have shape {dims:?}",
                kind.name()
            )));
        };
        if !self.names.insert(name.to_owned()) {
            return Err(wrong("is added twice".into()));
        }
        let mut ne = [1i64; MAX_DIMS];
        ne.iter_mut().zip(dims).for_each(|(n, &d)| *n = d as i64);
        let c_name = self.c_string(name, name)?;
        // Room for exactly one tensor's header. ggml needs the struct only to copy it.
        // SAFETY: no memory is handed over; ggml allocates the context.
        let tensor_ctx = unsafe {
            sys::ggml_init(sys::ggml_init_params {
                mem_size: sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            })
        };
        if tensor_ctx.is_null() {
            return Err(Error::llama("ggml_init", "returned null"));
        }
        // SAFETY: the context has room for one tensor and allocates no data (no_alloc); `ne` holds
        // MAX_DIMS lengths whose product was checked not to overflow; the type is a known one. The
        // name is a C string shorter than GGML_MAX_NAME and not in the table yet (ggml would abort
        // on a duplicate). gguf_add_tensor copies the struct, so the context may go afterwards.
        unsafe {
            let tensor = sys::ggml_new_tensor(tensor_ctx, kind.0, MAX_DIMS as i32, ne.as_ptr());
            sys::ggml_set_name(tensor, c_name.as_ptr());
            sys::gguf_add_tensor(self.ctx.as_ptr(), tensor);
            sys::ggml_free(tensor_ctx);
        }
        self.tensors.push((name.to_owned(), bytes));
        Ok(())
    }

    /// The file up to its tensor data, padded to where the data starts.
    ///
    /// # Errors
    /// [`Error::Llama`] where there was no memory for it, or for a key or a tensor before.
    fn metadata(&self) -> Result<Vec<u8>> {
        let ctx = self.ctx.as_ptr();
        // SAFETY: a live context; the calls only count.
        let (keys, tensors) = unsafe { (sys::gguf_get_n_kv(ctx), sys::gguf_get_n_tensors(ctx)) };
        let set = (usize::try_from(keys), usize::try_from(tensors));
        if set != (Ok(self.keys.len()), Ok(self.tensors.len())) {
            return Err(Error::llama("gguf_set_kv", "not enough memory"));
        }
        // SAFETY: the first call returns the size that the second one writes, and nothing changes
        // in between.
        let bytes = unsafe {
            let mut bytes = vec![0u8; sys::gguf_get_meta_size(ctx)];
            sys::gguf_get_meta_data(ctx, bytes.as_mut_ptr().cast());
            bytes
        };
        match bytes.starts_with(b"GGUF") {
            true => Ok(bytes),
            false => Err(Error::llama("gguf_get_meta_data", "not enough memory")),
        }
    }

    /// Writes the metadata to `out` and returns what takes the tensors' data, in the order in
    /// which they were added.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn begin<W: Write>(self, mut out: W) -> Result<DataWriter<W>> {
        out.write_all(&self.metadata()?)
            .map_err(|e| Error::io(&self.path, e))?;
        Ok(DataWriter {
            out,
            path: self.path.clone(),
            tensors: self.tensors.clone(),
            done: 0,
            written: 0,
        })
    }
}

/// Appends tensor data to a file whose metadata is written, and holds it to what the metadata says.
#[derive(Debug)]
pub struct DataWriter<W> {
    out: W,
    path: PathBuf,
    tensors: Vec<(String, u64)>,
    /// Tensors finished.
    done: usize,
    /// Bytes written of the current one.
    written: u64,
}

impl<W: Write> DataWriter<W> {
    /// Appends bytes of the current tensor.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .map_err(|e| Error::io(&self.path, e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Ends the current tensor: checks its size and pads to [`ALIGNMENT`].
    ///
    /// # Errors
    /// [`Error::File`] if more or fewer bytes were written than the table says.
    pub fn end_tensor(&mut self) -> Result<()> {
        let Some((name, bytes)) = self.tensors.get(self.done) else {
            return Err(Error::file(&self.path, "more tensors than in the table"));
        };
        if self.written != *bytes {
            return Err(Error::file(
                &self.path,
                format!("tensor {name}: {} bytes, expected {bytes}", self.written),
            ));
        }
        let padding = bytes.next_multiple_of(ALIGNMENT as u64) - bytes;
        self.out
            .write_all(&[0; ALIGNMENT][..padding as usize])
            .map_err(|e| Error::io(&self.path, e))?;
        self.done += 1;
        self.written = 0;
        Ok(())
    }

    /// Flushes and returns the output.
    ///
    /// # Errors
    /// [`Error::File`] if tensors are missing, [`Error::Io`] from the flush.
    pub fn finish(mut self) -> Result<W> {
        if let Some((name, _)) = self.tensors.get(self.done) {
            return Err(Error::file(
                &self.path,
                format!("tensor {name} was not written"),
            ));
        }
        self.out.flush().map_err(|e| Error::io(&self.path, e))?;
        Ok(self.out)
    }
}
