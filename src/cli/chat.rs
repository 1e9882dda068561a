//! `hae run` without a prompt: a chat with history and pictures.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::run::{answer, picture};
use super::warn;
use hae::conversation::{Answer, Conversation, KvReport, Turn};
use hae::generate::Finish;
use hae::image::Picture;

const HELP: &str = "\
/image PATH  show a picture with the next question
/clear       forget the conversation
/stats       what the last answer and the KV cache cost
/quit        leave (so does Ctrl-D); Ctrl-C stops an answer";

/// Reads questions until the end of input. A mistake in one of them does not end the chat.
pub fn chat(
    conversation: &mut Conversation<'_>,
    pictures: Vec<Picture>,
    n_predict: Option<usize>,
    cancel: &AtomicBool,
) -> Result<()> {
    let mut editor = DefaultEditor::new()?;
    let mut turn = Turn {
        text: String::new(),
        pictures,
        n_predict,
    };
    let mut last: Option<Answer> = None;
    eprintln!("{HELP}");
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let _ = editor.add_history_entry(line);
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/quit" | "/exit" => return Ok(()),
            "/help" => eprintln!("{HELP}"),
            "/clear" => {
                conversation.clear();
                turn.pictures.clear();
                last = None;
            }
            "/stats" => stats(last.as_ref(), &conversation.kv()),
            "/image" if rest.trim().is_empty() => warn("/image: expected the path of a picture"),
            "/image" => match picture(Path::new(rest.trim())) {
                Ok(picture) => turn.pictures.push(picture),
                Err(e) => warn(&format!("{e:#}")),
            },
            _ if command.starts_with('/') => {
                warn(&format!("{command}: unknown command, /help lists them"))
            }
            _ => {
                turn.text = line.to_owned();
                cancel.store(false, Ordering::SeqCst);
                match answer(conversation, &turn, cancel, true) {
                    Ok(answer) => {
                        if answer.finish == Finish::Context {
                            warn("the context is full: /clear starts again");
                        }
                        turn.pictures.clear();
                        last = Some(answer);
                    }
                    Err(e) if super::is_broken_pipe(&e) => return Err(e),
                    Err(e) => warn(&format!("{e:#}")),
                }
            }
        }
    }
}

fn stats(last: Option<&Answer>, kv: &KvReport) {
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    let cells = kv.cells;
    eprintln!(
        "cells: {} live ({} text, {} vision), {} in the bin, {} evicted, {} restored, {} at most, {} in all",
        cells.live.total(),
        cells.live.text,
        cells.live.vision,
        cells.binned.total(),
        cells.evicted.total(),
        cells.restored.total(),
        cells.peak,
        kv.n_cells,
    );
    eprintln!(
        "KV: {:.2} MiB in use, {:.2} MiB at most, {:.2} MiB allocated",
        mib(kv.bytes_in_use),
        mib(kv.bytes_peak),
        mib(kv.bytes_allocated)
    );
    if let Some(Answer {
        timings: t, tokens, ..
    }) = last
    {
        eprintln!(
            "last answer: {} prompt tokens ({} vision), {} generated; encode {:.0} ms, prefill {:.0} ms, first token after {:.0} ms, {:.1} ms a token",
            tokens.prompt.total(),
            tokens.prompt.vision,
            tokens.generated,
            t.vision_encode_ms,
            t.prefill_ms,
            t.ttft_ms.unwrap_or(0.0),
            t.tpot_ms.unwrap_or(0.0),
        );
    }
}
