//! What this program was built from, for reports.

use serde::Serialize;

/// The pinned bindings; a test compares them with `vendor/pin/Cargo.toml`.
pub const LLAMA_CPP_2: &str = "0.1.160";
/// The same of the C interface.
pub const LLAMA_CPP_SYS_2: &str = "0.1.161";

/// The program and what it is linked with.
#[derive(Clone, Debug, Serialize)]
pub struct Build {
    /// hae's.
    pub version: &'static str,
    /// [`LLAMA_CPP_2`].
    pub llama_cpp_2: &'static str,
    /// [`LLAMA_CPP_SYS_2`].
    pub llama_cpp_sys_2: &'static str,
    /// ggml's own version number.
    pub ggml: String,
    /// llama.cpp's list of the processor features that it was built for.
    pub system: String,
}

/// Describes this program.
pub fn build() -> Build {
    Build {
        version: env!("CARGO_PKG_VERSION"),
        llama_cpp_2: LLAMA_CPP_2,
        llama_cpp_sys_2: LLAMA_CPP_SYS_2,
        ggml: crate::llama::ggml_version(),
        system: crate::llama::system_info(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_the_pinned_ones() {
        let pin = include_str!("../vendor/pin/Cargo.toml");
        assert!(
            pin.contains(&format!("llama-cpp-2 = \"={LLAMA_CPP_2}\"")),
            "{pin}"
        );
        assert!(
            pin.contains(&format!("llama-cpp-sys-2 = \"={LLAMA_CPP_SYS_2}\"")),
            "{pin}"
        );
    }
}
