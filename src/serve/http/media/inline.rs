//! Pictures in the request itself.

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// With or without the signs that fill up the end.
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);

/// The bytes of a `data:` address.
pub(super) fn data(address: &str, most: u64) -> Result<Vec<u8>, String> {
    let rest = address.get("data:".len()..).unwrap_or_default();
    let (kind, body) = rest
        .split_once(',')
        .ok_or("a data address without a comma")?;
    let mut kind = kind.split(';');
    let mime = kind.next().unwrap_or_default().trim().to_ascii_lowercase();
    if !mime.starts_with("image/") {
        return Err(format!("data of the type {mime:?}, expected image/..."));
    }
    if !kind.any(|part| part.trim().eq_ignore_ascii_case("base64")) {
        return Err("data that is not base64".into());
    }
    base64(body, most)
}

/// The bytes that base64 stands for.
pub(super) fn base64(text: &str, most: u64) -> Result<Vec<u8>, String> {
    // Some encoders break lines.
    let text: String = match text.contains(|c: char| c.is_ascii_whitespace()) {
        true => text.chars().filter(|c| !c.is_ascii_whitespace()).collect(),
        false => text.to_owned(),
    };
    if text.is_empty() {
        return Err("is empty, expected a picture".into());
    }
    if text.len() as u64 / 4 * 3 > most {
        return Err(format!(
            "has more than {most} bytes, the limit for a picture"
        ));
    }
    let alphabet = match text.contains(['-', '_']) {
        true => &base64::alphabet::URL_SAFE,
        false => &base64::alphabet::STANDARD,
    };
    let engine = GeneralPurpose::new(alphabet, LENIENT);
    engine
        .decode(&text)
        .map_err(|e| format!("is not valid base64: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_read_with_and_without_its_last_signs() {
        for address in [
            "data:image/png;base64,AQIDBA==",
            "DATA:Image/PNG;charset=x;Base64,AQIDBA",
            "data:image/png;base64,AQ\nID\r\nBA==",
        ] {
            assert_eq!(data(address, 100), Ok(vec![1, 2, 3, 4]), "{address}");
        }
        assert_eq!(base64("-_-_", 100), Ok(vec![251, 255, 191]));
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        for address in [
            "data:text/html;base64,aGVsbG8=",
            "data:image/png,AQID",
            "data:image/png;base64",
            "data:image/png;base64,",
            "data:image/png;base64,!!!",
            "data:;base64,AQID",
            "data:",
        ] {
            assert!(data(address, 100).is_err(), "{address}");
        }
        let long = "AAAA".repeat(10);
        assert_eq!(base64(&long, 30).map(|b| b.len()), Ok(30));
        let error = base64(&long, 29).unwrap_err();
        assert!(error.contains("more than 29 bytes"), "{error}");
    }
}
