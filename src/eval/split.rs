//! Which of a file's questions are asked.
//!
//! Whoever chooses parameters on some questions must not score on the same ones. A question's
//! part follows from a hash of its pictures' names (of its id, if it has none) and from nothing
//! else, so that questions about the same pictures never lie on both sides.

use std::collections::HashMap;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use super::question::{Image, Question};

/// `tune:0.5` is the part for choosing, `test:0.5` all the rest. With the same share the two have
/// nothing in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Whether this is the part for choosing.
    pub tune: bool,
    /// Of the pictures that are for choosing.
    pub share: f64,
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            format!(
                "{text:?}, expected tune or test, or tune:0.5 with the share that is for tuning"
            )
        };
        let (name, share) = text.split_once(':').unwrap_or((text, "0.5"));
        let tune = match name {
            "tune" => true,
            "test" => false,
            _ => return Err(expected()),
        };
        let share = share
            .parse()
            .ok()
            .filter(|&share| share > 0.0 && share < 1.0);
        Ok(Part {
            tune,
            share: share.ok_or_else(expected)?,
        })
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if self.tune { "tune" } else { "test" };
        write!(f, "{name}:{}", self.share)
    }
}

impl Part {
    fn holds(&self, question: &Question) -> bool {
        (place(question) < self.share) == self.tune
    }
}

/// A number from 0 to 1 that only the names of the pictures decide.
fn place(question: &Question) -> f64 {
    // The end of a path: where a set lies does not change its parts. ScienceQA's pictures have
    // the same name in different folders.
    let name = |image: &Image| match image {
        Image::File(path) => {
            let parts: Vec<_> = path.iter().map(|p| p.to_string_lossy()).collect();
            parts[parts.len().saturating_sub(2)..].join("/")
        }
        Image::Inside { name, .. } => name.rsplit('#').next().unwrap_or(name).to_owned(),
    };
    let mut names: Vec<String> = question.images.iter().map(name).collect();
    if names.is_empty() {
        names.push(question.id.clone());
    }
    let digest = Sha256::digest(names.join("\n"));
    let bits = digest
        .iter()
        .take(6)
        .fold(0u64, |n, &b| n << 8 | u64::from(b));
    bits as f64 / (1u64 << 48) as f64
}

/// What to take of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Selection {
    /// `None`: all of the file.
    pub part: Option<Part>,
    /// Every how manieth of each task; at least 1.
    pub every: usize,
    /// Questions at most.
    pub limit: Option<usize>,
}

impl Selection {
    /// In this order: the part, every so manieth question of each task, the first so many.
    pub fn of(&self, questions: Vec<Question>) -> Vec<Question> {
        let mut asked_of: HashMap<String, usize> = HashMap::new();
        let mut every = |question: &Question| {
            let task = question.turns.first().map_or("", |turn| turn.task.as_str());
            let asked = asked_of.entry(task.to_owned()).or_default();
            *asked += 1;
            (*asked - 1).is_multiple_of(self.every.max(1))
        };
        questions
            .into_iter()
            .filter(|question| self.part.is_none_or(|part| part.holds(question)))
            .filter(|question| every(question))
            .take(self.limit.unwrap_or(usize::MAX))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::question::{Expected, Turn};

    fn question(id: usize, image: usize, task: &str) -> Question {
        Question {
            id: id.to_string(),
            place: String::new(),
            images: vec![Image::File(format!("some/where/{image}.png").into())],
            num_crops: None,
            turns: vec![Turn {
                task: task.into(),
                text: "?".into(),
                raw: None,
                expected: Expected::Nothing,
            }],
        }
    }

    fn all() -> Vec<Question> {
        (0..600)
            .map(|i| question(i, i / 3, if i % 2 == 0 { "a" } else { "b" }))
            .collect()
    }

    fn selected(part: &str) -> Vec<Question> {
        let selection = Selection {
            part: Some(part.parse().unwrap()),
            every: 1,
            limit: None,
        };
        selection.of(all())
    }

    #[test]
    fn parts_share_no_picture_and_leave_none_out() {
        for share in [0.2, 0.5, 0.9] {
            let tune = selected(&format!("tune:{share}"));
            let test = selected(&format!("test:{share}"));
            assert_eq!(tune.len() + test.len(), 600);
            for question in &tune {
                assert!(!test.iter().any(|q| q.images == question.images));
            }
            // 200 pictures: some 3 standard deviations of a binomial share.
            let got = tune.len() as f64 / 600.0;
            assert!((got - share).abs() < 0.11, "{share}: {got}");
        }
    }

    #[test]
    fn every_so_manieth_is_of_each_task() {
        let selection = Selection {
            part: None,
            every: 5,
            limit: Some(100),
        };
        let some = selection.of(all());
        assert_eq!(some.len(), 100);
        let a = some.iter().filter(|q| q.turns[0].task == "a").count();
        assert_eq!(a, 50);
        assert_eq!(some[0].id, "0");
        assert_eq!(some[1].id, "1");
        assert_eq!(some[2].id, "10");
    }

    #[test]
    fn parts_are_spelled_with_or_without_a_share() {
        assert_eq!("tune".parse::<Part>().unwrap().to_string(), "tune:0.5");
        assert_eq!("test:0.3".parse::<Part>().unwrap().to_string(), "test:0.3");
        for bad in ["", "dev", "tune:", "tune:0", "tune:1", "tune:x", "test:NaN"] {
            assert!(bad.parse::<Part>().is_err(), "{bad}");
        }
    }
}
