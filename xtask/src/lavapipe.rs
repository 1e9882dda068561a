//! `cargo xtask lavapipe`: the tests that hold on a GPU, on Vulkan without one. Mesa's lavapipe is a Vulkan driver that
//! computes on the processor: slowly, but through all that a GPU has, from buffers of its own and copies that are not
//! waited for to graphs over two backends.
//!
//! A device of ggml has one queue, and a process one such device: tests beside each other in a process wait for one
//! another, longest while shaders are compiled. So each test has a process of its own, and one is run for each core.
//! What was compiled is shared through Mesa's cache on the disk. A test that ends its process ends no other.

use std::ffi::OsString;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::{bench, setup, steps, vendor};

#[derive(clap::Args)]
pub struct Args {
    /// Tests whose names contain one of these, in the place of those that `cargo xtask bench cuda parity` runs,
    /// but for `two_questions`
    filters: Vec<String>,
    /// The K-th of N parts of them: every N-th test
    #[arg(long, value_name = "K/N", value_parser = part)]
    part: Option<Part>,
    /// Tests at a time [default: one for each core]
    #[arg(long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    k: usize,
    n: usize,
}

fn part(text: &str) -> Result<Part> {
    let said = || format!("{text}: not K/N with 1 <= K <= N");
    let (k, n) = text.split_once('/').with_context(said)?;
    let [k, n] = [k, n].map(str::parse::<usize>);
    let part = Part { k: k?, n: n? };
    ensure!((1..=part.n).contains(&part.k), said());
    Ok(part)
}

impl Part {
    /// What is its own of a list that `--list` of a test program printed. Neighbours, which take as long as each
    /// other, are in different parts.
    fn of(self, list: &str) -> Vec<String> {
        let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
        let own = names.skip(self.k - 1).step_by(self.n);
        own.map(str::to_owned).collect()
    }
}

/// Where drivers are listed, but for those of `VK_DRIVER_FILES` and its older name.
const DRIVERS: [&str; 4] = [
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/etc/vulkan/icd.d",
    "/usr/local/etc/vulkan/icd.d",
];

/// Builds with the feature `vulkan` and runs the tests. 0: all passed; 1: some failed.
///
/// # Errors
/// When this is no Linux, something is missing, or cargo cannot be run.
pub fn run(root: &Path, wanted: &Args) -> Result<u8> {
    ensure!(cfg!(target_os = "linux"), "lavapipe is set up for Linux");
    setup::run()?;
    let driver = driver();
    let mut missing: Vec<&str> = PROBES
        .iter()
        .filter(|(_, find)| !finds(find))
        .map(|&(package, _)| package)
        .collect();
    if driver.is_none() {
        missing.push("mesa-vulkan-drivers");
    }
    let Some(driver) = driver.filter(|_| missing.is_empty()) else {
        bail!(said(&missing));
    };
    vendor::run(root)?;
    let tests = match &wanted.filters[..] {
        [] => in_hours(bench::tests_on_a_gpu(root)?),
        some => some.to_vec(),
    };
    let environment = environment(&driver);
    let list = arguments(&[&tests[..], &["--list".to_owned()]].concat());
    let list: Vec<&str> = list.iter().map(String::as_str).collect();
    let mut command = steps::cargo_command(root, &list, &environment);
    let output = command.stderr(Stdio::inherit()).output().context("cargo")?;
    ensure!(output.status.success(), "the tests cannot be listed");
    let part = wanted.part.unwrap_or(Part { k: 1, n: 1 });
    let own = part.of(&String::from_utf8(output.stdout)?);
    ensure!(!own.is_empty(), "no test is among them");
    let jobs = match wanted.jobs {
        Some(jobs) => jobs,
        None => thread::available_parallelism()?,
    };
    let test = |name: &str| -> Result<Output> {
        let args = arguments(&["--exact", name].map(str::to_owned));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = steps::unprinted(root, &args, &environment).output();
        output.context("cargo")
    };
    // The others would pass on the processor as well.
    let asked = test(IS_THERE)?;
    let said = String::from_utf8_lossy(&asked.stdout);
    ensure!(asked.status.success(), "ggml does not see lavapipe: {said}");
    let start = Instant::now();
    let failed = each(&own, jobs, test);
    println!(
        "{} passed, {} failed, in {} min",
        own.len() - failed.len(),
        failed.len(),
        start.elapsed().as_secs().div_ceil(60)
    );
    failed.iter().for_each(|name| println!("FAILED {name}"));
    Ok(u8::from(!failed.is_empty()))
}

/// Runs every test, `jobs` of them at a time, in their order; says of each how it went, and what a failed one printed.
/// Those that failed.
fn each(
    names: &[String],
    jobs: NonZeroUsize,
    run: impl Fn(&str) -> Result<Output> + Sync,
) -> Vec<&String> {
    let next = Mutex::new(names.iter());
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let taken = next.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(name) = taken else { return };
            // If something ends all of them, these are the ones that took too long.
            println!("{:>9}  starts  {name}", "");
            let start = Instant::now();
            let done = run(name);
            let seconds = start.elapsed().as_secs_f32();
            // Locked while it is printed, so that one is printed after another.
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            if done.as_ref().is_ok_and(|done| done.status.success()) {
                println!("{seconds:7.1} s  ok      {name}");
                continue;
            }
            println!("{seconds:7.1} s  FAILED  {name}");
            match done {
                Ok(done) => {
                    print!("{}", String::from_utf8_lossy(&done.stdout));
                    print!("{}", String::from_utf8_lossy(&done.stderr));
                    println!("{}", done.status);
                }
                Err(error) => println!("{error:#}"),
            }
            failed.push(name);
        }
    };
    thread::scope(|scope| (0..jobs.get()).for_each(|_| drop(scope.spawn(work))));
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the device is the one that the environment names.
const IS_THERE: &str = "offload::the_device_that_was_asked_for_is_there";

/// Hundreds of chats about pictures, for which a processor that plays a GPU takes many hours.
const LEFT_OUT: &str = "two_questions::";

fn in_hours(mut tests: Vec<String>) -> Vec<String> {
    tests.retain(|test| test != LEFT_OUT);
    tests
}

/// What llama.cpp's build asks cmake for, by the Debian package that has it.
const PROBES: [(&str, &str); 3] = [
    ("libvulkan-dev", "find_package(Vulkan REQUIRED)"),
    ("glslc", "find_package(Vulkan COMPONENTS glslc REQUIRED)"),
    (
        "spirv-headers",
        "find_package(SPIRV-Headers CONFIG REQUIRED)",
    ),
];

fn said(missing: &[&str]) -> String {
    format!(
        "missing; on Debian or Ubuntu: sudo apt-get install {}",
        missing.join(" ")
    )
}

/// Whether cmake finds it.
fn finds(find: &str) -> bool {
    let probe = || -> Result<bool> {
        let folder = tempfile::tempdir()?;
        let text = format!("cmake_minimum_required(VERSION 3.19)\nproject(probe CXX)\n{find}\n");
        fs::write(folder.path().join("CMakeLists.txt"), text)?;
        let program = std::env::var_os("CMAKE").unwrap_or_else(|| "cmake".into());
        let mut cmake = Command::new(program);
        cmake.arg("-S").arg(folder.path());
        cmake.arg("-B").arg(folder.path().join("build"));
        let quiet = cmake.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(quiet.status()?.success())
    };
    probe().unwrap_or(false)
}

/// The file that tells Vulkan's loader of lavapipe.
fn driver() -> Option<PathBuf> {
    let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"]
        .iter()
        .filter_map(std::env::var_os)
        .flat_map(|files| std::env::split_paths(&files).collect::<Vec<_>>());
    let listed = DRIVERS
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()));
    named.chain(listed).find(|path| is_lavapipe(path))
}

fn is_lavapipe(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("lvp_icd") && name.ends_with(".json"))
}

fn arguments(tests: &[String]) -> Vec<String> {
    let build = [
        "test",
        "--release",
        "--locked",
        // A program that needs Vulkan does not take the place of the usual one.
        "--target-dir",
        "target/lavapipe",
        "--features",
        "vulkan",
        "--test",
        "suite",
        "--",
    ];
    build
        .iter()
        .map(|&word| word.to_owned())
        .chain(tests.iter().cloned())
        .collect()
}

fn environment(driver: &Path) -> Vec<(String, OsString)> {
    [
        ("VK_DRIVER_FILES", driver.into()),
        // Its name for loaders before 1.3.207.
        ("VK_ICD_FILENAMES", driver.into()),
        // ggml takes no processor for a GPU unless it is told to.
        ("GGML_VK_VISIBLE_DEVICES", OsString::from("0")),
        // The suite makes sure that it runs on it (`offload`).
        ("HAE_TEST_DEVICE", OsString::from("llvmpipe")),
        // The other cores have tests of their own.
        ("LP_NUM_THREADS", OsString::from("1")),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::Path;
    use std::process::Command;
    use std::sync::Mutex;

    use super::{Part, arguments, each, environment, finds, is_lavapipe, part, said};
    use crate::{bench, root};

    #[test]
    fn the_tests_are_those_of_the_plan() {
        let tests = bench::tests_on_a_gpu(root()).unwrap();
        for test in [
            "parity::",
            "masked::",
            "lookup",
            "kv_",
            "session::",
            "offload::",
        ] {
            assert!(tests.contains(&test.to_owned()), "{test}: {tests:?}");
        }
        assert!(!tests.iter().any(|word| word.contains('{')), "{tests:?}");
        assert!(tests.iter().any(|test| test == super::LEFT_OUT));
        let tests = super::in_hours(tests);
        assert!(!tests.iter().any(|test| test == super::LEFT_OUT));
        let args = arguments(&tests);
        let at = args.iter().position(|arg| arg == "--").unwrap();
        assert_eq!(args[at + 1..], tests);
        // What is skipped, and what is asked first, is a test that is there.
        let skipped = tests.windows(2).filter(|pair| pair[0] == "--skip");
        let named = skipped.map(|pair| pair[1].as_str());
        for name in named.chain([super::IS_THERE]) {
            let (file, test) = name.split_once("::").unwrap();
            let path = root().join(format!("tests/suite/{file}.rs"));
            let text = std::fs::read_to_string(path).unwrap();
            assert!(text.contains(&format!("fn {test}")), "{name}");
        }
    }

    #[test]
    fn parts_are_all_tests_once() {
        let list = "a::b: test\na::c: test\nd: benchmark\ne: test\n\n3 tests, 1 benchmark\n";
        let of = |text: &str| part(text).unwrap().of(list);
        assert_eq!(of("1/2"), ["a::b", "e"]);
        assert_eq!(of("2/2"), ["a::c"]);
        assert_eq!(of("1/1"), ["a::b", "a::c", "e"]);
        assert_eq!(part("3/4").unwrap(), Part { k: 3, n: 4 });
        for text in ["", "1", "0/2", "3/2", "1/0", "1/x", "-1/2"] {
            assert!(part(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_test_is_run_once_and_those_that_fail_are_named() {
        let names = ["true", "false", "no such program", "true"].map(str::to_owned);
        for jobs in [1, 3, 9] {
            let ran = Mutex::new(Vec::new());
            let failed = each(&names, NonZeroUsize::new(jobs).unwrap(), |name| {
                ran.lock().unwrap().push(name.to_owned());
                Ok(Command::new(name).output()?)
            });
            let mut ran = ran.into_inner().unwrap();
            ran.sort();
            let mut all = names.to_vec();
            all.sort();
            assert_eq!(ran, all);
            let mut failed: Vec<String> = failed.into_iter().cloned().collect();
            failed.sort();
            assert_eq!(failed, ["false", "no such program"]);
        }
    }

    #[test]
    fn only_lavapipe_is_seen() {
        let driver = Path::new("/usr/share/vulkan/icd.d/lvp_icd.x86_64.json");
        assert!(is_lavapipe(driver));
        assert!(!is_lavapipe(Path::new(
            "/x/lvp_icd.d/radeon_icd.x86_64.json"
        )));
        let environment = environment(driver);
        let of = |name: &str| {
            let mut all = environment.iter().filter(|(n, _)| n == name);
            all.next().unwrap().1.to_str().unwrap()
        };
        assert_eq!(of("VK_DRIVER_FILES"), driver.to_str().unwrap());
        assert_eq!(of("VK_ICD_FILENAMES"), of("VK_DRIVER_FILES"));
        assert_eq!(of("GGML_VK_VISIBLE_DEVICES"), "0");
    }

    #[test]
    fn what_is_missing_is_one_line() {
        let line = said(&["glslc", "spirv-headers"]);
        assert!(line.ends_with("apt-get install glslc spirv-headers"));
        assert!(!finds("find_package(NoSuchThing CONFIG REQUIRED)"));
        assert!(finds("message(STATUS here)"));
    }
}
