//! Which devices a model's layers, their part of the cache and single tensors go to, as llama.cpp's
//! programs say it (`common/arg.cpp`).

use std::ffi::CString;
use std::ptr;

use llama_cpp_2::model::params::{LlamaModelParams, LlamaSplitMode};
use llama_cpp_sys_2 as sys;

use super::devices::{self, Device};
use super::static_str;
use crate::error::{Error, Result};

/// How a model is spread over several devices (`-sm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SplitMode {
    /// One device has all.
    None,
    /// Whole layers, each with its part of the cache.
    #[default]
    Layer,
    /// Rows of each layer's weights, where a backend can; the cache as with [`SplitMode::Layer`].
    Row,
    /// Rows of the weights, and heads of the cache. Refused: see [`Placement::check`].
    Tensor,
}

/// Where a model goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Placement {
    /// ggml's names of the devices that layers may go to, in this order (`-dev`); empty: none but the processor.
    /// `None`: llama.cpp's choice, which is all workers, then all GPUs.
    pub devices: Option<Vec<String>>,
    /// How they share it.
    pub split_mode: SplitMode,
    /// Which of them has all of it, with [`SplitMode::None`]; below 0: none.
    pub main_gpu: i32,
    /// What share each of them gets (`-ts`), one for each; empty or all zeros: by their free memory.
    pub tensor_split: Vec<f32>,
    /// Tensors that go elsewhere (`-ot`). The first pattern that fits a tensor's name counts.
    pub overrides: Vec<Override>,
    /// K and V stay in this machine's main memory, wherever the layers are (`-nkvo`).
    pub kv_on_host: bool,
}

/// Where some tensors go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// A regular expression (ECMAScript) that is found in their names.
    pub pattern: String,
    /// ggml's name of the buffer type, such as `CPU`.
    pub buffer: String,
}

/// What the C parameters point to. It has to live until the model is loaded.
#[derive(Default)]
pub(super) struct Pointed {
    devices: Vec<sys::ggml_backend_dev_t>,
    tensor_split: Vec<f32>,
    overrides: Vec<sys::llama_model_tensor_buft_override>,
    /// What `overrides` points to.
    _patterns: Vec<CString>,
}

impl Placement {
    /// Whether a model can be spread so on this machine. Nothing is loaded.
    ///
    /// # Errors
    /// [`Error::Option`] naming the flag: a device or buffer type that is not there, more or fewer shares than devices, a main
    /// device that is none, [`SplitMode::Tensor`], and [`SplitMode::Row`] on a device that cannot.
    pub fn check(&self) -> Result<()> {
        self.pointed().map(drop)
    }

    /// Whether layers may go to a device.
    pub(super) fn offloads(&self) -> Result<bool> {
        let on_none = self.split_mode == SplitMode::None && self.main_gpu < 0;
        Ok(!on_none && !self.targets()?.is_empty())
    }

    /// The devices that layers may go to.
    pub(super) fn targets(&self) -> Result<Vec<sys::ggml_backend_dev_t>> {
        self.taken(&devices::raw()?)
    }

    /// The device that encodes pictures: `None` is ggml's choice among those that there are.
    pub(super) fn first(&self) -> Result<Option<sys::ggml_backend_dev_t>> {
        if self.devices.is_none() && self.split_mode != SplitMode::None {
            return Ok(None);
        }
        let taken = self.targets()?;
        let main = usize::try_from(self.main_gpu).unwrap_or(0);
        let at = if self.split_mode == SplitMode::None {
            main
        } else {
            0
        };
        Ok(taken.get(at).copied())
    }

    /// The devices that llama.cpp takes: those that are named, or as `llama_prepare_model_devices` chooses.
    fn taken(
        &self,
        all: &[(sys::ggml_backend_dev_t, Device)],
    ) -> Result<Vec<sys::ggml_backend_dev_t>> {
        match &self.devices {
            Some(names) => {
                let find = |name: &String| devices::find(all, name, |device| !device.is_cpu);
                names.iter().map(find).collect()
            }
            None => {
                let of = |kind: fn(&Device) -> bool| {
                    let some = all
                        .iter()
                        .filter(move |(_, device)| device.is_gpu && kind(device));
                    some.map(|(raw, _)| *raw)
                };
                let own: Vec<_> = of(|gpu| !gpu.is_remote && !gpu.is_integrated).collect();
                let shared =
                    of(|gpu| !gpu.is_remote && gpu.is_integrated).filter(|_| own.is_empty());
                Ok(of(|gpu| gpu.is_remote)
                    .chain(own.iter().copied())
                    .chain(shared)
                    .collect())
            }
        }
    }

    fn pointed(&self) -> Result<Pointed> {
        let refused = |name, reason: String| Err(Error::option(name, reason));
        let all = devices::raw()?;
        let taken = self.taken(&all)?;
        if self.split_mode == SplitMode::Tensor {
            let reason = "tensor cuts each layer's cache by heads, which scores, copies, compaction and another size of \
                it do not reach: expected none, layer or row";
            return refused("split_mode", reason.to_owned());
        }
        if self.split_mode == SplitMode::Row
            && let Some((_, device)) = all
                .iter()
                .find(|(raw, _)| taken.contains(raw) && !splits_rows(*raw))
        {
            let reason = format!("row: {} cannot hold rows of a weight", device.name);
            return refused("split_mode", reason);
        }
        let one = self.split_mode == SplitMode::None && !taken.is_empty();
        let main = usize::try_from(self.main_gpu);
        if one && main.is_ok_and(|main| main >= taken.len()) {
            let (n, last) = (self.main_gpu, taken.len() - 1);
            return refused("main_gpu", format!("no device {n}, expected 0 to {last}"));
        }
        let (shares, n) = (&self.tensor_split, taken.len());
        // llama.cpp takes fewer, and leaves the last devices empty without a word.
        if !shares.is_empty() && shares.len() != n {
            let reason = format!("{} shares for {n} devices", shares.len());
            return refused("tensor_split", reason);
        }
        if let Some(share) = shares.iter().find(|x| !x.is_finite() || **x < 0.0) {
            let reason = format!("a share of {share}, expected 0 or more");
            return refused("tensor_split", reason);
        }
        // SAFETY: takes nothing.
        let most = unsafe { sys::llama_max_devices() };
        // The processor is one of those that a graph is cut up for.
        if n >= most {
            let reason = format!("{n} devices, expected at most {}", most.saturating_sub(1));
            return refused("device", reason);
        }
        let mut pointed = Pointed::default();
        if self.devices.is_some() {
            pointed.devices = taken;
            pointed.devices.push(ptr::null_mut());
        }
        if shares.iter().any(|&share| share > 0.0) {
            pointed.tensor_split = shares.clone();
            pointed.tensor_split.resize(most, 0.0);
        }
        self.point_overrides(&all, &mut pointed)?;
        Ok(pointed)
    }

    fn point_overrides(
        &self,
        all: &[(sys::ggml_backend_dev_t, Device)],
        pointed: &mut Pointed,
    ) -> Result<()> {
        if self.overrides.is_empty() {
            return Ok(());
        }
        // SAFETY: devices of the registry; a type that ggml gives lives as long as the process, and so does its name.
        let types = all.iter().filter_map(|(raw, _)| unsafe {
            let kind = sys::ggml_backend_dev_buffer_type(*raw);
            (!kind.is_null()).then(|| (static_str(sys::ggml_backend_buft_name(kind)), kind))
        });
        let types: Vec<_> = types.collect();
        for Override { pattern, buffer } in &self.overrides {
            let Some((_, kind)) = types.iter().find(|(name, _)| name == buffer) else {
                let names: Vec<&str> = types.iter().map(|(name, _)| &**name).collect();
                let names = names.join(", ");
                let reason = format!("no buffer type {buffer:?}, expected one of {names}");
                return Err(Error::option("override_tensor", reason));
            };
            let text = CString::new(pattern.as_str());
            let text = text.map_err(|_| Error::option("override_tensor", "a zero byte"))?;
            // The text lies on the heap, and stays there when the vector grows.
            pointed
                .overrides
                .push(sys::llama_model_tensor_buft_override {
                    pattern: text.as_ptr(),
                    buft: *kind,
                });
            pointed._patterns.push(text);
        }
        pointed
            .overrides
            .push(sys::llama_model_tensor_buft_override {
                pattern: ptr::null(),
                buft: ptr::null_mut(),
            });
        Ok(())
    }

    /// Tells the parameters, which point to what is returned.
    pub(super) fn set(&self, params: LlamaModelParams) -> Result<(LlamaModelParams, Pointed)> {
        let mut pointed = self.pointed()?;
        let mut params =
            params
                .with_main_gpu(self.main_gpu)
                .with_split_mode(match self.split_mode {
                    SplitMode::None => LlamaSplitMode::None,
                    SplitMode::Layer => LlamaSplitMode::Layer,
                    SplitMode::Row => LlamaSplitMode::Row,
                    SplitMode::Tensor => LlamaSplitMode::Tensor,
                });
        let raw = params.as_raw_mut();
        if !pointed.devices.is_empty() {
            raw.devices = pointed.devices.as_mut_ptr();
        }
        if !pointed.tensor_split.is_empty() {
            raw.tensor_split = pointed.tensor_split.as_ptr();
        }
        if !pointed.overrides.is_empty() {
            raw.tensor_buft_overrides = pointed.overrides.as_ptr();
        }
        Ok((params, pointed))
    }
}

/// Whether a backend has buffers whose weights lie on several of its devices.
fn splits_rows(device: sys::ggml_backend_dev_t) -> bool {
    // SAFETY: a device of the registry, whose backend lives as long as the process; the name is a C string.
    unsafe {
        let registry = sys::ggml_backend_dev_backend_reg(device);
        let name = c"ggml_backend_split_buffer_type";
        !sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr()).is_null()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(placement: &Placement) -> String {
        placement.check().unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_loads() {
        let devices = Some(vec!["NONE0".to_owned()]);
        let said = refusal(&Placement {
            devices,
            ..Placement::default()
        });
        assert!(said.starts_with("`device`: no device \"NONE0\""), "{said}");
        let on_cpu = Placement {
            devices: Some(Vec::new()),
            ..Placement::default()
        };
        on_cpu.check().unwrap();
        assert!(!on_cpu.offloads().unwrap());
        let said = refusal(&Placement {
            tensor_split: vec![1.0],
            ..on_cpu.clone()
        });
        assert_eq!(said, "`tensor_split`: 1 shares for 0 devices");
        let said = refusal(&Placement {
            split_mode: SplitMode::Tensor,
            ..on_cpu.clone()
        });
        assert!(said.starts_with("`split_mode`: tensor cuts"), "{said}");
        let overrides = vec![Override {
            pattern: "ffn".into(),
            buffer: "NONE".into(),
        }];
        let said = refusal(&Placement {
            overrides,
            ..on_cpu
        });
        assert!(
            said.starts_with("`override_tensor`: no buffer type \"NONE\", expected one of "),
            "{said}"
        );
    }
}
