//! A file that appears whole or not at all: written under a temporary name in the directory of
//! its target and renamed at the end. Dropped before that, it leaves nothing behind.
//!
//! A link stays a link, its target is written; who may read an existing file may read the new one.

mod apart;
mod claim;

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::tempfiles::TempFile;

pub use apart::FilesInUse;
pub use claim::Claim;

/// What new files may be, before the umask.
const SHARED: u32 = 0o666;
pub(crate) const PRIVATE: u32 = 0o600;

/// A file that gets its name when it is complete.
#[derive(Debug)]
pub struct OutFile {
    temp: TempFile,
    /// As it was named.
    target: PathBuf,
    /// Where that leads to.
    real: PathBuf,
    /// Of the file that it replaces, if there is one.
    old: Option<Metadata>,
}

impl OutFile {
    /// Creates the temporary file. An existing target is replaced only by [`OutFile::commit`].
    ///
    /// # Errors
    /// [`Error::File`] if the target is a directory, a device or a pipe, or its directory does not
    /// exist, [`Error::Io`] if the directory cannot be written to.
    pub fn create(target: &Path) -> Result<Self> {
        Self::with_mode(target, SHARED)
    }

    /// As [`OutFile::create`], for what is nobody else's business: a new file is its owner's alone.
    ///
    /// # Errors
    /// As [`OutFile::create`].
    pub fn create_private(target: &Path) -> Result<Self> {
        Self::with_mode(target, PRIVATE)
    }

    fn with_mode(target: &Path, mode: u32) -> Result<Self> {
        let old = std::fs::metadata(target).ok();
        if old.as_ref().is_some_and(Metadata::is_dir) || target.file_name().is_none() {
            return Err(Error::file(
                target,
                "is a directory, expected the name of a file to write",
            ));
        }
        if old.as_ref().is_some_and(|old| !old.is_file()) {
            return Err(Error::file(
                target,
                "is a device or a pipe, expected the name of a file to write",
            ));
        }
        let real = behind_links(target)?;
        let dir = folder_of(&real);
        if !dir.is_dir() {
            return Err(Error::file(
                target,
                format!("directory {} does not exist", dir.display()),
            ));
        }
        let mode = old.as_ref().map_or(mode, |old| mode_of(old) | PRIVATE);
        let temp = TempFile::create_in(dir, "", mode).map_err(|e| Error::io(target, e))?;
        Ok(Self {
            temp,
            target: target.to_owned(),
            real,
            old,
        })
    }

    /// The file under its temporary name.
    pub fn file(&self) -> &File {
        self.temp.file()
    }

    /// Where it is until then.
    pub fn temp_path(&self) -> &Path {
        self.temp.path()
    }

    /// The name that it will get.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the file its name, replacing what had it before. It is on the disk by then: a machine that loses power
    /// keeps the old one or the new one.
    ///
    /// # Errors
    /// [`Error::Io`]; the temporary file is gone then.
    pub fn commit(self) -> Result<()> {
        let Self {
            temp,
            target,
            real,
            old,
        } = self;
        let kept = match &old {
            Some(old) => keep_access(temp.file(), old),
            None => Ok(()),
        };
        kept.and_then(|()| temp.file().sync_all())
            .and_then(|()| temp.persist(&real))
            .map_err(|e| Error::io(&target, e))
    }
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// What a name leads to, whether that exists or not.
fn behind_links(path: &Path) -> Result<PathBuf> {
    // As many as Linux follows.
    const MOST: usize = 40;
    let mut real = path.to_owned();
    for _ in 0..MOST {
        match std::fs::read_link(&real) {
            Ok(to) => real = folder_of(&real).join(to),
            Err(_) => return Ok(real),
        }
    }
    Err(Error::file(path, "is a link that leads nowhere"))
}

#[cfg(unix)]
fn mode_of(file: &Metadata) -> u32 {
    use std::os::unix::fs::PermissionsExt;

    file.permissions().mode() & 0o777
}

/// Gives a new file the owner, as far as that is allowed, and the permissions of an old one.
#[cfg(unix)]
fn keep_access(file: &File, old: &Metadata) -> std::io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

    let mut mode = mode_of(old);
    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid())
        && fchown(file, Some(old.uid()), Some(old.gid())).is_err()
        && fchown(file, None, Some(old.gid())).is_err()
    {
        // What the old group might, another need not.
        mode &= !0o070;
    }
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn mode_of(_: &Metadata) -> u32 {
    SHARED
}

#[cfg(not(unix))]
fn keep_access(_: &File, _: &Metadata) -> std::io::Result<()> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests;
