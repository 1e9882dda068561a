//! Ctrl-C and other requests to end: what they mean depends on what the program is doing.
//!
//! While there is work that can be cut short, such as an answer, the first of them ends the work
//! and what there is of it is kept. At a chat's prompt Ctrl-C means nothing; SIGTERM and SIGHUP
//! end the chat as Ctrl-D does. At any other time, and the second time, they end the program, which
//! then leaves no temporary file behind. What was ignored when the program began (`nohup`) stays
//! ignored.

use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;
#[cfg(unix)]
use {anyhow::Context, hae::tempfiles};

/// A signal ends the program.
const BUSY: u8 = 0;
/// Ctrl-C means nothing.
const AT_PROMPT: u8 = 1;
/// A signal ends the work.
const WORKING: u8 = 2;
/// It did; the work ends as soon as the model is through with what it computes.
const CANCELLED: u8 = 3;

/// What SIGINT, which is Ctrl-C, leaves as the status: 128 and its number, as shells count.
const INTERRUPTED: u8 = 130;

static STATE: AtomicU8 = AtomicU8::new(BUSY);
/// The signal that wants the whole program to end; 0: none yet.
static ENDS: AtomicI32 = AtomicI32::new(0);

type Wake = Box<dyn Fn() + Send>;

/// Ends the waiting for a user.
static WAKE: Mutex<Option<Wake>> = Mutex::new(None);

fn wake() -> MutexGuard<'static, Option<Wake>> {
    WAKE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts to listen.
#[cfg(unix)]
pub fn install() -> Result<()> {
    use signal_hook::consts::{
        SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM,
        SIGXCPU, SIGXFSZ,
    };

    // These ask; the others end a program that does nothing about them. A file that may not
    // grow any more is an ordinary error once its signal is taken.
    let asks = [SIGINT, SIGTERM, SIGHUP];
    let others = [
        SIGQUIT, SIGALRM, SIGIO, SIGPROF, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
    ];
    let all = asks.iter().chain(&others).chain(&[SIGXFSZ]).copied();
    let ignored = ignored();
    let heard = all.filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let mut signals =
        signal_hook::iterator::Signals::new(heard).context("cannot listen for Ctrl-C")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGXFSZ => {}
                    SIGINT if !is_taken(false) => leave(signal),
                    SIGTERM | SIGHUP if ENDS.swap(signal, Ordering::SeqCst) != 0 => leave(signal),
                    SIGTERM | SIGHUP if !is_taken(true) => leave(signal),
                    SIGINT | SIGTERM | SIGHUP => {}
                    _ => {
                        tempfiles::remove_all();
                        // With the status that says which signal it was.
                        let _ = signal_hook::low_level::emulate_default_handler(signal);
                    }
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

/// Whether somebody acts on a signal; `ends`: it wants the whole program to end.
#[cfg(unix)]
fn is_taken(ends: bool) -> bool {
    let cancel = |state| (state == WORKING).then_some(CANCELLED);
    match STATE.fetch_update(Ordering::SeqCst, Ordering::SeqCst, cancel) {
        Ok(_) => true,
        Err(AT_PROMPT) => {
            if let (true, Some(wake)) = (ends, &*wake()) {
                wake();
            }
            true
        }
        // After Ctrl-C, the first that wants more than that.
        Err(CANCELLED) => ends,
        Err(_) => false,
    }
}

#[cfg(unix)]
fn leave(signal: i32) {
    tempfiles::remove_all();
    // Not `std::process::exit`: other threads may be anywhere in C.
    signal_hook::low_level::exit(128 + signal);
}

/// The signals that are ignored, a bit each, from the lowest for number 1 on.
#[cfg(unix)]
fn ignored() -> u64 {
    // Linux tells; elsewhere all of them are heard.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
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

/// Runs what waits for the user; `wake` ends the waiting when the program is to end.
pub fn at_prompt<R>(wake_up: impl Fn() + Send + 'static, f: impl FnOnce() -> R) -> R {
    *wake() = Some(Box::new(wake_up));
    let mut scope = Scope::enter(AT_PROMPT);
    if scope.0 == CANCELLED {
        // What there was to be cut short is over.
        scope.0 = WORKING;
    }
    // One that came between the last work and this.
    if let (true, Some(wake)) = (ends(), &*wake()) {
        wake();
    }
    let done = f();
    drop(scope);
    *wake() = None;
    done
}

/// Runs work that can be cut short; ask [`cancelled`] whether it should end.
pub fn working<R>(f: impl FnOnce() -> R) -> R {
    let _scope = Scope::enter(WORKING);
    f()
}

/// Whether the work should end.
pub fn cancelled() -> bool {
    STATE.load(Ordering::SeqCst) == CANCELLED || ends()
}

/// Whether the whole program should end.
pub fn ends() -> bool {
    ENDS.load(Ordering::SeqCst) != 0
}

/// The status of a program that a signal ended, as shells count.
pub fn status() -> u8 {
    match ENDS.load(Ordering::SeqCst) {
        0 => INTERRUPTED,
        signal => u8::try_from(128 + signal).unwrap_or(INTERRUPTED),
    }
}
