//! Text as answers are compared.

/// What exact match compares: lower case, white space as single spaces, without quotation marks
/// around the whole and full stops at its end.
pub fn normalised(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ").to_lowercase();
    text.trim_matches(['"', '\''])
        .trim_end_matches('.')
        .trim_end()
        .to_owned()
}
