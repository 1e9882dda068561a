//! Texts that end an answer: what may still become one is held back.

/// The stop texts of an answer, and what of it was not told yet.
pub(super) struct Stops {
    texts: Vec<String>,
    held: String,
}

impl Stops {
    /// None of the texts is empty, or it is passed over.
    pub fn new(mut texts: Vec<String>) -> Self {
        texts.retain(|text| !text.is_empty());
        Stops {
            texts,
            held: String::new(),
        }
    }

    /// Adds text that was said. Gives what can be told now, and the stop text that ended it: the one that
    /// begins first, the longest of several.
    pub fn add(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let found = self.texts.iter().filter_map(|stop| {
            let at = self.held.find(stop.as_str())?;
            Some((at, std::cmp::Reverse(stop.len()), stop))
        });
        if let Some((at, _, stop)) = found.min() {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.texts.iter().map(|stop| may_begin(&self.held, stop));
        let split = self.held.len() - keep.max().unwrap_or(0);
        let rest = self.held.split_off(split);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What was held back: no stop text comes any more.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of the text that the stop text begins with; less than all of it.
fn may_begin(text: &str, stop: &str) -> usize {
    let starts = text.char_indices().map(|(at, _)| at);
    let mut tails = starts
        .map(|at| &text[at..])
        .filter(|tail| tail.len() < stop.len());
    tails
        .find(|tail| stop.starts_with(tail))
        .map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(stops: &[&str], said: &[&str]) -> (Vec<String>, Option<String>, String) {
        let mut stops = Stops::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut all = Vec::new();
        for text in said {
            let (text, stop) = stops.add(text);
            all.push(text);
            if stop.is_some() {
                return (all, stop, stops.rest());
            }
        }
        let rest = stops.rest();
        (all, None, rest)
    }

    #[test]
    fn what_may_become_a_stop_text_is_held_back() {
        let (all, stop, rest) = told(&["\n\nUser:"], &["Hi", "\n", "\nUs", "er", ": what"]);
        assert_eq!(all, ["Hi", "", "", "", ""]);
        assert_eq!((stop.as_deref(), &*rest), (Some("\n\nUser:"), ""));
        let (all, stop, rest) = told(&["\n\nUser:"], &["Hi\n\nUse", "ful", "\n"]);
        assert_eq!(all, ["Hi", "\n\nUseful", ""]);
        assert_eq!((stop, &*rest), (None, "\n"));
    }

    #[test]
    fn the_first_counts_and_then_the_longest() {
        let (all, stop, _) = told(&["b", "abc", "", "ab"], &["xabcd"]);
        assert_eq!((all, stop.as_deref()), (vec!["x".to_owned()], Some("abc")));
        let (all, stop, _) = told(&["aab"], &["aa", "ab"]);
        assert_eq!(all, ["", "a"]);
        assert_eq!(stop.as_deref(), Some("aab"));
        let (all, ..) = told(&["öä"], &["ö", "ü"]);
        assert_eq!(all, ["", "öü"]);
        let (all, stop, _) = told(&[], &["a", "b"]);
        assert_eq!((all, stop), (vec!["a".to_owned(), "b".to_owned()], None));
    }
}
