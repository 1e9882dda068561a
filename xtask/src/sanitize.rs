//! `cargo xtask sanitize`: llama.cpp and the tests of what we change in its cache, under the address
//! and undefined-behaviour sanitizers; with `--all` the whole suite, with `--thread` the tests of
//! several threads, under the thread sanitizer.
//!
//! A stable Rust cannot instrument its own code, and needs not: only `src/llama` is unsafe, and every
//! pointer that it hands over is checked where C++ follows it. So llama.cpp alone is compiled with
//! the sanitizers, and the test program is linked with their runtime, whose allocator then also
//! stands behind Rust's buffers. Builds go into a target folder of their own.

mod races;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{pin, setup, steps, vendor};

/// What is run when nothing is named: copies of a quantized cache on the device, and cells that are
/// moved, resized, saved and restored at random, also those of several sequences; prompts that go on
/// behind the first layers; taps; batches that fail or are refused; positions with holes; several
/// sequences in one pass; lookups. Others can be
/// named, but for `kv_memory`, which limits the address space and measures what a process holds: the
/// sanitizer's shadow memory is more than either.
pub const TESTS: [&str; 11] = [
    "kv_state::",
    "kv_cells::cells_f",
    "kv_streams::",
    "midway::",
    "midway_calls::",
    "taps_limits::",
    "failed::",
    "refused::",
    "holes::",
    "passes::",
    "lookup::",
];

/// What is run under the thread sanitizer when nothing is named: conversations that share a context,
/// alone and behind the HTTP interface, and ggml's own threads.
const THREADED: [&str; 6] = [
    "passes::",
    "together::",
    "serve_hall::",
    "serve::",
    "sequences::",
    "lookup_mrope::",
];

/// Left out of `--all`: they limit or measure the memory of a process, of which the sanitizer's
/// shadow takes terabytes.
const MEMORY: [&str; 6] = [
    "kv_memory::",
    "no_memory::",
    "wide::",
    "plan::the_program_plans_and_fits",
    "rpc::a_cache_that_cannot_grow",
    "allocations::",
];

#[derive(clap::Args)]
pub struct Args {
    /// Every test but those of memory
    #[arg(long, conflicts_with = "filters")]
    all: bool,
    /// Under the thread sanitizer, without OpenMP, whose waiting it cannot see
    #[arg(long)]
    thread: bool,
    /// Tests whose names contain one of these, in the place of the usual ones
    filters: Vec<String>,
}

impl Args {
    /// The compiler's name for what it adds.
    fn sanitizers(&self) -> &'static str {
        match self.thread {
            true => "-fsanitize=thread",
            false => "-fsanitize=address,undefined",
        }
    }
}

/// Lets the compiler that links add its runtime, in front of all other libraries: rustc tells it to
/// add nothing otherwise.
const LINK: &str = "-C default-linker-libraries=yes";

/// Of llama.cpp: any finding ends the process, and one that only prints would be missed. Line
/// numbers, and not more optimization than the tests need to end soon. Without C's assert(), as in
/// every release build: one of ggml's allocator does not hold in llama.cpp as it comes. With a
/// rotated V cache and K, Q and V computed in one, a single token needs no copy of V where larger
/// batches do, and takes the place that was planned for the copy without using it.
const FLAGS: [&str; 5] = [
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
    "-DNDEBUG",
];

/// What upstream does not free on purpose.
const NEVER_FREED: &str = "xtask/src/sanitize/never-freed.supp";

/// Builds and runs the tests. 0: all passed and nothing was found.
///
/// # Errors
/// When this is no Linux, the set-up fails, or cargo cannot be run.
pub fn run(root: &Path, wanted: &Args) -> Result<u8> {
    ensure!(
        cfg!(target_os = "linux"),
        "the sanitizers are set up for Linux with gcc or clang"
    );
    setup::run()?;
    vendor::run(root)?;
    let target = host()?;
    let compiler = |name: &str, usual: &str| std::env::var_os(name).unwrap_or(usual.into());
    let (cc, cxx) = (compiler("CC", "cc"), compiler("CXX", "c++"));
    let args = arguments(&target, wanted);
    let environment = environment(root, &target, wanted, cc, cxx);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let reports = root.join(REPORTS);
    if wanted.thread {
        if reports.is_dir() {
            fs::remove_dir_all(&reports).with_context(|| reports.display().to_string())?;
        }
        fs::create_dir_all(&reports).with_context(|| reports.display().to_string())?;
    }
    let status = steps::cargo_with(root, &args, &environment)?;
    let mut found = 0;
    if wanted.thread {
        let (races, others) = races::of(&reports)?;
        races.iter().for_each(|race| println!("{race}\n"));
        found = races.len();
        println!("races: {found}; hand-overs between threads of Rust: {others}");
    }
    Ok(u8::from(!status.success() || found > 0))
}

/// Where the thread sanitizer's reports go, of all processes.
const REPORTS: &str = "target/sanitize-thread/reports";

fn arguments(target: &str, wanted: &Args) -> Vec<String> {
    let folder = match wanted.thread {
        true => "target/sanitize-thread",
        false => "target/sanitize",
    };
    let mut args: Vec<&str> = vec![
        "test",
        "--release",
        "--locked",
        "--target-dir",
        folder,
        // So that build scripts and macros, which run on the way, are not linked with the runtime.
        "--target",
        target,
        "--test",
        "suite",
    ];
    if wanted.thread {
        // Its library is not instrumented, so that every hand-over between its threads is a finding.
        args.extend(["--no-default-features", "--features"]);
        args.push("cli,embedded-model,report,parquet,serve");
    }
    args.push("--");
    match (&wanted.filters[..], wanted.all) {
        ([], true) => args.extend(MEMORY.iter().flat_map(|test| ["--skip", test])),
        ([], false) if wanted.thread => args.extend(THREADED),
        ([], false) => args.extend(TESTS),
        (some, _) => args.extend(some.iter().map(String::as_str)),
    }
    args.into_iter().map(str::to_owned).collect()
}

/// What the build and the tests see beside the caller's environment.
fn environment(
    root: &Path,
    target: &str,
    wanted: &Args,
    cc: OsString,
    cxx: OsString,
) -> Vec<(String, OsString)> {
    let linker = format!(
        "CARGO_TARGET_{}_LINKER",
        target.to_uppercase().replace('-', "_")
    );
    let sanitizers = wanted.sanitizers();
    let flags = format!("{sanitizers} {}", FLAGS.join(" "));
    // `detect_leaks` stays on; a stack of frames that says who, not only where.
    let address =
        "detect_stack_use_after_return=1:strict_string_checks=1:check_initialization_order=1";
    let undefined = "print_stacktrace=1";
    let leaks = format!(
        "suppressions={}:print_suppressions=0",
        root.join(NEVER_FREED).display()
    );
    // All is reported, and read when the tests are through.
    let reports = root.join(REPORTS).join("of");
    let thread = format!(
        "halt_on_error=0:exitcode=0:history_size=7:second_deadlock_stack=1:log_path={}",
        reports.display()
    );
    [
        // The same compiler links, so that the runtime is its own.
        (linker.as_str(), cxx.clone()),
        ("CC", cc),
        ("CXX", cxx),
        ("LLAMA_LIB_PROFILE", "RelWithDebInfo".into()),
        ("CMAKE_C_FLAGS_RELWITHDEBINFO", flags.clone().into()),
        ("CMAKE_CXX_FLAGS_RELWITHDEBINFO", flags.into()),
        // In the place of what .cargo/config.toml says.
        (
            "RUSTFLAGS",
            format!("-C target-cpu=native {LINK} -C link-arg={sanitizers}").into(),
        ),
        ("ASAN_OPTIONS", address.into()),
        ("LSAN_OPTIONS", leaks.into()),
        ("UBSAN_OPTIONS", undefined.into()),
        ("TSAN_OPTIONS", thread.into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The target that rustc compiles for by itself.
///
/// # Errors
/// When cargo does not say.
pub fn host() -> Result<String> {
    let output = Command::new(pin::cargo())
        .args(["--version", "--verbose"])
        .output()
        .context("cannot run cargo --version")?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().find_map(|line| line.strip_prefix("host: ")) {
        Some(host) => Ok(host.to_owned()),
        None => bail!("cargo --version --verbose names no host"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Args, FLAGS, MEMORY, TESTS, THREADED, arguments, environment, host};

    fn args(all: bool, thread: bool, filters: &[&str]) -> Args {
        let filters = filters.iter().map(|&f| f.to_owned()).collect();
        Args {
            all,
            thread,
            filters,
        }
    }

    #[test]
    fn states_on_the_device_midway_and_several_sequences_are_among_the_usual_ones() {
        let target = host().unwrap();
        let usual = arguments(&target, &args(false, false, &[]));
        for module in [
            "kv_state::",
            "midway::",
            "kv_streams::",
            "passes::",
            "lookup::",
        ] {
            assert!(usual.contains(&module.to_owned()), "{module}");
        }
        let at = usual.iter().position(|arg| arg == "--").unwrap();
        assert_eq!(usual[at + 1..], TESTS);
        let named = arguments(&target, &args(false, false, &["holes::"]));
        assert_eq!(named[at + 1..], ["holes::"]);
        assert_eq!(named[..at], usual[..at]);
        // A folder of its own: the plain build is not thrown away.
        assert!(usual.contains(&"target/sanitize".to_owned()));
        let all = arguments(&target, &args(true, false, &[]));
        assert_eq!(all.len(), at + 1 + 2 * MEMORY.len());
        assert!(all[at + 1..].iter().step_by(2).all(|word| word == "--skip"));
    }

    #[test]
    fn the_thread_sanitizer_has_a_build_without_openmp() {
        let target = host().unwrap();
        let usual = arguments(&target, &args(false, true, &[]));
        let at = usual.iter().position(|arg| arg == "--").unwrap();
        assert_eq!(usual[at + 1..], THREADED);
        assert!(usual.contains(&"--no-default-features".to_owned()));
        assert!(usual.contains(&"target/sanitize-thread".to_owned()));
        assert!(!usual.iter().any(|word| word.contains("openmp")));
    }

    /// Every name stands for a test file, so that none is left out without anybody noticing.
    #[test]
    fn every_name_is_one_of_a_test_file() {
        for name in TESTS.iter().chain(&THREADED).chain(&MEMORY) {
            let (file, _) = name.split_once("::").unwrap();
            let file = crate::root().join(format!("tests/suite/{file}.rs"));
            assert!(file.is_file(), "{name}");
        }
    }

    #[test]
    fn the_same_sanitizers_are_compiled_and_linked() {
        for thread in [false, true] {
            let target = "x86_64-unknown-linux-gnu";
            let wanted = args(false, thread, &[]);
            let all = environment(crate::root(), target, &wanted, "cc".into(), "g++-12".into());
            let get = |name: &str| {
                let found = all.iter().find(|(n, _)| n == name);
                found.unwrap().1.to_str().unwrap()
            };
            assert_eq!(
                get("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER"),
                "g++-12"
            );
            for name in [
                "CMAKE_C_FLAGS_RELWITHDEBINFO",
                "CMAKE_CXX_FLAGS_RELWITHDEBINFO",
            ] {
                let flags = format!("{} {}", wanted.sanitizers(), FLAGS.join(" "));
                assert_eq!(get(name), flags);
            }
            assert!(get("CMAKE_C_FLAGS_RELWITHDEBINFO").contains("-fno-sanitize-recover"));
            let link = format!("link-arg={}", wanted.sanitizers());
            assert!(get("RUSTFLAGS").ends_with(&link));
            for name in ["ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"] {
                assert!(!get(name).contains("suppressions"));
            }
            let leaks = get("LSAN_OPTIONS").split(':').next().unwrap();
            let file = leaks.strip_prefix("suppressions=").unwrap();
            let text = std::fs::read_to_string(file).unwrap();
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            for line in lines {
                assert!(line.starts_with("leak:ggml_backend_rpc_"), "{line}");
            }
            for name in ["ASAN_OPTIONS", "UBSAN_OPTIONS"] {
                assert!(!get(name).contains("halt_on_error=0"));
            }
        }
    }
}
