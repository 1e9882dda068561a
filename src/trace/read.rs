//! Reading a trace. Nothing is believed: sizes are checked before memory is taken for them, and
//! what does not fit is one line about where.

use std::path::{Path, PathBuf};

use super::block::{self, Broken};
use super::{Header, MAGIC, OLDEST, Record, VERSION};
use crate::error::{Error, Result};

/// What to do with a file that ends in the middle of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// It is an error.
    Refuse,
    /// The blocks before are taken.
    Accept,
}

/// A trace file, a record at a time.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    bytes: Vec<u8>,
    at: usize,
    /// Number of the block that is open.
    block: usize,
    records: Vec<u8>,
    next: usize,
    cut: Cut,
    header: Header,
    ended: bool,
}

/// The header of a trace and its other records, without the end.
///
/// # Errors
/// As [`Reader::open`] and [`Reader::record`].
pub fn read(path: &Path, cut: Cut) -> Result<(Header, Vec<Record>)> {
    let mut reader = Reader::open(path, cut)?;
    let records = reader.rest()?;
    Ok((reader.header, records))
}

impl Reader {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when it is no trace, of another version, or damaged.
    pub fn open(path: &Path, cut: Cut) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Reader::new(path, bytes, cut)
    }

    /// As [`Reader::open`], for a file that was read; `path` is its name.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn new(path: &Path, bytes: Vec<u8>, cut: Cut) -> Result<Self> {
        let bad = |reason: String| Error::file(path, reason);
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| bad("is no trace of hae".into()))?;
        let Some(version) = rest.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) else {
            return Err(bad("is no trace of hae: too short".into()));
        };
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(bad(format!(
                "is a trace of version {version}, expected {OLDEST} to {VERSION}"
            )));
        }
        let mut reader = Reader {
            path: path.to_owned(),
            bytes,
            at: MAGIC.len() + 4,
            block: 0,
            records: Vec::new(),
            next: 0,
            cut,
            header: Header {
                build: String::new(),
                model: String::new(),
                n_layer: 0,
                n_cells: 0,
                policy: String::new(),
                options: crate::policy::PolicyOptions::default(),
                layers: Vec::new(),
                precision: super::Precision::Exact,
            },
            ended: false,
        };
        match reader.next_record()? {
            Some(Record::Header(header)) => reader.header = *header,
            _ => return Err(bad("is damaged: it has no header".into())),
        }
        reader.header.check(path)?;
        Ok(reader)
    }

    /// What the trace begins with.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether the run came to its end; known once there are no more records.
    pub fn is_complete(&self) -> bool {
        self.ended
    }

    /// The next record; `None` at the end.
    ///
    /// # Errors
    /// [`Error::File`] that says where the file is cut off or damaged.
    pub fn record(&mut self) -> Result<Option<Record>> {
        let record = self.next_record()?;
        match record {
            Some(Record::Header(_)) => Err(self.damaged("a second header")),
            Some(Record::End) => {
                self.ended = true;
                Ok(None)
            }
            Some(record) => match record.check(&self.header) {
                Ok(()) => Ok(Some(record)),
                Err(reason) => Err(self.damaged(&reason)),
            },
            None => Ok(None),
        }
    }

    /// All records that are left.
    ///
    /// # Errors
    /// As [`Reader::record`].
    pub fn rest(&mut self) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        while let Some(record) = self.record()? {
            records.push(record);
        }
        Ok(records)
    }

    fn next_record(&mut self) -> Result<Option<Record>> {
        if self.ended {
            return Ok(None);
        }
        if self.next == self.records.len() && !self.next_block()? {
            return Ok(None);
        }
        match postcard::take_from_bytes(&self.records[self.next..]) {
            Ok((record, rest)) => {
                self.next = self.records.len() - rest.len();
                Ok(Some(record))
            }
            Err(e) => Err(self.damaged(&e.to_string())),
        }
    }

    fn next_block(&mut self) -> Result<bool> {
        if self.at == self.bytes.len() {
            return Ok(false);
        }
        match block::unpack(&self.bytes[self.at..]) {
            Ok((records, rest)) => {
                self.at = self.bytes.len() - rest.len();
                self.block += 1;
                (self.records, self.next) = (records, 0);
                match self.records.is_empty() {
                    true => Err(self.damaged("an empty block")),
                    false => Ok(true),
                }
            }
            Err(Broken::Cut) if self.cut == Cut::Accept && self.block > 0 => Ok(false),
            Err(Broken::Cut) => Err(Error::file(
                &self.path,
                format!(
                    "is cut off in block {}, at byte {}: `partial` takes what comes before",
                    self.block + 1,
                    self.bytes.len()
                ),
            )),
            Err(Broken::Damaged(reason)) => Err(Error::file(
                &self.path,
                format!(
                    "is damaged in block {}, at byte {}: {reason}",
                    self.block + 1,
                    self.at
                ),
            )),
        }
    }

    fn damaged(&self, reason: &str) -> Error {
        let reason = format!("is damaged in block {}: {reason}", self.block);
        Error::file(&self.path, reason)
    }
}
