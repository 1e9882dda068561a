//! The file that a calibration is kept in: the parameters, what they were chosen on, and every
//! setting that was tried. `docs/calibration.md` tells what each field means.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::search::Tried;
use super::{Score, Setting};
use crate::error::{Error, Result};
use crate::eval::record::{FileId, QuestionSet};
use crate::outfile::OutFile;
use crate::policy::Amount;
use crate::text::without_bom;

/// What the field `format` says.
const FORMAT: &str = "hae calibration";
/// Of the format; a reader refuses another.
pub const VERSION: u32 = 1;
/// Many times what a search can write.
const MOST_BYTES: u64 = 1 << 20;

/// Parameters for one model, and the evidence for them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Tells the file from others.
    pub format: String,
    /// Of the format.
    pub version: u32,
    /// Seconds since 1970.
    pub time: u64,
    /// The model that was calibrated.
    pub model: FileId,
    /// Of the model file; none in files that were written before there were any.
    #[serde(default)]
    pub fingerprint: Option<String>,
    /// Its vision file, if it had one.
    pub mmproj: Option<FileId>,
    /// What the parameters were chosen on.
    pub tune: QuestionSet,
    /// What they were checked on.
    pub held_out: QuestionSet,
    /// The budget that it was calibrated at.
    pub kv_budget: Amount,
    /// Whether [`Calibration::parameters`] are those that the search found.
    pub chosen: Chosen,
    /// What is to be used.
    pub parameters: Setting,
    /// The best of the search.
    pub found: Setting,
    /// What the questions said of them.
    pub scores: Scores,
    /// All that the search scored, in that order.
    pub tried: Vec<Tried>,
    /// As in `hae run -o json`.
    pub context: Value,
    /// The most tokens of an answer, where it was said.
    pub n_predict: Option<usize>,
    /// What the program was built from, as in `hae run -o json`.
    pub build: Value,
}

/// Where the parameters come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chosen {
    /// The search found them, and they held what they promised.
    Found,
    /// Nothing that was found is better than the defaults.
    Defaults,
}

/// What full, the defaults and the found parameters score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// On the questions that they were chosen on.
    pub tune: Compared,
    /// On questions that the search had not seen.
    pub held_out: Compared,
}

/// On the same questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// The full cache.
    pub full: Score,
    /// `hae` without calibration, at the same budget.
    pub defaults: Score,
    /// The best of the search.
    pub found: Score,
}

impl Calibration {
    /// What the field `format` has to be.
    pub fn format() -> String {
        FORMAT.into()
    }

    /// Where a model's calibration lies, if it is not told: beside it.
    pub fn beside(model: &Path) -> PathBuf {
        let gguf = |e: &std::ffi::OsStr| e.eq_ignore_ascii_case("gguf");
        match model.extension() {
            Some(extension) if gguf(extension) => model.with_extension("hae.json"),
            _ => {
                let mut name = model.as_os_str().to_owned();
                name.push(".hae.json");
                name.into()
            }
        }
    }

    /// # Errors
    /// [`Error::Io`], or [`Error::File`] for what is no calibration, of another version, or holds
    /// a value that its flag would refuse.
    pub fn read(path: &Path) -> Result<Self> {
        Calibration::of(path, value(path)?)
    }

    /// As [`Calibration::read`], of a file's bytes; `path` is what messages name.
    ///
    /// # Errors
    /// As [`Calibration::read`].
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        Calibration::of(path, json(bytes))
    }

    fn of(path: &Path, json: Result<Value, String>) -> Result<Self> {
        let no = |what: String| Error::file(path, format!("is no calibration of hae: {what}"));
        let json = json.map_err(no)?;
        if json["format"] != FORMAT {
            return Err(no(format!("expected \"format\": \"{FORMAT}\"")));
        }
        match json["version"].as_u64() {
            Some(version) if version == u64::from(VERSION) => {}
            _ => {
                let found = &json["version"];
                let reason = format!("is of version {found}, expected {VERSION}");
                return Err(Error::file(path, reason));
            }
        }
        let calibration = serde_json::from_value(json);
        calibration.map_err(|e| Error::file(path, format!("has a value that cannot be: {e}")))
    }

    /// A file that is about to be written: it replaces an older calibration, and nothing else.
    ///
    /// # Errors
    /// Those of [`OutFile::create`]; [`Error::File`] where something else has the name.
    pub fn create(path: &Path) -> Result<OutFile> {
        let out = OutFile::create(path)?;
        if path.exists() {
            let known = value(path)?.is_ok_and(|json| json["format"] == FORMAT);
            if !known {
                let reason = "is there and no calibration of hae, expected a new name";
                return Err(Error::file(path, reason));
            }
        }
        Ok(out)
    }

    /// # Errors
    /// [`Error::Io`]; what was there before is still there then.
    pub fn write(&self, out: OutFile) -> Result<()> {
        let path = out.target().to_owned();
        let io = |e| Error::io(&path, e);
        let mut json = serde_json::to_vec_pretty(self).map_err(|e| io(e.into()))?;
        json.push(b'\n');
        let mut file = out.file();
        file.write_all(&json).map_err(io)?;
        out.commit()
    }
}

/// What a file holds, or why that is no JSON.
fn value(path: &Path) -> Result<Result<Value, String>> {
    let io = |e| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    let read = file.take(MOST_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(io)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Ok(Err(format!("expected at most {MOST_BYTES} bytes")));
    }
    Ok(json(&bytes))
}

fn json(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(without_bom(bytes)).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Layers;

    fn sample() -> Calibration {
        let file = FileId {
            file: "m.gguf".into(),
            sha256: "ab".into(),
        };
        let set = QuestionSet {
            file: file.clone(),
            format: "jsonl".into(),
            part: Some("tune:0.5".into()),
            every: 1,
            limit: None,
            n: 3,
        };
        let score = Score {
            points: 2.5,
            kl_mean: Some(0.125),
            ..Score::default()
        };
        let compared = Compared {
            full: score.clone(),
            defaults: score.clone(),
            found: score.clone(),
        };
        let parameters = Setting {
            layers: Layers::List(vec![1]),
            ..Setting::default()
        };
        Calibration {
            format: Calibration::format(),
            version: VERSION,
            time: 1,
            model: file,
            fingerprint: Some("cd".into()),
            mmproj: None,
            tune: set.clone(),
            held_out: set,
            kv_budget: Amount::Share(0.4),
            chosen: Chosen::Found,
            scores: Scores {
                tune: compared.clone(),
                held_out: compared,
            },
            tried: vec![Tried {
                stage: "defaults".into(),
                parameters: parameters.clone(),
                score,
            }],
            found: parameters.clone(),
            parameters,
            context: Value::Null,
            n_predict: None,
            build: Value::Null,
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.hae.json");
        sample().write(Calibration::create(&path).unwrap()).unwrap();
        assert_eq!(Calibration::read(&path).unwrap(), sample());
        // Older ones have no fingerprint.
        let mut json = serde_json::to_value(sample()).unwrap();
        json.as_object_mut().unwrap().remove("fingerprint");
        std::fs::write(&path, json.to_string()).unwrap();
        assert_eq!(Calibration::read(&path).unwrap().fingerprint, None);
        // A newer one takes its place.
        sample().write(Calibration::create(&path).unwrap()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn it_lies_beside_the_model() {
        let beside = |model: &str| Calibration::beside(Path::new(model));
        assert_eq!(beside("a/m.Q4.gguf"), Path::new("a/m.Q4.hae.json"));
        assert_eq!(beside("m.GGUF"), Path::new("m.hae.json"));
        assert_eq!(beside("a.b/model"), Path::new("a.b/model.hae.json"));
    }

    #[test]
    fn other_files_are_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        for other in ["GGUF", "{\"format\": 1}", "[]", ""] {
            std::fs::write(&path, other).unwrap();
            let error = Calibration::create(&path).unwrap_err().to_string();
            assert!(error.contains("no calibration of hae"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
        }
    }

    #[test]
    fn damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.hae.json");
        let good = serde_json::to_value(sample()).unwrap();
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let error = Calibration::read(&path).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
            error
        };
        let changed = |pointer: &str, value: Value| {
            let mut json = good.clone();
            *json.pointer_mut(pointer).unwrap() = value;
            refused(&json.to_string())
        };
        let text = good.to_string();
        for (error, expected) in [
            (refused(""), "is no calibration of hae: EOF"),
            (
                refused(&text[..text.len() / 2]),
                "is no calibration of hae: EOF",
            ),
            (refused("{}"), "expected \"format\": \"hae calibration\""),
            (refused("3"), "expected \"format\""),
            (refused(&" ".repeat(1 << 21)), "at most 1048576 bytes"),
            (changed("/version", 2.into()), "is of version 2, expected 1"),
            (changed("/version", Value::Null), "is of version null"),
            (
                changed("/parameters/bin_size", 0.into()),
                "has a value that cannot be: `bin_size`: 0 cells",
            ),
            (
                changed("/parameters/score_layers", "5-1".into()),
                "runs backwards",
            ),
            (
                changed("/kv_budget", 7.into()),
                "has a value that cannot be",
            ),
        ] {
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
