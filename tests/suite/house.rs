//! The rules of the house, checked: who may name what, who may print, how patches look.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use regex::Regex;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust sources below a folder, with `/` in their names, without their comments.
pub(crate) fn sources(folder: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path
                    .strip_prefix(root())
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .replace('\\', "/");
                out.push((name, without_comments(&fs::read_to_string(&path).unwrap())));
            }
        }
    }
    assert!(!out.is_empty());
    out.sort();
    out
}

/// Drops line comments. A `//` in a string goes too, which here can only hide an address.
fn without_comments(text: &str) -> String {
    text.lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Whether `word` stands in `text` as a name of its own.
fn names(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        // Behind `::` anything may stand.
        !before.is_some_and(part) && (word.ends_with(':') || !after.is_some_and(part))
    })
}

#[test]
fn only_the_llama_module_names_llama_cpp_or_unsafe() {
    // As a path or an import: a field may be called like a crate.
    let crates = ["llama_cpp_2", "llama_cpp_sys_2"]
        .map(|c| [format!("{c}::"), format!("use {c}"), format!("crate {c}")]);
    let words = crates.as_flattened().iter().map(String::as_str);
    let words: Vec<&str> = words.chain(["unsafe"]).collect();
    // llama.cpp driven by hand is an oracle of some tests, one of them makes it abort, one asks the C library what is
    // allocated, and one asks a worker what an operation takes.
    let oracles = [
        "fixture.rs",
        "convert_metadata.rs",
        "stock.rs",
        "damaged.rs",
        "failed.rs",
        "flash.rs",
        "kv_streams.rs",
        "kv_twin.rs",
        "midway_calls.rs",
        "refused.rs",
        "rpc/sizes.rs",
        "soak.rs",
        "taps_limits.rs",
        "taps_oracle.rs",
    ];
    for (name, text) in sources("src").iter().chain(&sources("tests")) {
        let by_nature = ["src/llama/", "tests/dry-metal/"];
        if by_nature.iter().any(|at| name.starts_with(at)) || name == "tests/suite/house.rs" {
            continue;
        }
        let oracle = oracles.iter().any(|o| name == &format!("tests/suite/{o}"));
        for word in words.iter().filter(|_| !oracle) {
            assert!(!names(text, word), "{name} names {word}");
        }
    }
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    assert_eq!(
        lib.matches("#![deny(unsafe_code)]").count(),
        1,
        "src/lib.rs has to deny it"
    );
}

#[test]
fn only_the_command_line_prints() {
    let words = [
        "print!",
        "println!",
        "eprint!",
        "eprintln!",
        "dbg!",
        "stdout()",
        "stderr()",
    ];
    for (name, text) in sources("src") {
        if name == "src/main.rs" || name == "src/cli.rs" || name.starts_with("src/cli/") {
            continue;
        }
        for word in words {
            let word_alone = word.trim_end_matches(['!', '(', ')']);
            let found = text.contains(word) && names(&text, word_alone);
            assert!(
                !found,
                "{name} uses {word}: return the text, or take a callback"
            );
        }
    }
}

/// The library names options by their keys; who spells them as flags is the command line
/// (`src/cli/spell.rs`).
#[test]
fn the_library_names_no_flags() {
    let flag = Regex::new(
        r#""(?:[^"\\\n]|\\.)*(?:^|[ "(`])(?:--[a-z]|-(?:ctk|ctv|ub|fa|sys|[cbnmpt])\b)"#,
    )
    .unwrap();
    // A setting's name is the flags that make it; a page's style sheet has variables.
    let others = ["src/main.rs", "src/calibrate/mod.rs"];
    for (name, text) in sources("src") {
        let of_others = ["src/cli/", "src/report/"]
            .iter()
            .any(|at| name.starts_with(at));
        if !of_others && !others.contains(&&*name) {
            let found = flag.find(&text).map(|found| found.as_str());
            assert_eq!(found, None, "{name}");
        }
    }
}

/// So that the whole controller can be tested against a scripted engine.
#[test]
fn the_controller_knows_nothing_of_llama_or_the_command_line() {
    let modelless = [
        "cache",
        "policy",
        "engine",
        "controller",
        "generate",
        "image",
        "replay",
        "report",
        "trace",
        "eval",
        "calibrate",
    ];
    let sources = sources("src");
    let below = |name: &str, module: &str| {
        name.strip_prefix("src/")
            .and_then(|n| n.strip_prefix(module))
            .is_some_and(|rest| rest.starts_with(['/', '.']))
    };
    for (name, text) in sources
        .iter()
        .filter(|(n, _)| modelless.iter().any(|m| below(n, m)))
    {
        for module in ["llama", "cli", "conversation"] {
            assert!(
                !names(text, &format!("crate::{module}")),
                "{name} names crate::{module}"
            );
        }
    }
}

#[test]
fn nothing_is_left_unfinished() {
    for (name, text) in sources("src").iter().chain(&sources("tests")) {
        if name == "tests/suite/house.rs" {
            continue;
        }
        for word in ["todo!", "unimplemented!", "#[ignore"] {
            assert!(!text.contains(word), "{name} has {word}");
        }
    }
}

/// The files that Git tracks, or `None` where there is no Git repository (a source package).
fn tracked() -> Option<Vec<PathBuf>> {
    if !root().join(".git").exists() {
        return None;
    }
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success());
    let names = String::from_utf8(output.stdout).unwrap();
    Some(names.split_terminator('\0').map(PathBuf::from).collect())
}

#[test]
fn no_file_names_a_path_of_somebodys_machine() {
    // In pieces, so that this file does not find itself.
    let home = [
        concat!("/ho", "me/"),
        concat!("/Us", "ers/"),
        concat!("/ro", "ot/"),
    ];
    let work = concat!("/wo", "rk/");
    let shared = concat!("../sh", "ared");
    let Some(files) = tracked() else { return };
    for file in files
        .iter()
        .filter(|f| *f != Path::new("tests/suite/house.rs"))
    {
        let Ok(bytes) = fs::read(root().join(file)) else {
            continue;
        };
        let text = String::from_utf8_lossy(&bytes);
        for path in home.iter().chain([&work, &shared]) {
            let found = text.match_indices(path).any(|(at, _)| {
                // "network/" and "~/home/" are no absolute paths.
                !text[..at].ends_with(|c: char| c.is_alphanumeric() || "~$}._-".contains(c))
            });
            assert!(!found, "{} names {path}", file.display());
        }
    }
}

/// A document without its blocks of code.
fn prose(text: &str) -> String {
    let mut code = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The anchors that GitHub gives the headings of a document.
fn anchors(text: &str) -> Vec<String> {
    let headings = prose(text)
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim().to_lowercase())
        .collect::<Vec<_>>();
    let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
    let slug = |heading: &String| heading.chars().filter(kept).collect::<String>();
    let slugs = headings.iter().map(slug);
    slugs.map(|slug| slug.replace(' ', "-")).collect()
}

#[test]
fn links_between_documents_lead_somewhere() {
    let Some(files) = tracked() else { return };
    let documents = files
        .iter()
        .filter(|f| f.extension().is_some_and(|e| e == "md"));
    let mut followed = 0;
    for document in documents {
        let path = root().join(document);
        let text = fs::read_to_string(&path).unwrap();
        let body = prose(&text);
        for link in body.split("](").skip(1) {
            let target = link.split(')').next().unwrap();
            if target.contains("://") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let broken = format!("{}: {target} leads nowhere", document.display());
            assert!(file.exists(), "{broken}");
            followed += 1;
            if !anchor.is_empty() {
                let there = anchors(&fs::read_to_string(&file).unwrap());
                assert!(there.iter().any(|a| a == anchor), "{broken}: {there:?}");
            }
        }
    }
    assert!(followed > 50, "{followed}");
}

#[test]
fn every_page_is_a_link_away_from_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for page in fs::read_dir(root().join("docs")).unwrap().flatten() {
        let name = page.file_name().into_string().unwrap();
        assert!(readme.contains(&format!("(docs/{name}")), "docs/{name}");
    }
    let lines = readme.lines().count();
    assert!(lines <= 80, "{lines} lines of README.md");
    assert!(readme.contains("\ncargo xtask test "));
}

#[test]
fn patches_are_numbered_and_say_why() {
    let table = fs::read_to_string(root().join("patches/README.md")).unwrap();
    let mut numbers: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for folder in fs::read_dir(root().join("patches")).unwrap().flatten() {
        if !folder.path().is_dir() {
            continue;
        }
        let krate = folder.file_name().into_string().unwrap();
        for patch in fs::read_dir(folder.path()).unwrap().flatten() {
            let file = patch.file_name().into_string().unwrap();
            let name = format!("{krate}/{file}");
            let (number, title) = file
                .split_once('-')
                .unwrap_or_else(|| panic!("{name}: expected NNNN-title.patch"));
            assert!(
                number.len() == 4 && title.ends_with(".patch"),
                "{name}: expected NNNN-title.patch"
            );
            numbers
                .entry(krate.clone())
                .or_default()
                .push(number.parse().unwrap());

            let text = fs::read_to_string(patch.path()).unwrap();
            let header = &text[..text
                .find("\n--- ")
                .unwrap_or_else(|| panic!("{name}: no header"))];
            let mut lines = header.lines();
            let title = lines.next().unwrap_or_default();
            assert!(
                !title.trim().is_empty() && title.len() <= 80,
                "{name}: expected a title"
            );
            assert_eq!(
                lines.next(),
                Some(""),
                "{name}: expected a blank line under the title"
            );
            let why = lines
                .clone()
                .take_while(|l| !l.starts_with("Upstream status:"));
            assert!(
                why.map(str::len).sum::<usize>() > 40,
                "{name}: expected to read why"
            );
            assert!(
                lines.any(|l| l.starts_with("Upstream status: ")),
                "{name}: no upstream status"
            );

            let listed = format!("`{krate}/{}`", file.trim_end_matches(".patch"));
            assert!(
                table.contains(&listed),
                "{listed} is missing in patches/README.md"
            );
        }
    }
    for (krate, mut numbers) in numbers {
        numbers.sort_unstable();
        assert!(
            numbers.iter().copied().eq(1..=numbers.len()),
            "{krate}: {numbers:?} has gaps"
        );
    }
}

#[test]
fn the_checks_see_what_they_look_for() {
    assert!(names("let x = unsafe { 1 };", "unsafe"));
    assert!(!names("#![deny(unsafe_code)]", "unsafe"));
    assert!(!names("my_llama_cpp_2::x", "llama_cpp_2::"));
    assert!(names("x(llama_cpp_2::y)", "llama_cpp_2::"));
    assert_eq!(without_comments("a // unsafe\nb"), "a \nb");
    let document = "# A `b`, c: d-e\n```\n# no\n```\n## F";
    assert_eq!(anchors(document), ["a-b-c-d-e", "f"]);
}
