//! Assertions of ggml and llama.cpp. Files are checked before they reach C, but an assertion that
//! nobody thought of would still end the process with a core dump and a stack trace. So would a read
//! behind the end of a mapped file that somebody cuts while it is in use.

use std::ffi::{CStr, c_char};
use std::sync::Mutex;

use llama_cpp_sys_2 as sys;

use super::{log, memory, workers};

/// Told what went wrong; returns the exit status.
type Handler = fn(&str) -> i32;

static HANDLER: Mutex<Option<Handler>> = Mutex::new(None);

/// From now on a failing assertion of ggml or llama.cpp, and a mapped file that is cut (on Linux),
/// call `handler` and end the process with the status that it returns. Destructors do not run: other
/// threads may be anywhere in C.
pub fn on_abort(handler: Handler) {
    *HANDLER.lock().unwrap_or_else(|e| e.into_inner()) = Some(handler);
    // SAFETY: the callback is a plain function that lives as long as the program.
    unsafe { sys::ggml_set_abort_callback(Some(receive)) };
    #[cfg(target_os = "linux")]
    cut::listen();
}

unsafe extern "C" fn receive(message: *const c_char) {
    leave(|| {
        let message = if message.is_null() {
            String::new()
        } else {
            // SAFETY: ggml passes a C string that lives during the call.
            unsafe { CStr::from_ptr(message) }
                .to_string_lossy()
                .into_owned()
        };
        workers::lost(&message).unwrap_or_else(|| {
            let reason = reason(without_folder(&message), log::take_reason(""));
            format!("llama.cpp: {reason}")
        })
    });
}

/// Reports and ends the process; returns where nobody wants to hear of it.
fn leave(message: impl FnOnce() -> String + std::panic::UnwindSafe) {
    // A panic must not unwind into C; after one, ggml aborts as it would have without us.
    let status = std::panic::catch_unwind(|| {
        // Taken, so that only the first of several threads reports.
        let handler = HANDLER.lock().unwrap_or_else(|e| e.into_inner()).take()?;
        Some(handler(&message()))
    });
    match status {
        // SAFETY: the C library's own, of any status. It ends the process at once, without atexit
        // handlers, which other threads in C may not survive.
        Ok(Some(status)) => unsafe { libc::_exit(status) },
        // Another thread is reporting: leave it the time.
        Ok(None) => std::thread::sleep(std::time::Duration::from_secs(5)),
        Err(_) => {}
    }
}

/// SIGBUS, which is what reading a mapped page gives that its file or its disk does not have any more.
#[cfg(target_os = "linux")]
mod cut {
    use std::ffi::{c_int, c_void};
    use std::mem::zeroed;
    use std::ptr::null_mut;

    /// The model is what is mapped; `no_mmap` reads it instead.
    const MESSAGE: &str = "the model's file was cut or cannot be read any more while it was in use, \
        expected it to stay as it is";

    pub(super) fn listen() {
        // SAFETY: all zeros are a valid sigaction without flags or masked signals; the handler has the
        // signature that SA_SIGINFO asks for. Not on the alternative stack, which is made for one frame.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_flags = libc::SA_SIGINFO;
            action.sa_sigaction = receive as *const () as usize;
            libc::sigaction(libc::SIGBUS, &raw const action, null_mut());
        }
    }

    /// What is faulted on is a load from a mapping, never the allocator or a lock of ours: whoever
    /// holds these is another thread and goes on. So the handler may do what any function may.
    unsafe extern "C" fn receive(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the system passes a valid one.
        let code = unsafe { (*info).si_code };
        if code == libc::BUS_ADRERR || code == libc::BUS_OBJERR {
            super::leave(|| MESSAGE.to_owned());
        }
        // Somebody's `kill`, or nobody to tell: as it would have been. A load faults again.
        // SAFETY: as in `listen`; both calls are allowed in handlers.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            if code <= 0 {
                libc::raise(libc::SIGBUS);
            }
        }
    }
}

/// The assertion, and where the log says that memory was refused before: that.
fn reason(assertion: &str, logged: String) -> String {
    match memory::was_refused(&logged) {
        true => memory::explained(
            logged,
            "what is to be computed",
            "a smaller `n_ctx`, `n_ubatch` or picture",
        ),
        false => assertion.to_owned(),
    }
}

/// `a/b/c.cpp:12: text` without the folders, which are those of the machine that built it.
fn without_folder(message: &str) -> &str {
    let place = message.split_once(": ").map_or(message, |(place, _)| place);
    let start = place.rfind(['/', '\\']).map_or(0, |at| at + 1);
    &message[start..]
}

#[cfg(test)]
mod tests {
    use super::{reason, without_folder};

    #[test]
    fn an_assertion_behind_a_lack_of_memory_says_so() {
        let assertion = "ggml.c:1: GGML_ASSERT(ctx->mem_buffer) failed";
        let logged = "insufficient memory (attempted to allocate 12.00 MB)";
        assert_eq!(
            reason(assertion, logged.to_owned()),
            format!(
                "not enough memory for what is to be computed: give a smaller `n_ctx`, `n_ubatch` or picture ({logged})"
            )
        );
        for other in ["", "failed to open a file"] {
            assert_eq!(reason(assertion, other.to_owned()), assertion);
        }
    }

    #[test]
    fn folders_are_cut_from_the_place_alone() {
        for (message, expected) in [
            (
                "../../ggml/src/ops.cpp:41: GGML_ASSERT(a / b) failed",
                "ops.cpp:41: GGML_ASSERT(a / b) failed",
            ),
            ("ops.cpp:41: a/b", "ops.cpp:41: a/b"),
            ("", ""),
        ] {
            assert_eq!(without_folder(message), expected);
        }
    }
}
