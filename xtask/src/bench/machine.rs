//! The machine that measures, as results and pages name it.

use std::fs;

use serde::{Deserialize, Serialize};
use sysinfo::System;

use crate::process::output;

/// Everything that a figure depends on. Of two results with the same machine either could take the
/// other's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// Physical ones.
    pub cores: usize,
    /// Those of [`FEATURES`] that the processor has.
    pub features: Vec<String>,
    /// Main memory, rounded to whole GiB.
    pub memory_gib: u64,
    /// Name, driver and memory of each NVIDIA GPU; empty without one.
    pub gpus: Vec<String>,
}

/// Instruction sets that llama.cpp has kernels for, the widest last.
const FEATURES: [&str; 8] = [
    "neon",
    "sve",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
];

impl Machine {
    pub fn here() -> Machine {
        let mut system = System::new();
        system.refresh_memory();
        system.refresh_cpu_all();
        let brand = system.cpus().first().map_or("", |cpu| cpu.brand());
        let query = [
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ];
        let gpus = output("nvidia-smi", &query).unwrap_or_default();
        Machine {
            cpu: brand.trim().to_owned(),
            cores: System::physical_core_count().unwrap_or(system.cpus().len()),
            features: features(&flags()),
            memory_gib: (system.total_memory() as f64 / f64::from(1 << 30)).round() as u64,
            gpus: gpus.lines().map(|line| line.trim().to_owned()).collect(),
        }
    }

    /// The name of its page: letters, digits and dashes. `gpu`: after the GPU, where it has one.
    pub fn slug(&self, gpu: bool) -> String {
        let name = match self.gpus.first().filter(|_| gpu) {
            Some(first) => {
                let name = first.split(',').next().unwrap_or_default();
                match self.gpus.len() {
                    1 => name.to_owned(),
                    n => format!("{name} x{n}"),
                }
            }
            None => {
                let widest = self
                    .widest()
                    .map_or(String::new(), |word| format!(" {word}"));
                let lacks = if gpu { " without gpu" } else { "" };
                format!("{}{widest} {} cores{lacks}", self.cpu, self.cores)
            }
        };
        let name = name.to_lowercase();
        let words = name
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join("-")
    }

    fn widest(&self) -> Option<&'static str> {
        let has = |word: &str| self.features.iter().any(|f| f == word);
        let names = [
            ("amx_tile", "amx"),
            ("avx512f", "avx512"),
            ("avx2", "avx2"),
            ("sve", "sve"),
        ];
        names
            .iter()
            .find(|(flag, _)| has(flag))
            .map(|&(_, name)| name)
    }

    /// In words, for the line below a table.
    pub fn words(&self) -> String {
        let gpus = self.gpus.iter().map(|gpu| format!("{gpu}; "));
        let gpus: String = gpus.collect();
        let features = match self.features.is_empty() {
            true => String::new(),
            false => format!(" ({})", self.features.join(", ")),
        };
        format!(
            "{gpus}{}{features}, {} cores, {} GiB",
            self.cpu, self.cores, self.memory_gib
        )
    }
}

/// The processor's flags as Linux lists them; elsewhere none, but for what every processor has.
fn flags() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut lines = info.lines();
    let line = lines.find(|line| line.starts_with("flags") || line.starts_with("Features"));
    match line.and_then(|line| line.split_once(':')) {
        Some((_, flags)) => flags.to_owned(),
        None if cfg!(target_arch = "aarch64") => "neon".to_owned(),
        None => String::new(),
    }
}

fn features(flags: &str) -> Vec<String> {
    let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    // On Linux NEON goes by another name.
    let here = FEATURES
        .iter()
        .filter(|&&name| has(name) || name == "neon" && has("asimd"));
    here.map(|&name| name.to_owned()).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn machine() -> Machine {
        Machine {
            cpu: "AMD EPYC".into(),
            cores: 2,
            features: features("fpu avx avx2 avx512f avx512_fp16"),
            memory_gib: 23,
            gpus: Vec::new(),
        }
    }

    #[test]
    fn a_page_is_named_after_what_sets_a_machine_apart() {
        let mut machine = machine();
        assert_eq!(machine.features, ["avx2", "avx512f", "avx512_fp16"]);
        assert_eq!(machine.slug(false), "amd-epyc-avx512-2-cores");
        assert_eq!(machine.slug(true), "amd-epyc-avx512-2-cores-without-gpu");
        machine.features = features("avx2 amx_tile avx512f");
        assert_eq!(machine.slug(false), "amd-epyc-amx-2-cores");
        machine.gpus = vec!["NVIDIA H200, 570.1, 143771 MiB".into(); 2];
        assert_eq!(machine.slug(true), "nvidia-h200-x2");
        assert_eq!(machine.slug(false), "amd-epyc-amx-2-cores");
        assert_eq!(features("fp asimd sve"), ["neon", "sve"]);
    }
}
