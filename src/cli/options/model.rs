//! Which files to load, and onto what.

use std::path::PathBuf;

use super::{DeviceArgs, HubArgs};
use crate::cli::named::named;
use hae::open::RopeChoice;
use hae::outfile::FilesInUse;

/// Which files to load, and onto what.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Text model [default: a small one in this program]
    ///
    /// A GGUF. The small one has Phi-3.5-vision's architecture.
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// -mm: vision file (GGUF) of the model
    #[arg(long, alias = "mm", value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    #[command(flatten)]
    pub hub: HubArgs,
    /// -ngl: layers on the GPU, or all
    ///
    /// A number, all, or auto for llama.cpp's choice. --n-gpu-layers is the same.
    #[arg(long, aliases = ["n-gpu-layers", "ngl"], default_value = "auto", value_parser = gpu_layers, value_name = "N")]
    pub gpu_layers: GpuLayers,
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// Read the weights into memory instead of mapping the file
    #[arg(long, hide_short_help = true)]
    pub no_mmap: bool,
    /// Keep the weights in memory, never swapped out
    #[arg(long, hide_short_help = true)]
    pub mlock: bool,
    /// Which longrope factors to use. auto goes by the positions that the run can reach. context
    /// goes by the size of the cache, as llama.cpp does
    #[arg(long, hide_short_help = true, value_parser = named::<RopeChoice>(), default_value = "auto", value_name = "RULE")]
    pub rope_factors: RopeChoice,
}

impl ModelArgs {
    /// The files that are read.
    pub fn in_use(&self) -> FilesInUse {
        let mut files = FilesInUse::default();
        for (flag, path) in [("-m", &self.model), ("--mmproj", &self.mmproj)] {
            if let Some(path) = path {
                files.reads_model(flag, path);
            }
        }
        files
    }
}

/// `None`: as many as llama.cpp chooses.
pub type GpuLayers = Option<u32>;

/// llama.cpp's own spellings: -1 is `auto`, -2 is `all`.
pub fn gpu_layers(text: &str) -> Result<GpuLayers, String> {
    match text {
        "auto" | "-1" => Ok(None),
        "all" | "-2" => Ok(Some(i32::MAX as u32)),
        _ => match text.parse() {
            Ok(n) if n <= i32::MAX as u32 => Ok(Some(n)),
            _ => Err("expected a number of layers, all or auto".into()),
        },
    }
}
