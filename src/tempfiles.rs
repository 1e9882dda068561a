//! Files that must not outlive the program. Destructors remove them on the ordinary ways out; a
//! signal or an assertion of llama.cpp ends the program without running any, so their names are
//! kept here, too.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A temporary file while somebody else's destructor is responsible for it.
#[derive(Debug)]
pub struct Listed(PathBuf);

impl Listed {
    pub fn new(path: &Path) -> Self {
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
