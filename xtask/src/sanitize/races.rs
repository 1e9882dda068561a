//! What the thread sanitizer reports, without what it cannot know.
//!
//! Rust's own locks and channels are not instrumented. So what one thread hands to another looks like a race where
//! Rust's code calls `memcpy` or the allocator, which are. A report is kept where C++ touches the memory on both
//! sides, or on one, if the other is not known any more and the memory is C++'s. The sanitizer's own suppressions
//! cannot say that: they look at all callers, and Rust calls all of it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The reports in the files of a folder that are about C++ on both sides, and how many others there are.
///
/// # Errors
/// When a file cannot be read.
pub fn of(folder: &Path) -> Result<(Vec<String>, usize)> {
    let (mut kept, mut others) = (Vec::new(), 0);
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        let text = String::from_utf8_lossy(&text);
        for report in text.split("WARNING: ThreadSanitizer: ").skip(1) {
            match is_handed_over(report) {
                true => others += 1,
                false => kept.push(report.trim_end_matches(['=', '\n']).to_owned()),
            }
        }
    }
    kept.sort();
    Ok((kept, others))
}

/// Whether it is a race, and one of its two sides is Rust.
fn is_handed_over(report: &str) -> bool {
    let is_side = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("Previous ").unwrap_or(line);
        let line = line.strip_prefix("atomic ").unwrap_or(line);
        ["read of size", "write of size"].iter().any(|start| {
            let begin = line.get(..start.len());
            begin.is_some_and(|begin| begin.eq_ignore_ascii_case(start))
        })
    };
    let mut lines = report.lines();
    let is_race = lines
        .next()
        .is_some_and(|line| line.starts_with("data race"));
    let (mut rust, mut unknown, mut allocated) = (false, false, false);
    while let Some(line) = lines.next() {
        let allocation = line.trim_start().starts_with("Location is heap block");
        if !allocation && !is_side(line) {
            continue;
        }
        let frames = lines.by_ref().take_while(|line| !line.trim().is_empty());
        let mut own = frames.filter(|frame| !frame.contains("/libsanitizer/"));
        let first = own.next().unwrap_or_default();
        let is_rust = first.contains(".rs:") || first.contains(".rs ");
        match allocation {
            true => allocated = is_rust,
            false => rust |= is_rust,
        }
        unknown |= first.contains("failed to restore");
        own.for_each(drop);
    }
    is_race && (rust || unknown && allocated)
}

#[cfg(test)]
mod tests {
    use super::{is_handed_over, of};

    const INSIDE: &str = "    #0 memcpy ../../../libsanitizer/x.inc:8 (libtsan.so.2+0x5)\n";
    const CPP: &str = "    #1 take /x/llama.cpp/a.cpp:16 (hae+0x20)\n    #2 bitmap src/llama/vision.rs:52 (hae+0x16)\n";
    const RUST: &str = "    #1 next /x/png-0.18.1/src/mod.rs:62 (hae+0x15)\n";

    fn report(kind: &str, read: &str, write: &str) -> String {
        format!(
            "{kind} (pid=1)\n  Read of size 8 at 0x7f by thread T4:\n{INSIDE}{read}\n  \
             Previous atomic write of size 8 at 0x7f by thread T7:\n{INSIDE}{write}\n  \
             Thread T4 'hall' created by main thread at:\n{INSIDE}{RUST}\n\
             SUMMARY: ThreadSanitizer: {kind} a.cpp:16\n==================\n"
        )
    }

    #[test]
    fn what_rust_hands_over_is_told_by_who_touches_it() {
        assert!(!is_handed_over(&report("data race", CPP, CPP)));
        assert!(is_handed_over(&report("data race", RUST, CPP)));
        assert!(is_handed_over(&report("data race", CPP, RUST)));
        let no_line = "    #1 eq library/std/src/path.rs (hae+0x16)\n";
        assert!(is_handed_over(&report("data race", no_line, CPP)));
        // Where nobody knows, and what is no race, is kept.
        let unknown = "    [failed to restore the stack]\n";
        let half = report("data race", CPP, "").replacen(
            &format!("{INSIDE}\n"),
            &format!("{unknown}\n"),
            1,
        );
        assert!(half.contains(unknown) && !is_handed_over(&half));
        let with = |whose: &str| {
            let memory = format!(
                "  Location is heap block of size 8 at 0x7f by T7:\n{INSIDE}{whose}\n  Thread T4 'hall'"
            );
            half.replace("  Thread T4 'hall'", &memory)
        };
        assert!(!is_handed_over(&with(CPP)));
        assert!(is_handed_over(&with(RUST)));
        assert!(!is_handed_over(&report("lock-order-inversion", RUST, RUST)));
    }

    #[test]
    fn all_files_of_a_folder_are_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path()).unwrap(), (Vec::new(), 0));
        let start = "==================\nWARNING: ThreadSanitizer: ";
        let [race, other] = [(CPP, CPP), (RUST, CPP)].map(|(a, b)| report("data race", a, b));
        std::fs::write(
            dir.path().join("r.1"),
            format!("{start}{race}{start}{other}"),
        )
        .unwrap();
        std::fs::write(dir.path().join("r.2"), format!("{start}{other}")).unwrap();
        let (kept, others) = of(dir.path()).unwrap();
        assert_eq!((kept.len(), others), (1, 2));
        assert!(kept[0].starts_with("data race") && kept[0].ends_with("a.cpp:16"));
        assert!(of(&dir.path().join("none")).is_err());
    }
}
