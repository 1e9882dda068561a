//! A token can end in the middle of a character: bytes are held back until it is whole.

/// Turns token bytes into text.
#[derive(Debug, Default)]
pub struct Utf8Stream {
    /// Bytes that no text was made of yet; a tokenizer appends to it.
    pub held: Vec<u8>,
}

impl Utf8Stream {
    /// Appends all complete characters to `text`. What can be no character becomes U+FFFD; the
    /// beginning of one is held back.
    pub fn take(&mut self, text: &mut String) {
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let tail = chunk.invalid();
            let is_last = done + tail.len() == self.held.len();
            match std::str::from_utf8(tail) {
                Ok(_) => {}
                // Without an error length nothing is wrong yet: the rest of it is to come.
                Err(e) if is_last && e.error_len().is_none() => break,
                Err(_) => text.push(char::REPLACEMENT_CHARACTER),
            }
            done += tail.len();
        }
        self.held.drain(..done);
    }

    /// At the end of a generation: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        text.push_str(&String::from_utf8_lossy(&self.held));
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text that is out after each piece, then at the end.
    fn stream(pieces: &[&[u8]]) -> Vec<String> {
        let (mut stream, mut text) = (Utf8Stream::default(), String::new());
        let mut after = Vec::new();
        for piece in pieces {
            stream.held.extend_from_slice(piece);
            stream.take(&mut text);
            after.push(text.clone());
        }
        stream.finish(&mut text);
        after.push(text);
        after
    }

    #[test]
    fn characters_come_whole() {
        assert_eq!(
            stream(&[b"a\xe2\x82", b"\xacb"]),
            ["a", "a\u{20ac}b", "a\u{20ac}b"]
        );
        assert_eq!(
            stream(&[b"\xf0", b"\x9f", b"\x98", b"\x80"])[2..],
            ["", "\u{1f600}", "\u{1f600}"]
        );
    }

    #[test]
    fn what_is_no_character_is_replaced() {
        assert_eq!(stream(&[b"a\xffb"])[0], "a\u{fffd}b");
        assert_eq!(
            stream(&[b"a\xe2\x82", b"b"]),
            ["a", "a\u{fffd}b", "a\u{fffd}b"]
        );
        assert_eq!(stream(&[b"a\xe2\x82"]), ["a", "a\u{fffd}"]);
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_text(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            text in "\\PC{0,12}",
            size in 1..5usize,
        ) {
            for bytes in [bytes.as_slice(), text.as_bytes()] {
                let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
                let expected = String::from_utf8_lossy(bytes);
                prop_assert_eq!(stream(&pieces).pop().unwrap(), expected);
            }
        }
    }
}
