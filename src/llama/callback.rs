//! The evaluation callback as llama.cpp sees it: a function, and an [`Observer`] that both sides
//! reach.

use std::ffi::c_void;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::observer::Observer;

/// The observer that llama.cpp holds a pointer to. It is only ever reached through this one
/// pointer, so that neither side's access invalidates the other's.
pub(super) struct Owned(NonNull<Observer>);

impl Owned {
    pub fn new(observer: Observer) -> Self {
        Owned(NonNull::from(Box::leak(Box::new(observer))))
    }

    /// What the callback is to be given.
    pub fn user_data(&self) -> *mut c_void {
        self.0.as_ptr().cast()
    }

    pub fn get(&self) -> &Observer {
        // SAFETY: alive until drop; llama.cpp uses it only inside llama_decode, which borrows
        // the engine mutably.
        unsafe { self.0.as_ref() }
    }

    pub fn get_mut(&mut self) -> &mut Observer {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by Box::leak in `new`, freed once; the context is gone by now.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// The callback itself; `user_data` is an [`Observer`].
pub(super) unsafe extern "C" fn on_node(
    t: *mut sys::ggml_tensor,
    ask: bool,
    user_data: *mut c_void,
) -> bool {
    // SAFETY: the context was made with a pointer to an observer that outlives it, and nobody
    // else touches the observer while llama_decode runs.
    let observer = unsafe { &mut *user_data.cast::<Observer>() };
    // SAFETY: the scheduler passes a live node.
    let t = unsafe { &*t };
    let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        if ask {
            // SAFETY: we are called by the scheduler about this node.
            unsafe { observer.ask(t) }
        } else {
            // SAFETY: as above, and the node was computed.
            unsafe { observer.read_scores(t) };
            true
        }
    }));
    // A panic must not cross C: it is kept and resumed when llama_decode has returned.
    answer.unwrap_or_else(|payload| {
        observer.panic = Some(payload);
        !ask
    })
}
