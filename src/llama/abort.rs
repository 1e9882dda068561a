//! Assertions of ggml and llama.cpp. Files are checked before they reach C, but an assertion that
//! nobody thought of would still end the process with a core dump and a stack trace.

use std::ffi::{CStr, c_char};
use std::sync::Mutex;

use llama_cpp_sys_2 as sys;

use super::{log, memory};

/// Told what went wrong; returns the exit status.
type Handler = fn(&str) -> i32;

static HANDLER: Mutex<Option<Handler>> = Mutex::new(None);

/// From now on a failing assertion of ggml or llama.cpp calls `handler` and ends the process with
/// the status that it returns. Destructors do not run: other threads may be anywhere in C.
pub fn on_abort(handler: Handler) {
    *HANDLER.lock().unwrap_or_else(|e| e.into_inner()) = Some(handler);
    // SAFETY: the callback is a plain function that lives as long as the program.
    unsafe { sys::ggml_set_abort_callback(Some(receive)) };
}

unsafe extern "C" fn receive(message: *const c_char) {
    // A panic must not unwind into C; after one, ggml aborts as it would have without us.
    let status = std::panic::catch_unwind(|| {
        // Taken, so that only the first of several threads reports.
        let handler = HANDLER.lock().unwrap_or_else(|e| e.into_inner()).take()?;
        let message = if message.is_null() {
            String::new()
        } else {
            // SAFETY: ggml passes a C string that lives during the call.
            unsafe { CStr::from_ptr(message) }
                .to_string_lossy()
                .into_owned()
        };
        Some(handler(&reason(
            without_folder(&message),
            log::take_reason(""),
        )))
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
