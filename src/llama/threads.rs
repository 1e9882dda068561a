//! The threads that a context computes with, and how eagerly they wait for each other.

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_sys_2 as sys;

use super::ContextOptions;
use crate::error::{Error, Result};

/// How eagerly threads wait for work (`--poll`): 0 sleep at once, 100 stay awake the longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Poll(u32);

impl Poll {
    /// llama.cpp's own.
    pub const DEFAULT: Poll = Poll(50);

    /// How often a thread of GCC's OpenMP library looks whether the others have come before it goes
    /// to sleep. By default this is well below a time slice of the system, and above what a thread
    /// waits on a quiet machine: docs/performance.md has the measurements.
    pub fn spins(self) -> u64 {
        u64::from(self.0) * 200
    }
}

impl Default for Poll {
    fn default() -> Self {
        Poll::DEFAULT
    }
}

impl From<Poll> for u32 {
    fn from(poll: Poll) -> Self {
        poll.0
    }
}

impl std::fmt::Display for Poll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for Poll {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let level = text.parse().ok().filter(|&level| level <= 100);
        level.map(Poll).ok_or_else(|| "expected 0 to 100".into())
    }
}

/// Whether ggml's threads are those of an OpenMP library, for which its own pools only keep count.
fn openmp() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| super::system_info().contains("OPENMP = 1"))
}

/// ggml's own pool of threads.
struct Pool(NonNull<sys::ggml_threadpool>);

impl Pool {
    fn new(n_threads: i32, poll: Poll) -> Result<Self> {
        // SAFETY: takes and returns plain data, which `ggml_threadpool_new` copies.
        let pool = unsafe {
            let mut params = sys::ggml_threadpool_params_default(n_threads.clamp(1, 512));
            params.poll = poll.into();
            sys::ggml_threadpool_new(&mut params)
        };
        let pool = NonNull::new(pool);
        pool.map(Pool)
            .ok_or_else(|| Error::llama("ggml_threadpool_new", "returned null"))
    }
}

// SAFETY: a pool is bound to no thread. The contexts that compute with it belong to one engine, which
// is not `Sync`, so that one of them computes at a time; nothing else reaches into it.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_threadpool_new`, freed once, and nothing computes with it any more:
        // the contexts that it was attached to are gone.
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) }
    }
}

/// The pools of a context and of the trial contexts that belong to it: one of them computes at a
/// time, and threads that wait for the others' work would only stand in its way.
pub(super) struct Threads {
    tokens: Pool,
    /// For prompts, where they take another number of threads.
    prompts: Option<Pool>,
}

impl Threads {
    /// `None` where OpenMP serves. Without pools llama.cpp would start threads for every token.
    pub(super) fn new(options: &ContextOptions) -> Result<Option<Arc<Self>>> {
        if openmp() {
            return Ok(None);
        }
        let (tokens, prompts) = (options.n_threads, options.n_threads_batch);
        let pool = |n_threads| Pool::new(n_threads, options.poll);
        Ok(Some(Arc::new(Threads {
            tokens: pool(tokens)?,
            prompts: (tokens != prompts).then(|| pool(prompts)).transpose()?,
        })))
    }

    /// Lets the context compute with them. They have to outlive it.
    pub(super) fn attach(&self, ctx: &mut LlamaContext<'_>) {
        let of = |pool: &Pool| pool.0.as_ptr();
        let prompts = self.prompts.as_ref().unwrap_or(&self.tokens);
        // SAFETY: the context is alive, and so are the pools.
        unsafe { sys::llama_attach_threadpool(ctx.as_mut_ptr(), of(&self.tokens), of(prompts)) }
    }
}
