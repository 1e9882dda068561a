//! The kernels of attention and of lookups compile for processors that this one is not: the widths of vectors differ,
//! and with them the types of ggml's own functions.

#![cfg(target_arch = "x86_64")]

use std::path::Path;
use std::process::Command;

#[test]
fn kernels_compile_for_every_level_of_x86_64() {
    let ggml = Path::new(env!("CARGO_MANIFEST_DIR")).join("vendor/llama-cpp-sys-2/llama.cpp/ggml");
    let compiler = std::env::var_os("CXX").unwrap_or("c++".into());
    for level in [
        "x86-64",
        "x86-64-v2",
        "x86-64-v3",
        "x86-64-v4",
        "sapphirerapids",
    ] {
        for file in ["hae-attend.cpp", "hae-flash.cpp"] {
            let done = Command::new(&compiler)
                .args(["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"])
                .arg(format!("-march={level}"))
                .args(["-Iinclude", "-Isrc", "-Isrc/ggml-cpu"])
                .arg(format!("src/ggml-cpu/{file}"))
                .current_dir(&ggml)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{level}: {said}");
        }
    }
}
