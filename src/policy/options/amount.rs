//! Cells by number or by share.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A number of cells, or a share of those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Amount {
    /// So many, 1 or more.
    Cells(usize),
    /// More than 0, at most 1.
    Share(f64),
}

impl Amount {
    /// Cells out of `total`; shares are rounded to the nearest cell.
    pub fn of(self, total: usize) -> usize {
        match self {
            Amount::Cells(n) => n,
            Amount::Share(share) => (share * total as f64).round() as usize,
        }
    }

    /// # Errors
    /// [`Error::Option`] for none, or a share that is none.
    pub(crate) fn check(self, flag: &'static str) -> Result<()> {
        match self {
            Amount::Cells(0) => Err(Error::option(flag, "0 cells, expected at least 1")),
            Amount::Share(share) if !(share > 0.0 && share <= 1.0) => Err(Error::option(
                flag,
                format!("a share of {share}, expected more than 0, up to 1"),
            )),
            _ => Ok(()),
        }
    }
}

/// As it is read.
impl std::fmt::Display for Amount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Amount::Cells(n) => write!(f, "{n}"),
            Amount::Share(share) if share.fract() == 0.0 => write!(f, "{share:.1}"),
            Amount::Share(share) => write!(f, "{share}"),
        }
    }
}

/// `512` is a number of cells, `0.4` a share, and so is `1.0`.
impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?}, expected a number of cells or a share such as 0.4");
        match text.parse() {
            Ok(cells) => Ok(Amount::Cells(cells)),
            Err(_) => text.parse().map(Amount::Share).map_err(|_| expected()),
        }
    }
}
