//! `hae run` without a prompt: a chat with history and pictures.

mod lines;

use std::io::ErrorKind;

use anyhow::Result;
use rustyline::error::ReadlineError;

use super::answer::{answer, warn_about_bin, warn_about_end};
use super::crops::crops;
use super::inputs::{dropped, picture};
use super::{interrupt, note, warn};
use hae::Error;
use hae::answer::{Answer, Kv};
use hae::chat::Chat;
use hae::generate::Finish;
use hae::image::Picture;
use hae::turn::Turn;
use lines::Lines;

const HELP: [&str; 7] = [
    "/image PATH  show a picture with the next question; a file that was dropped here will do",
    "/drop        show no picture with it after all",
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

struct Prompting<'c> {
    chat: &'c mut Chat,
    /// Pictures for the next question.
    pictures: Vec<Picture>,
    /// Crops of the pictures that follow.
    num_crops: Option<u32>,
    n_predict: Option<usize>,
    calibration: Option<String>,
    last: Option<Answer>,
}

/// Reads questions until the end of input. A mistake in one of them does not end the chat.
pub fn chat(chat: &mut Chat, start: Start) -> Result<()> {
    let Start {
        pictures,
        num_crops,
        n_predict,
        calibration,
    } = start;
    if !pictures.is_empty() && !chat.has_vision() {
        let reason = "pictures need a vision file, give one with --mmproj";
        return Err(Error::option("--image", reason).into());
    }
    let mut lines = Lines::new()?;
    let mut prompting = Prompting {
        chat,
        pictures,
        num_crops,
        n_predict,
        calibration,
        last: None,
    };
    help();
    loop {
        let line = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            // A terminal that hung up.
            Err(_) if interrupt::ends() => return Ok(()),
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
            "/clear" => prompting.clear(),
            "/stats" => {
                stats(prompting.last.as_ref(), &prompting.chat.kv());
                if let Some(path) = &prompting.calibration {
                    note(&format!("calibration: {path}"));
                }
            }
            "/image" => prompting.image(rest.trim()),
            "/drop" => prompting.drop_pictures(),
            "/crops" => prompting.crops(rest.trim()),
            _ if command.starts_with('/') => {
                warn(&format!("{command}: unknown command, /help lists them"));
            }
            _ => prompting.ask(line)?,
        }
    }
}

fn help() {
    HELP.iter().for_each(|line| note(line));
}

impl Prompting<'_> {
    fn clear(&mut self) {
        self.chat.clear();
        self.pictures.clear();
        self.last = None;
    }

    fn image(&mut self, name: &str) {
        if name.is_empty() {
            return warn("/image: expected the path of a picture");
        }
        if !self.chat.has_vision() {
            return warn("/image: pictures need a vision file, start with --mmproj");
        }
        for path in dropped(name) {
            match picture(&path, self.num_crops) {
                Ok(picture) => self.pictures.push(picture),
                Err(e) => warn(&format!("{e:#}")),
            }
        }
    }

    fn drop_pictures(&mut self) {
        match self.pictures.len() {
            0 => warn("/drop: no picture waits"),
            n => note(&format!("{} dropped", pictures(n))),
        }
        self.pictures.clear();
    }

    /// After a question that was not answered: its pictures would be forgotten otherwise, or come
    /// as a surprise.
    fn warn_about_pictures(&self) {
        if !self.pictures.is_empty() {
            let n = self.pictures.len();
            let (n, them) = (pictures(n), if n == 1 { "it" } else { "them" });
            warn(&format!(
                "{n} will be shown with the next question, /drop drops {them}"
            ));
        }
    }

    fn crops(&mut self, text: &str) {
        let Ok(n) = text.parse() else {
            return warn("/crops: expected a number, such as 4 or 16");
        };
        match crops("/crops", n).and_then(|n| Ok(self.chat.check_num_crops(n).map(|()| n)?)) {
            Ok(n) => self.num_crops = Some(n),
            Err(e) => warn(&format!("{e:#}")),
        }
    }

    /// # Errors
    /// Only when stdout cannot be written to.
    fn ask(&mut self, text: &str) -> Result<()> {
        let pictures = std::mem::take(&mut self.pictures);
        let turn = Turn {
            text,
            pictures: &pictures,
            n_predict: self.n_predict,
            expected: None,
        };
        match interrupt::working(|| answer(self.chat, turn, true)) {
            Ok(answer) if answer.finish == Finish::Cancelled => {
                if answer.taken_back {
                    warn("the question was taken back, it had not been read to its end");
                    self.pictures = pictures;
                }
                self.last = Some(answer);
            }
            Ok(answer) => {
                if answer.finish == Finish::Context {
                    warn("the context is full: /clear starts again");
                } else {
                    warn_about_end(&answer);
                    warn_about_bin(&answer);
                }
                self.last = Some(answer);
            }
            Err(e) => match e.downcast_ref::<Error>() {
                None => return Err(e),
                // These leave the conversation as it was.
                Some(Error::PromptTooLong { .. }) => {
                    self.pictures = pictures;
                    warn(&format!("{e:#}; /clear starts again"));
                    self.warn_about_pictures();
                }
                Some(Error::Option { .. }) => {
                    self.pictures = pictures;
                    warn(&format!("{e:#}"));
                    self.warn_about_pictures();
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

fn pictures(n: usize) -> String {
    format!("{n} picture{}", if n == 1 { "" } else { "s" })
}

fn stats(last: Option<&Answer>, kv: &Kv) {
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
