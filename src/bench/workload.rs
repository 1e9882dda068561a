//! Conversations to measure, from files.

use std::path::Path;

use serde::Deserialize;

use super::{Test, Turn};
use crate::error::{Error, Result};

/// A workload file: turns of so many pictures, prompt tokens and generated tokens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// What the test is called.
    pub name: String,
    /// What it stands for.
    #[serde(default)]
    pub about: String,
    /// Made-up embeddings of each picture; without it pictures are encoded by a vision file.
    #[serde(default)]
    pub image_tokens: Option<usize>,
    /// At least one, each with a prompt.
    pub turns: Vec<Turn>,
}

/// Far more than any conversation has, and small enough that sums of them are.
const MOST: usize = 1 << 24;

impl Workload {
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::File`] for one that is no workload.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let text = crate::text::decode(path, bytes)?;
        Workload::parse(&text).map_err(|reason| Error::file(path, reason))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let workload: Workload =
            serde_json::from_str(text).map_err(|e| format!("is no workload: {e}"))?;
        if workload.turns.is_empty() {
            return Err("has no turns, expected at least one".into());
        }
        for (i, turn) in workload.turns.iter().enumerate() {
            let sizes = [turn.n_images, turn.n_prompt, turn.n_gen];
            if sizes.iter().any(|&n| n > MOST) {
                return Err(format!("turn {}: expected at most {MOST}", i + 1));
            }
            if turn.n_prompt == 0 {
                return Err(format!(
                    "turn {}: no prompt, expected at least 1 token",
                    i + 1
                ));
            }
        }
        match workload.image_tokens {
            Some(n) if n == 0 || n > MOST => {
                Err(format!("image_tokens: {n}, expected 1 to {MOST}"))
            }
            _ => Ok(workload),
        }
    }

    /// The test that it describes, from an empty cache.
    pub fn test(&self) -> Test {
        Test {
            workload: Some(self.name.clone()),
            n_depth: 0,
            depth_copies: false,
            turns: self.turns.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_workload_is_refused_with_the_reason() {
        for (text, reason) in [
            ("[]", "is no workload"),
            (r#"{"name": "a", "turns": []}"#, "has no turns"),
            (
                r#"{"name": "a", "turns": [{"images": 1}]}"#,
                "turn 1: no prompt",
            ),
            (
                r#"{"name": "a", "turns": [{"prompts": 1}]}"#,
                "unknown field",
            ),
            (
                r#"{"name": "a", "turns": [{"prompt": 99999999999}]}"#,
                "turn 1: expected at most",
            ),
            (
                r#"{"name": "a", "image_tokens": 0, "turns": [{"prompt": 1}]}"#,
                "image_tokens: 0",
            ),
        ] {
            let error = Workload::parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn the_workloads_in_the_repository_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/workloads");
        let mut n = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let workload = Workload::read(&entry.unwrap().path()).unwrap();
            assert!(!workload.about.is_empty());
            assert_eq!(workload.test().name(), workload.name);
            n += 1;
        }
        assert!(n >= 3);
    }
}
