//! llama.cpp's log: shown on stderr when asked for, otherwise kept so that an error can say why.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_sys_2 as sys;

static VERBOSE: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The first error line of this thread since [`forget`]. llama.cpp logs why a call fails on the thread
    /// that called; those of other threads, which tokenize while a model samples, are not its reason.
    static ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

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

/// Forgets what this thread logged so far: what a later failure logs is then its own.
pub(super) fn forget() {
    ERROR.take();
}

/// Why this thread's call since [`forget`] failed: the first error line, which comes from where it happened
/// (those after it say who had to give up in turn); `otherwise` when there is none.
pub(super) fn take_reason(otherwise: &str) -> String {
    // A thread that ends has none any more.
    let line = ERROR.try_with(RefCell::take).ok().flatten();
    line.map_or(otherwise.to_owned(), |line| reason(&line))
}

/// Where llama.cpp says in other words that memory was refused: the second by the number of ggml's
/// status (`GGML_STATUS_ALLOC_FAILED`).
const MEMORY: [&str; 2] = [
    "std::bad_alloc",
    "ggml_backend_sched_graph_compute_async failed with error -2",
];

/// A line as our own messages quote it.
fn reason(line: &str) -> String {
    MEMORY.iter().fold(bare(line).to_owned(), |line, words| {
        line.replace(words, "not enough memory")
    })
}

/// A line without what llama.cpp puts before the reason: functions, and that a model of this path
/// could not be loaded, which our own message says.
fn bare(line: &str) -> &str {
    let mut rest = line;
    while let Some((head, tail)) = rest.split_once(": ") {
        let name = head.trim_end_matches("()");
        let function = name == "operator"
            || name.contains('_') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let repeated = head == "error" || head.starts_with("error loading model");
        // The path is quoted and may hold a colon itself.
        let path = rest.strip_prefix("failed to load model '");
        let tail = match path.and_then(|path| path.split_once("': ")) {
            Some((_, tail)) => tail,
            None if function || repeated => tail,
            None => break,
        };
        if tail.trim().is_empty() {
            break;
        }
        rest = tail;
    }
    rest.trim_end_matches(':')
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
            let line = text.trim();
            if !line.is_empty() {
                let _ = ERROR.try_with(|error| {
                    error
                        .borrow_mut()
                        .get_or_insert_with(|| line.replace('\n', " "));
                });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_another_thread_is_not_the_reason() {
        fn log(line: &CStr) {
            receive(
                sys::GGML_LOG_LEVEL_ERROR,
                line.as_ptr(),
                std::ptr::null_mut(),
            );
        }
        forget();
        log(c"ours: first");
        std::thread::spawn(|| {
            assert_eq!(take_reason("nothing"), "nothing");
            log(c"theirs");
            assert_eq!(take_reason("nothing"), "theirs");
            log(c"theirs again");
        })
        .join()
        .unwrap();
        log(c"ours: second");
        assert_eq!(take_reason("nothing"), "ours: first");
        assert_eq!(take_reason("nothing"), "nothing");
    }

    #[test]
    fn reasons_are_bare() {
        for (line, expected) in [
            (
                "llama_model_load: error loading model: error loading model vocabulary: unknown tokenizer: 'abc'",
                "unknown tokenizer: 'abc'",
            ),
            (
                "clip_init: failed to load model 'a: b.gguf': operator(): unable to find tensor v.x",
                "unable to find tensor v.x",
            ),
            ("operator(): std::bad_alloc", "not enough memory"),
            (
                "graph_compute: ggml_backend_sched_graph_compute_async failed with error -2",
                "not enough memory",
            ),
            ("init: expected 3: got 4", "init: expected 3: got 4"),
            ("a_b: ", "a_b: "),
            ("", ""),
        ] {
            assert_eq!(reason(line), expected, "{line}");
        }
    }
}
