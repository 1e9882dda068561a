//! `hae rpc-worker`: this machine's devices for the models of other machines.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;

use anyhow::Result;

use super::options::{default_threads, names};
use super::polling::PollArgs;
use super::{Done, show_log, warn};
use hae::Error;
use hae::llama::{WorkerOptions, serve_worker};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Another machine gives this one's address to --rpc. One client is served at a time. Who can reach the \
                  port can read and write the memory of this process: give an address of a network that you trust."
)]
pub struct Args {
    /// Address to listen at
    #[arg(short = 'H', long, default_value_t = Ipv4Addr::LOCALHOST, value_name = "IP")]
    host: Ipv4Addr,
    /// Port to listen at
    #[arg(short, long, default_value_t = 50052, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    port: u16,
    /// Threads of the processor [default: physical cores]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=512), value_name = "N")]
    threads: Option<u16>,
    /// Devices to offer, list [default: all GPUs, or the processor where there is none]
    #[arg(short, long, value_name = "NAMES")]
    device: Option<String>,
    /// Keep large tensors in a file cache, so that a model is sent once
    ///
    /// In rpc/ below LLAMA_CACHE, or where llama.cpp keeps them without it.
    #[arg(short, long)]
    cache: bool,
    #[command(flatten)]
    pub poll: PollArgs,
    /// Show ggml's log on stderr
    #[arg(short, long)]
    verbose: bool,
}

/// Returns only if it fails: a signal ends it, as it ends ggml's.
pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        show_log();
    }
    let n_threads = match args.threads {
        Some(n) => usize::from(n),
        None => usize::try_from(default_threads()).unwrap_or(1),
    };
    let options = WorkerOptions {
        address: SocketAddrV4::new(args.host, args.port),
        n_threads,
        devices: match args.device.as_deref().map(names).transpose()? {
            Some(names) if names.is_empty() => {
                let reason = "none, expected the name of one";
                return Err(Error::option("device", reason).into());
            }
            names => names.unwrap_or_default(),
        },
        cache: args.cache.then(cache).transpose()?,
    };
    if !args.host.is_loopback() {
        warn(&format!(
            "{} can be reached from other machines: whoever can may read and write this process, and nothing is \
             encrypted. For networks that you trust",
            options.address
        ));
    }
    serve_worker(&options)?;
    Ok(Done::Whole)
}

/// As llama.cpp's `fs_get_cache_directory`, and its rpc-server's folder in that.
fn cache() -> hae::Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let home = || set("HOME").map(PathBuf::from);
    let base = match set("LLAMA_CACHE") {
        Some(folder) => Some(PathBuf::from(folder)),
        None if cfg!(target_os = "macos") => {
            home().map(|home| home.join("Library/Caches/llama.cpp"))
        }
        None => {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            cache
                .or_else(|| home().map(|home| home.join(".cache")))
                .map(|cache| cache.join("llama.cpp"))
        }
    };
    let reason = "no folder for it: set LLAMA_CACHE or HOME";
    Ok(base
        .ok_or_else(|| Error::option("cache", reason))?
        .join("rpc"))
}
