//! Text as answers are compared.

/// Lower case, white space as single spaces.
pub fn folded(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

/// What exact match compares: [`folded`], without quotation marks around the whole and full stops at its end.
pub fn normalised(text: &str) -> String {
    folded(text)
        .trim_matches(['"', '\''])
        .trim_end_matches('.')
        .trim_end()
        .to_owned()
}
