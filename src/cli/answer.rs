//! One answer on its way to stdout, for a single prompt and for a chat.

use std::cell::RefCell;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use super::{interrupt, load, warn};
use hae::answer::Answer;
use hae::chat::Chat;
use hae::generate::{Finish, Hooks};
use hae::turn::Turn;

/// One turn with its text streamed to stdout; a signal ends it where this is
/// [`interrupt::working`].
pub fn answer(chat: &mut Chat, turn: Turn<'_>, stream: bool) -> Result<Answer> {
    let now = load::clock();
    let bar = load::spinner("reading the prompt");
    let mut out = std::io::stdout().lock();
    // Why the text could not be written; the answer has no use then and ends.
    let failure: RefCell<Option<std::io::Error>> = RefCell::new(None);
    let cancelled = || interrupt::cancelled() || failure.borrow().is_some();
    let mut on_text = |text: &str| {
        bar.finish_and_clear();
        if stream && failure.borrow().is_none() {
            *failure.borrow_mut() = out
                .write_all(text.as_bytes())
                .and_then(|()| out.flush())
                .err();
        }
    };
    let hooks = Hooks {
        on_text: &mut on_text,
        cancelled: &cancelled,
        now: &now,
    };
    let answer = chat.turn(turn, hooks);
    bar.finish_and_clear();
    if let Some(e) = failure.into_inner() {
        return Err(e).context("stdout");
    }
    let answer = answer?;
    if stream {
        writeln!(out).context("stdout")?;
    }
    Ok(answer)
}

/// Says on stderr, once, why rows of evicted tokens are not kept.
pub fn warn_about_bin(answer: &Answer) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let trouble = answer.bin.as_ref().and_then(|bin| bin.trouble.as_ref());
    if let Some(trouble) = trouble.filter(|_| !TOLD.swap(true, Ordering::Relaxed)) {
        let text = format!(
            "--bin-store: {trouble}: from now on evicted visual tokens come back by decoding them again, evicted text not at all"
        );
        warn(&text);
    }
}

/// Says on stderr why an answer is shorter than the model wanted it.
pub fn warn_about_end(answer: &Answer) {
    match answer.finish {
        Finish::Context => warn(
            "the context is full, the answer is cut short: give a larger -c, or a --kv-budget with --kv-policy hae",
        ),
        Finish::Positions => warn(
            "the short rope factors reach no further, the answer is cut short: give --rope-factors long",
        ),
        Finish::Eog | Finish::Length | Finish::Cancelled => {}
    }
}
