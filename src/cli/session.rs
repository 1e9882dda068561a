//! `--session FILE`: whether there is a conversation in it, whether this run's flags go with that,
//! and keeping it.

use std::path::Path;

use anyhow::Result;

use hae::Error;
use hae::chat::Chat;
use hae::outfile::{Claim, OutFile};
use hae::prompt::{ChatTemplate, Source, Template};
use hae::saved::Saved;

/// The conversation to go on with; `None` where one begins: the file is not there, or empty, as
/// `mktemp` makes it. It is this run's alone as long as the claim lives: of two that went on with it,
/// one would be lost.
///
/// # Errors
/// Those of [`Saved::read`]; [`Error::File`] where another run has it, or where it could not be
/// written in the end, which is better said now than after the answer.
pub fn open(path: &Path) -> Result<(Option<Saved>, Claim)> {
    let claim = Claim::take(path)?;
    OutFile::create_private(path)?;
    let empty = |meta: std::fs::Metadata| meta.is_file() && meta.len() == 0;
    let begins = !path.exists() || std::fs::metadata(path).is_ok_and(empty);
    match begins {
        true => Ok((None, claim)),
        false => Ok((Some(Saved::read(path)?), claim)),
    }
}

/// A session keeps the template and the system prompt that it began with: what it has seen cannot
/// be changed. A flag that says something else is refused, one that is not given says nothing.
///
/// # Errors
/// [`Error::Option`] naming the flag.
pub fn check_flags(saved: &Saved, template: &Template, system: Option<&str>) -> hae::Result<()> {
    let refuse = |flag, reason: String| Err(Error::option(flag, reason));
    let own = saved.transcript.template().map(ChatTemplate::text);
    match (&template.source, own) {
        (Source::Raw, Some(_)) => {
            let reason = "the session goes through a chat template, expected none of this flag";
            return refuse("-no-cnv", reason.into());
        }
        (Source::Named(_), None) => {
            let reason = "the session was made with -no-cnv, expected the same and no template";
            return refuse("--chat-template", reason.into());
        }
        (Source::Named(named), Some(own)) if named != own => {
            let reason = format!(
                "the session was made with another one ({}), expected that or none",
                shown(own)
            );
            return refuse("--chat-template", reason);
        }
        _ => {}
    }
    match (system, saved.transcript.system()) {
        (Some(_), None) => {
            let reason = "the session began without a system prompt, expected none";
            refuse("-sys", reason.into())
        }
        (Some(now), Some(then)) if now != then => {
            let then = shown(then);
            let reason =
                format!("the session began with another one ({then}), expected that or none");
            refuse("-sys", reason)
        }
        _ => Ok(()),
    }
}

/// The beginning of a text, on one line.
fn shown(text: &str) -> String {
    const MOST: usize = 40;
    let mut start: String = text.chars().take(MOST).collect();
    if start.len() < text.len() {
        start.push_str("...");
    }
    format!("{start:?}")
}

/// Writes the session, if there is one to be kept.
///
/// # Errors
/// Those of [`Chat::save`].
pub fn keep(chat: &mut Chat, session: Option<&Path>) -> Result<()> {
    match session {
        Some(path) if chat.next_pos() > 0 => Ok(chat.save(path)?),
        _ => Ok(()),
    }
}
