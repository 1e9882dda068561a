//! Saved results and traces as one HTML file that needs no network: what a policy costs and keeps,
//! and where on a picture the tokens lay that it gave up.

mod chart;
mod overview;
mod page;
mod prompt;
mod seen;
mod story;
mod teller;
mod told;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::eval::record::{Answer, Header};
use crate::eval::results;
use crate::trace::{self, Cut, Reader};

pub use story::{Fate, Image, Moment, Story, Token};
pub use teller::stories;
pub use told::Sentence;

/// Results of one file.
#[derive(Clone, Debug)]
pub struct Results {
    /// The results file.
    pub path: PathBuf,
    /// What it says of the run.
    pub header: Header,
    /// Each answer that it holds.
    pub answers: Vec<Answer>,
}

impl Results {
    /// # Errors
    /// As [`results::read`], and [`Error::File`] for a file without a single answer.
    pub fn read(path: &Path) -> Result<Self> {
        let (header, answers) = results::read(path)?;
        if answers.is_empty() {
            return Err(Error::file(path, "holds no results, expected at least one"));
        }
        Ok(Results {
            path: path.to_owned(),
            header,
            answers,
        })
    }

    /// The traces that its answers name, as they are named.
    pub fn traces(&self) -> impl Iterator<Item = &str> {
        let mut seen = std::collections::HashSet::new();
        let named = self.answers.iter().filter_map(|a| a.trace.as_deref());
        named.filter(move |&path| seen.insert(path))
    }
}

/// One trace file.
#[derive(Clone, Debug)]
pub struct Traced {
    /// The trace file.
    pub path: PathBuf,
    /// What it says of the run.
    pub header: trace::Header,
    /// A conversation each.
    pub stories: Vec<Story>,
    /// Whether the run came to its end.
    pub complete: bool,
}

impl Traced {
    /// # Errors
    /// As [`Reader::open`] and [`stories`], and [`Error::File`] for a trace without a prompt.
    pub fn read(path: &Path, cut: Cut) -> Result<Self> {
        let mut reader = Reader::open(path, cut)?;
        let records = reader.rest()?;
        let stories = stories(path, &records)?;
        if stories.is_empty() {
            return Err(Error::file(path, "holds no prompt, expected at least one"));
        }
        Ok(Traced {
            path: path.to_owned(),
            header: reader.header().clone(),
            stories,
            complete: reader.is_complete(),
        })
    }
}

/// The page.
///
/// # Errors
/// [`Error::Contract`] when a chart cannot be drawn.
pub fn html(results: &[Results], traces: &[Traced]) -> Result<String> {
    page::page(results, traces)
}

#[cfg(test)]
mod tests;
