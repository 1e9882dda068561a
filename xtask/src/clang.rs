//! `cargo xtask clang`: a second compiler reads the C and C++ that `patches/` add or change.
//!
//! Nothing is built, and Vulkan's backend, which needs what a build makes, is left out. Warnings
//! count where they are ours: anywhere in a file that a patch adds, in other files on
//! lines that a patch added. Errors count everywhere. With `--target` clang reads the same lines as
//! for another machine: those for ARM's vectors, which Apple's processors have, are else seen by
//! nobody on a PC.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{patch, vendor};

#[derive(clap::Args)]
pub struct Args {
    /// As for another machine, such as aarch64-linux-gnu; its C++ headers must be installed
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
}

const CRATE: &str = "llama-cpp-sys-2";

/// Below the crate: llama.cpp's own build has these.
const INCLUDES: [&str; 8] = [
    "include",
    "src",
    "ggml/include",
    "ggml/src",
    "ggml/src/ggml-cpu",
    "tools/mtmd",
    "vendor",
    "common",
];

/// What llama.cpp's build defines.
const DEFINES: [&str; 5] = [
    "-DGGML_USE_CPU",
    "-D_GNU_SOURCE",
    "-DNDEBUG",
    "-DGGML_VERSION=\"\"",
    "-DGGML_COMMIT=\"\"",
];

/// What patches do to one file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    is_new: bool,
    added: BTreeSet<String>,
}

/// 0: nothing to say; 1: warnings or errors of ours.
///
/// # Errors
/// When there is no clang, or a file cannot be read.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    vendor::run(root)?;
    let mut changes = BTreeMap::new();
    for file in patch::read(&root.join("patches"), CRATE)? {
        read(&String::from_utf8_lossy(&file.text), &mut changes);
    }
    let llama = root.join("vendor").join(CRATE).join("llama.cpp");
    // cmake writes it; no warning depends on what is in it.
    let made = tempfile::tempdir().context("no folder for temporary files")?;
    let version = "#define LLAMA_VERSION \"\"\n#define LLAMA_COMMIT \"\"\n";
    fs::write(made.path().join("llama-version.h"), version)?;
    let (mut n_files, mut found) = (0, Vec::new());
    for name in changes.keys().filter(|name| is_source(name)) {
        let text = check(&llama, name, made.path(), args)?;
        found.extend(ours(&text, &llama, &changes));
        n_files += 1;
    }
    ensure!(n_files > 0, "no C or C++ among the patches");
    found.sort();
    found.dedup();
    for line in &found {
        println!("{line}");
    }
    let target = args.target.as_deref().unwrap_or("this machine");
    eprintln!(
        "clang, for {target}: {n_files} files, {} findings of ours",
        found.len()
    );
    Ok(u8::from(!found.is_empty()))
}

/// Adds what one patch does, by file below llama.cpp.
fn read(text: &str, changes: &mut BTreeMap<String, Change>) {
    let prefix = format!("{CRATE}/llama.cpp/");
    let (mut file, mut is_new) = (None, false);
    for line in text.lines() {
        if line.starts_with("--- ") {
            is_new = line.starts_with("--- /dev/null");
        } else if let Some(path) = line.strip_prefix("+++ ") {
            let path = path.split('\t').next().unwrap_or(path).trim();
            file = path.strip_prefix(&prefix).map(str::to_owned);
            if let Some(file) = &file {
                changes.entry(file.clone()).or_default().is_new |= is_new;
            }
        } else if let (Some(added), Some(file)) = (line.strip_prefix('+'), &file) {
            let change = changes.entry(file.clone()).or_default();
            change.added.insert(added.trim().to_owned());
        }
    }
}

/// CUDA's sources take CUDA's compiler, and Vulkan's a header of all shaders, which only a build makes. Other headers are
/// read where they are included.
fn is_source(name: &str) -> bool {
    (name.ends_with(".c") || name.ends_with(".cpp")) && !name.starts_with("ggml/src/ggml-vulkan/")
}

/// What clang says of a file.
fn check(llama: &Path, name: &str, made: &Path, args: &Args) -> Result<String> {
    let (compiler, standard) = match name.ends_with(".c") {
        true => ("clang", "-std=gnu11"),
        false => ("clang++", "-std=c++17"),
    };
    let mut command = Command::new(compiler);
    command
        .current_dir(llama)
        .args([standard, "-fsyntax-only", "-Wall", "-Wextra"])
        .args(["-fno-caret-diagnostics", "-fno-color-diagnostics"])
        .args(DEFINES)
        .args(INCLUDES.map(|folder| format!("-I{folder}")))
        .arg("-I")
        .arg(made);
    match &args.target {
        // Apple's oldest has these.
        Some(target) if target.starts_with("aarch64") || target.starts_with("arm64") => {
            command.arg(format!("--target={target}"));
            command.arg("-march=armv8.4-a+dotprod+fp16");
        }
        Some(target) => drop(command.arg(format!("--target={target}"))),
        None => drop(command.arg("-march=native")),
    }
    let output = command
        .arg(name)
        .output()
        .with_context(|| format!("missing: {compiler}; install clang"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success() || text.contains("error:"),
        "{compiler} {name}: {text}"
    );
    Ok(text)
}

/// The lines of clang's that are about us.
fn ours(text: &str, llama: &Path, changes: &BTreeMap<String, Change>) -> Vec<String> {
    let mut out = Vec::new();
    for line in text.lines() {
        let is_error = line.contains(" error: ");
        if !is_error && !line.contains(" warning: ") {
            continue;
        }
        let mut parts = line.split(':');
        let (Some(file), Some(number)) = (parts.next(), parts.next()) else {
            continue;
        };
        let file = file.strip_prefix("./").unwrap_or(file);
        let change = changes.get(file);
        let at = || {
            let source = fs::read_to_string(llama.join(file)).ok()?;
            let number: usize = number.parse().ok()?;
            Some(
                source
                    .lines()
                    .nth(number.checked_sub(1)?)?
                    .trim()
                    .to_owned(),
            )
        };
        let is_ours = change.is_some_and(|change| {
            change.is_new || at().is_some_and(|line| change.added.contains(&line))
        });
        if is_error || is_ours {
            out.push(line.to_owned());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = "\
Title

--- llama-cpp-sys-2/llama.cpp/src/old.cpp
+++ llama-cpp-sys-2/llama.cpp/src/old.cpp
@@ -1,2 +1,3 @@
 int a;
+int ours;
 int b;
--- /dev/null
+++ llama-cpp-sys-2/llama.cpp/src/new.cpp
@@ -0,0 +1 @@
+int all;
";

    #[test]
    fn what_needs_no_build_is_read() {
        assert!(is_source("src/llama-kv-cache.cpp") && is_source("ggml/src/ggml-cpu/quants.c"));
        assert!(!is_source("ggml/src/ggml-cuda/fattn.cu") && !is_source("src/llama-graph.h"));
        assert!(!is_source("ggml/src/ggml-vulkan/ggml-vulkan.cpp"));
    }

    #[test]
    fn only_our_lines_and_errors_count() {
        let mut changes = BTreeMap::new();
        read(PATCH, &mut changes);
        assert!(changes["src/new.cpp"].is_new && !changes["src/old.cpp"].is_new);
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("src")).unwrap();
        fs::write(
            dir.path().join("src/old.cpp"),
            "int a;\n  int ours;\nint b;\n",
        )
        .unwrap();
        let text = "\
src/old.cpp:1:5: warning: theirs [-Wx]
src/old.cpp:2:5: warning: on our line [-Wx]
src/new.cpp:1:5: warning: in our file [-Wx]
src/other.h:9:1: warning: theirs [-Wx]
src/other.h:9:1: error: of anybody
2 warnings generated.
";
        let found = ours(text, dir.path(), &changes);
        let lines = ["on our line", "in our file", "of anybody"];
        assert_eq!(found.len(), lines.len(), "{found:?}");
        for (found, line) in found.iter().zip(lines) {
            assert!(found.contains(line), "{found}");
        }
    }
}
