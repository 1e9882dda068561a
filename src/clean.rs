//! Texts of strangers in messages and on a terminal: characters that would move its cursor, or turn its lines around,
//! are shown by their numbers.

/// Whether a terminal does something with it other than showing it.
fn acts(c: char) -> bool {
    let turns = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    c.is_control() || turns
}

/// The text with such characters as Rust writes them: `\n`, `\u{1b}`.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match acts(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// JSON whose texts hold none of them: the same JSON.
pub fn clean_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match acts(c) && c != '\n' {
            // All are below 2^16.
            true => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal() {
        assert_eq!(
            clean("a\x1b[2J\r\n\u{9b}b\u{202e}é😀"),
            "a\\u{1b}[2J\\r\\n\\u{9b}b\\u{202e}é😀"
        );
        let text = "\u{9b}\u{7f}\u{202e}\u{feff}\n\t";
        let json = serde_json::to_string(text).unwrap();
        let cleaned = clean_json(&json);
        assert!(
            cleaned.is_ascii() && !cleaned.contains('\u{7f}'),
            "{cleaned}"
        );
        let back: String = serde_json::from_str(&cleaned).unwrap();
        assert_eq!(back, text);
    }
}
