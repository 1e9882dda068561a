//! Flags that take lists, as llama-bench has them: values separated by commas, flags given several
//! times, and spans of numbers (`512-2048`, `512-2048+512`, `512-2048*2`).

use hae::{Error, Result, policy};

/// A list that is longer was not meant.
const MOST: usize = 1000;

/// The words of a flag that may be given several times.
fn words<'a>(flag: &'static str, given: &'a [String]) -> Result<Vec<&'a str>> {
    let words: Vec<&str> = given.iter().flat_map(|list| list.split(',')).collect();
    if words.iter().any(|word| word.trim().is_empty()) {
        let reason = format!("{:?} has an empty place", given.join(","));
        return Err(Error::option(flag, reason));
    }
    Ok(words.into_iter().map(str::trim).collect())
}

/// Values that `parse` knows.
pub fn values<T>(
    flag: &'static str,
    given: &[String],
    parse: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Vec<T>> {
    let words = words(flag, given)?;
    let parsed = words.into_iter().map(|word| {
        parse(word)
            .map_err(|reason| Error::option(flag, format!("\"{}\": {reason}", word.escape_debug())))
    });
    parsed.collect()
}

/// Numbers and spans of numbers, each from `least` to `most`.
pub fn numbers(flag: &'static str, given: &[String], least: u32, most: u32) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for word in words(flag, given)? {
        let bad =
            |reason: String| Error::option(flag, format!("\"{}\": {reason}", word.escape_debug()));
        let one = |text: &str| match text.parse() {
            Ok(n) if (least..=most).contains(&n) => Ok(n),
            _ => Err(bad(format!(
                "expected numbers from {least} to {most}, or spans such as 512-2048*2"
            ))),
        };
        let Some((first, rest)) = word.split_once('-') else {
            all.push(one(word)?);
            continue;
        };
        let part = |text: &str, least: u32, what: &str| {
            let n = text.parse().ok().filter(|&n: &u32| n >= least);
            n.ok_or_else(|| bad(format!("expected a {what} of at least {least}")))
        };
        // From n the span goes on to n * factor + step.
        let (last, factor, step) = match (rest.split_once('+'), rest.split_once('*')) {
            (Some((last, step)), _) => (last, 1, part(step, 1, "step")?),
            (None, Some((last, factor))) => (last, part(factor, 2, "factor")?, 0),
            (None, None) => (rest, 1, 1),
        };
        let (first, last) = (one(first)?, one(last)?);
        if first > last {
            return Err(bad("runs backwards".into()));
        }
        let next = |n: &u32| n.checked_mul(factor)?.checked_add(step).filter(|m| m > n);
        let span = std::iter::successors(Some(first), next);
        all.extend(span.take_while(|&n| n <= last).take(MOST + 1));
        if all.len() > MOST {
            return Err(bad(format!("is longer than {MOST} values")));
        }
    }
    Ok(all)
}

/// Pairs `prompt,generated`, one for each time that the flag was given, of numbers up to `most`.
pub fn pairs(flag: &'static str, given: &[String], most: u32) -> Result<Vec<(u32, u32)>> {
    let pair = |text: &String| {
        let numbers = numbers(flag, std::slice::from_ref(text), 1, most)?;
        match numbers[..] {
            [prompt, generated] => Ok((prompt, generated)),
            _ => {
                let reason = format!(
                    "\"{}\": expected the tokens of a prompt and of an answer, such as 512,128",
                    text.escape_debug()
                );
                Err(Error::option(flag, reason))
            }
        }
    };
    given.iter().map(pair).collect()
}

/// `WIDTHxHEIGHT`, in pixels.
pub fn size(text: &str) -> std::result::Result<(u32, u32), String> {
    let sides = text.split_once('x');
    let numbers = sides.and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    numbers.ok_or_else(|| "expected pixels such as 336x336".into())
}

/// Names of policies, none twice.
/// `twice_is_right`: whether one may be there more than once.
pub fn policies(given: &[String], twice_is_right: bool) -> Result<Vec<&'static str>> {
    let known = || policy::names().collect::<Vec<_>>().join(", ");
    let policies = values("--kv-policy", given, |name| {
        policy::names()
            .find(|known| *known == name)
            .ok_or_else(|| format!("expected names of {}", known()))
    })?;
    let twice = |i: &usize| policies[..*i].contains(&policies[*i]);
    match (0..policies.len()).find(twice).filter(|_| !twice_is_right) {
        Some(i) => {
            let reason = format!("{} is in the list twice", policies[i]);
            Err(Error::option("--kv-policy", reason))
        }
        None => Ok(policies),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &[&str]) -> Result<Vec<u32>> {
        let given: Vec<String> = text.iter().map(|&t| t.to_owned()).collect();
        numbers("-p", &given, 0, 1 << 20)
    }

    #[test]
    fn lists_are_llama_benchs() {
        assert_eq!(list(&["512"]).unwrap(), [512]);
        assert_eq!(list(&["1, 2", "3"]).unwrap(), [1, 2, 3]);
        assert_eq!(list(&["2-5"]).unwrap(), [2, 3, 4, 5]);
        assert_eq!(list(&["0-10+4,7"]).unwrap(), [0, 4, 8, 7]);
        assert_eq!(list(&["512-4096*2"]).unwrap(), [512, 1024, 2048, 4096]);
    }

    #[test]
    fn bad_lists_are_refused() {
        for text in [
            "", "1,", ",1", "x", "-1", "1-", "5-2", "1-9+0", "1-9*1", "0-9*2*2", "9999999",
            "0-9999",
        ] {
            let error = list(&[text]).unwrap_err().to_string();
            assert!(
                error.starts_with("-p: ") && !error.contains('\n'),
                "{error}"
            );
        }
        // A span that multiplies nothing would never end.
        assert_eq!(list(&["0-8*2"]).unwrap(), [0]);
    }

    #[test]
    fn pairs_and_sizes() {
        let pair = |text: &str| pairs("-pg", &[text.to_owned()], 1 << 20);
        assert_eq!(pair("512,128").unwrap(), [(512, 128)]);
        for text in ["512", "1,2,3", "0,5", "a,b"] {
            assert!(pair(text).unwrap_err().to_string().starts_with("-pg: "));
        }
        assert_eq!(size("336x224"), Ok((336, 224)));
        for text in ["336", "x", "1x", "-1x5", "1x2x3"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
