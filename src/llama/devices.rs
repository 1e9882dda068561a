//! What llama.cpp computes on.

use std::ffi::CStr;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use super::{backend, static_str};
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
