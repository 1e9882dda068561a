//! What contexts and vision models take, on which device: what they have, or, of a model that was loaded to
//! be measured, what they would have.

use std::ptr;

use llama_cpp_sys_2 as sys;

use super::{ImageTokens, LlamaEngine, Vision, backend, static_str};
use crate::error::{Error, Result};

/// Bytes on one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// ggml's name of it; `None`: main memory.
    pub device: Option<String>,
    /// Of weights.
    pub weights: u64,
    /// Of the KV cache, and of other memory that a context keeps.
    pub kv: u64,
    /// Of the buffers that graphs are computed in, and of logits.
    pub compute: u64,
}

/// Memory that something can lie in.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Place {
    /// ggml's name of the device; `None`: main memory.
    pub device: Option<String>,
    /// Bytes that nobody uses, if that is known.
    pub free: Option<u64>,
    /// All bytes, if that is known.
    pub total: Option<u64>,
}

/// Main memory, and that of each GPU.
///
/// # Errors
/// [`Error::Llama`] if llama.cpp cannot be set up.
pub fn places() -> Result<Vec<Place>> {
    backend()?;
    // SAFETY: the registry lives as long as the process; every index is below its count, for which ggml returns
    // a device; both numbers are live variables.
    let all = unsafe {
        (0..sys::ggml_backend_dev_count()).map(|i| {
            let device = sys::ggml_backend_dev_get(i);
            let (mut free, mut total) = (0, 0);
            sys::ggml_backend_dev_memory(device, &raw mut free, &raw mut total);
            let known = |bytes: usize| (total > 0).then_some(bytes as u64);
            Place {
                device: device_name(device),
                free: known(free),
                total: known(total),
            }
        })
    };
    let (mut host, mut gpus): (Vec<Place>, Vec<Place>) =
        all.partition(|place| place.device.is_none());
    if let (Some(main), Some(free)) = (host.first_mut(), available()) {
        // ggml takes all of it for free.
        main.free = Some(free.min(main.total.unwrap_or(free)));
    }
    host.truncate(1);
    host.append(&mut gpus);
    Ok(host)
}

/// Bytes of main memory that a program can have: what the system can give without swapping, and what a group of processes
/// is allowed to.
#[cfg(target_os = "linux")]
fn available() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let text = read("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let system: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let group = || {
        let most = number("/sys/fs/cgroup/memory.max")?;
        let used = number("/sys/fs/cgroup/memory.current")?;
        // Pages of files are given back when they are needed.
        let stat = read("/sys/fs/cgroup/memory.stat")?;
        let cached = stat
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file "));
        let cached = cached.and_then(|n| n.parse().ok()).unwrap_or(0);
        Some(most.saturating_sub(used.saturating_sub(cached)))
    };
    let system = system * 1024;
    Some(group().map_or(system, |group| group.min(system)))
}

#[cfg(not(target_os = "linux"))]
fn available() -> Option<u64> {
    None
}

/// A GPU's name; `None` for what computes in main memory.
///
/// # Safety
/// The device is one of ggml's registry.
unsafe fn device_name(device: sys::ggml_backend_dev_t) -> Option<String> {
    // SAFETY: the caller's promise; its name is a C string that ggml owns.
    unsafe {
        let kind = sys::ggml_backend_dev_type(device);
        let is_gpu = [
            sys::GGML_BACKEND_DEVICE_TYPE_GPU,
            sys::GGML_BACKEND_DEVICE_TYPE_IGPU,
        ]
        .contains(&kind);
        is_gpu.then(|| static_str(sys::ggml_backend_dev_name(device)))
    }
}

/// Parts of one device together, main memory first.
pub fn by_device(parts: impl IntoIterator<Item = Footprint>) -> Vec<Footprint> {
    let mut all = vec![Footprint::default()];
    for part in parts {
        let same = all.iter().position(|known| known.device == part.device);
        let Some(known) = same.and_then(|i| all.get_mut(i)) else {
            all.push(part);
            continue;
        };
        known.weights += part.weights;
        known.kv += part.kv;
        known.compute += part.compute;
    }
    all
}

impl LlamaEngine {
    /// What its model and its context take, a device each, main memory first.
    pub fn footprint(&self) -> Vec<Footprint> {
        let context = self.raw.as_ptr();
        let empty = sys::llama_hae_memory_part {
            type_: ptr::null_mut(),
            model: 0,
            context: 0,
            compute: 0,
        };
        // SAFETY: the context is alive, and `raw` holds as many parts as is said. Every buffer type is one of
        // ggml's, and has a device of the registry or none.
        let raw = unsafe {
            let n = sys::llama_hae_memory(context, ptr::null_mut(), 0);
            let mut raw = vec![empty; n];
            sys::llama_hae_memory(context, raw.as_mut_ptr(), n);
            raw
        };
        let logits = Footprint {
            compute: 4 * self.model.n_vocab() as u64 * u64::from(self.options.n_seq_max),
            ..Footprint::default()
        };
        let parts = raw.into_iter().map(|part| {
            // SAFETY: as above.
            let device = unsafe {
                let device = sys::ggml_backend_buft_get_device(part.type_);
                let host = device.is_null() || sys::ggml_backend_buft_is_host(part.type_);
                (!host).then(|| device_name(device)).flatten()
            };
            Footprint {
                device,
                weights: part.model as u64,
                kv: part.context as u64,
                compute: part.compute as u64,
            }
        });
        by_device(parts.chain([logits]))
    }

    /// What a trial run of so many cells takes beside it, weights aside; `goes_on`: with the hidden states that the
    /// prompt goes on from.
    ///
    /// # Errors
    /// As [`LlamaEngine::new`].
    pub fn footprint_of_trial(&self, n_cells: usize, goes_on: bool) -> Result<Vec<Footprint>> {
        let Some(trial) = self.trial_engine(n_cells)? else {
            return Ok(Vec::new());
        };
        let mut parts = trial.footprint();
        let hidden = 4 * (trial.n_ctx * self.model.n_embd()) as u64;
        let largest = parts.iter_mut().max_by_key(|part| part.kv);
        if let Some(part) = largest.filter(|_| goes_on) {
            part.kv += hidden;
        }
        parts.iter_mut().for_each(|part| part.weights = 0);
        Ok(parts)
    }
}

impl Vision {
    /// What its weights take, and what encoding the picture would take beside them; `None`: what is taken now.
    ///
    /// # Errors
    /// [`Error::Llama`] when the picture cannot be measured.
    pub fn footprint(&mut self, image: Option<&ImageTokens>) -> Result<Vec<Footprint>> {
        // A GPU and the processor.
        const MOST: usize = 8;
        let empty = sys::mtmd_hae_memory_part {
            device: ptr::null_mut(),
            weights: 0,
            compute: 0,
        };
        let mut raw = [empty; MOST];
        // SAFETY: context and chunk are alive, and there is room for as many parts as is said. Every device is one of
        // ggml's registry.
        let n = unsafe {
            let chunk = image.map_or(ptr::null(), ImageTokens::raw);
            sys::mtmd_hae_memory(self.raw(), chunk, raw.as_mut_ptr(), MOST)
        };
        if n == 0 || n > MOST {
            return Err(Error::llama(
                "mtmd_hae_memory",
                "the picture cannot be measured",
            ));
        }
        let parts = raw[..n].iter().map(|part| Footprint {
            // SAFETY: as above.
            device: unsafe { device_name(part.device) },
            weights: part.weights as u64,
            kv: 0,
            compute: part.compute as u64,
        });
        Ok(by_device(parts))
    }
}
