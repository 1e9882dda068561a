//! The text of a grammar, to its rules.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Groups within groups.
const MOST_DEEP: usize = 200;
/// Repetitions of a repetition.
const MOST_REPEATS: usize = 8;
/// llama.cpp's own limit of a repetition (`MAX_REPETITION_THRESHOLD`).
const MOST_TIMES: u32 = 2000;
/// Bytes of a grammar.
const MOST_TEXT: usize = 1 << 20;

/// What a rule stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// One character.
    Class(Class),
    /// What that rule stands for.
    Rule(usize),
    /// One after the other; none: nothing.
    Sequence(Vec<Expr>),
    /// One of them.
    Either(Vec<Expr>),
    /// So many times, at least and at most.
    Repeat(Box<Expr>, u32, Option<u32>),
}

impl Expr {
    /// The rules that it names.
    pub fn names(&self) -> Vec<usize> {
        match self {
            Expr::Class(_) => Vec::new(),
            Expr::Rule(rule) => vec![*rule],
            Expr::Sequence(all) | Expr::Either(all) => all.iter().flat_map(Expr::names).collect(),
            Expr::Repeat(part, ..) => part.names(),
        }
    }
}

/// Characters, or all but these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Whether it is all others.
    pub negated: bool,
    /// From and to, both included.
    pub ranges: Vec<(char, char)>,
}

impl Class {
    /// As a class of a regular expression.
    pub fn write(&self, out: &mut String) {
        out.push_str(if self.negated { "[^" } else { "[" });
        for (from, to) in &self.ranges {
            // A String takes all that is written.
            let _ = match from == to {
                true => write!(out, "\\u{{{:x}}}", u32::from(*from)),
                false => write!(
                    out,
                    "\\u{{{:x}}}-\\u{{{:x}}}",
                    u32::from(*from),
                    u32::from(*to)
                ),
            };
        }
        out.push(']');
    }
}

/// Rules by number.
#[derive(Debug)]
pub struct Grammar {
    pub rules: Vec<Expr>,
    pub root: usize,
}

impl Grammar {
    /// # Errors
    /// What is wrong, and in which line.
    pub fn read(text: &str) -> Result<Self, String> {
        if text.len() > MOST_TEXT {
            return Err(format!(
                "{} bytes, expected at most {MOST_TEXT}",
                text.len()
            ));
        }
        let mut reader = Reader {
            text,
            at: 0,
            names: BTreeMap::new(),
            rules: Vec::new(),
        };
        reader.grammar().map_err(|reason| {
            let line = text[..reader.at].matches('\n').count() + 1;
            format!("line {line}: {reason}")
        })?;
        let Reader { names, rules, .. } = reader;
        let undefined = names.iter().find(|&(_, &rule)| rules[rule].is_none());
        if let Some((name, _)) = undefined {
            return Err(format!("no rule {name}, which others name"));
        }
        let root = names
            .get("root")
            .ok_or("no rule root, with which it begins")?;
        Ok(Grammar {
            root: *root,
            rules: rules.into_iter().flatten().collect(),
        })
    }
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
    names: BTreeMap<&'t str, usize>,
    rules: Vec<Option<Expr>>,
}

impl<'t> Reader<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn takes(&mut self, what: &str) -> bool {
        let found = self.rest().starts_with(what);
        self.at += if found { what.len() } else { 0 };
        found
    }

    /// Over white space and comments.
    fn space(&mut self, newlines: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if newlines => self.at += 1,
                '#' => {
                    let rest = self.rest();
                    self.at += rest.find(['\r', '\n']).unwrap_or(rest.len());
                }
                _ => break,
            }
        }
    }

    fn name(&mut self) -> Result<&'t str, String> {
        let rest = self.rest();
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        if end == 0 {
            return Err(format!("{}, expected a name", self.found()));
        }
        self.at += end;
        Ok(&rest[..end])
    }

    fn found(&self) -> String {
        self.peek().map_or("the end".into(), |c| format!("{c:?}"))
    }

    fn number_of(&mut self, name: &'t str) -> usize {
        let n = self.rules.len();
        let number = *self.names.entry(name).or_insert(n);
        if number == n {
            self.rules.push(None);
        }
        number
    }

    fn grammar(&mut self) -> Result<(), String> {
        self.space(true);
        while self.peek().is_some() {
            let name = self.name()?;
            let rule = self.number_of(name);
            self.space(false);
            if !self.takes("::=") {
                return Err(format!("{}, expected ::= behind {name}", self.found()));
            }
            self.space(true);
            let expr = self.either(0)?;
            self.rules[rule] = Some(expr);
            match self.peek() {
                None | Some('\r' | '\n') => self.space(true),
                Some(_) => return Err(format!("{}, expected the end of the rule", self.found())),
            }
        }
        Ok(())
    }

    fn either(&mut self, depth: usize) -> Result<Expr, String> {
        let mut all = vec![self.sequence(depth)?];
        while self.takes("|") {
            self.space(true);
            all.push(self.sequence(depth)?);
        }
        Ok(match all.len() {
            1 => all.remove(0),
            _ => Expr::Either(all),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, String> {
        let mut all: Vec<Expr> = Vec::new();
        let mut repeats = 0;
        while let Some(c) = self.peek() {
            let part = match c {
                '"' => self.literal()?,
                '[' => self.class()?,
                '.' => {
                    self.at += 1;
                    let ranges = vec![('\0', char::MAX)];
                    Expr::Class(Class {
                        negated: false,
                        ranges,
                    })
                }
                '(' => {
                    self.at += 1;
                    if depth == MOST_DEEP {
                        return Err(format!("more than {MOST_DEEP} groups within each other"));
                    }
                    self.space(true);
                    let group = self.either(depth + 1)?;
                    if !self.takes(")") {
                        return Err(format!("{}, expected )", self.found()));
                    }
                    group
                }
                '*' | '+' | '?' | '{' => {
                    let (min, max) = self.times()?;
                    let Some(part) = all.pop() else {
                        return Err(format!("{c:?} with nothing before it"));
                    };
                    repeats += 1;
                    if repeats > MOST_REPEATS {
                        return Err(format!(
                            "more than {MOST_REPEATS} repetitions of one another"
                        ));
                    }
                    all.push(Expr::Repeat(Box::new(part), min, max));
                    self.space(depth > 0);
                    continue;
                }
                '<' | '!' => {
                    return Err(
                        "a token, which llama.cpp takes and this does not: expected its text"
                            .into(),
                    );
                }
                c if c.is_ascii_alphanumeric() || c == '-' || c == '_' => {
                    let name = self.name()?;
                    Expr::Rule(self.number_of(name))
                }
                _ => break,
            };
            repeats = 0;
            all.push(part);
            self.space(depth > 0);
        }
        Ok(match all.len() {
            1 => all.remove(0),
            _ => Expr::Sequence(all),
        })
    }

    fn times(&mut self) -> Result<(u32, Option<u32>), String> {
        match self.next() {
            Some('*') => return Ok((0, None)),
            Some('+') => return Ok((1, None)),
            Some('?') => return Ok((0, Some(1))),
            _ => {}
        }
        self.space(true);
        let min = self.number()?;
        self.space(true);
        let times = match self.takes(",") {
            false => (min.ok_or("no number in {}")?, min),
            true => {
                self.space(true);
                (min.unwrap_or(0), self.number()?)
            }
        };
        self.space(true);
        if !self.takes("}") {
            return Err(format!("{}, expected }}", self.found()));
        }
        match times {
            (min, Some(max)) if max < min => {
                Err(format!("{{{min},{max}}}, expected the smaller first"))
            }
            times => Ok(times),
        }
    }

    fn number(&mut self) -> Result<Option<u32>, String> {
        let rest = self.rest();
        let end = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        self.at += end;
        if end == 0 {
            return Ok(None);
        }
        match rest[..end].parse() {
            Ok(n) if n <= MOST_TIMES => Ok(Some(n)),
            _ => Err(format!(
                "{} times, expected at most {MOST_TIMES}",
                &rest[..end.min(20)]
            )),
        }
    }

    fn literal(&mut self) -> Result<Expr, String> {
        self.at += 1;
        let mut all = Vec::new();
        loop {
            match self.peek() {
                Some('"') => break,
                None => return Err("a text without its end".into()),
                Some(_) => {
                    let c = self.char()?;
                    all.push(Expr::Class(Class {
                        negated: false,
                        ranges: vec![(c, c)],
                    }));
                }
            }
        }
        self.at += 1;
        Ok(Expr::Sequence(all))
    }

    fn class(&mut self) -> Result<Expr, String> {
        self.at += 1;
        let negated = self.takes("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                Some(']') => break,
                None => return Err("a [ without its end".into()),
                Some(_) => {}
            }
            let from = self.char()?;
            let is_range = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let to = match is_range {
                true => {
                    self.at += 1;
                    match self.peek() {
                        None => return Err("a [ without its end".into()),
                        Some(_) => self.char()?,
                    }
                }
                false => from,
            };
            if to < from {
                return Err(format!("{from:?}-{to:?}, expected the smaller first"));
            }
            ranges.push((from, to));
        }
        self.at += 1;
        if ranges.is_empty() {
            if !negated {
                return Err("[], which no character is in".into());
            }
            return Ok(Expr::Class(Class {
                negated: false,
                ranges: vec![('\0', char::MAX)],
            }));
        }
        Ok(Expr::Class(Class { negated, ranges }))
    }

    /// A character, or what an escape stands for.
    fn char(&mut self) -> Result<char, String> {
        match self.next() {
            Some('\\') => {}
            Some(c) => return Ok(c),
            None => return Err("the end, expected a character".into()),
        }
        let escaped = self.next().ok_or("a backslash at the end")?;
        let digits = match escaped {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            't' => return Ok('\t'),
            'r' => return Ok('\r'),
            'n' => return Ok('\n'),
            '\\' | '"' | '[' | ']' => return Ok(escaped),
            other => {
                let other = other.escape_debug();
                return Err(format!(
                    "\\{other}, expected \\n, \\r, \\t, \\\\, \\\", \\[, \\], \\x, \\u or \\U"
                ));
            }
        };
        let hex = self.rest().get(..digits).unwrap_or_default();
        let number = Some(hex)
            .filter(|hex| hex.len() == digits && hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u32::from_str_radix(hex, 16).ok());
        self.at += hex.len();
        number
            .and_then(char::from_u32)
            .ok_or_else(|| format!("\\{escaped}, expected {digits} digits of a character"))
    }
}
