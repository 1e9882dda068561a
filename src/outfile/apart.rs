//! What a command reads and writes, so that it writes over nothing that it reads.

use std::collections::HashMap;
use std::fs::Metadata;
use std::path::{Path, PathBuf};

use super::{behind_links, folder_of};
use crate::error::{Error, Result, quoted};

/// The files of a command by what they are, not by how they are called: links do not hide them.
#[derive(Debug, Default)]
pub struct FilesInUse {
    /// What each is for, as messages say it.
    files: HashMap<Id, String>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum Id {
    /// Device and number of a file that is there.
    #[cfg(unix)]
    Node(u64, u64),
    /// One that is not there yet, or whose system has no such numbers.
    Path(PathBuf),
}

impl FilesInUse {
    /// Takes down a file that is read; `what` is a flag, or what the file is.
    pub fn reads(&mut self, what: impl Into<String>, path: &Path) {
        if let Some(id) = Id::of(path) {
            self.files.insert(id, what.into());
        }
    }

    /// Takes down a model, with its other files where it was split into several.
    pub fn reads_model(&mut self, what: &str, path: &Path) {
        self.reads(what, path);
        for part in parts(path) {
            self.reads(what, &part);
        }
    }

    /// Takes down a file that will be written; nothing has been yet.
    ///
    /// # Errors
    /// [`Error::Option`] under this name when the command reads the file, or writes it for something
    /// else.
    pub fn writes(&mut self, name: &'static str, path: &Path) -> Result<()> {
        let Some(id) = Id::of(path) else {
            return Ok(());
        };
        if let Some(what) = self.files.get(&id) {
            let path = path.display();
            let reason = format!("{path} is the same file as {what}, expected another one");
            return Err(Error::option(name, reason));
        }
        self.files.insert(id, quoted(name).into_owned());
        Ok(())
    }
}

impl Id {
    /// `None` for what writing does not destroy: a device, a pipe, a directory.
    fn of(path: &Path) -> Option<Self> {
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_file() => Id::of_file(path, &meta),
            Ok(_) => None,
            Err(_) => {
                let real = behind_links(path).ok()?;
                let folder = folder_of(&real).canonicalize().ok()?;
                Some(Id::Path(folder.join(real.file_name()?)))
            }
        }
    }

    #[cfg(unix)]
    fn of_file(_: &Path, meta: &Metadata) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;

        Some(Id::Node(meta.dev(), meta.ino()))
    }

    #[cfg(not(unix))]
    fn of_file(path: &Path, _: &Metadata) -> Option<Self> {
        path.canonicalize().ok().map(Id::Path)
    }
}

/// The files beside one that is called `NAME-00001-of-00003.gguf`, which llama.cpp reads with it.
fn parts(path: &Path) -> Vec<PathBuf> {
    let split = || {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, of) = stem.rsplit_once("-of-")?;
        let (name, number) = rest.rsplit_once('-')?;
        let five = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        (five(number) && five(of)).then_some(())?;
        Some((name, of, of.parse::<u32>().ok()?))
    };
    let Some((name, of, n)) = split() else {
        return Vec::new();
    };
    let part = |i: u32| path.with_file_name(format!("{name}-{i:05}-of-{of}.gguf"));
    (1..=n).map(part).take_while(|part| part.exists()).collect()
}
