//! Text files as editors write them: UTF-8, with or without a byte order mark, with lines that end
//! in LF or CR LF.

use std::path::Path;

use crate::error::{Error, Result};

const BOM: &[u8] = b"\xef\xbb\xbf";

/// The text in a file's bytes, without its byte order mark, CR LF as LF.
///
/// # Errors
/// As [`unchanged`].
pub fn decode(path: &Path, bytes: Vec<u8>) -> Result<String> {
    let text = unchanged(path, bytes)?;
    let without = text.strip_prefix('\u{feff}').unwrap_or(&text);
    Ok(match without.contains("\r\n") {
        true => without.replace("\r\n", "\n"),
        false => without.to_owned(),
    })
}

/// The text in a file's bytes, with all that an editor left in it.
///
/// # Errors
/// [`Error::File`] naming the first byte that is no UTF-8.
pub fn unchanged(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        if matches!(e.as_bytes(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
            return Error::file(path, "is UTF-16, expected UTF-8");
        }
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("is not UTF-8 at byte {at}, expected text"))
    })
}

/// Bytes without the mark that some editors put before UTF-8, which is none of JSON's.
pub fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BOM).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_carriage_returns_are_no_text() {
        let text = |bytes: &[u8]| decode(Path::new("f"), bytes.to_vec());
        assert_eq!(text(b"\xef\xbb\xbfa\r\nb\r\n").unwrap(), "a\nb\n");
        assert_eq!(text(b"a\rb\n\r").unwrap(), "a\rb\n\r");
        assert_eq!(text(b"\xef\xbb\xbf").unwrap(), "");
        let kept = unchanged(Path::new("f"), b"\xef\xbb\xbfa\r\n".to_vec());
        assert_eq!(kept.unwrap(), "\u{feff}a\r\n");
        let refused = |bytes: &[u8]| text(bytes).unwrap_err().to_string();
        assert_eq!(
            refused(b"caf\xe9"),
            "f: is not UTF-8 at byte 3, expected text"
        );
        assert_eq!(refused(b"\xff\xfea\0"), "f: is UTF-16, expected UTF-8");
        assert_eq!(without_bom(b"\xef\xbb\xbf{}"), b"{}");
        assert_eq!(without_bom(b"{}"), b"{}");
    }
}
