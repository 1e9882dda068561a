//! llama.cpp's log: shown on stderr when asked for, otherwise kept so that an error can say why.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_sys_2 as sys;

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Error lines since the last [`take_reason`], the oldest first. Bounded: a broken file may log
/// one line a tensor.
static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());
const KEPT: usize = 16;

/// Where verbose lines go. The library itself never prints: the caller hands in a sink.
static SINK: Mutex<Option<fn(&str)>> = Mutex::new(None);

/// Shows llama.cpp's and mtmd's log through `sink` from now on.
pub fn show(sink: fn(&str)) {
    *SINK.lock().unwrap_or_else(|e| e.into_inner()) = Some(sink);
    VERBOSE.store(true, Ordering::Relaxed);
}

/// Routes llama.cpp's, ggml's and mtmd's log to this module.
pub(super) fn install() {
    // SAFETY: the callback is a plain function that lives as long as the program, and it does
    // not use the user data.
    unsafe {
        sys::llama_log_set(Some(receive), std::ptr::null_mut());
        sys::mtmd_log_set(Some(receive), std::ptr::null_mut());
        sys::mtmd_helper_log_set(Some(receive), std::ptr::null_mut());
    }
}

/// Forgets the error lines so far: what a later failure logs is then its own.
pub(super) fn forget() {
    ERRORS.lock().unwrap_or_else(|e| e.into_inner()).clear();
}

/// The error lines since [`forget`], joined into one line; `otherwise` when there are none.
pub(super) fn take_reason(otherwise: &str) -> String {
    let lines = std::mem::take(&mut *ERRORS.lock().unwrap_or_else(|e| e.into_inner()));
    if lines.is_empty() {
        otherwise.to_owned()
    } else {
        lines.join("; ")
    }
}

extern "C" fn receive(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // A panic must not unwind into C: nothing here is worth more than losing a log line.
    let _ = std::panic::catch_unwind(|| {
        // SAFETY: llama.cpp passes a NUL-terminated string that lives during the call; null was
        // excluded above.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        if level == sys::GGML_LOG_LEVEL_ERROR {
            let mut errors = ERRORS.lock().unwrap_or_else(|e| e.into_inner());
            let line = text.trim();
            if !line.is_empty() && errors.len() < KEPT {
                errors.push(line.to_owned());
            }
        }
        if VERBOSE.load(Ordering::Relaxed) {
            let sink = *SINK.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(sink) = sink {
                sink(&text);
            }
        }
    });
}
