//! `hae run` without a prompt: a chat with history and pictures.

use std::io::{ErrorKind, IsTerminal};
use std::path::Path;

use anyhow::Result;
use rustyline::config::{Behavior, Config};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{DefaultEditor, Editor};

use super::crops::crops;
use super::run::{answer, picture, warn_about_end};
use super::{interrupt, note, warn};
use hae::Error;
use hae::conversation::{Answer, Conversation, KvReport, Turn};
use hae::generate::Finish;
use hae::image::Picture;

const HELP: [&str; 6] = [
    "/image PATH  show a picture with the next question",
    "/crops N     cut the pictures that follow into N crops at most (Phi-3.5-vision)",
    "/clear       forget the conversation",
    "/stats       what the last answer and the KV cache cost",
    "/help        these lines",
    "/quit        leave (so does Ctrl-D); Ctrl-C stops an answer",
];

/// What a chat begins with.
pub struct Start {
    /// For the first question.
    pub pictures: Vec<Picture>,
    pub num_crops: Option<u32>,
    pub n_predict: Option<usize>,
    /// The file that parameters of the policy were taken from.
    pub calibration: Option<String>,
}

struct Chat<'c, 'm> {
    conversation: &'c mut Conversation<'m>,
    /// Pictures for the next question.
    pictures: Vec<Picture>,
    /// Crops of the pictures that follow.
    num_crops: Option<u32>,
    n_predict: Option<usize>,
    calibration: Option<String>,
    last: Option<Answer>,
}

/// Reads questions until the end of input. A mistake in one of them does not end the chat.
pub fn chat(conversation: &mut Conversation<'_>, start: Start) -> Result<()> {
    let Start {
        pictures,
        num_crops,
        n_predict,
        calibration,
    } = start;
    if !pictures.is_empty() && !conversation.has_vision() {
        let reason = "pictures need a vision file, give one with --mmproj";
        return Err(Error::option("--image", reason).into());
    }
    let mut lines = Lines::new()?;
    let mut chat = Chat {
        conversation,
        pictures,
        num_crops,
        n_predict,
        calibration,
        last: None,
    };
    help();
    loop {
        let line = match interrupt::at_prompt(|| lines.next()) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(ReadlineError::Io(e)) if e.kind() == ErrorKind::InvalidData => {
                warn("that line is not UTF-8, expected text");
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        lines.remember(line);
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/quit" | "/exit" => return Ok(()),
            "/help" => help(),
            "/clear" => chat.clear(),
            "/stats" => {
                stats(chat.last.as_ref(), &chat.conversation.kv());
                if let Some(path) = &chat.calibration {
                    note(&format!("calibration: {path}"));
                }
            }
            "/image" => chat.image(rest.trim()),
            "/crops" => chat.crops(rest.trim()),
            _ if command.starts_with('/') => {
                warn(&format!("{command}: unknown command, /help lists them"));
            }
            _ => chat.ask(line)?,
        }
    }
}

/// Where the questions come from.
enum Lines {
    /// A terminal, with editing and history.
    Typed(Box<DefaultEditor>),
    /// A file or another program: no prompt, which would mix with the answers.
    Piped,
}

impl Lines {
    fn new() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Lines::Piped);
        }
        // The prompt belongs to the terminal, even if the answers go to a file.
        let behavior = match std::io::stdout().is_terminal() {
            true => Behavior::Stdio,
            false => Behavior::PreferTerm,
        };
        let config = Config::builder().behavior(behavior).build();
        let editor = Editor::<(), DefaultHistory>::with_config(config)?;
        Ok(Lines::Typed(Box::new(editor)))
    }

    fn next(&mut self) -> Result<String, ReadlineError> {
        match self {
            Lines::Typed(editor) => editor.readline("> "),
            Lines::Piped => {
                let mut line = String::new();
                match std::io::stdin().read_line(&mut line)? {
                    0 => Err(ReadlineError::Eof),
                    _ => Ok(line),
                }
            }
        }
    }

    fn remember(&mut self, line: &str) {
        if let Lines::Typed(editor) = self {
            // A history that cannot grow is no reason to stop.
            let _ = editor.add_history_entry(line);
        }
    }
}

fn help() {
    HELP.iter().for_each(|line| note(line));
}

impl Chat<'_, '_> {
    fn clear(&mut self) {
        self.conversation.clear();
        self.pictures.clear();
        self.last = None;
    }

    fn image(&mut self, path: &str) {
        // Terminals quote the name of a file that is dropped on them.
        let path = ['\'', '"']
            .iter()
            .find_map(|&quote| path.strip_prefix(quote)?.strip_suffix(quote))
            .unwrap_or(path);
        if path.is_empty() {
            return warn("/image: expected the path of a picture");
        }
        if !self.conversation.has_vision() {
            return warn("/image: pictures need a vision file, start with --mmproj");
        }
        match picture(Path::new(path), self.num_crops) {
            Ok(picture) => self.pictures.push(picture),
            Err(e) => warn(&format!("{e:#}")),
        }
    }

    fn crops(&mut self, text: &str) {
        let Ok(n) = text.parse() else {
            return warn("/crops: expected a number, such as 4 or 16");
        };
        match crops("/crops", n)
            .and_then(|n| Ok(self.conversation.check_num_crops(n).map(|()| n)?))
        {
            Ok(n) => self.num_crops = Some(n),
            Err(e) => warn(&format!("{e:#}")),
        }
    }

    /// # Errors
    /// Only when stdout cannot be written to.
    fn ask(&mut self, text: &str) -> Result<()> {
        let turn = Turn {
            text: text.to_owned(),
            pictures: std::mem::take(&mut self.pictures),
            n_predict: self.n_predict,
        };
        match answer(self.conversation, &turn, true) {
            Ok(answer) if answer.finish == Finish::Cancelled => {
                if answer.taken_back {
                    warn("the question was taken back, it had not been read to its end");
                    self.pictures = turn.pictures;
                }
                self.last = Some(answer);
            }
            Ok(answer) => {
                if answer.finish == Finish::Context {
                    warn("the context is full: /clear starts again");
                } else {
                    warn_about_end(&answer);
                }
                self.last = Some(answer);
            }
            Err(e) => match e.downcast_ref::<Error>() {
                None => return Err(e),
                // These leave the conversation as it was.
                Some(Error::PromptTooLong { .. }) => {
                    self.pictures = turn.pictures;
                    warn(&format!("{e:#}; /clear starts again"));
                }
                Some(Error::Option { .. }) => {
                    self.pictures = turn.pictures;
                    warn(&format!("{e:#}"));
                }
                Some(_) => {
                    self.clear();
                    warn(&format!("{e:#}; the conversation starts again"));
                }
            },
        }
        Ok(())
    }
}

fn stats(last: Option<&Answer>, kv: &KvReport) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let cells = kv.cells;
    note(&format!(
        "cells: {} live ({} text, {} vision), {} in the bin, {} evicted, {} restored, {} recalled, {} at most, {} in all",
        cells.live.total(),
        cells.live.text,
        cells.live.vision,
        cells.binned.total(),
        cells.evicted.total(),
        cells.restored.total(),
        cells.recalled.total(),
        cells.peak,
        kv.n_cells,
    ));
    note(&format!(
        "KV: {:.2} MiB in use, {:.2} MiB at most; {:.2} MiB allocated, {:.2} MiB at most; {:.2} MiB on the host",
        mib(kv.bytes_in_use),
        mib(kv.bytes_peak),
        mib(kv.bytes_allocated),
        mib(kv.bytes_allocated_peak),
        mib(kv.bytes_host)
    ));
    let Some(Answer {
        timings, tokens, ..
    }) = last
    else {
        return;
    };
    let ms = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.1} ms"));
    note(&format!(
        "last answer: {} prompt tokens ({} text, {} vision), {} generated; encode {:.0} ms, prefill {:.0} ms, first token after {}, {} a token",
        tokens.prompt.total(),
        tokens.prompt.text,
        tokens.prompt.vision,
        tokens.generated,
        timings.vision_encode_ms,
        timings.prefill_ms,
        ms(timings.ttft_ms),
        ms(timings.tpot_ms),
    ));
}
