//! What templates know from Python: its JSON, its dates, and what it calls a sequence.

use std::io;
use std::time::SystemTime;

use jiff::tz::TimeZone;
use jiff::{Timestamp, fmt::strtime};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::Value as Json;
use serde_json::ser::Formatter;

/// Spaces of an indent at most: more is no layout.
const MOST_INDENT: usize = 64;

fn wrong(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Digits of a width at most that `format` takes: it would make the text before anybody counts.
const MOST_WIDTH: usize = 5;

/// Python's methods of texts, lists and mappings.
pub fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let wide = |text: &str| {
        let mut runs = text.split(|c: char| !c.is_ascii_digit());
        runs.any(|digits| digits.len() > MOST_WIDTH)
    };
    if name == "format" && value.as_str().is_some_and(wide) {
        return Err(wrong("format: a width above 99999"));
    }
    pycompat::unknown_method_callback(state, value, name, arguments)
}

/// What `{{ }}` writes: the crate's own way is Python's, but for large and small numbers.
pub fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if value.is_number()
        && !value.is_integer()
        && let Ok(number) = f64::try_from(value.clone())
        && number.is_finite()
    {
        return Ok(out.write_str(&float(number))?);
    }
    minijinja::escape_formatter(out, state, value)
}

/// Lists, texts and mappings: what has a length and items.
pub fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Bytes
    )
}

/// What a loop goes over; in Jinja2 also nothing at all.
pub fn is_iterable(value: &Value) -> bool {
    let kinds = [ValueKind::Undefined, ValueKind::Iterable];
    is_sequence(value) || kinds.contains(&value.kind())
}

/// A point in time on the clock of this place, by Python's and C's `strftime`.
pub fn strftime(now: SystemTime, format: &str) -> Result<String, Error> {
    let now = Timestamp::try_from(now).map_err(|e| wrong(e.to_string()))?;
    let now = now.to_zoned(TimeZone::system());
    strtime::format(format, &now).map_err(|e| wrong(e.to_string()))
}

/// `json.dumps` with `ensure_ascii=False`, which is transformers' `tojson`.
pub fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if indent.is_some_and(|n| n > MOST_INDENT) {
        return Err(wrong(format!("tojson: an indent above {MOST_INDENT}")));
    }
    if value.is_undefined() {
        return Err(wrong("tojson: the value is undefined"));
    }
    let mut json = serde_json::to_value(value).map_err(|e| wrong(format!("tojson: {e}")))?;
    if sort == Some(true) {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(wrong("tojson: separators are two")),
    };
    let layout = Layout {
        item,
        key,
        indent,
        depth: 0,
        has_value: false,
    };
    let text = dumps(&json, layout)?;
    let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
    state.consume_fuel(bytes / 64)?;
    Ok(match ascii {
        Some(true) => as_ascii(&text),
        _ => text,
    })
}

fn dumps(json: &Json, layout: Layout) -> Result<String, Error> {
    let mut out = Vec::new();
    let mut to = serde_json::Serializer::with_formatter(&mut out, layout);
    json.serialize(&mut to)
        .map_err(|e| wrong(format!("tojson: {e}")))?;
    String::from_utf8(out).map_err(|e| wrong(e.to_string()))
}

fn as_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            out.push_str(&format!("\\u{unit:04x}"));
        }
    }
    out
}

/// Python's layout of JSON.
struct Layout {
    item: String,
    key: String,
    /// Spaces of a level; `None`: all on one line.
    indent: Option<usize>,
    depth: usize,
    /// Whether the innermost list or object has something in it.
    has_value: bool,
}

impl Layout {
    fn line<W: ?Sized + io::Write>(&self, to: &mut W) -> io::Result<()> {
        match self.indent {
            Some(n) => write!(to, "\n{:1$}", "", n * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, to: &mut W, with: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        to.write_all(with)
    }

    fn close<W: ?Sized + io::Write>(&mut self, to: &mut W, with: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.line(to)?;
        }
        to.write_all(with)
    }

    fn next<W: ?Sized + io::Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if !first {
            to.write_all(self.item.as_bytes())?;
        }
        self.line(to)
    }
}

impl Formatter for Layout {
    fn write_f64<W: ?Sized + io::Write>(&mut self, to: &mut W, value: f64) -> io::Result<()> {
        to.write_all(float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.open(to, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.close(to, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(to, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.open(to, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.close(to, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(to, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

/// A finite number as Python writes it: the shortest digits that are it, with an exponent below 1e-4
/// and from 1e16 on.
fn float(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}
