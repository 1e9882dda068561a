//! `--poll`: how long threads stay awake when they wait for each other.
//!
//! GCC's OpenMP library reads this from the environment while it is loaded, before `main`. By itself
//! it lets threads spin for milliseconds, which on a busy machine keeps those away that they wait
//! for. So the program starts itself once more with the variable set.

use hae::llama::Poll;

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct PollArgs {
    /// How long a waiting thread stays awake. 0: not at all. 100: longest, for machines that do
    /// nothing else [default: 50, unless GOMP_SPINCOUNT or OMP_WAIT_POLICY is set]
    #[arg(long, value_name = "LEVEL", hide_short_help = true)]
    poll: Option<Poll>,
}

impl PollArgs {
    pub fn level(self) -> Poll {
        self.poll.unwrap_or_default()
    }

    /// Makes threads wait so, which may start the program anew: nothing may have happened yet.
    pub fn apply(self) {
        #[cfg(all(feature = "openmp", target_os = "linux", target_env = "gnu"))]
        libgomp::apply(self.poll);
    }
}

#[cfg(all(feature = "openmp", target_os = "linux", target_env = "gnu"))]
mod libgomp {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use hae::llama::Poll;

    /// How often a waiting thread looks before it goes to sleep.
    const SPINS: &str = "GOMP_SPINCOUNT";
    const POLICY: &str = "OMP_WAIT_POLICY";

    pub fn apply(given: Option<Poll>) {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let Some(spins) = missing(given, set(SPINS).as_deref(), set(POLICY).is_some()) else {
            return;
        };
        let Ok(program) = std::env::current_exe() else {
            return;
        };
        let mut args = std::env::args_os();
        let name = args.next().unwrap_or_else(|| OsString::from("hae"));
        // Returns only if it fails, as where the program's file is gone: then all goes on as it
        // would without the variable, only slower on a busy machine.
        let _ = Command::new(program)
            .arg0(name)
            .args(args)
            .env(SPINS, spins)
            .exec();
    }

    /// The value that the variable has to get. Who sets one of both variables is left alone, but
    /// for a flag.
    pub fn missing(given: Option<Poll>, spins: Option<&OsStr>, policy: bool) -> Option<String> {
        if given.is_none() && (spins.is_some() || policy) {
            return None;
        }
        let wanted = given.unwrap_or_default().spins().to_string();
        (spins != Some(OsStr::new(&wanted))).then_some(wanted)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_variable_is_set_once_and_never_over_the_users_own() {
            let level = |text: &str| Some(text.parse().unwrap());
            let default = Poll::DEFAULT.spins().to_string();
            assert_eq!(missing(None, None, false), Some(default.clone()));
            assert_eq!(missing(None, Some(OsStr::new(&default)), false), None);
            assert_eq!(missing(None, Some(OsStr::new("7")), false), None);
            assert_eq!(missing(None, None, true), None);
            assert_eq!(
                missing(level("0"), Some(OsStr::new("7")), true),
                Some("0".into())
            );
            assert_eq!(missing(level("0"), Some(OsStr::new("0")), true), None);
        }
    }
}
