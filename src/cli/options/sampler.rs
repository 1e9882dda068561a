//! How the next token is chosen.

use anyhow::Result;

use hae::Error;
use hae::llama::SamplerOptions;

/// How to choose the next token.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplerArgs {
    /// Seed of the sampler; -1: the clock
    #[arg(short, long, default_value_t = -1, value_name = "N")]
    seed: i64,
    /// Temperature; 0: the likeliest token
    #[arg(long, alias = "temperature", default_value_t = 0.8, value_name = "T")]
    temp: f32,
    /// Choose among the K likeliest tokens; 0: all
    #[arg(long, hide_short_help = true, default_value_t = 40, value_name = "K")]
    top_k: i32,
    /// Choose among the tokens that hold P
    ///
    /// The likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability
    #[arg(long, hide_short_help = true, default_value_t = 0.05, value_name = "P")]
    min_p: f32,
    /// Divide the odds of recent tokens by this; 1: off
    #[arg(long, hide_short_help = true, default_value_t = 1.0, value_name = "X")]
    repeat_penalty: f32,
    /// Tokens that the penalty looks back on; -1: as many as the context holds
    #[arg(long, hide_short_help = true, default_value_t = 64, value_name = "N")]
    repeat_last_n: i32,
}

impl SamplerArgs {
    /// Whether no seed was given, so that another one may be drawn each time.
    #[cfg(feature = "serve")]
    pub fn is_random(&self) -> bool {
        self.seed == -1 || self.seed == i64::from(u32::MAX)
    }

    /// `clock` stands in for a seed that was not given.
    pub fn options(&self, clock: u32) -> Result<SamplerOptions> {
        let finite = |name, x: f32, least: f32| match x.is_finite() && x >= least {
            true => Ok(x),
            false => Err(Error::option(
                name,
                format!("{x}, expected a number of at least {least}"),
            )),
        };
        // The largest u32 is llama.cpp's own -1: its sampler would draw a seed that nobody learns.
        let seed = match u32::try_from(self.seed) {
            Ok(u32::MAX) => clock,
            Ok(seed) => seed,
            Err(_) if self.seed == -1 => clock,
            Err(_) => {
                let reason = format!("{}, expected -1 to {}", self.seed, u32::MAX);
                return Err(Error::option("-s", reason).into());
            }
        };
        if self.repeat_last_n < -1 {
            let reason = format!("{}, expected -1 or more", self.repeat_last_n);
            return Err(Error::option("--repeat-last-n", reason).into());
        }
        if !(self.repeat_penalty.is_finite() && self.repeat_penalty > 0.0) {
            return Err(Error::option(
                "--repeat-penalty",
                format!("{}, expected a number above 0", self.repeat_penalty),
            )
            .into());
        }
        Ok(SamplerOptions {
            seed,
            temp: finite("--temp", self.temp, 0.0)?,
            top_k: self.top_k,
            top_p: finite("--top-p", self.top_p, 0.0)?,
            min_p: finite("--min-p", self.min_p, 0.0)?,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
        })
    }
}
