//! Energy of the processor packages, where Linux tells it (powercap, Intel and AMD).

use std::fs;
use std::path::{Path, PathBuf};

/// Reads the counters of all packages from here on.
#[derive(Debug)]
pub struct Energy {
    packages: Vec<Package>,
}

#[derive(Debug)]
struct Package {
    /// Microjoules since some time.
    counter: PathBuf,
    start: u64,
    /// Where the counter begins again.
    range: u64,
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl Energy {
    pub fn start() -> Self {
        Energy::of(Path::new("/sys/class/powercap"))
    }

    fn of(folder: &Path) -> Self {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        // `intel-rapl:0` is a package, `intel-rapl:0:1` a part of it. AMD's have the same name.
        let is_package = |name: &str| {
            let number = name.strip_prefix("intel-rapl:");
            number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        let packages = entries
            .filter(|entry| entry.file_name().to_str().is_some_and(is_package))
            .filter_map(|entry| {
                let counter = entry.path().join("energy_uj");
                Some(Package {
                    start: number(&counter)?,
                    range: number(&entry.path().join("max_energy_range_uj"))?,
                    counter,
                })
            });
        Energy {
            packages: packages.collect(),
        }
    }

    /// Joules since the start; `None` where nothing tells. A counter may have begun again once.
    pub fn joules(&self) -> Option<f64> {
        if self.packages.is_empty() {
            return None;
        }
        let spent = self.packages.iter().map(|package| {
            let now = number(&package.counter)?;
            Some(match now.checked_sub(package.start) {
                Some(spent) => spent,
                None => package.range.checked_sub(package.start)?.checked_add(now)?,
            })
        });
        let spent: Option<Vec<u64>> = spent.collect();
        Some(spent?.iter().map(|&uj| uj as f64 / 1e6).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_added_and_counters_may_begin_again() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name: &str, uj: u64| {
            let folder = dir.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("energy_uj"), format!("{uj}\n")).unwrap();
            fs::write(folder.join("max_energy_range_uj"), "10000000\n").unwrap();
        };
        assert_eq!(Energy::of(dir.path()).joules(), None);
        set("intel-rapl:0", 1_000_000);
        set("intel-rapl:1", 9_000_000);
        // A part of the first package, and another kind of counter.
        set("intel-rapl:0:0", 5);
        set("dtpm", 5);
        let energy = Energy::of(dir.path());
        set("intel-rapl:0", 3_500_000);
        set("intel-rapl:1", 500_000);
        set("intel-rapl:0:0", 9_000_000);
        assert_eq!(energy.joules(), Some(2.5 + 1.5));
    }
}
