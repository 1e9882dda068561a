//! What users hand to a command: prompts and the files of pictures.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use hae::image::{self, Limits, Picture};
use hae::{Error, text};

/// The name of standard input.
const STDIN: &str = "-";

/// Whether backslashes in a prompt are what llama.cpp makes of them.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Prompt")]
pub struct EscapeArgs {
    /// In the prompt \n, \t, \r, \', \", \\ and \x41 stand for what they name. This is the default
    #[arg(
        short = 'e',
        long,
        overrides_with = "no_escape",
        hide_short_help = true
    )]
    escape: bool,
    /// Take backslashes in the prompt as they are
    #[arg(long, overrides_with = "escape", hide_short_help = true)]
    no_escape: bool,
}

impl EscapeArgs {
    /// A prompt that `flag` gave, as it was meant.
    ///
    /// # Errors
    /// [`Error::Option`] for one that is empty, or that bytes by number break.
    pub fn prompt(&self, flag: &'static str, text: &str) -> Result<String, Error> {
        let wrong = |reason: &str| Err(Error::option(flag, reason));
        let prompt = match self.no_escape {
            true => text.to_owned(),
            false => match String::from_utf8(unescaped(text.as_bytes())) {
                Ok(text) => text,
                Err(_) => {
                    return wrong("\\x names bytes that are no UTF-8: give --no-escape, or others");
                }
            },
        };
        if prompt.is_empty() {
            return wrong("is empty, expected a prompt");
        }
        match prompt.contains('\0') {
            true => wrong("\\x names a NUL, expected text: give --no-escape, or another byte"),
            false => Ok(prompt),
        }
    }

    /// The prompt in a file, or in standard input for `-`, without the newline at its end.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for what is no text.
    pub fn file(&self, path: &Path) -> Result<String, Error> {
        let io = |e| Error::io(path, e);
        let bytes = match is_stdin(path) {
            true => stdin().map_err(io)?,
            false => std::fs::read(path).map_err(io)?,
        };
        if let Some(at) = bytes.iter().position(|&b| b == 0)
            && std::str::from_utf8(&bytes).is_ok()
        {
            return Err(Error::file(
                path,
                format!("byte {at} is NUL, expected text"),
            ));
        }
        let mut text = text::decode(path, bytes)?;
        // Editors end a file with a newline that is not part of the question.
        if text.ends_with('\n') {
            text.pop();
        }
        if text.is_empty() {
            return Err(Error::file(path, "is empty, expected a prompt"));
        }
        self.prompt("-f", &text)
    }
}

/// llama.cpp's `string_process_escapes`: what is no escape keeps its backslash.
pub fn unescaped(text: &[u8]) -> Vec<u8> {
    let hex = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok()?;
        let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
    };
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [byte, tail @ ..] = rest {
        let (bytes, used): (&[u8], usize) = match (byte, tail) {
            (b'\\', [b'n', ..]) => (b"\n", 2),
            (b'\\', [b'r', ..]) => (b"\r", 2),
            (b'\\', [b't', ..]) => (b"\t", 2),
            (b'\\', [b'\'', ..]) => (b"'", 2),
            (b'\\', [b'"', ..]) => (b"\"", 2),
            (b'\\', [b'\\', ..]) => (b"\\", 2),
            (b'\\', [b'x', a, b, ..]) if hex(&[*a, *b]).is_some() => {
                out.extend(hex(&[*a, *b]));
                (b"", 4)
            }
            (byte, _) => (std::slice::from_ref(byte), 1),
        };
        out.extend_from_slice(bytes);
        rest = &rest[used..];
    }
    out
}

/// The text of a file that a flag names.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for what is no text.
pub fn text(path: &Path) -> Result<String, Error> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    text::decode(path, bytes)
}

fn is_stdin(path: &Path) -> bool {
    path == Path::new(STDIN)
}

fn stdin() -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Refuses standard input for two things, or for one and a chat.
///
/// # Errors
/// [`Error::Option`] naming the flags.
pub fn check_stdin(file: Option<&Path>, images: &[PathBuf], chat: bool) -> Result<(), Error> {
    let images = images.iter().filter(|path| is_stdin(path)).count();
    let takers = images + usize::from(file.is_some_and(is_stdin)) + usize::from(chat && images > 0);
    if takers > 1 {
        let reason = match chat {
            true => "- is standard input, which the chat reads: give a prompt with -p or -f",
            false => "- is standard input, which is there once: give a file for the other",
        };
        return Err(Error::option("--image", reason));
    }
    if images > 0 && std::io::stdin().is_terminal() {
        let reason = "- is standard input, expected a picture there, not a terminal";
        return Err(Error::option("--image", reason));
    }
    Ok(())
}

/// The files that values of `--image` name. As in llama.cpp one value may name several, with commas
/// between them and quotes around one with a comma, unless there is a file of just that name.
pub fn pictures(values: &[PathBuf]) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for value in values {
        match value.to_str() {
            Some(text) if !value.exists() && text.contains(',') => {
                paths.extend(comma_separated(text).iter().map(|name| located(name)));
            }
            Some(text) if !value.exists() => paths.push(located(text)),
            _ => paths.push(value.clone()),
        }
    }
    paths
}

/// llama.cpp's `parse_csv_row`.
fn comma_separated(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let Some(field) = fields.last_mut() else {
            break;
        };
        match c {
            '"' if !quoted && field.is_empty() => quoted = true,
            '"' if quoted && chars.next_if_eq(&'"').is_none() => quoted = false,
            ',' if !quoted => fields.push(String::new()),
            c => field.push(c),
        }
    }
    fields
}

/// The files that a line of a chat names, as terminals write the names of files that are dropped
/// on them: as they are, in quotes, with backslashes, as a `file://` address; `~` is the home
/// folder.
pub fn dropped(text: &str) -> Vec<PathBuf> {
    let whole = located(text);
    if whole.exists() {
        return vec![whole];
    }
    let words = shlex::split(text).unwrap_or_default();
    let paths: Vec<PathBuf> = words.iter().map(|word| located(word)).collect();
    match paths.len() {
        1 => paths,
        // Several files, or the name of one that is not there.
        n if n > 1 && paths.iter().all(|path| path.exists()) => paths,
        _ => vec![whole],
    }
}

/// The file of a name that may be an address, or begin with `~`.
fn located(name: &str) -> PathBuf {
    let path = PathBuf::from(name);
    if path.exists() {
        return path;
    }
    let address = name
        .strip_prefix("file://localhost/")
        .or_else(|| name.strip_prefix("file:///"));
    if let Some(rest) = address {
        let decoded = percent_encoding::percent_decode_str(rest).decode_utf8_lossy();
        // On Windows the drive follows.
        let root = if cfg!(windows) { "" } else { "/" };
        return PathBuf::from(format!("{root}{decoded}"));
    }
    let rest = name.strip_prefix('~');
    match rest.and_then(|rest| Some((rest, std::env::home_dir()?))) {
        Some(("", home)) => home,
        Some((rest, home)) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => path,
    }
}

/// Reads the picture in a file.
///
/// # Errors
/// Those of [`image::load`].
pub fn picture(path: &Path, num_crops: Option<u32>) -> Result<Picture, Error> {
    let picture = image::load(path, &Limits::default())?;
    Ok(Picture {
        num_crops,
        ..picture
    })
}

/// As [`picture`]; `-` is standard input.
///
/// # Errors
/// Those of [`image::read`].
pub fn picture_or_stdin(path: &Path, num_crops: Option<u32>) -> Result<Picture, Error> {
    if !is_stdin(path) {
        return picture(path, num_crops);
    }
    let picture = image::read(path, std::io::stdin().lock(), &Limits::default())?;
    Ok(Picture {
        num_crops,
        ..picture
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `string_process_escapes` makes of them.
    #[test]
    fn escapes_are_llama_cpps() {
        for (text, expected) in [
            (r"a\nb\tc\rd", "a\nb\tc\rd"),
            (r#"\'\"\\n"#, "'\"\\n"),
            (r"\x41\x7a\x4", r"Az\x4"),
            (r"\xg1 \x+1", r"\xg1 \x+1"),
            (r"\frac C:\dir \", r"\frac C:\dir \"),
            ("caf\u{e9}\\n", "caf\u{e9}\n"),
        ] {
            let found = String::from_utf8(unescaped(text.as_bytes())).unwrap();
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn commas_separate_names_as_in_llama_cpp() {
        let names = comma_separated(r#"a.png,"b, c.png",d "e".png,"say ""x"".png""#);
        assert_eq!(
            names,
            ["a.png", "b, c.png", r#"d "e".png"#, r#"say "x".png"#]
        );
        assert_eq!(comma_separated("a,"), ["a", ""]);
    }

    #[test]
    fn names_are_read_as_terminals_write_them() {
        let dir = tempfile::TempDir::new().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "x").unwrap();
            path
        };
        let spaced = file("my pic.png");
        let quote = file("it's.png");
        let comma = file("a,b.png");
        let (first, second) = (file("a"), file("b.png"));
        let shown = |path: &Path| path.to_str().unwrap().to_owned();
        let escaped = shown(&spaced).replace(' ', "\\ ");
        let address = format!("file://{}", shown(&spaced).replace(' ', "%20"));
        let local = address.replace("file://", "file://localhost");
        let shell = format!("'{}'", shown(&quote).replace('\'', r"'\''"));
        for (text, expected) in [
            (shown(&spaced), &spaced),
            (escaped, &spaced),
            (format!("'{}'", shown(&spaced)), &spaced),
            (format!("\"{}\"", shown(&spaced)), &spaced),
            (address.clone(), &spaced),
            (format!("'{address}'"), &spaced),
            (local, &spaced),
            (shown(&quote), &quote),
            (shell.clone(), &quote),
        ] {
            assert_eq!(dropped(&text), std::slice::from_ref(expected), "{text}");
        }
        let two = format!("'{}' {shell}", shown(&spaced));
        assert_eq!(dropped(&two), [spaced, quote]);
        assert_eq!(dropped("no such file"), [PathBuf::from("no such file")]);
        let home = std::env::home_dir().unwrap();
        assert_eq!(dropped("~/x.png"), [home.join("x.png")]);

        assert_eq!(pictures(std::slice::from_ref(&comma)), [comma]);
        let list = format!("{},{}", shown(&first), shown(&second));
        assert_eq!(pictures(&[list.into()]), [first, second]);
    }
}
