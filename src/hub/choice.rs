//! Which of a repository's files are the model: llama.cpp's rules (`common/download.cpp`).

use crate::llama::gguf::PartName;

/// Tags that are looked for where none is named, the first that is there.
const USUAL: [&str; 2] = ["Q4_K_M", "Q8_0"];

/// Words in the names of GGUFs that belong to a model and are none.
const NO_MODEL: [&str; 6] = ["mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"];

/// Whether it is the (first) file of a model.
fn begins_model(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    let other = NO_MODEL.iter().any(|word| file.contains(word));
    !other && PartName::of(path).is_some_and(|name| name.part.0 == 1)
}

/// Whether a path holds the tag, followed by a dot or a dash, in any case.
fn has_tag(path: &str, tag: &str) -> bool {
    let (path, tag) = (path.to_ascii_uppercase(), tag.to_ascii_uppercase());
    path.match_indices(&tag).any(|(at, _)| {
        let next = path[at + tag.len()..].chars().next();
        matches!(next, Some('.' | '-'))
    })
}

/// The file of a model, the first of its parts. With a tag only a file with that tag; without one
/// `Q4_K_M`, else `Q8_0`, else the first.
pub fn model<'f>(files: &'f [String], tag: Option<&str>) -> Option<&'f String> {
    let models = || files.iter().filter(|path| begins_model(path));
    let tagged = |tag: &str| models().find(|path| has_tag(path, tag));
    match tag {
        Some(tag) => tagged(tag),
        None => USUAL
            .into_iter()
            .find_map(tagged)
            .or_else(|| models().next()),
    }
}

/// Bits that the end of a name speaks of: 4 for `-Q4_K_M` and `.Q4_0`, 16 for `-F16`. 0: none.
fn bits(path: &str) -> u32 {
    let stem = PartName::of(path).map_or(path, |name| name.stem);
    let tag = stem.rsplit(['-', '.']).next().unwrap_or_default();
    let is_word = tag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !is_word || tag.len() == stem.len() {
        return 0;
    }
    let digits = tag.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(0)
}

/// The vision file for a model: in its folder or one above it, the deepest; of those the one whose
/// bits are nearest, the first.
pub fn mmproj<'f>(files: &'f [String], model: &str) -> Option<&'f String> {
    let folder = |path: &'f str| path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let own = model.rsplit_once('/').map_or("", |(folder, _)| folder);
    let above = |path: &'f str| {
        let theirs = folder(path);
        let below = own.strip_prefix(theirs);
        theirs.is_empty() || below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let depth = |path: &'f str| path.matches('/').count();
    files
        .iter()
        .filter(|path| path.ends_with(".gguf") && path.contains("mmproj") && above(path))
        .min_by_key(|path| {
            let distance = bits(path).abs_diff(bits(model));
            (std::cmp::Reverse(depth(path)), distance)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn the_tag_decides_then_q4_k_m_then_q8_0_then_the_first() {
        let all = files(&[
            "README.md",
            "a-F16.gguf",
            "a-IQ4_XS.gguf",
            "a-Q4_K_M.gguf",
            "a-Q8_0.gguf",
            "imatrix.gguf",
            "mmproj-Q4_K_M.gguf",
        ]);
        let chosen = |files: &[String], tag| model(files, tag).cloned();
        for (tag, expected) in [
            (None, Some("a-Q4_K_M.gguf")),
            (Some("q8_0"), Some("a-Q8_0.gguf")),
            (Some("F16"), Some("a-F16.gguf")),
            (Some("Q4_K_S"), None),
            // No tag by itself, as more follows it.
            (Some("Q4_K"), None),
        ] {
            assert_eq!(chosen(&all, tag).as_deref(), expected, "{tag:?}");
        }
        let without = files(&["b-F32.gguf", "b-Q8_0.gguf", "mmproj.gguf"]);
        assert_eq!(chosen(&without, None).unwrap(), "b-Q8_0.gguf");
        let plain = files(&["mmproj.gguf", "x/c.gguf", "x/d.gguf"]);
        assert_eq!(chosen(&plain, None).unwrap(), "x/c.gguf");
        assert_eq!(chosen(&plain[..1], None), None);
        // A tag may be a folder's: the whole path is looked at.
        let folders = files(&["Q5_K_M/e.gguf", "e-Q5_K_M-00001-of-00002.gguf"]);
        assert_eq!(
            chosen(&folders, Some("Q5_K_M")).unwrap(),
            "e-Q5_K_M-00001-of-00002.gguf"
        );
    }

    #[test]
    fn a_model_in_parts_begins_with_the_first() {
        let all = files(&["m-Q4_0-00002-of-00003.gguf", "m-Q4_0-00001-of-00003.gguf"]);
        let first = model(&all, Some("Q4_0")).unwrap();
        assert_eq!(first, &all[1]);
    }

    #[test]
    fn the_vision_file_is_near_in_place_and_bits() {
        let all = files(&[
            "mmproj-F32.gguf",
            "mmproj-F16.gguf",
            "mmproj-Q8_0.gguf",
            "big/mmproj-F16.gguf",
            "big/deep/mmproj-Q8_0.gguf",
        ]);
        for (model, expected) in [
            ("m-Q4_K_M.gguf", "mmproj-Q8_0.gguf"),
            ("m-F16.gguf", "mmproj-F16.gguf"),
            ("m.gguf", "mmproj-Q8_0.gguf"),
            ("m-F32-00001-of-00002.gguf", "mmproj-F32.gguf"),
            ("big/m-Q8_0.gguf", "big/mmproj-F16.gguf"),
            ("bigger/m-Q8_0.gguf", "mmproj-Q8_0.gguf"),
        ] {
            assert_eq!(mmproj(&all, model).unwrap(), expected, "{model}");
        }
        assert_eq!(mmproj(&files(&["other/mmproj.gguf"]), "m.gguf"), None);
    }
}
