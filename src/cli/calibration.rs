//! The parameters that `hae calibrate` found, picked up by `hae run` and `hae serve`.

use std::path::PathBuf;

use anyhow::{Result, anyhow};

use super::load::Files;
use super::options::{ModelArgs, PRESETS, PolicyArgs, Taken};
use super::{spell, warn};
use hae::Error;
use hae::calibrate::file::Calibration;
use hae::llama::gguf;
use hae::outfile::FilesInUse;
use hae::policy::{PolicyOptions, PolicySpec};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = PRESETS)]
pub struct CalibrationArgs {
    /// With --kv-policy hae: what hae calibrate found. It stands in for flags that are not given
    /// [default: MODEL.hae.json beside the model, if it is there]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["no_calibration", "kv_preset"])]
    calibration: Option<PathBuf>,
    /// Take hae's own defaults, whatever lies beside the model
    #[arg(long)]
    no_calibration: bool,
}

/// A calibration in use.
pub struct Calibrated {
    pub path: String,
    pub options: PolicyOptions,
    taken: Vec<Taken>,
}

impl CalibrationArgs {
    /// Takes down the file that may be read.
    pub fn in_use(&self, model: &ModelArgs, files: &mut FilesInUse) {
        if let Some(path) = &self.calibration {
            files.reads("--calibration", path);
        } else if let Some(model) = &model.model {
            let path = Calibration::beside(model);
            if path.exists() {
                files.reads("the model's calibration", &path);
            }
        }
    }

    /// The policy with the parameters of the calibration, if there is one, otherwise with these, which the flags
    /// say.
    pub fn policy(
        &self,
        files: &Files,
        (name, flags): (&str, &PolicyArgs),
        said: PolicyOptions,
    ) -> Result<(PolicySpec, Option<Calibrated>)> {
        let calibrated = self.find(files, name, flags)?;
        let options = match &calibrated {
            Some(calibrated) => calibrated.options.clone(),
            None => said,
        };
        Ok((PolicySpec::new(name, options), calibrated))
    }

    /// The calibration that gives a flag its value, if there is one. A file for another model is
    /// named on stderr, and refused where the command line asks for it.
    fn find(
        &self,
        files: &Files,
        kv_policy: &str,
        policy: &PolicyArgs,
    ) -> Result<Option<Calibrated>> {
        let path = match &self.calibration {
            Some(_) if kv_policy != "hae" => {
                let reason = format!("is for --kv-policy hae, not for {kv_policy}");
                return Err(Error::option("--calibration", reason).into());
            }
            Some(path) => path.clone(),
            None if self.no_calibration || policy.has_preset() || kv_policy != "hae" => {
                return Ok(None);
            }
            None => match files.calibration() {
                Some(path) if path.exists() => path,
                _ => return Ok(None),
            },
        };
        let asked_for = self.calibration.is_some();
        let calibration = Calibration::read(&path).map_err(|e| match asked_for {
            true => anyhow!(e),
            false => anyhow!("{e}; --no-calibration goes on without it"),
        })?;
        if !made_with(&calibration, files)? {
            let of = &calibration.model.file;
            let reason = format!("was made with another model file, {of}");
            if asked_for {
                return Err(Error::file(&path, reason).into());
            }
            warn(&format!("{}: {reason}, and is not used", path.display()));
            return Ok(None);
        }
        let (options, taken) = policy.calibrated(&calibration)?;
        let path = path.display().to_string();
        Ok((!taken.is_empty()).then_some(Calibrated {
            path,
            options,
            taken,
        }))
    }
}

/// Whether the model is the one that was calibrated.
fn made_with(calibration: &Calibration, files: &Files) -> Result<bool> {
    Ok(match &calibration.fingerprint {
        Some(fingerprint) => *fingerprint == gguf::fingerprint(&files.model)?,
        None => calibration.model.sha256 == files.model_report()?.sha256,
    })
}

impl Calibrated {
    /// The flags that it stands in for.
    pub fn flags(&self) -> String {
        let flags = self.taken.iter().map(|t| format!("{} {}", t.flag, t.value));
        flags.collect::<Vec<_>>().join(" ")
    }

    /// An error with the file in front, where the value came from there.
    pub fn blamed(&self, e: anyhow::Error) -> anyhow::Error {
        match e.downcast_ref::<Error>() {
            Some(Error::Option { name, .. })
                if self
                    .taken
                    .iter()
                    .any(|t| spell::flag(name).as_deref() == Some(t.flag)) =>
            {
                anyhow!("{}: {e}", self.path)
            }
            _ => e,
        }
    }
}
