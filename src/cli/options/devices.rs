//! Which devices of which machines a model goes to, spelled as llama.cpp spells it.

use std::io::Write;

use anyhow::{Context, Result};

use crate::cli::named::named;
use hae::Error;
use hae::llama::{
    Override, Placement, SplitMode, add_workers, device_memory, devices as all_devices,
};

/// Experts of a mixture, as llama.cpp names their tensors (`common.h`).
const EXPERTS: &str = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps";
const DENSE: &str = r"\.ffn_(up|down|gate)\.";

/// Which devices of which machines a model goes to.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Devices")]
pub struct DeviceArgs {
    /// Workers on other machines, list of HOST:PORT
    ///
    /// hae rpc-worker is one, llama.cpp's rpc-server another. Their devices are called RPC0 and so on.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SERVERS",
        hide_short_help = true
    )]
    rpc: Vec<String>,
    /// -dev: devices that layers go to, list, or none
    #[arg(long, alias = "dev", value_name = "NAMES", hide_short_help = true)]
    device: Option<String>,
    /// -sm: how devices share the model: none, layer or row
    ///
    /// none: one of them has it all. layer: each has some layers, with their cache. row: each has some rows of
    /// every weight, where a backend can.
    #[arg(long, alias = "sm", value_parser = named::<SplitMode>(), hide_possible_values = true, default_value = "layer", value_name = "MODE", hide_short_help = true)]
    split_mode: SplitMode,
    /// -mg: the device that has it all, with -sm none
    #[arg(
        long,
        alias = "mg",
        default_value_t = 0,
        allow_negative_numbers = true,
        value_name = "INDEX",
        hide_short_help = true
    )]
    main_gpu: i32,
    /// -ts: share of each device, list such as 3,1 [default: by free memory]
    #[arg(long, alias = "ts", value_name = "SHARES", hide_short_help = true)]
    tensor_split: Option<String>,
    /// -ot: where tensors go, list of PATTERN=BUFFER
    ///
    /// A pattern is a regular expression, found in their names. The first that fits counts.
    #[arg(
        long,
        alias = "ot",
        value_delimiter = ',',
        value_name = "PLACES",
        hide_short_help = true
    )]
    override_tensor: Vec<String>,
    /// -cmoe: experts stay in main memory
    #[arg(long, alias = "cmoe", hide_short_help = true)]
    cpu_moe: bool,
    /// -ncmoe: experts of the first N layers stay there
    #[arg(long, alias = "ncmoe", value_name = "N", hide_short_help = true)]
    n_cpu_moe: Option<u16>,
    /// -ncffn: so do the other feed-forward weights of the first N layers
    #[arg(long, alias = "ncffn", value_name = "N", hide_short_help = true)]
    n_cpu_ffn: Option<u16>,
    /// -nkvo: the cache stays in main memory
    #[arg(long, alias = "nkvo", hide_short_help = true)]
    no_kv_offload: bool,
    /// List the devices, those of --rpc among them, and do nothing else
    #[arg(long, hide_short_help = true)]
    list_devices: bool,
}

impl DeviceArgs {
    /// Makes the workers known, and checks that the rest can be, before anything loads. Gives whether that is
    /// all, since the list was asked for.
    pub fn begin(&self) -> Result<bool> {
        if !self.rpc.is_empty() {
            add_workers(&self.rpc)?;
        }
        if self.list_devices {
            list()?;
            return Ok(true);
        }
        self.placement()?.check()?;
        Ok(false)
    }

    /// What the flags say.
    pub fn placement(&self) -> hae::Result<Placement> {
        let devices = self.device.as_deref().map(names).transpose()?;
        Ok(Placement {
            devices,
            split_mode: self.split_mode,
            main_gpu: self.main_gpu,
            tensor_split: match &self.tensor_split {
                Some(text) => shares(text)?,
                None => Vec::new(),
            },
            overrides: self.overrides()?,
            kv_on_host: self.no_kv_offload,
        })
    }

    fn overrides(&self) -> hae::Result<Vec<Override>> {
        let on_cpu = |pattern: String| Override {
            pattern,
            buffer: "CPU".into(),
        };
        let given = self.override_tensor.iter().map(|text| {
            let (pattern, buffer) = text.split_once('=').ok_or_else(|| {
                let reason = format!("{text:?}, expected PATTERN=BUFFER, as in ffn=CPU");
                Error::option("override_tensor", reason)
            })?;
            Ok(Override {
                pattern: pattern.into(),
                buffer: buffer.into(),
            })
        });
        let mut all = given.collect::<hae::Result<Vec<_>>>()?;
        all.extend(self.cpu_moe.then(|| on_cpu(EXPERTS.into())));
        for (n, names) in [(self.n_cpu_moe, EXPERTS), (self.n_cpu_ffn, DENSE)] {
            let layers = 0..n.unwrap_or(0);
            all.extend(layers.map(|il| on_cpu(format!(r"blk\.{il}{names}"))));
        }
        Ok(all)
    }
}

/// Names behind commas; `none` is none of them.
pub fn names(text: &str) -> hae::Result<Vec<String>> {
    if text == "none" {
        return Ok(Vec::new());
    }
    let names: Vec<String> = text.split(',').map(str::to_owned).collect();
    match names.iter().position(String::is_empty) {
        None => Ok(names),
        Some(_) => Err(Error::option(
            "device",
            format!("{text:?}, expected names with commas between them, or none"),
        )),
    }
}

/// llama.cpp takes commas and slashes.
fn shares(text: &str) -> hae::Result<Vec<f32>> {
    let shares = text.split([',', '/']).map(|share| {
        share.trim().parse().map_err(|_| {
            let reason = format!("{text:?}, expected numbers with commas between them");
            Error::option("tensor_split", reason)
        })
    });
    shares.collect()
}

/// As llama.cpp's programs print them.
fn list() -> Result<()> {
    let devices = all_devices()?;
    let mut out = std::io::stdout().lock();
    let mut line = |text: String| writeln!(out, "{text}").context("stdout");
    line("Available devices:".into())?;
    let mut none = true;
    for device in devices.iter().filter(|device| !device.is_cpu) {
        none = false;
        let (total, free) = device_memory(&device.name)?;
        line(format!(
            "  {}: {} ({} MiB, {} MiB free)",
            device.name,
            device.description,
            total >> 20,
            free >> 20
        ))?;
    }
    match none {
        true => line("  (none)".into()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_llama_cpp_reads_them() {
        assert_eq!(shares("3,1").unwrap(), [3.0, 1.0]);
        assert_eq!(shares("0.5/2").unwrap(), [0.5, 2.0]);
        for text in ["", "3,", "x", "1;2"] {
            let error = shares(text).unwrap_err().to_string();
            assert!(error.starts_with("`tensor_split`: "), "{error}");
        }
        assert_eq!(names("none").unwrap(), [""; 0]);
        assert_eq!(names("CUDA0,RPC1").unwrap(), ["CUDA0", "RPC1"]);
        for text in ["", "CUDA0,", ",RPC0"] {
            assert!(names(text).is_err(), "{text}");
        }
    }

    #[test]
    fn experts_of_single_layers_come_behind_what_was_said() {
        let args = DeviceArgs {
            override_tensor: vec!["a=X".into()],
            n_cpu_moe: Some(2),
            n_cpu_ffn: Some(1),
            ..DeviceArgs::default()
        };
        let patterns = args.overrides().unwrap().into_iter();
        let patterns: Vec<String> = patterns.map(|o| o.pattern).collect();
        let expected = [
            "a",
            r"blk\.0\.ffn_(up|down|gate|gate_up)_(ch|)exps",
            r"blk\.1\.ffn_(up|down|gate|gate_up)_(ch|)exps",
            r"blk\.0\.ffn_(up|down|gate)\.",
        ];
        assert_eq!(patterns, expected);
        let args = DeviceArgs {
            override_tensor: vec!["a".into()],
            ..DeviceArgs::default()
        };
        assert!(args.placement().is_err());
    }

    /// The patterns are llama.cpp's own.
    #[test]
    fn tensors_are_named_as_llama_cpp_names_them() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let header = root.join("vendor/llama-cpp-sys-2/llama.cpp/common/common.h");
        let header = std::fs::read_to_string(header).unwrap();
        for pattern in [EXPERTS, DENSE] {
            let literal = format!("\"{}\";", pattern.replace('\\', r"\\"));
            assert!(header.contains(&literal), "{literal}");
        }
    }
}
