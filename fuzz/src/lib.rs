//! What the targets share. Each is one reader of hae's on bytes that libFuzzer makes up: nothing may
//! panic, overflow a sum, hang or take memory without bounds.

use std::cell::RefCell;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

/// Ends the process at a panic, but where hae catches one of other people's readers: only those that
/// nobody catches are finds. To be called when the target begins, behind libFuzzer's own hook.
pub fn catch_what_hae_catches() {
    let _ = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        if !hae::guard::is_guarded() {
            eprintln!("{info}\n{}", std::backtrace::Backtrace::force_capture());
            std::process::abort();
        }
    }));
}

/// Memory, where the system has a folder for that.
fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => memory.to_owned(),
        false => std::env::temp_dir(),
    }
}

/// A file of these bytes for readers that want a path: one for all runs of the process.
///
/// # Panics
/// Where it cannot be written.
pub fn with_file<R>(bytes: &[u8], read: impl FnOnce(&Path) -> R) -> R {
    thread_local! {
        static FILE: RefCell<NamedTempFile> =
            RefCell::new(NamedTempFile::new_in(folder()).expect("a temporary file"));
    }
    FILE.with_borrow_mut(|named| {
        let file = named.as_file_mut();
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(bytes))
            .expect("writing a temporary file");
        read(named.path())
    })
}

/// A folder that goes with the process, in memory where there is such a thing.
///
/// # Panics
/// Where it cannot be made.
pub fn new_folder() -> TempDir {
    TempDir::new_in(folder()).expect("a temporary folder")
}

/// A message is one line, so that whoever calls the program gets one.
///
/// # Panics
/// Where it is none.
pub fn one_line<T>(result: hae::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let said = error.to_string();
            assert!(!said.trim().is_empty(), "an error without a word");
            assert!(!said.contains('\n'), "more than one line: {said:?}");
            None
        }
    }
}
