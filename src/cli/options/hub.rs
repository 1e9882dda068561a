//! A model by its name on the Hugging Face hub, as llama.cpp's programs take it.

use hae::Result;
use hae::hub::{Hub, Wanted};

/// Where a model comes from that is not here yet.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct HubArgs {
    /// -hf: model of the hub, user/model[:quant]
    ///
    /// Of the Hugging Face hub, in the place of -m. quant is Q4_K_M, else Q8_0, else that of the first GGUF. Its vision file comes with it. What was fetched
    /// once stays in ~/.cache/huggingface, or under HF_HOME.
    #[arg(long, alias = "hf", value_name = "REPO", conflicts_with = "model")]
    hf_repo: Option<String>,
    /// -hff: with -hf, the very file
    #[arg(
        long,
        alias = "hff",
        value_name = "FILE",
        requires = "hf_repo",
        hide_short_help = true
    )]
    hf_file: Option<String>,
    /// -hft: with -hf, access token [default: HF_TOKEN, or that of hf auth login]
    #[arg(long, alias = "hft", value_name = "TOKEN", hide_short_help = true)]
    hf_token: Option<String>,
    /// With -hf: ask nobody, take what was fetched before
    #[arg(long, hide_short_help = true)]
    offline: bool,
    /// With -hf: leave the vision file out
    #[arg(
        long,
        alias = "no-mmproj-auto",
        conflicts_with = "mmproj",
        hide_short_help = true
    )]
    no_mmproj: bool,
}

impl HubArgs {
    /// What is to be fetched and from where, if anything; `mmproj`: whether its own vision file is wanted.
    pub fn wanted(&self, mmproj: bool) -> Result<Option<(Hub, Wanted)>> {
        let Some(repo) = &self.hf_repo else {
            return Ok(None);
        };
        let mmproj = mmproj && !self.no_mmproj;
        let wanted = Wanted::new(repo, self.hf_file.as_deref(), mmproj)?;
        let hub = Hub::from_env(self.hf_token.as_deref(), self.offline)?;
        Ok(Some((hub, wanted)))
    }
}
