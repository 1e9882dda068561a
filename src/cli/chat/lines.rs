//! The lines of a chat, from a terminal or through a pipe. They are read by a thread of their own:
//! a signal has to end the waiting, which the systems' calls do not let it do.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};
use rustyline::config::{Behavior, Config};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{
    Cmd, ConditionalEventHandler, Editor, Event, EventContext, EventHandler, KeyEvent, RepeatCount,
};

use crate::cli::interrupt;

pub struct Lines {
    /// Each asks for one line; what comes with it goes into the history.
    ask: Sender<Option<String>>,
    told: Receiver<Told>,
    tell: Sender<Told>,
    last: Option<String>,
    terminal: Terminal,
}

enum Told {
    Line(Result<String, ReadlineError>),
    /// The program is to end.
    Ends,
}

impl Lines {
    pub fn new() -> Result<Self> {
        let (ask, asked) = channel();
        let (tell, told) = channel();
        let teller = tell.clone();
        let terminal = Terminal::now();
        std::thread::Builder::new()
            .name("lines".into())
            .spawn(move || read(&asked, &teller))
            .context("cannot read lines")?;
        Ok(Lines {
            ask,
            told,
            tell,
            last: None,
            terminal,
        })
    }

    /// The next line; `None` when a signal ends the program.
    pub fn next(&mut self) -> Result<Option<String>, ReadlineError> {
        if interrupt::ends() || self.ask.send(self.last.take()).is_err() {
            return Ok(None);
        }
        let tell = self.tell.clone();
        // Nobody waits any more if this cannot be sent.
        let wake = move || drop(tell.send(Told::Ends));
        match interrupt::at_prompt(wake, || self.told.recv()) {
            Ok(Told::Line(line)) => line.map(Some),
            Ok(Told::Ends) | Err(_) => {
                self.terminal.restore();
                Ok(None)
            }
        }
    }

    /// Puts a line into the history.
    pub fn remember(&mut self, line: &str) {
        self.last = Some(line.to_owned());
    }
}

fn read(asked: &Receiver<Option<String>>, tell: &Sender<Told>) {
    let mut source = Source::open();
    for remember in asked {
        let line = match &mut source {
            Ok(source) => source.line(remember),
            // There is no terminal to be had; the chat ends with the reason.
            Err(e) => Err(std::mem::replace(e, ReadlineError::Eof)),
        };
        if tell.send(Told::Line(line)).is_err() {
            return;
        }
    }
}

/// Where the questions come from.
enum Source {
    /// A terminal, with editing and history. One editor for all lines: it holds what was typed
    /// ahead.
    Typed {
        editor: Box<Editor<(), DefaultHistory>>,
        interrupted: Arc<AtomicBool>,
    },
    /// A file or another program: no prompt, which would mix with the answers. `begun`: whether
    /// its first line was read, which may have a byte order mark.
    Piped { begun: bool },
}

impl Source {
    fn open() -> Result<Self, ReadlineError> {
        if !std::io::stdin().is_terminal() {
            return Ok(Source::Piped { begun: false });
        }
        // The prompt belongs to the terminal, even if the answers go to a file.
        let behavior = match std::io::stdout().is_terminal() {
            true => Behavior::Stdio,
            false => Behavior::PreferTerm,
        };
        let config = Config::builder().behavior(behavior).build();
        let mut editor = Editor::with_config(config)?;
        let interrupted = Arc::new(AtomicBool::new(false));
        let leaves = EventHandler::Conditional(Box::new(Leaves(Arc::clone(&interrupted))));
        editor.bind_sequence(KeyEvent::ctrl('c'), leaves);
        Ok(Source::Typed {
            editor: Box::new(editor),
            interrupted,
        })
    }

    fn line(&mut self, remember: Option<String>) -> Result<String, ReadlineError> {
        match self {
            Source::Typed {
                editor,
                interrupted,
            } => {
                if let Some(line) = remember {
                    // A history that cannot grow is no reason to stop.
                    let _ = editor.add_history_entry(line);
                }
                let line = editor.readline("> ");
                match interrupted.swap(false, Ordering::Relaxed) {
                    true => line.and(Err(ReadlineError::Interrupted)),
                    false => line,
                }
            }
            Source::Piped { begun } => {
                let mut line = String::new();
                if std::io::stdin().read_line(&mut line)? == 0 {
                    return Err(ReadlineError::Eof);
                }
                match line.strip_prefix('\u{feff}') {
                    Some(rest) if !std::mem::replace(begun, true) => Ok(rest.to_owned()),
                    _ => {
                        *begun = true;
                        Ok(line)
                    }
                }
            }
        }
    }
}

/// Ctrl-C gives a line up. The editor's own way of doing so forgets what was typed after it; a line
/// that is accepted does not.
struct Leaves(Arc<AtomicBool>);

impl ConditionalEventHandler for Leaves {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, _: &EventContext<'_>) -> Option<Cmd> {
        self.0.store(true, Ordering::Relaxed);
        Some(Cmd::AcceptLine)
    }
}

/// How the terminal was before a line was edited in it; the editor, cut short, cannot put it back.
#[cfg(unix)]
struct Terminal(Option<rustix::termios::Termios>);

#[cfg(unix)]
impl Terminal {
    fn now() -> Self {
        Terminal(rustix::termios::tcgetattr(std::io::stdin()).ok())
    }

    fn restore(&self) {
        use rustix::termios::{OptionalActions, tcsetattr};
        use std::io::Write;

        if let Some(state) = &self.0 {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, state);
            // The editor asks for pasted text to be marked.
            let _ = std::io::stderr().write_all(b"\x1b[?2004l\n");
        }
    }
}

#[cfg(not(unix))]
struct Terminal;

#[cfg(not(unix))]
impl Terminal {
    fn now() -> Self {
        Terminal
    }

    fn restore(&self) {}
}
