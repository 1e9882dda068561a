//! Writing a trace as the run goes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::{Header, MAGIC, Record, VERSION, block};
use crate::controller::{After, Event, Recorder};
use crate::error::{Error, Result};
use crate::outfile::Claim;

/// Records wait until so many bytes are worth a block. An interruption that leaves no time for
/// the last words costs no more than these.
const BLOCK: usize = 64 << 10;

/// A trace file that is being written.
#[derive(Debug)]
pub struct Writer {
    file: File,
    path: PathBuf,
    header: Header,
    /// Records that are not in the file yet.
    waiting: Vec<u8>,
    /// Length of the file up to the last whole block.
    written: u64,
    failure: Option<Error>,
    ended: bool,
    /// Two writers of one file would make one that nobody can read.
    _claim: Claim,
}

impl Writer {
    /// Creates the file, replacing an older trace. A new one is its owner's alone: it holds what
    /// was said and shown.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written, [`Error::File`] where something else has the name or another run
    /// writes it.
    pub fn create(path: &Path, header: Header) -> Result<Self> {
        check(path)?;
        let claim = Claim::take(path)?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, crate::outfile::PRIVATE);
        let mut file = options.open(path).map_err(|e| Error::io(path, e))?;
        let mut begin = MAGIC.to_vec();
        begin.extend(VERSION.to_le_bytes());
        file.write_all(&begin).map_err(|e| Error::io(path, e))?;
        let mut writer = Writer {
            file,
            path: path.to_owned(),
            waiting: Vec::new(),
            written: begin.len() as u64,
            failure: None,
            ended: false,
            _claim: claim,
            header: header.clone(),
        };
        writer.push(&Record::Header(Box::new(header)));
        writer.flush();
        match writer.failure.take() {
            None => Ok(writer),
            Some(failure) => {
                writer.ended = true;
                Err(failure)
            }
        }
    }

    fn push(&mut self, record: &Record) {
        if self.failure.is_some() || self.ended {
            return;
        }
        match postcard::to_extend(record, std::mem::take(&mut self.waiting)) {
            Ok(waiting) => self.waiting = waiting,
            Err(e) => self.failure = Some(Error::file(&self.path, e.to_string())),
        }
    }

    /// Writes what waits. Of a block that does not go in whole nothing stays.
    fn flush(&mut self) {
        if self.failure.is_some() || self.waiting.is_empty() {
            return;
        }
        let written = block::pack(&self.waiting).and_then(|block| {
            self.file.write_all(&block)?;
            Ok(block.len() as u64)
        });
        self.waiting.clear();
        match written {
            Ok(n) => self.written += n,
            Err(e) => {
                // The error that matters is the first.
                let _ = self.file.set_len(self.written);
                self.failure = Some(Error::io(&self.path, e));
            }
        }
    }
}

/// Whether a trace may be written here: where nothing is, or an older trace, or what is no regular
/// file. It is written in place, so what it replaces is gone at once.
///
/// # Errors
/// [`Error::File`] where something else has the name.
pub fn check(path: &Path) -> Result<()> {
    if !std::fs::metadata(path).is_ok_and(|meta| meta.is_file()) {
        return Ok(());
    }
    let mut begin = Vec::new();
    // One that cannot be read may be one that cannot be written either; the system says so.
    let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut begin));
    match read.is_err() || begin.is_empty() || begin == MAGIC {
        true => Ok(()),
        false => Err(Error::file(
            path,
            "is there and no trace of hae, expected a new name",
        )),
    }
}

impl Recorder for Writer {
    fn record(&mut self, event: Event<'_>) {
        if self.failure.is_some() {
            return;
        }
        self.push(&Record::of(event, self.header.precision));
        let after_prompt = matches!(
            event,
            Event::Planned {
                after: After::Prompt { .. },
                ..
            }
        );
        if after_prompt || self.waiting.len() >= BLOCK {
            self.flush();
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.push(&Record::End);
        self.flush();
        self.ended = true;
        self.failure.take().map_or(Ok(()), Err)
    }
}

/// A run that failed keeps what it saw; only the end is missing.
impl Drop for Writer {
    fn drop(&mut self) {
        if !self.ended {
            self.flush();
        }
    }
}
