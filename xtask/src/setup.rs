//! The build tools that llama.cpp and its bindings need besides Rust: cmake, make, a C++17
//! compiler, and libclang for bindgen.

use std::env;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::libclang;
use crate::process::output;

struct Tool {
    what: &'static str,
    apt: &'static [&'static str],
    /// Empty where Apple's command line tools are the way.
    brew: &'static [&'static str],
    /// What it is called elsewhere.
    otherwise: &'static str,
    found: fn() -> bool,
}

const TOOLS: [Tool; 4] = [
    Tool {
        what: "cmake 3.14 or newer",
        apt: &["cmake"],
        brew: &["cmake"],
        otherwise: "cmake (Fedora, Arch, Windows: the package cmake)",
        found: cmake,
    },
    Tool {
        what: "make or ninja",
        apt: &["make"],
        brew: &[],
        otherwise: "make (Fedora, Arch: the package make; macOS: xcode-select --install)",
        found: || cfg!(windows) || runs("make", "--version") || runs("ninja", "--version"),
    },
    Tool {
        what: "a C++17 compiler",
        apt: &["g++"],
        brew: &[],
        otherwise: "a C++17 compiler (Fedora: gcc-c++; Arch: gcc; macOS: xcode-select --install; \
                    Windows: the C++ build tools of Visual Studio)",
        found: || cfg!(windows) || compiler(),
    },
    Tool {
        what: "libclang",
        apt: &["libclang-dev"],
        brew: &["llvm"],
        otherwise: "libclang (Fedora: clang-devel; Arch: clang; Windows: LLVM), \
                    or set LIBCLANG_PATH to the folder that holds it",
        found: || libclang::find().is_some(),
    },
];

/// Checks for every tool and installs what is missing where a package manager may be used.
///
/// # Errors
/// When a tool is missing and could not be installed; the message says what to install.
pub fn run() -> Result<()> {
    let missing: Vec<&Tool> = TOOLS.iter().filter(|t| !(t.found)()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for tool in &missing {
        eprintln!("missing: {}", tool.what);
    }
    for command in plan(&missing, &System::here())? {
        run_command(&command)?;
    }
    let still: Vec<&Tool> = missing.into_iter().filter(|t| !(t.found)()).collect();
    if still.is_empty() {
        return Ok(());
    }
    bail!("still missing after the installation: {}", by_hand(&still))
}

/// What this system lets us do.
struct System {
    /// The words before `apt-get`: nothing for root, `sudo -n` where no password is asked.
    apt: Option<Vec<&'static str>>,
    brew: bool,
}

impl System {
    fn here() -> Self {
        let apt = if !cfg!(target_os = "linux") || !runs("apt-get", "--version") {
            None
        } else if is_root() {
            Some(vec![])
        } else if succeeds(Command::new("sudo").args(["-n", "true"])) {
            Some(vec!["sudo", "-n"])
        } else {
            None
        };
        System {
            apt,
            brew: cfg!(target_os = "macos") && runs("brew", "--version"),
        }
    }
}

/// The commands that install the tools.
///
/// # Errors
/// When there is no way to install all of them; says which, and what they are called.
fn plan(missing: &[&Tool], system: &System) -> Result<Vec<Vec<&'static str>>> {
    if let Some(sudo) = &system.apt {
        let with = |args: &[&'static str]| {
            [
                &sudo[..],
                &["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"],
                args,
            ]
            .concat()
        };
        let mut install = with(&["install", "--yes", "--no-install-recommends"]);
        install.extend(missing.iter().flat_map(|t| t.apt));
        return Ok(vec![with(&["update"]), install]);
    }
    let by_brew = system.brew && missing.iter().all(|t| !t.brew.is_empty());
    if by_brew {
        let mut install = vec!["brew", "install"];
        install.extend(missing.iter().flat_map(|t| t.brew));
        return Ok(vec![install]);
    }
    bail!(
        "install these and run the command again: {}",
        by_hand(missing)
    )
}

fn by_hand(tools: &[&Tool]) -> String {
    let packages: Vec<&str> = tools.iter().flat_map(|t| t.apt).copied().collect();
    let others: Vec<&str> = tools.iter().map(|t| t.otherwise).collect();
    format!(
        "{}. On Debian or Ubuntu: sudo apt-get install {}",
        others.join("; "),
        packages.join(" ")
    )
}

fn run_command(words: &[&str]) -> Result<()> {
    eprintln!("$ {}", words.join(" "));
    let status = Command::new(words[0])
        .args(&words[1..])
        .status()
        .with_context(|| format!("cannot run {}", words[0]))?;
    if !status.success() {
        bail!("{} failed: {status}", words.join(" "));
    }
    Ok(())
}

fn runs(program: &str, arg: &str) -> bool {
    succeeds(Command::new(program).arg(arg))
}

fn succeeds(command: &mut Command) -> bool {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    quiet.status().is_ok_and(|s| s.success())
}

fn is_root() -> bool {
    output("id", &["-u"]).is_some_and(|id| id.trim() == "0")
}

fn cmake() -> bool {
    let program = env::var("CMAKE").unwrap_or_else(|_| "cmake".into());
    output(&program, &["--version"]).is_some_and(|text| cmake_version(&text) >= Some((3, 14)))
}

fn cmake_version(text: &str) -> Option<(u32, u32)> {
    let version = text.lines().next()?.strip_prefix("cmake version ")?;
    let mut numbers = version.split(['.', '-']).map_while(|n| n.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// Whether one of the usual compilers builds a file that needs C++17 and its library.
fn compiler() -> bool {
    const PROBE: &str = "#include <optional>\n#include <filesystem>\n\
        int main() { std::optional<int> v{0}; if constexpr (true) { return *v; } }\n";
    let Ok(dir) = tempfile::tempdir() else {
        return false;
    };
    let source = dir.path().join("probe.cpp");
    if fs::write(&source, PROBE).is_err() {
        return false;
    }
    let chosen = env::var("CXX").ok().filter(|c| !c.is_empty());
    let usual = ["c++", "g++", "clang++"].map(String::from);
    let candidates = chosen.map_or_else(|| usual.to_vec(), |c| vec![c]);
    candidates.iter().any(|compiler| {
        // CXX may carry a wrapper or flags: `ccache g++`.
        let mut words = compiler.split_whitespace();
        words.next().is_some_and(|program| {
            let object = dir.path().join("probe.o");
            succeeds(
                Command::new(program)
                    .args(words)
                    .args(["-std=c++17", "-c"])
                    .arg(&source)
                    .arg("-o")
                    .arg(object),
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<&'static Tool> {
        TOOLS.iter().collect()
    }

    #[test]
    fn root_and_passwordless_sudo_install_with_apt() {
        let root = plan(
            &all(),
            &System {
                apt: Some(vec![]),
                brew: false,
            },
        )
        .unwrap();
        assert_eq!(
            root[0].join(" "),
            "env DEBIAN_FRONTEND=noninteractive apt-get update"
        );
        assert!(
            root[1]
                .join(" ")
                .ends_with("--no-install-recommends cmake make g++ libclang-dev")
        );
        let sudo = plan(
            &all()[..1],
            &System {
                apt: Some(vec!["sudo", "-n"]),
                brew: false,
            },
        )
        .unwrap();
        assert!(sudo.iter().all(|c| c[..2] == ["sudo", "-n"]));
    }

    #[test]
    fn homebrew_installs_what_it_has() {
        let system = System {
            apt: None,
            brew: true,
        };
        let both = plan(&[&TOOLS[0], &TOOLS[3]], &system).unwrap();
        assert_eq!(both, [["brew", "install", "cmake", "llvm"]]);
        let error = plan(&all(), &system).unwrap_err().to_string();
        assert!(error.contains("xcode-select --install"), "{error}");
    }

    #[test]
    fn elsewhere_the_message_says_what_to_install() {
        let error = plan(
            &all(),
            &System {
                apt: None,
                brew: false,
            },
        )
        .unwrap_err()
        .to_string();
        for word in [
            "cmake",
            "C++17",
            "libclang",
            "LIBCLANG_PATH",
            "apt-get install cmake make g++ libclang-dev",
        ] {
            assert!(error.contains(word), "{error}");
        }
        assert!(!error.contains('\n'));
    }

    #[test]
    fn versions_of_cmake() {
        assert_eq!(
            cmake_version("cmake version 3.28.3\n\nCMake suite"),
            Some((3, 28))
        );
        assert_eq!(cmake_version("cmake version 4.0-rc1\n"), Some((4, 0)));
        assert!(cmake_version("cmake version 3.9.1") < Some((3, 14)));
        assert_eq!(cmake_version("something else"), None);
    }
}
