//! What llama.cpp computes on.

use std::ffi::CStr;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use super::{CacheType, backend, static_str};
use crate::error::{Error, Result};

/// A processor or accelerator that this build of ggml found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// ggml's name, `CPU` or `CUDA0`.
    pub name: String,
    /// The maker's name.
    pub description: String,
    /// Whether it is a GPU. A worker's device counts as one, whatever it is there.
    pub is_gpu: bool,
    /// Whether that GPU shares main memory with the processor.
    pub is_integrated: bool,
    /// Whether it is this machine's processor.
    pub is_cpu: bool,
    /// Whether it is a worker's ([`super::add_workers`]).
    pub is_remote: bool,
}

/// All devices, as ggml orders them.
///
/// # Errors
/// [`crate::Error::Llama`] if llama.cpp cannot be set up.
pub fn devices() -> Result<Vec<Device>> {
    Ok(raw()?.into_iter().map(|(_, device)| device).collect())
}

/// The same with ggml's own pointers, which are valid as long as the process lives.
pub(super) fn raw() -> Result<Vec<(sys::ggml_backend_dev_t, Device)>> {
    backend()?;
    // SAFETY: the registry lives as long as the process; every index is below its count, for
    // which ggml returns a device, and its texts are C strings that it owns.
    unsafe {
        let device = |i| {
            let raw = sys::ggml_backend_dev_get(i);
            let kind = sys::ggml_backend_dev_type(raw);
            let registry = sys::ggml_backend_reg_name(sys::ggml_backend_dev_backend_reg(raw));
            let device = Device {
                name: static_str(sys::ggml_backend_dev_name(raw)),
                description: static_str(sys::ggml_backend_dev_description(raw)),
                is_integrated: kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU,
                is_remote: static_str(registry) == "RPC",
                is_gpu: kind == sys::GGML_BACKEND_DEVICE_TYPE_GPU
                    || kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU,
                is_cpu: kind == sys::GGML_BACKEND_DEVICE_TYPE_CPU,
            };
            (raw, device)
        };
        Ok((0..sys::ggml_backend_dev_count()).map(device).collect())
    }
}

/// One of these devices that cannot write rows into a cache of this type, by its maker's name. llama.cpp would put the
/// cache there all the same, and ggml ends the program when it finds that no other device reaches it.
pub(super) fn without_cache(
    devices: &[sys::ggml_backend_dev_t],
    kind: CacheType,
) -> Option<String> {
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
        let mut devices = devices.iter();
        let lacks = devices.find(|&&device| !sys::ggml_backend_dev_supports_op(device, op));
        let name = lacks.map(|&device| static_str(sys::ggml_backend_dev_description(device)));
        sys::ggml_free(ctx);
        name
    }
}

/// The device of this name, if it is one that `may` be taken.
///
/// # Errors
/// [`Error::Option`] naming `device`, with the names that there are.
pub(super) fn find(
    all: &[(sys::ggml_backend_dev_t, Device)],
    name: &str,
    may: impl Fn(&Device) -> bool,
) -> Result<sys::ggml_backend_dev_t> {
    let mut known = all.iter().filter(|(_, device)| may(device));
    if let Some((raw, _)) = known.clone().find(|(_, device)| device.name == name) {
        return Ok(*raw);
    }
    let names: Vec<&str> = known.by_ref().map(|(_, device)| &*device.name).collect();
    let there = match names.is_empty() {
        true => "there are none".to_owned(),
        false => format!("expected some of {}", names.join(", ")),
    };
    Err(Error::option(
        "device",
        format!("no device {name:?}, {there}"),
    ))
}

/// Bytes of a device's memory: all of them, and those that nobody uses.
///
/// # Errors
/// As [`devices`]; [`Error::Option`] for a name that no device has.
pub fn device_memory(name: &str) -> Result<(u64, u64)> {
    let device = find(&raw()?, name, |_| true)?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: a device of the registry; both numbers are live variables.
    unsafe { sys::ggml_backend_dev_memory(device, &raw mut free, &raw mut total) };
    Ok((total as u64, free as u64))
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
