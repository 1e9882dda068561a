//! `--fit`: what may be made smaller until a run fits.

use super::{ContextArgs, ModelArgs};
use hae::memory::fit::Fit;

/// Whether and how a run is made to fit.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Context")]
pub struct FitArgs {
    /// -fit: choose what fits the free memory, on or off
    ///
    /// Only what no flag says is chosen, in this order: the cache as q8_0; fewer layers on the GPU; a
    /// smaller -c, down to --fit-ctx. Without any of them what was asked for, if it fits.
    #[arg(long, alias = "fit", num_args = 0..=1, default_value = "off", default_missing_value = "on", value_parser = on_or_off, value_name = "WHEN", hide_short_help = true)]
    fit: bool,
    /// -fitt: MiB that --fit and hae plan leave free on every device
    #[arg(
        long,
        alias = "fitt",
        default_value_t = 1024,
        value_name = "MIB",
        hide_short_help = true
    )]
    fit_target: u32,
    /// -fitc: cells that --fit leaves at least
    #[arg(long, alias = "fitc", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..), value_name = "N", hide_short_help = true)]
    fit_ctx: u32,
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" | "enabled" | "true" | "1" => Ok(true),
        "off" | "disabled" | "false" | "0" => Ok(false),
        _ => Err("expected on or off".into()),
    }
}

impl FitArgs {
    /// What may be chosen, if anything. How many layers the model has is not known here.
    pub fn may(&self, model: &ModelArgs, context: &ContextArgs) -> Option<Fit> {
        self.fit.then(|| Fit {
            types: context
                .options()
                .is_ok_and(|options| options.by_policy.types),
            layers: model.gpu_layers.is_none().then_some(u32::MAX),
            cells: match context.ctx_size() {
                None | Some(0) => Some(self.fit_ctx),
                Some(_) => None,
            },
        })
    }

    /// Bytes that stay free on each device.
    pub fn margin(&self) -> u64 {
        u64::from(self.fit_target) << 20
    }
}
