//! The end of a program that no memory is left for.
//!
//! Large buffers, whose sizes follow from files and flags, are asked for so that a refusal is an
//! error. Nobody can answer for all of the small ones in between: without this, Rust would abort at
//! the first of them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;

/// Buffers of this size, in bytes, and more are refused, smaller ones end the program.
const LARGE: usize = 1 << 20;

/// The system's allocator. Where it has nothing left for a small buffer, the program ends with one
/// line and exit code 2. For `#[global_allocator]`.
pub struct OrExit;

/// Says so, by what needs no memory.
fn checked(memory: *mut u8, size: usize) -> *mut u8 {
    if memory.is_null() && size < LARGE {
        let mut line = [0_u8; 128];
        let mut rest = &mut line[..];
        // It fits.
        let _ = writeln!(
            rest,
            "hae: not enough memory for {size} bytes more: give a smaller context, batch or picture"
        );
        let left = rest.len();
        let n = line.len() - left;
        // SAFETY: the first `n` bytes are there; the other call ends the process at once, without the
        // handlers that might need memory.
        unsafe {
            libc::write(2, line.as_ptr().cast(), n as _);
            libc::_exit(2)
        };
    }
    memory
}

// SAFETY: every call goes to the system's allocator as it is; what it gives is handed on.
unsafe impl GlobalAlloc for OrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the callee's.
        checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        checked(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
