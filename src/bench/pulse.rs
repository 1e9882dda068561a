//! What a run asks for while it goes on.

use std::time::Duration;

/// Time and the user's wish to stop.
#[derive(Clone, Copy)]
pub struct Pulse<'a> {
    /// A clock that never runs backwards.
    pub now: &'a dyn Fn() -> Duration,
    /// Asked again and again on the way: whether to stop.
    pub cancelled: &'a dyn Fn() -> bool,
}
