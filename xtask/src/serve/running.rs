//! A server to ask, as long as this lives.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub struct Running {
    child: Child,
    /// Where it listens.
    pub url: String,
}

impl Running {
    /// Starts `hae serve` at a port that is free.
    ///
    /// # Errors
    /// Where it ends at once.
    pub fn start(program: &Path, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(["serve", "--port", "0"]).args(args);
        eprintln!("$ {}", crate::python::shown(&command));
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let out = child.stdout.take().context("no stdout")?;
        let mut running = Running {
            child,
            url: String::new(),
        };
        for line in BufReader::new(out).lines() {
            if let Some(url) = line?.strip_prefix("listening at ") {
                url.clone_into(&mut running.url);
                return Ok(running);
            }
        }
        bail!("hae serve ended before it listened");
    }

    /// Whether it is still there, once what is left of its work is done.
    pub fn lives(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(200));
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
