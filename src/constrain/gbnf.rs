//! llama.cpp's grammars (GBNF), as `llama-grammar.cpp` reads them, to what llguidance takes.
//!
//! A grammar whose rules do not lead back to themselves is one regular expression, and becomes one. Any
//! other goes over character by character: each terminal is a class of single characters, so that
//! the lexer never has to choose how far one reaches, and the language is the same.

mod read;
#[cfg(test)]
mod tests;

use std::fmt::Write;

use crate::error::{Error, Result};
use read::{Expr, Grammar};

/// Bytes of one expression at most; above that the rules stay rules.
const MOST_REGEX: usize = 200_000;
/// And of those of all rules.
const MOST_REGEXES: usize = 4 << 20;

/// What a grammar is to llguidance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Converted {
    /// One expression, that the whole answer matches.
    Regex(String),
    /// Rules, in llguidance's Lark.
    Lark(String),
}

/// # Errors
/// [`Error::Option`] with the line of what is wrong.
pub(super) fn converted(text: &str) -> Result<Converted> {
    let grammar = Grammar::read(text).map_err(|reason| Error::option("grammar", reason))?;
    Ok(match regex(&grammar) {
        Some(regex) => Converted::Regex(regex),
        None => Converted::Lark(lark(&grammar)),
    })
}

/// `None` where a rule leads back to itself, or the expression is too long.
fn regex(grammar: &Grammar) -> Option<String> {
    let mut of_rules: Vec<Option<String>> = vec![None; grammar.rules.len()];
    let mut on_the_way = vec![false; grammar.rules.len()];
    let mut bytes = 0;
    // Rules within each other, with what they name that was not looked at yet: a grammar may be deeper
    // than the stack.
    let names = |rule: usize| (rule, grammar.rules[rule].names());
    let mut open = vec![names(grammar.root)];
    on_the_way[grammar.root] = true;
    while let Some((rule, needs)) = open.last_mut() {
        match needs.pop() {
            Some(next) if on_the_way[next] => return None,
            Some(next) if of_rules[next].is_some() => {}
            Some(next) => {
                on_the_way[next] = true;
                open.push(names(next));
            }
            None => {
                let rule = *rule;
                let mut out = String::new();
                write_regex(&grammar.rules[rule], &of_rules, &mut out)?;
                bytes += out.len();
                if bytes > MOST_REGEXES {
                    return None;
                }
                of_rules[rule] = Some(out);
                on_the_way[rule] = false;
                open.pop();
            }
        }
    }
    of_rules.swap_remove(grammar.root)
}

fn write_regex(expr: &Expr, of_rules: &[Option<String>], out: &mut String) -> Option<()> {
    if out.len() > MOST_REGEX {
        return None;
    }
    match expr {
        Expr::Class(class) => class.write(out),
        Expr::Rule(rule) => {
            out.push_str("(?:");
            out.push_str(of_rules[*rule].as_ref()?);
            out.push(')');
        }
        Expr::Sequence(all) => {
            for part in all {
                match part {
                    Expr::Either(_) => {
                        out.push_str("(?:");
                        write_regex(part, of_rules, out)?;
                        out.push(')');
                    }
                    part => write_regex(part, of_rules, out)?,
                }
            }
        }
        Expr::Either(all) => {
            for (i, part) in all.iter().enumerate() {
                out.push_str(if i > 0 { "|" } else { "" });
                write_regex(part, of_rules, out)?;
            }
        }
        Expr::Repeat(part, min, max) => {
            out.push_str("(?:");
            write_regex(part, of_rules, out)?;
            out.push(')');
            write_times(*min, *max, out);
        }
    }
    (out.len() <= MOST_REGEX).then_some(())
}

fn write_times(min: u32, max: Option<u32>, out: &mut String) {
    // A String takes all that is written.
    let _ = match max {
        Some(max) => write!(out, "{{{min},{max}}}"),
        None => write!(out, "{{{min},}}"),
    };
}

fn lark(grammar: &Grammar) -> String {
    let mut out = format!("start: r{}\n", grammar.root);
    for (i, rule) in grammar.rules.iter().enumerate() {
        out.push_str(&format!("r{i}: "));
        write_lark(rule, &mut out);
        out.push('\n');
    }
    out
}

fn write_lark(expr: &Expr, out: &mut String) {
    match expr {
        Expr::Class(class) => {
            out.push('/');
            class.write(out);
            out.push('/');
        }
        Expr::Rule(rule) => out.push_str(&format!("r{rule}")),
        Expr::Sequence(all) if all.is_empty() => out.push_str("\"\""),
        Expr::Sequence(all) => {
            for (i, part) in all.iter().enumerate() {
                out.push_str(if i > 0 { " " } else { "" });
                write_group(part, out);
            }
        }
        Expr::Either(all) => {
            for (i, part) in all.iter().enumerate() {
                out.push_str(if i > 0 { " | " } else { "" });
                write_lark(part, out);
            }
        }
        Expr::Repeat(part, min, max) => {
            out.push('(');
            write_lark(part, out);
            out.push(')');
            match (min, max) {
                (0, None) => out.push('*'),
                (1, None) => out.push('+'),
                (0, Some(1)) => out.push('?'),
                (min, max) => write_times(*min, *max, out),
            }
        }
    }
}

fn write_group(expr: &Expr, out: &mut String) {
    match expr {
        Expr::Either(_) => {
            out.push('(');
            write_lark(expr, out);
            out.push(')');
        }
        expr => write_lark(expr, out),
    }
}
