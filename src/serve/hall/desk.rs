//! Between those who ask and the model's thread: the bounded queue, errands, and what the thread tells of
//! itself.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::serve::ask::{Ask, Part, Refused, SlotState, Stats, Told};

/// How often a thread that waits looks whether it was cancelled.
const LOOK: Duration = Duration::from_millis(50);

/// Who asked. Dropped without an answer, it is told that there will be none.
pub(super) struct Asker {
    /// `None`: told the last.
    tell: Option<Box<dyn FnMut(Told) -> bool + Send>>,
    listens: Arc<AtomicBool>,
}

impl Asker {
    fn new(tell: Box<dyn FnMut(Told) -> bool + Send>) -> Self {
        Asker {
            tell: Some(tell),
            listens: Arc::new(AtomicBool::new(true)),
        }
    }

    /// Tells something. A panic in there is the asker's own, who hears no more then.
    pub fn tell(&mut self, told: Told) {
        let last = matches!(told, Told::Ended { .. } | Told::Failed(_));
        let Some(mut tell) = self.tell.take().filter(|_| self.listens()) else {
            return;
        };
        match guarded(|| tell(told)) {
            Some(true) if !last => self.tell = Some(tell),
            Some(true) => {}
            _ => self.listens.store(false, Ordering::Relaxed),
        }
    }

    /// Whether anybody still listens.
    pub fn listens(&self) -> bool {
        self.listens.load(Ordering::Relaxed)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.tell(Told::Failed(Error::Closed));
    }
}

/// A question in the queue.
pub(super) struct Question {
    pub ask: Ask,
    pub asker: Asker,
}

/// What is wanted beside answers, all but the first of an idle slot.
pub(super) enum Errand {
    /// Tokens of a prompt.
    Count(Vec<Part>),
    Save(PathBuf),
    Restore(PathBuf),
    Erase,
}

/// An errand, its slot, and where the answer goes: tokens, and the file's bytes.
pub(super) struct Errands {
    pub slot: usize,
    pub errand: Errand,
    pub reply: mpsc::Sender<Result<(usize, u64)>>,
}

#[derive(Default)]
struct Inside {
    arrived: VecDeque<Question>,
    errands: Vec<Errands>,
    /// Questions that the thread has taken and no slot has.
    waiting: usize,
    /// Slots that wait for questions.
    idle: usize,
    refused: u64,
    /// Set when nothing new is taken.
    closing: Option<Arc<AtomicBool>>,
    /// The thread has ended.
    gone: bool,
    slots: Vec<SlotState>,
    stats: Stats,
}

/// What the model's thread and the others share.
pub(super) struct Shared {
    inside: Mutex<Inside>,
    changed: Condvar,
    /// Cancels whatever is going on: nobody holds the desk any more.
    left: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has come since the last call.
    pub fn take(&self) -> (VecDeque<Question>, Vec<Errands>) {
        let mut inside = self.lock();
        let arrived = std::mem::take(&mut inside.arrived);
        inside.waiting += arrived.len();
        (arrived, std::mem::take(&mut inside.errands))
    }

    /// Tells the others how things are: `waiting` questions have no slot, `idle` slots no question.
    pub fn publish(&self, waiting: usize, idle: usize, slots: Vec<SlotState>, mut stats: Stats) {
        let mut inside = self.lock();
        (inside.waiting, inside.idle) = (waiting, idle);
        stats.waiting = waiting + inside.arrived.len();
        stats.refused = inside.refused;
        (inside.slots, inside.stats) = (slots, stats);
    }

    /// Waits until something comes, `most` at most.
    pub fn wait(&self, most: Duration) {
        let inside = self.lock();
        if inside.arrived.is_empty() && inside.errands.is_empty() {
            drop(self.changed.wait_timeout(inside, most));
        }
    }

    /// Whether the hall closes, and whether what goes on is to end now.
    pub fn closes(&self) -> (bool, bool) {
        let inside = self.lock();
        let cancelled = |flag: &Arc<AtomicBool>| flag.load(Ordering::Relaxed);
        let cancelled = inside.closing.as_ref().is_some_and(cancelled);
        let left = self.left.load(Ordering::Relaxed);
        (left || inside.closing.is_some(), left || cancelled)
    }

    /// The thread ends: whoever waits hears of it.
    fn leave(&self) {
        let mut inside = self.lock();
        inside.gone = true;
        inside.stats.processing = 0;
        let rest = (
            std::mem::take(&mut inside.arrived),
            std::mem::take(&mut inside.errands),
        );
        drop(inside);
        drop(rest);
        self.changed.notify_all();
    }
}

/// The side of those who ask.
pub(super) struct Desk {
    shared: Arc<Shared>,
    slots: usize,
    queue: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Desk {
    /// Starts the thread, which runs `work` until that comes back or panics. `slots` slots are idle, `queue`
    /// questions may wait beside those that a slot is free for.
    ///
    /// # Errors
    /// [`Error::Io`] when the system gives no thread.
    pub fn open(
        slots: usize,
        queue: usize,
        work: impl FnOnce(Arc<Shared>) + Send + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            inside: Mutex::new(Inside {
                idle: slots,
                ..Inside::default()
            }),
            changed: Condvar::new(),
            left: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        let run = move || {
            let thread = Arc::clone(&own);
            // What it held is dropped by then: those whom it answered have heard of it.
            drop(catch_unwind(AssertUnwindSafe(|| work(thread))));
            own.leave();
        };
        let thread = thread::Builder::new().name("hall".to_owned()).spawn(run);
        let thread = thread.map_err(|e| Error::io("the thread of the model", e))?;
        Ok(Desk {
            shared,
            slots,
            queue,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// As [`crate::serve::ask::Hall::ask`].
    pub fn ask(
        &self,
        ask: Ask,
        tell: Box<dyn FnMut(Told) -> bool + Send>,
    ) -> std::result::Result<(), Refused> {
        let mut inside = self.shared.lock();
        if inside.gone || inside.closing.is_some() {
            return Err(Refused::Closing);
        }
        if inside.arrived.len() + inside.waiting >= self.queue + inside.idle {
            inside.refused += 1;
            inside.stats.refused += 1;
            return Err(Refused::Busy);
        }
        let asker = Asker::new(tell);
        inside.arrived.push_back(Question { ask, asker });
        drop(inside);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// As [`crate::serve::ask::Hall::count`].
    pub fn count(&self, prompt: Vec<Part>) -> Result<usize> {
        self.run(0, Errand::Count(prompt)).map(|(tokens, _)| tokens)
    }

    /// As [`crate::serve::ask::Hall::save`].
    pub fn save(&self, slot: usize, file: &Path) -> Result<(usize, u64)> {
        self.run(slot, Errand::Save(file.to_owned()))
    }

    /// As [`crate::serve::ask::Hall::restore`].
    pub fn restore(&self, slot: usize, file: &Path) -> Result<(usize, u64)> {
        self.run(slot, Errand::Restore(file.to_owned()))
    }

    /// As [`crate::serve::ask::Hall::erase`].
    pub fn erase(&self, slot: usize) -> Result<usize> {
        self.run(slot, Errand::Erase).map(|(tokens, _)| tokens)
    }

    fn run(&self, slot: usize, errand: Errand) -> Result<(usize, u64)> {
        if slot >= self.slots {
            let reason = format!("{slot}, expected less than {}", self.slots);
            return Err(Error::option("slot", reason));
        }
        let (reply, answer) = mpsc::channel();
        let mut inside = self.shared.lock();
        if inside.gone || inside.closing.is_some() {
            return Err(Error::Closed);
        }
        inside.errands.push(Errands {
            slot,
            errand,
            reply,
        });
        drop(inside);
        self.shared.changed.notify_all();
        answer.recv().unwrap_or(Err(Error::Closed))
    }

    /// What each slot does.
    pub fn slots(&self) -> Vec<SlotState> {
        self.shared.lock().slots.clone()
    }

    /// What the hall did.
    pub fn stats(&self) -> Stats {
        let inside = self.shared.lock();
        Stats {
            waiting: inside.waiting + inside.arrived.len(),
            ..inside.stats.clone()
        }
    }

    /// As [`crate::serve::ask::Hall::close`].
    pub fn close(&self, cancel: Arc<AtomicBool>) {
        let mut inside = self.shared.lock();
        inside.closing.get_or_insert(cancel);
        self.shared.changed.notify_all();
        while !inside.gone {
            let waited = self.shared.changed.wait_timeout(inside, LOOK);
            inside = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(inside);
        self.join();
    }

    fn join(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // The last to hold the desk may be told something by the thread itself.
        let own = |thread: &JoinHandle<()>| thread.thread().id() == thread::current().id();
        if let Some(thread) = thread.take().filter(|thread| !own(thread)) {
            // Its panic was caught there.
            drop(thread.join());
        }
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.shared.left.store(true, Ordering::Relaxed);
        self.shared.lock().closing.get_or_insert_default();
        self.shared.changed.notify_all();
        self.join();
    }
}
