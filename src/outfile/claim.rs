//! One writer at a time of a file that is read, worked on and written again.

use std::path::Path;

use super::{behind_links, folder_of};
use crate::error::{Error, Result};
use crate::tempfiles::Held;

/// The right to write a file, until it is dropped or the process ends, however it ends.
///
/// The file itself cannot be locked: what is written gets its name in the end and is another file, and
/// at first there may be none. So a file beside it stands for the name.
#[derive(Debug)]
pub struct Claim {
    _held: Option<Held>,
}

impl Claim {
    /// Takes it. Where file systems know no locks, or the folder takes no files, nothing is held; nor is a device or a
    /// pipe.
    ///
    /// # Errors
    /// [`Error::File`] when another process has it.
    pub fn take(target: &Path) -> Result<Self> {
        let real = behind_links(target)?;
        if std::fs::metadata(&real).is_ok_and(|meta| !meta.is_file()) {
            return Ok(Claim { _held: None });
        }
        let name = real.file_name().unwrap_or_default();
        // A name of any length makes one of ours that is short.
        let name = format!("{:08x}-in-use", crc32fast::hash(name.as_encoded_bytes()));
        match Held::create(folder_of(&real), &name) {
            Ok(held) => Ok(Claim { _held: held }),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Err(Error::file(
                target,
                "is in use by another run of hae, expected that to end or another name",
            )),
            // Who cannot write here will hear of it from the file itself.
            Err(_) => Ok(Claim { _held: None }),
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::Claim;

    #[test]
    fn one_name_is_one_writers_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let (file, other) = (folder.path().join("s"), folder.path().join("t"));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let claim = Claim::take(&file).unwrap();
        for name in [&file, &link] {
            let error = Claim::take(name).unwrap_err().to_string();
            assert!(error.contains("is in use by another run"), "{error}");
        }
        Claim::take(&other).unwrap();
        // The file under the name may be written and replaced meanwhile.
        std::fs::write(&file, "x").unwrap();
        assert!(Claim::take(&file).is_err());
        drop(claim);
        Claim::take(&link).unwrap();
        let names = std::fs::read_dir(folder.path()).unwrap();
        assert_eq!(names.count(), 2, "nothing is left beside them");
        Claim::take(&folder.path().join("none/s")).unwrap();
        let _both = [
            Claim::take(folder.path()).unwrap(),
            Claim::take(folder.path()).unwrap(),
        ];
    }

    #[test]
    fn many_takers_are_one_at_a_time() {
        use std::sync::atomic::{AtomicUsize, Ordering};

        let folder = tempfile::tempdir().unwrap();
        let (file, inside, taken) = (
            folder.path().join("s"),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Ok(_claim) = Claim::take(&file) {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            taken.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(taken.into_inner() > 0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
