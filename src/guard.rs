//! Other people's readers, which may panic where a file is damaged.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `f` gives; `None` where it panics. It must leave nothing half changed that is used again.
pub fn guarded<R>(f: impl FnOnce() -> R) -> Option<R> {
    let outer = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    result.ok()
}

/// Whether a panic of this thread will be caught by [`guarded`], so that nobody needs to hear of it.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_nothing_and_goes_no_further() {
        assert_eq!(guarded(|| 1 + usize::from(is_guarded())), Some(2));
        let broken: Option<u8> = guarded(|| std::panic::resume_unwind(Box::new("broken")));
        assert_eq!((broken, is_guarded()), (None, false));
    }
}
