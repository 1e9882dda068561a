//! ggml's Metal backend without a Mac.
//!
//! The backend's host code is the pinned source, compiled as it is: its rules of what it supports, its fusions, its
//! order of nodes, the choice of each kernel and the size of each launch. Apple's frameworks are stood in for
//! (`apple.cpp`), and what the kernels would compute, the CPU backend computes. So graphs are built, split and copied
//! as on a Mac, and whatever would end the program there before a kernel runs ends it here. What the kernels
//! themselves do, their speed and their rounding, stays unknown.
//!
//! With `DRY_METAL=m1` (`m3`, `m5`, `no-bf16`, `virtual`) in the environment a program that links this crate finds the GPU when
//! it starts.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};

// Only for ggml's symbols.
use llama_cpp_sys_2 as _;

/// Why the backend could not be compiled, in one line; nothing if it could.
pub const BROKEN: &str = env!("DRY_METAL_BROKEN");

/// An operation that a graph asked the device for.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name, with what tells its cases apart: `FLASH_ATTN_EXT head 96 queries 1`.
    pub op: String,
    /// Types of the sources and of the result. Behind a type: `^P` permuted, `^T` transposed, `^R` rows with
    /// gaps between them, `^S` gaps inside the rows.
    pub types: String,
    /// What the sources say, by GPU: `m1`, `no-bf16`, `m3`, `m5`, `virtual`, `cuda`, `vulkan`.
    pub answers: BTreeMap<String, Answer>,
    /// Whether the chosen GPU refused it.
    pub refused: bool,
    /// The kernels that were launched for it or for the nodes that it was fused with.
    pub kernels: Vec<String>,
    /// The labels under which it was seen.
    pub labels: Vec<String>,
}

/// What a source says of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether the GPU has it.
    pub yes: bool,
    /// The line that says so.
    pub line: u32,
}

/// What was seen since the program started.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order of their texts.
    pub nodes: Vec<Node>,
    /// What Metal would have failed at, in one line each.
    pub faults: Vec<String>,
}

/// What passed between the device and the rest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Bytes written to the device's tensors.
    pub set: u64,
    /// Bytes read from them.
    pub got: u64,
    /// Graphs, or parts of them, that the device computed.
    pub graphs: u64,
    /// Kernels launched.
    pub launches: u64,
}

#[cfg(dry)]
mod sys {
    use super::{c_char, c_void};
    unsafe extern "C" {
        pub fn dry_metal_register(key: *const c_char) -> i32;
        pub fn dry_metal_label(text: *const c_char);
        pub fn dry_metal_counts(out: *mut u64);
        pub fn dry_metal_report(
            line: unsafe extern "C" fn(*const c_char, *mut c_void),
            data: *mut c_void,
        );
    }
}

#[cfg(not(dry))]
mod sys {
    use super::{c_char, c_void};
    pub unsafe fn dry_metal_register(_: *const c_char) -> i32 {
        1
    }
    pub unsafe fn dry_metal_label(_: *const c_char) {}
    pub unsafe fn dry_metal_counts(_: *mut u64) {}
    pub unsafe fn dry_metal_report(
        _: unsafe extern "C" fn(*const c_char, *mut c_void),
        _: *mut c_void,
    ) {
    }
}

/// Adds the device to ggml's. Whether `key` is the name of a GPU, and none was added before.
#[must_use]
pub fn register(key: &str) -> bool {
    let key = CString::new(key).unwrap();
    // SAFETY: a C string that lives through the call.
    unsafe { sys::dry_metal_register(key.as_ptr()) == 0 }
}

/// Notes from now on under this label.
pub fn label(text: &str) {
    let text = CString::new(text).unwrap();
    // SAFETY: a C string, which is copied.
    unsafe { sys::dry_metal_label(text.as_ptr()) }
}

/// Sums since the program started.
#[must_use]
pub fn counts() -> Counts {
    let mut out = [0; 4];
    // SAFETY: it writes four numbers.
    unsafe { sys::dry_metal_counts(out.as_mut_ptr()) };
    let [set, got, graphs, launches] = out;
    Counts {
        set,
        got,
        graphs,
        launches,
    }
}

/// What was seen so far, in lines for [`Report::of`].
#[must_use]
pub fn lines() -> Vec<String> {
    unsafe extern "C" fn push(line: *const c_char, lines: *mut c_void) {
        // SAFETY: called below, with a C string and the vector.
        let (line, lines) = unsafe { (CStr::from_ptr(line), &mut *lines.cast::<Vec<String>>()) };
        lines.push(line.to_string_lossy().into_owned());
    }
    let mut lines: Vec<String> = Vec::new();
    // SAFETY: `push` is only called inside, with the vector.
    unsafe { sys::dry_metal_report(push, (&raw mut lines).cast()) };
    lines
}

impl Report {
    /// Reads [`lines`], among which others may stand.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        let mut report = Report::default();
        for line in text.lines() {
            match line.split('\t').collect::<Vec<_>>()[..] {
                ["fault", text] => report.faults.push(text.to_owned()),
                ["node", op, types, answers, state, kernels, labels] => report.nodes.push(Node {
                    op: op.to_owned(),
                    types: types.to_owned(),
                    answers: answers.split(' ').filter_map(answer).collect(),
                    refused: state == "refused",
                    kernels: words(kernels),
                    labels: labels.split(", ").map(str::to_owned).collect(),
                }),
                _ => {}
            }
        }
        report
    }
}

fn answer(text: &str) -> Option<(String, Answer)> {
    let (key, line) = text.split_once('=')?;
    let line: i32 = line.parse().ok()?;
    let yes = line > 0;
    Some((
        key.to_owned(),
        Answer {
            yes,
            line: line.unsigned_abs(),
        },
    ))
}
