//! Files that must not outlive the program.
//!
//! Destructors remove them on the ordinary ways out. A signal or an assertion of llama.cpp ends the
//! program without running any, so their names are kept here, too. What a killed process leaves is
//! removed by the next one that makes such a file in the same folder: a file whose owner lives is
//! locked.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;

static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

const PREFIX: &str = ".hae-";
/// Of files that are locked as long as they are needed.
const SUFFIX: &str = ".part";
/// Where the file system knows no locks; nobody can tell whether those are left over.
const SUFFIX_UNLOCKED: &str = ".unlocked-part";

/// A file under a name of its own that nobody else takes for a leftover. Removed on drop.
#[derive(Debug)]
pub struct TempFile {
    temp: NamedTempFile,
    listed: Listed,
}

/// A temporary file while somebody else's destructor is responsible for it.
#[derive(Debug)]
struct Listed(PathBuf);

impl TempFile {
    /// Makes one in a folder, after removing what killed processes left there. `what` becomes a
    /// part of its name; `mode` are its permissions, of which the umask takes some.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn create_in(folder: &Path, what: &str, mode: u32) -> std::io::Result<Self> {
        sweep(folder);
        let prefix = format!("{PREFIX}{what}");
        let mut suffix = SUFFIX;
        loop {
            let mut builder = tempfile::Builder::new();
            builder.prefix(&prefix).suffix(suffix);
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
            #[cfg(not(unix))]
            let _ = mode;
            let temp = builder.tempfile_in(folder)?;
            let made = TempFile {
                listed: Listed::new(temp.path()),
                temp,
            };
            match lock(&made.temp) {
                Lock::Held => return Ok(made),
                _ if suffix == SUFFIX_UNLOCKED => return Ok(made),
                // Somebody took it for a leftover before it was locked.
                Lock::Taken => {}
                Lock::Unknown => suffix = SUFFIX_UNLOCKED,
            }
        }
    }

    /// Open for reading and writing.
    pub fn file(&self) -> &std::fs::File {
        self.temp.as_file()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Gives the file its name, replacing what had it before.
    ///
    /// # Errors
    /// The system's; the file is gone then.
    pub fn persist(self, target: &Path) -> std::io::Result<()> {
        let TempFile { temp, listed } = self;
        temp.persist(target).map_err(|e| e.error)?;
        drop(listed);
        Ok(())
    }
}

impl Listed {
    fn new(path: &Path) -> Self {
        files().push(path.to_owned());
        Listed(path.to_owned())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        files().retain(|path| *path != self.0);
    }
}

/// Removes every listed file: the last thing before the program ends without destructors.
pub fn remove_all() {
    for path in std::mem::take(&mut *files()) {
        // Nobody is left to hear of a failure.
        let _ = std::fs::remove_file(path);
    }
}

fn files() -> MutexGuard<'static, Vec<PathBuf>> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of an attempt to lock a file. Elsewhere than on Unix there are no attempts.
#[cfg_attr(not(unix), expect(dead_code))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lock {
    /// It is ours until it is closed, and it still has a name.
    Held,
    /// Somebody else has it, or has removed it.
    Taken,
    /// Such files cannot be locked here.
    Unknown,
}

/// A file under a known name that is locked while it is held; it holds nothing. Removed on drop.
#[derive(Debug)]
pub struct Held {
    _file: std::fs::File,
    listed: Listed,
}

impl Held {
    /// Makes and locks `name` in a folder. `None` where files cannot be locked.
    ///
    /// # Errors
    /// [`std::io::ErrorKind::WouldBlock`] when another holder has it, otherwise the system's.
    #[cfg(unix)]
    pub fn create(folder: &Path, name: &str) -> std::io::Result<Option<Self>> {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

        let path = folder.join(format!("{PREFIX}{name}{SUFFIX}"));
        loop {
            let mut options = std::fs::OpenOptions::new();
            options.write(true).create(true).truncate(false);
            let file = options.mode(0o600).open(&path)?;
            match locked(&file) {
                Lock::Taken => return Err(std::io::ErrorKind::WouldBlock.into()),
                Lock::Unknown => {
                    std::fs::remove_file(&path)?;
                    return Ok(None);
                }
                // Its last holder, or somebody who took it for a leftover, removed it meanwhile.
                Lock::Held if file.metadata()?.nlink() == 0 => {}
                Lock::Held => {
                    let listed = Listed::new(&path);
                    return Ok(Some(Held {
                        _file: file,
                        listed,
                    }));
                }
            }
        }
    }

    /// Elsewhere nothing is held.
    #[cfg(not(unix))]
    pub fn create(_: &Path, _: &str) -> std::io::Result<Option<Self>> {
        Ok(None)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // While it is still locked: nobody can have made another under the name.
        let _ = std::fs::remove_file(&self.listed.0);
    }
}

#[cfg(unix)]
fn lock(temp: &NamedTempFile) -> Lock {
    use std::os::unix::fs::MetadataExt;

    match locked(temp.as_file()) {
        Lock::Held if temp.as_file().metadata().is_ok_and(|m| m.nlink() == 0) => Lock::Taken,
        lock => lock,
    }
}

/// The lock belongs to the open file, so it ends with its process, however that ends, and another
/// opening of the file in this process does not have it.
#[cfg(unix)]
fn locked(file: &std::fs::File) -> Lock {
    use rustix::fs::{FlockOperation, flock};

    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Lock::Held,
        Err(e) if e == rustix::io::Errno::WOULDBLOCK => Lock::Taken,
        Err(_) => Lock::Unknown,
    }
}

/// Removes what killed processes left in a folder: files of ours that nobody has locked. What
/// cannot be removed stays, which is no reason to fail.
#[cfg(unix)]
fn sweep(folder: &Path) {
    use rustix::fs::{Mode, OFlags};
    use std::os::unix::fs::MetadataExt;

    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name
            .to_str()
            .is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
        if !ours {
            continue;
        }
        let path = entry.path();
        // Never waits, whatever has that name.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::open(&path, flags, Mode::empty()) else {
            continue;
        };
        let file = std::fs::File::from(file);
        if locked(&file) != Lock::Held {
            continue;
        }
        // It may have got its final name meanwhile.
        let same = |a: std::fs::Metadata, b: std::fs::Metadata| {
            a.is_file() && (a.dev(), a.ino()) == (b.dev(), b.ino())
        };
        if let (Ok(open), Ok(named)) = (file.metadata(), path.symlink_metadata())
            && same(open, named)
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(not(unix))]
fn lock(_: &NamedTempFile) -> Lock {
    Lock::Held
}

/// Elsewhere nobody can tell whether a file is left over.
#[cfg(not(unix))]
fn sweep(_: &Path) {}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn leftovers_go_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in [".hae-killed.part", "model.part", ".hae-notes", "a.session"] {
            std::fs::write(at(name), "x").unwrap();
        }
        std::fs::create_dir(at(".hae-folder.part")).unwrap();
        std::os::unix::fs::symlink(at("a.session"), at(".hae-link.part")).unwrap();
        let living = TempFile::create_in(folder.path(), "", 0o600).unwrap();
        let other = TempFile::create_in(folder.path(), "", 0o600).unwrap();
        assert!(living.path().exists() && other.path().exists());
        drop((living, other));
        let left = [
            ".hae-folder.part",
            ".hae-link.part",
            ".hae-notes",
            "a.session",
            "model.part",
        ];
        assert_eq!(names(folder.path()), left);
    }

    #[test]
    fn files_of_another_process_stay_while_it_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".hae-other.part");
        std::fs::write(&path, "x").unwrap();
        // What another process does: the lock belongs to the opening.
        let held = std::fs::File::open(&path).unwrap();
        assert_eq!(locked(&held), Lock::Held);
        drop(TempFile::create_in(folder.path(), "", 0o600).unwrap());
        assert!(path.exists());
        drop(held);
        drop(TempFile::create_in(folder.path(), "", 0o600).unwrap());
        assert!(!path.exists());
    }

    /// Many at once in one folder: nobody removes what another is about to lock.
    #[test]
    fn many_writers_do_not_take_each_others_files() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let folder = folder.path();
                scope.spawn(move || {
                    for i in 0..50 {
                        let target = folder.join(format!("{writer}-{i}"));
                        let temp = TempFile::create_in(folder, "", 0o600).unwrap();
                        temp.persist(&target).unwrap();
                        assert!(target.exists());
                    }
                });
            }
        });
        assert_eq!(names(folder.path()).len(), 200);
    }
}
