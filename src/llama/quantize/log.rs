//! What llama.cpp says while it quantizes. Its function returns only 0 or 1: the reason of a
//! failure and the tensor at work stand in the log alone, and would otherwise fill the screen.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use llama_cpp_sys_2 as sys;

use super::Progress;

/// What a captured call returned, and the last error it logged.
pub struct Captured<T> {
    pub result: T,
    pub last_error: Option<String>,
}

// The log callback is one for the process, so what it fills is, too. At most one capture at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static STATE: Mutex<Option<State>> = Mutex::new(None);

struct State {
    progress: Arc<Progress>,
    last_error: Option<String>,
}

/// Runs `call` with the log going here, and puts the earlier log back. `progress.done` follows the
/// lines that begin with a tensor's number.
pub fn capture<T>(progress: &Arc<Progress>, call: impl FnOnce() -> T) -> Captured<T> {
    let _one = lock(&ONE_AT_A_TIME);
    *lock(&STATE) = Some(State {
        progress: Arc::clone(progress),
        last_error: None,
    });
    let restore = Restore::install();
    let result = call();
    drop(restore);
    Captured {
        result,
        last_error: lock(&STATE).take().and_then(|state| state.last_error),
    }
}

/// The log callback that was there before, put back on drop.
struct Restore {
    callback: sys::ggml_log_callback,
    data: *mut c_void,
}

impl Restore {
    fn install() -> Self {
        let mut before = Self {
            callback: None,
            data: std::ptr::null_mut(),
        };
        // SAFETY: both pointers are to live variables of the types asked for. `receive` uses only
        // statics, so it may be called at any time and from any thread.
        unsafe {
            sys::llama_log_get(&mut before.callback, &mut before.data);
            sys::llama_log_set(Some(receive), std::ptr::null_mut());
        }
        before
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: what llama_log_get returned, whose owner keeps it valid as before.
        unsafe { sys::llama_log_set(self.callback, self.data) };
    }
}

/// # Safety
/// `text` is a C string, as ggml promises to log callbacks.
unsafe extern "C" fn receive(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: the caller's promise. Nothing below panics: no indexing, no unwrap.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let line = text.trim();
    let mut state = lock(&STATE);
    let Some(state) = state.as_mut() else { return };
    if level == sys::GGML_LOG_LEVEL_ERROR && !line.is_empty() {
        state.last_error = Some(line.split_whitespace().collect::<Vec<_>>().join(" "));
    } else if let Some((number, _)) = line.strip_prefix('[').and_then(|rest| rest.split_once('/'))
        && let Ok(number) = number.trim().parse::<u32>()
    {
        state
            .progress
            .done
            .store(number.saturating_sub(1), Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
