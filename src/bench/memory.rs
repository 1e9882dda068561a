//! The most memory that the process held while something ran. Linux alone can count anew for
//! each run (`proc_pid_clear_refs(5)`); elsewhere there is no figure rather than a wrong one.

/// Counts from here on.
#[derive(Debug)]
pub struct PeakRss {
    counting: bool,
}

impl PeakRss {
    pub fn start() -> Self {
        // 5: set the mark back to what is held now.
        let counting =
            cfg!(target_os = "linux") && std::fs::write("/proc/self/clear_refs", "5").is_ok();
        PeakRss { counting }
    }

    /// Bytes, weights that are mapped from a file and were touched included.
    pub fn bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string("/proc/self/status").ok();
        status
            .filter(|_| self.counting)
            .and_then(|text| high_water_mark(&text))
    }
}

fn high_water_mark(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_read_from_the_status() {
        let status = "VmPeak:\t  9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(high_water_mark(status), Some(2 << 20));
        assert_eq!(high_water_mark("VmRSS:\t 1 kB\n"), None);
        assert_eq!(high_water_mark("VmHWM:\t lots\n"), None);
    }

    #[test]
    fn what_was_held_and_given_back_counts_once() {
        const BYTES: usize = 256 << 20;
        let peak = PeakRss::start();
        let Some(before) = peak.bytes() else {
            assert!(cfg!(not(target_os = "linux")) || !peak.counting);
            return;
        };
        drop(std::hint::black_box(vec![1u8; BYTES]));
        let after = peak.bytes().unwrap();
        assert!(after >= before + BYTES as u64 / 2, "{before} to {after}");
        let again = PeakRss::start().bytes().unwrap();
        assert!(again < after, "{again} after {after}");
    }
}
