//! `--num-crops` and `/crops`: how pictures are cut up.

use anyhow::Result;

use hae::Error;
use hae::llama::Vision;

/// How pictures are cut up.
#[derive(Debug, clap::Args)]
pub struct CropArgs {
    /// Most crops of a Phi-3.5 picture, 1 to 64
    ///
    /// More crops show smaller things and take more cells. [default: what the vision file says]
    #[arg(long, value_name = "N")]
    num_crops: Option<i64>,
}

impl CropArgs {
    pub fn num_crops(&self) -> Result<Option<u32>> {
        self.num_crops.map(|n| crops("--num-crops", n)).transpose()
    }
}

/// A number of crops that somebody gave as `name`.
pub fn crops(name: &'static str, n: i64) -> Result<u32> {
    match u32::try_from(n) {
        Ok(n @ 1..=Vision::MAX_CROPS) => Ok(n),
        _ => {
            let reason = format!("{n}, expected 1 to {}", Vision::MAX_CROPS);
            Err(Error::option(name, reason).into())
        }
    }
}
