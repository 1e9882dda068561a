//! A file that appears whole or not at all: written under a temporary name in the directory of
//! its target and renamed at the end. Dropped before that, it leaves nothing behind.

use std::fs::File;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};
use crate::tempfiles::Listed;

#[derive(Debug)]
pub struct OutFile {
    temp: NamedTempFile,
    target: PathBuf,
    listed: Listed,
}

impl OutFile {
    /// Creates the temporary file. An existing target is replaced only by [`OutFile::commit`].
    ///
    /// # Errors
    /// [`Error::File`] if the target is a directory or its directory does not exist, [`Error::Io`]
    /// if the directory cannot be written to.
    pub fn create(target: &Path) -> Result<Self> {
        if target.is_dir() || target.file_name().is_none() {
            return Err(Error::file(
                target,
                "is a directory, expected the name of a file to write",
            ));
        }
        let dir = match target.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        if !dir.is_dir() {
            return Err(Error::file(
                target,
                format!("directory {} does not exist", dir.display()),
            ));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".hae-").suffix(".part");
        // Temporary files are private by default; a model is as readable as any other file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temp = builder.tempfile_in(dir).map_err(|e| Error::io(target, e))?;
        Ok(Self {
            listed: Listed::new(temp.path()),
            temp,
            target: target.to_owned(),
        })
    }

    /// The file under its temporary name.
    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    pub fn temp_path(&self) -> &Path {
        self.temp.path()
    }

    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the file its name, replacing what had it before.
    ///
    /// # Errors
    /// [`Error::Io`]; the temporary file is gone then.
    pub fn commit(self) -> Result<()> {
        let Self {
            temp,
            target,
            listed,
        } = self;
        temp.persist(&target)
            .map_err(|e| Error::io(&target, e.error))?;
        drop(listed);
        Ok(())
    }
}
