//! A server of our own: started on a free port, ended with us.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// It has this long to end once it is asked to.
const ENDS: Duration = Duration::from_secs(60);
/// What SIGTERM leaves as the status.
const TERMINATED: i32 = 143;

/// A running server. Dropping it kills it.
pub struct Server {
    child: Child,
    /// `host:port`.
    pub address: String,
}

impl Server {
    /// Starts one and waits until it listens. Its own words go to our stderr.
    ///
    /// # Errors
    /// When it cannot be started, or ends before it listens.
    pub fn start(program: &Path, flags: &[String]) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["serve", "--port", "0", "--metrics"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let stdout = child.stdout.take().context("stdout")?;
        let mut server = Server {
            child,
            address: String::new(),
        };
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        match line.trim().strip_prefix("listening at http://") {
            Some(address) => server.address = address.to_owned(),
            None => bail!("the server did not start: {}", flags.join(" ")),
        }
        Ok(server)
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// Where the system does not tell, or the server is gone.
    pub fn resident(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| path.clone())?;
        resident(&status).with_context(|| format!("{path} says nothing of memory"))
    }

    /// Ends it as a user would.
    ///
    /// # Errors
    /// When it does not end in time, or not as it should.
    pub fn end(mut self) -> Result<()> {
        let id = self.child.id().to_string();
        let asked = Command::new("kill").args(["-s", "TERM", &id]).status()?;
        ensure!(asked.success(), "the server is gone");
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if start.elapsed() > ENDS => bail!("the server does not end"),
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        ensure!(
            status.code() == Some(TERMINATED),
            "the server ended with {status}"
        );
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::resident;

    #[test]
    fn memory_is_read_from_the_line_of_the_resident_set() {
        let status = "VmHWM:\t  900 kB\nVmRSS:\t    12 kB\nRssAnon:\t 3 kB\n";
        assert_eq!(resident(status), Some(12 << 10));
        assert_eq!(resident("VmHWM:\t 900 kB\n"), None);
    }
}
