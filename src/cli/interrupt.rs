//! Ctrl-C and other requests to end: what they mean depends on what the program is doing.
//!
//! While an answer is written, the first Ctrl-C ends the answer. At a chat's prompt it means
//! nothing. At any other time, and the second time, it ends the program, which then leaves no
//! temporary file behind.

use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};

use hae::tempfiles;

/// Ctrl-C ends the program.
const BUSY: u8 = 0;
/// Ctrl-C means nothing.
const AT_PROMPT: u8 = 1;
/// Ctrl-C ends the answer.
const ANSWERING: u8 = 2;
/// It did; the answer ends as soon as the model is through with what it computes.
const CANCELLED: u8 = 3;

static STATE: AtomicU8 = AtomicU8::new(BUSY);

/// Starts to listen.
#[cfg(unix)]
pub fn install() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
        .context("cannot listen for Ctrl-C")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                let state = STATE.load(Ordering::SeqCst);
                if signal == SIGINT && state == AT_PROMPT {
                    continue;
                }
                let cancel = signal == SIGINT
                    && STATE
                        .compare_exchange(ANSWERING, CANCELLED, Ordering::SeqCst, Ordering::SeqCst)
                        .is_ok();
                if !cancel {
                    tempfiles::remove_all();
                    // Not `std::process::exit`: other threads may be anywhere in C.
                    signal_hook::low_level::exit(128 + signal);
                }
            }
        })
        .context("cannot listen for Ctrl-C")?;
    Ok(())
}

/// Elsewhere Ctrl-C ends the program, as the system does it.
#[cfg(not(unix))]
pub fn install() -> Result<()> {
    Ok(())
}

/// Puts the state back when its scope ends.
struct Scope(u8);

impl Scope {
    fn enter(state: u8) -> Self {
        Scope(STATE.swap(state, Ordering::SeqCst))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        STATE.store(self.0, Ordering::SeqCst);
    }
}

/// Runs what waits for the user.
pub fn at_prompt<R>(f: impl FnOnce() -> R) -> R {
    let _scope = Scope::enter(AT_PROMPT);
    f()
}

/// Runs what writes an answer; ask [`cancelled`] whether it should end.
pub fn answering<R>(f: impl FnOnce() -> R) -> R {
    let _scope = Scope::enter(ANSWERING);
    f()
}

/// Whether the user wants the answer to end.
pub fn cancelled() -> bool {
    STATE.load(Ordering::SeqCst) == CANCELLED
}
