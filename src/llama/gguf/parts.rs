//! Names of models in several files, as `llama-gguf-split` gives them: `m-00001-of-00003.gguf`.

/// What a GGUF's name says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartName<'n> {
    /// Without `.gguf` and the number of a part.
    pub stem: &'n str,
    /// Of a model in several files: which, from 1, of how many. Otherwise 1 of 1.
    pub part: (u32, u32),
}

impl<'n> PartName<'n> {
    /// Of a file's name or path. `None`: no GGUF.
    pub fn of(path: &'n str) -> Option<Self> {
        let whole = path.strip_suffix(".gguf")?;
        let part = || {
            let (rest, count) = whole.rsplit_once("-of-")?;
            let (stem, index) = rest.rsplit_once('-')?;
            let number = |text: &str| {
                let digits = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
                digits.then(|| text.parse().ok()).flatten()
            };
            let part = (number(index)?, number(count)?);
            Some(PartName { stem, part })
        };
        let alone = PartName {
            stem: whole,
            part: (1, 1),
        };
        Some(part().unwrap_or(alone))
    }
}

/// The names of all parts of a model, in order; one that is in a single file is its own only part.
/// Whether they are there is not asked.
pub fn parts(path: &str) -> Vec<String> {
    match PartName::of(path) {
        Some(PartName {
            stem,
            part: (_, n @ 2..),
        }) => (1..=n)
            .map(|i| format!("{stem}-{i:05}-of-{n:05}.gguf"))
            .collect(),
        _ => vec![path.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_in_five_digits() {
        let expected: Vec<String> = (1..=3)
            .map(|i| format!("x/m-0000{i}-of-00003.gguf"))
            .collect();
        assert_eq!(parts("x/m-00002-of-00003.gguf"), expected);
        for whole in ["m-Q4_0.gguf", "m-1-of-2.gguf", "m-00001-of-00001.gguf", "m"] {
            assert_eq!(parts(whole), [whole]);
        }
        let name = PartName::of("m-00002-of-00003.gguf").unwrap();
        assert_eq!((name.stem, name.part), ("m", (2, 3)));
        assert_eq!(PartName::of("m.bin"), None);
    }
}
