//! One file from the hub into a place of its own: resumed where it was left, compared with its
//! checksum, and only then under its name.
//!
//! hf-hub has a download, too. It puts a file under its name before anybody can compare it,
//! compares nothing, appends whatever a server sends to what is there, and begins at 0 when it tries
//! again.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::Agent;

use super::{Failure, Progress};
use crate::error::{Error, Result};

/// Tries in a row that bring not one byte.
const TRIES: u32 = 3;

/// A file of the hub's.
pub struct Remote<'a> {
    pub url: String,
    /// As the hub calls it.
    pub name: &'a str,
    pub bytes: u64,
    /// In hexadecimal digits.
    pub sha256: &'a str,
    pub token: Option<&'a str>,
}

/// What of a file is here.
struct Here {
    file: File,
    path: PathBuf,
    bytes: u64,
    hash: Sha256,
}

impl Here {
    /// What an earlier run left, or an empty file; nobody else writes to it meanwhile.
    fn open(path: PathBuf) -> Result<Self> {
        let open = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let mut file = open.map_err(|e| Error::io(&path, e))?;
        lock(&file).map_err(|_| Error::file(&path, "another program is fetching it"))?;
        let mut hash = Sha256::new();
        let bytes = io::copy(&mut file, &mut hash).map_err(|e| Error::io(&path, e))?;
        Ok(Here {
            file,
            path,
            bytes,
            hash,
        })
    }

    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        let done = self.file.write_all(bytes);
        done.map_err(|e| Error::io(&self.path, e))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn empty(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0);
        let emptied = emptied.and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|e| Error::io(&self.path, e))?;
        self.hash = Sha256::new();
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(unix)]
fn lock(file: &File) -> io::Result<()> {
    use rustix::fs::{FlockOperation, flock};
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

#[cfg(not(unix))]
fn lock(_: &File) -> io::Result<()> {
    Ok(())
}

/// Fetches a file to `to`, which is not there yet. What was fetched so far waits beside it, as
/// `.incomplete`, until the next try.
pub fn fetch(
    agent: &Agent,
    remote: &Remote<'_>,
    to: &Path,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<(), Failure> {
    let waiting = to.with_extension("incomplete");
    let mut here = Here::open(waiting.clone())?;
    if to.exists() {
        // Another program was faster.
        let _ = fs::remove_file(&waiting);
        return Ok(());
    }
    if here.bytes > remote.bytes {
        here.empty()?;
    }
    let mut fruitless = 0;
    while here.bytes < remote.bytes {
        let before = here.bytes;
        let Err(failure) = receive(agent, remote, &mut here, progress) else {
            continue;
        };
        fruitless = if here.bytes > before {
            0
        } else {
            fruitless + 1
        };
        if !matches!(failure, Failure::Away(_)) || fruitless >= TRIES {
            return Err(failure);
        }
        std::thread::sleep(Duration::from_millis(200) * 4u32.pow(fruitless));
    }
    let found = format!("{:x}", here.hash.finalize_reset());
    if here.bytes != remote.bytes || found != remote.sha256 {
        let _ = fs::remove_file(&waiting);
        let reason = format!(
            "{} came with SHA-256 {found}, the hub says {}: it was thrown away",
            remote.name, remote.sha256
        );
        return Err(Failure::Hub(reason));
    }
    let done = here.file.sync_all();
    done.and_then(|()| fs::rename(&waiting, to))
        .map_err(|e| Error::io(to, e))?;
    Ok(())
}

/// One request for what is missing.
fn receive(
    agent: &Agent,
    remote: &Remote<'_>,
    here: &mut Here,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<(), Failure> {
    // What is counted are the file's own bytes.
    let mut request = agent.get(&remote.url).header("Accept-Encoding", "identity");
    if let Some(token) = remote.token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    if here.bytes > 0 {
        request = request.header("Range", format!("bytes={}-", here.bytes));
    }
    let response = request.call()?;
    let range = response.headers().get("Content-Range");
    let range = range.and_then(|range| range.to_str().ok());
    let expected = format!("bytes {}-", here.bytes);
    let goes_on = response.status() == 206 && range.is_some_and(|r| r.starts_with(&expected));
    if !goes_on {
        // A server that knows no ranges sends all of it.
        here.empty()?;
        if response.status() != 200 {
            let status = response.status();
            return Err(Failure::Hub(format!("{}: status {status}", remote.name)));
        }
    }
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; 1 << 18];
    loop {
        progress(Progress {
            file: remote.name,
            bytes: here.bytes,
            of: remote.bytes,
        })?;
        let n = match body.read(&mut buffer) {
            Ok(0) if here.bytes < remote.bytes => {
                return Err(Failure::Away("the connection was closed".into()));
            }
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Failure::Away(e.to_string())),
        };
        if n as u64 > remote.bytes - here.bytes {
            here.empty()?;
            let reason = format!("{} is longer than the hub says", remote.name);
            return Err(Failure::Hub(reason));
        }
        here.add(&buffer[..n])?;
    }
}
