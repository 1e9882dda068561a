//! What llama.cpp computes on.

use std::ffi::CStr;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use super::{CacheType, backend, static_str};
use crate::error::Result;

/// A processor or accelerator that this build of ggml found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// ggml's name, `CPU` or `CUDA0`.
    pub name: String,
    /// The maker's name.
    pub description: String,
    /// Whether it is a GPU.
    pub is_gpu: bool,
}

/// All devices, as ggml orders them.
///
/// # Errors
/// [`crate::Error::Llama`] if llama.cpp cannot be set up.
pub fn devices() -> Result<Vec<Device>> {
    backend()?;
    // SAFETY: the registry lives as long as the process; every index is below its count, for
    // which ggml returns a device, and its texts are C strings that it owns.
    unsafe {
        let device = |i| {
            let device = sys::ggml_backend_dev_get(i);
            let kind = sys::ggml_backend_dev_type(device);
            Device {
                name: static_str(sys::ggml_backend_dev_name(device)),
                description: static_str(sys::ggml_backend_dev_description(device)),
                is_gpu: kind == sys::GGML_BACKEND_DEVICE_TYPE_GPU
                    || kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU,
            }
        };
        Ok((0..sys::ggml_backend_dev_count()).map(device).collect())
    }
}

/// A GPU that cannot write rows into a cache of this type. llama.cpp would put the cache there all the same,
/// and ggml ends the program when it finds that no other device reaches it.
pub(super) fn without_cache(kind: CacheType) -> Option<String> {
    let params = sys::ggml_init_params {
        // Four tensors.
        mem_size: 4 << 10,
        mem_buffer: std::ptr::null_mut(),
        no_alloc: true,
    };
    // SAFETY: the context holds what is made in it and is freed last. The rows are of one block that every
    // type has whole; nothing is computed. Devices live as long as the process, and only look at the tensor.
    unsafe {
        let ctx = sys::ggml_init(params);
        if ctx.is_null() {
            return None;
        }
        let new = |kind, ne0, ne1| sys::ggml_new_tensor_2d(ctx, kind, ne0, ne1);
        let cache = new(kind.raw().into(), 256, 1);
        let rows = new(sys::GGML_TYPE_F32, 256, 1);
        let op = sys::ggml_set_rows(ctx, cache, rows, new(sys::GGML_TYPE_I64, 1, 1));
        let lacks = (0..sys::ggml_backend_dev_count()).map(|i| sys::ggml_backend_dev_get(i));
        let lacks = lacks
            .filter(|&device| {
                let kind = sys::ggml_backend_dev_type(device);
                kind == sys::GGML_BACKEND_DEVICE_TYPE_GPU
                    || kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU
            })
            .find(|&device| !sys::ggml_backend_dev_supports_op(device, op))
            .map(|device| static_str(sys::ggml_backend_dev_description(device)));
        sys::ggml_free(ctx);
        lacks
    }
}

/// What llama.cpp calls a model: `phi3 3B Q4_0`.
pub(super) fn description(model: &LlamaModel) -> String {
    let mut text = [0u8; 128];
    // SAFETY: the model is alive, and llama.cpp writes at most text.len() bytes, the last of them
    // zero.
    unsafe { sys::llama_model_desc(model.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
    CStr::from_bytes_until_nul(&text).map_or_else(
        |_| String::new(),
        |text| text.to_string_lossy().into_owned(),
    )
}
