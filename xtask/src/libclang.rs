//! Where libclang is.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::process::output;

/// Finds libclang where bindgen's loader (clang-sys) looks: LIBCLANG_PATH, the folders that
/// llvm-config and xcode-select name, the library path, then the usual places.
pub fn find() -> Option<PathBuf> {
    if let Some(path) = env::var_os("LIBCLANG_PATH").map(PathBuf::from) {
        // A file or a folder; when it is set the loader looks nowhere else first, but falls
        // through to the rest.
        if path.is_file() {
            return Some(path);
        }
        if let Some(found) = library_in(&path) {
            return Some(found);
        }
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    let llvm_config = env::var("LLVM_CONFIG_PATH").unwrap_or_else(|_| "llvm-config".into());
    if let Some(prefix) = output(&llvm_config, &["--prefix"]) {
        folders.extend(["bin", "lib", "lib64"].map(|f| Path::new(prefix.trim()).join(f)));
    }
    if cfg!(target_os = "macos")
        && let Some(tools) = output("xcode-select", &["--print-path"])
    {
        let tools = Path::new(tools.trim());
        folders.push(tools.join("Toolchains/XcodeDefault.xctoolchain/usr/lib"));
        folders.push(tools.join("usr/lib"));
    }
    let library_path: OsString = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    folders.extend(env::split_paths(&library_path));
    folders.extend(usual_folders());
    folders.iter().find_map(|f| library_in(f))
}

fn usual_folders() -> Vec<PathBuf> {
    let (roots, depth): (&[&str], usize) = if cfg!(target_os = "macos") {
        (
            &[
                "/Library/Developer/CommandLineTools/usr/lib",
                "/usr/local/opt/llvm/lib",
                "/opt/homebrew/opt/llvm/lib",
            ],
            0,
        )
    } else if cfg!(windows) {
        (
            &[
                "C:\\Program Files\\LLVM\\bin",
                "C:\\Program Files\\LLVM\\lib",
            ],
            0,
        )
    } else {
        (
            &[
                "/usr/local/lib",
                "/usr/local/lib64",
                "/usr/lib",
                "/usr/lib64",
            ],
            2,
        )
    };
    let mut all: Vec<PathBuf> = roots.iter().map(PathBuf::from).collect();
    let mut level = all.clone();
    for _ in 0..depth {
        level = level.iter().flat_map(|f| folders_in(f)).collect();
        all.extend(level.iter().cloned());
    }
    all
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

fn library_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries
        .flatten()
        .find(|e| e.file_name().to_str().is_some_and(is_libclang))
        .map(|e| e.path())
        .filter(|p| p.exists())
}

fn is_libclang(name: &str) -> bool {
    if name.contains("-cpp.") {
        return false;
    }
    match name.strip_prefix("libclang") {
        Some(rest) => {
            let shared = rest.contains(".so") && (rest.starts_with(".so") || rest.starts_with('-'));
            shared || rest == ".dylib" || rest == ".dll"
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_libclang() {
        for name in [
            "libclang.so",
            "libclang.so.1",
            "libclang-18.so.18",
            "libclang-14.so",
            "libclang.dylib",
            "libclang.dll",
        ] {
            assert!(is_libclang(name), "{name}");
        }
        for name in [
            "libclang-cpp.so.18.1",
            "libclangAST.so",
            "libclang.a",
            "clang.so",
            "libclang",
        ] {
            assert!(!is_libclang(name), "{name}");
        }
    }

    #[test]
    fn a_folder_is_searched_for_the_library() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(library_in(dir.path()), None);
        fs::write(dir.path().join("libclang-cpp.so.18"), "").unwrap();
        assert_eq!(library_in(dir.path()), None);
        let library = dir.path().join("libclang-18.so.1");
        fs::write(&library, "").unwrap();
        assert_eq!(library_in(dir.path()), Some(library));
        assert_eq!(library_in(&dir.path().join("missing")), None);
    }
}
