//! Questions whose answer stands somewhere in a long text, and is lost with the cells that hold it.
//!
//! The text is prose of any kind, cut between sentences. Into it go one or more sentences that have
//! nothing to do with it, and behind it is asked for them. The same text, seed and number of tokens give the
//! same questions.

mod prose;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::noise::Noise;
use prose::Prose;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// One number, which the text says twice (Mohtashami and Jaggi 2023, arXiv 2305.16300).
    Passkey,
    /// One of four words, each of a city, at four places.
    Facts,
    /// One of two words. They stand in the first half of the text, and which city is meant is said
    /// between the halves alone.
    Middle,
    /// All four words, one question after the other about the same text.
    Turns,
    /// Words, in their order.
    List,
    /// Four rules in front of the text, of what to answer to a word; one of them is asked for.
    Instruction,
}

impl Task {
    /// Each of them once.
    pub const ALL: [Task; 6] = [
        Task::Passkey,
        Task::Facts,
        Task::Middle,
        Task::Turns,
        Task::List,
        Task::Instruction,
    ];

    /// As tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Task::Passkey => "passkey",
            Task::Facts => "facts",
            Task::Middle => "middle",
            Task::Turns => "turns",
            Task::List => "list",
            Task::Instruction => "instruction",
        }
    }
}

/// How many questions, and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which tasks, by turns.
    pub tasks: Vec<Task>,
    /// Questions of each task.
    pub each: usize,
    /// Tokens of a prompt at most, without what a chat template adds.
    pub tokens: usize,
    /// The same seed gives the same questions.
    pub seed: u64,
}

/// A line of a question file ([`super::files`]).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Task, tokens, seed and number.
    pub id: String,
    /// Where the sentence that is asked for stands: 0 in front of the text, 1 behind it. Of several, the
    /// one that is asked for first.
    pub depth: f64,
    /// A question alone.
    #[serde(flatten)]
    pub alone: Option<Ask>,
    /// Or several, one after the other; the text is in the first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<Ask>,
}

/// One thing that is asked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ask {
    /// What tables group by: the task's name, and which of several turns.
    pub task: String,
    /// What a user says.
    pub question: String,
    /// A text that ends where the answer has to follow, for a model that continues texts.
    pub prompt: String,
    /// The key.
    pub answer: String,
    /// How answers are compared.
    pub r#match: &'static str,
    /// Keys of others in the same text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrong: Vec<String>,
}

/// Makes questions of all tasks by turns. `count` says how many tokens a piece of text has.
///
/// # Errors
/// Those of `count`; [`Error::Option`] where the text is too short, so few tokens do not hold the
/// sentences that are asked for, or the text's own sentences do not fill them to nine tenths.
pub fn questions(
    text: &str,
    options: &Options,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<Vec<Line>> {
    let prose = Prose::of(text, count)?;
    let mut lines = Vec::new();
    for i in 0..options.each {
        // Multiples of the golden ratio: any number of them, from the first, is spread evenly.
        let depth = (0.5 + i as f64 * 0.618_033_988_749_895).fract();
        for &task in &options.tasks {
            // A question is the same whatever else is in the file.
            let mut own = Noise::new(options.seed ^ ((100 * i + task as usize) as u64) << 32);
            let mut noise = Noise::new(own.bits());
            let start = noise.below(prose.sentences.len().max(1));
            let asked = Asked::draw(task, depth, &mut noise);
            lines.push(asked.line((i, start), &prose, options, count)?);
        }
    }
    Ok(lines)
}

/// What is asked about a text, without the text.
struct Asked {
    task: Task,
    /// In front of the text.
    front: String,
    /// Sentences within it, and where.
    within: Vec<(f64, String)>,
    /// Behind it.
    ends: Vec<End>,
    depth: f64,
}

/// A question behind a text.
struct End {
    /// As a user asks.
    question: String,
    /// As a text goes on.
    cue: String,
    answer: String,
    wrong: Vec<String>,
}

impl End {
    fn new(question: &str, cue: &str, answer: &str) -> Self {
        End {
            question: question.to_owned(),
            cue: cue.to_owned(),
            answer: answer.to_owned(),
            wrong: Vec::new(),
        }
    }
}

impl Asked {
    fn draw(task: Task, depth: f64, noise: &mut Noise) -> Self {
        let mut asked = Asked {
            task,
            front: String::new(),
            within: Vec::new(),
            ends: Vec::new(),
            depth,
        };
        match task {
            Task::Passkey => {
                let key = (10_000 + noise.below(90_000)).to_string();
                let sentence =
                    format!("The pass key is {key}. Remember it. {key} is the pass key.");
                asked.within.push((depth, sentence));
                let cue = "What is the pass key? The pass key is";
                let end = End::new("What is the pass key?", cue, &key);
                asked.ends.push(end);
            }
            Task::Facts | Task::Middle | Task::Turns => asked.draw_facts(noise),
            Task::List => {
                let words = drawn(&WORDS, 6, noise).join(", ");
                let stem = "Anna went to the market with a list. She had to buy these things:";
                asked.within.push((depth, format!("{stem} {words}.")));
                let question = "Which things did Anna have to buy at the market? Give the list in its order, \
                    separated by commas.";
                asked.ends.push(End::new(question, stem, &words));
            }
            Task::Instruction => asked.draw_rules(noise),
        }
        asked
    }

    /// Cities; the first is the one that is asked for, or asked for first.
    fn draw_facts(&mut self, noise: &mut Noise) {
        let (n, until) = match self.task {
            Task::Middle => (2, 0.5),
            _ => (4, 1.0),
        };
        self.depth *= until;
        let cities = drawn(&CITIES, n, noise);
        // Words: small models mix up several numbers.
        let words = drawn(&WORDS, n, noise);
        for (i, (city, word)) in cities.iter().zip(&words).enumerate() {
            let depth = match i {
                0 => self.depth,
                _ => until * noise.below(1000) as f64 / 1000.0,
            };
            let sentence = format!("The secret word of {city} is {word}.");
            self.within.push((depth, sentence));
            let question = format!("What is the secret word of {city}?");
            let cue = format!("{question} The secret word of {city} is");
            let others = words.iter().filter(|other| *other != word);
            self.ends.push(End {
                wrong: others.map(|&other| other.to_owned()).collect(),
                ..End::new(&question, &cue, word)
            });
        }
        if self.task != Task::Turns {
            self.ends.truncate(1);
        }
        if self.task == Task::Middle {
            let end = &mut self.ends[0];
            let asked = format!("\n\nQuestion: {}\n\n", end.question);
            self.within.push((until, asked));
            end.question = "Answer the question that stands in the text.".into();
            end.cue = "Answer to the question: The secret word of".into();
        }
    }

    fn draw_rules(&mut self, noise: &mut Noise) {
        let words = drawn(&WORDS, 8, noise);
        let rules: Vec<(&str, &str)> = words.chunks_exact(2).map(|two| (two[0], two[1])).collect();
        let told: Vec<String> = rules
            .iter()
            .map(|(said, answer)| {
                format!("When somebody says \"{said}\", the answer is \"{answer}\".")
            })
            .collect();
        self.front = format!("These are the rules. {}", told.join(" "));
        let asked = noise.below(rules.len());
        let (said, answer) = rules[asked];
        let others = rules.iter().filter(|rule| rule.1 != answer);
        let question = format!("By the rules, what is the answer when somebody says \"{said}\"?");
        let cue = format!("Now the rules. When somebody says \"{said}\", the answer is \"");
        self.ends.push(End {
            wrong: others.map(|rule| rule.1.to_owned()).collect(),
            ..End::new(&question, &cue, answer)
        });
        self.depth = 0.0;
    }

    fn line(
        &self,
        (number, start): (usize, usize),
        prose: &Prose,
        options: &Options,
        count: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<Line> {
        let &Options { tokens, seed, .. } = options;
        let first = &self.ends[0];
        let longer = |body: &str| -> Result<usize> {
            let asked = count(&self.whole(body, &first.question))?;
            Ok(asked.max(count(&self.whole(body, &first.cue))?))
        };
        let needed = longer(&self.body(&[]))?;
        if needed >= tokens {
            let reason = format!("{tokens}, expected more than the {needed} of a question");
            return Err(Error::option("tokens", reason));
        }
        let mut chosen = prose.beginning_at(start, tokens - needed);
        if chosen.len() == prose.sentences.len() {
            let have: usize = prose.tokens.iter().sum();
            let reason = format!("{tokens}, expected less than the text's {have}");
            return Err(Error::option("tokens", reason));
        }
        let whole = |chosen: &[usize]| longer(&self.body(&prose.texts(chosen)));
        // The tokens of a whole are not quite those of its parts.
        while whole(&chosen)? > tokens && chosen.pop().is_some() {}
        let mut found = whole(&chosen)?;
        let short = |found: usize| 10 * found < 9 * tokens;
        // Where that took a long sentence, shorter ones from further on fill the gap.
        for i in prose.behind(start, &chosen) {
            if !short(found) {
                break;
            }
            if prose.tokens[i] <= tokens - found {
                chosen.push(i);
                match whole(&chosen)? {
                    n if n <= tokens => found = n,
                    _ => drop(chosen.pop()),
                }
            }
        }
        // A key without a text around it tests nothing.
        if short(found) {
            let reason = format!(
                "{tokens}, the text's sentences fill {found}: expected a text of shorter ones"
            );
            return Err(Error::option("tokens", reason));
        }
        let body = self.body(&prose.texts(&chosen));
        let name = self.task.name();
        let ends = self.ends.iter().enumerate();
        let mut turns: Vec<Ask> = ends
            .map(|(turn, end)| Ask {
                task: match self.ends.len() {
                    1 => name.to_owned(),
                    _ => format!("{name}-{}", turn + 1),
                },
                question: match turn {
                    0 => self.whole(&body, &end.question),
                    _ => end.question.clone(),
                },
                prompt: match turn {
                    0 => self.whole(&body, &end.cue),
                    _ => format!("\n\n{}", end.cue),
                },
                answer: end.answer.clone(),
                r#match: "contains",
                wrong: end.wrong.clone(),
            })
            .collect();
        Ok(Line {
            id: format!("{name}-{tokens}-{seed}-{number}"),
            depth: (self.depth * 1000.0).round() / 1000.0,
            alone: (turns.len() == 1).then(|| turns.remove(0)),
            turns,
        })
    }

    /// The text with what stands within it, each behind that share of its characters, between sentences.
    fn body(&self, text: &[&str]) -> String {
        let all: usize = text.iter().map(|sentence| sentence.len()).sum();
        let mut within: Vec<&(f64, String)> = self.within.iter().collect();
        within.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut within = within.into_iter().peekable();
        let mut out: Vec<&str> = Vec::new();
        let mut done = 0;
        for sentence in text {
            while let Some((_, own)) = within.next_if(|(at, _)| at * all as f64 <= done as f64) {
                out.push(own);
            }
            out.push(sentence);
            done += sentence.len();
        }
        out.extend(within.map(|(_, own)| own.as_str()));
        // A question between halves is a paragraph.
        out.join(" ").replace(" \n", "\n").replace("\n ", "\n")
    }

    fn whole(&self, body: &str, behind: &str) -> String {
        let parts = [&self.front, body, behind];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        parts.join("\n\n")
    }
}

fn drawn<'a>(from: &[&'a str], n: usize, noise: &mut Noise) -> Vec<&'a str> {
    let mut left = from.to_vec();
    (0..n)
        .map(|_| left.swap_remove(noise.below(left.len())))
        .collect()
}

const CITIES: [&str; 16] = [
    "Paris", "Berlin", "Madrid", "Vienna", "Prague", "Dublin", "Oslo", "Lisbon", "Athens",
    "Warsaw", "Cairo", "Delhi", "Tokyo", "Lima", "Quito", "Havana",
];

const WORDS: [&str; 40] = [
    "river", "chair", "candle", "mountain", "apple", "window", "garden", "bottle", "feather",
    "hammer", "lantern", "meadow", "needle", "orange", "pencil", "rabbit", "saddle", "teapot",
    "umbrella", "violin", "wagon", "anchor", "basket", "copper", "dragon", "eagle", "forest",
    "guitar", "harbor", "jacket", "kettle", "ladder", "mirror", "notebook", "pillow", "quarry",
    "ribbon", "silver", "tunnel", "walnut",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::files::Source;
    use crate::eval::held;
    use crate::eval::question::Expected;

    fn words(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    fn prose() -> String {
        let sentence = |i: usize| {
            format!(
                "Mr. X. saw {} of them,\n and \"went on.\" ",
                "ab".repeat(i % 7)
            )
        };
        (0..200).map(sentence).collect()
    }

    fn options(each: usize, tokens: usize, seed: u64) -> Options {
        Options {
            tasks: Task::ALL.to_vec(),
            each,
            tokens,
            seed,
        }
    }

    impl Line {
        fn asked(&self) -> impl Iterator<Item = &Ask> {
            self.alone.iter().chain(&self.turns)
        }

        fn first(&self) -> &Ask {
            self.asked().next().unwrap()
        }
    }

    #[test]
    fn questions_are_as_long_as_was_said_and_hold_their_answer() {
        let lines = questions(&prose(), &options(12, 300, 1), &words).unwrap();
        assert_eq!(lines.len(), 72);
        for line in &lines {
            let first = line.first();
            for text in [&first.question, &first.prompt] {
                let n = words(text).unwrap();
                // A sentence has nine words, the two questions differ by eleven at most.
                assert!((280..=300).contains(&n), "{n} in {text}");
            }
            let turns = line.asked().count();
            assert_eq!(turns, if first.task == "turns-1" { 4 } else { 1 });
            let (text, behind) = first.prompt.rsplit_once("\n\n").unwrap();
            if first.task == "middle" {
                let asked = text.find("\n\nQuestion: What").unwrap() as f64 / text.len() as f64;
                assert!((asked - 0.5).abs() < 0.15 && line.depth < 0.5, "{asked}");
                assert!(!text.contains("  ") && !text.contains(" \n"));
            }
            // It is nowhere behind the text.
            assert!(!behind.contains(&first.answer), "{behind}");
            for ask in line.asked() {
                let key = [ask.answer.clone()];
                assert!(held::is_right(text, &key, &[], false), "{line:?}");
                assert!(!ask.question.ends_with(' ') && !ask.prompt.ends_with(' '));
                let others = match ask.task.as_str() {
                    "passkey" | "list" => 0,
                    "middle" => 1,
                    _ => 3,
                };
                assert_eq!(ask.wrong.len(), others);
                for wrong in &ask.wrong {
                    assert!(text.contains(wrong) && *wrong != ask.answer);
                }
            }
            let at = text.find(&first.answer).unwrap() as f64 / text.len() as f64;
            assert!((at - line.depth).abs() < 0.2, "{at} {line:?}");
        }
        let depths = |n: usize| {
            let own = lines.iter().filter(|line| line.first().task == "passkey");
            let mut all: Vec<f64> = own.take(n).map(|line| line.depth).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        // No gap is much larger than an even one.
        for n in [4, 8, 12] {
            let all = [vec![0.0], depths(n), vec![1.0]].concat();
            let gaps = all.windows(2).map(|two| two[1] - two[0]);
            assert!(gaps.fold(0.0, f64::max) < 2.0 / n as f64, "{all:?}");
        }
    }

    #[test]
    fn seeds_choose() {
        let make = |options: &Options| questions(&prose(), options, &words).unwrap();
        let one = make(&options(3, 200, 1));
        assert_eq!(one, make(&options(3, 200, 1)));
        let other = make(&options(3, 200, 2));
        assert!(
            one.iter()
                .zip(&other)
                .all(|(a, b)| a.first().question != b.first().question)
        );
        let answers = |lines: &[Line]| -> Vec<String> {
            lines
                .iter()
                .flat_map(Line::asked)
                .map(|ask| ask.answer.clone())
                .collect()
        };
        assert_ne!(answers(&one), answers(&other));
        // A longer text is asked the same, a longer file begins with the shorter one, and a task asks the
        // same alone.
        assert_eq!(answers(&one), answers(&make(&options(3, 300, 1))));
        assert_eq!(make(&options(5, 200, 1))[..18], one);
        let lists = make(&Options {
            tasks: vec![Task::List],
            ..options(3, 200, 1)
        });
        let own = one.iter().filter(|line| line.first().task == "list");
        assert!(lists.iter().eq(own));
    }

    #[test]
    fn a_text_too_short_and_too_few_tokens_are_refused() {
        let refused = |text: &str, tokens| {
            questions(text, &options(1, tokens, 1), &words)
                .unwrap_err()
                .to_string()
        };
        let n = words(&prose()).unwrap();
        let too_long = format!("5000, expected less than the text's {n}");
        assert!(refused(&prose(), 20).contains("20, expected more than the"));
        assert!(refused(&prose(), 5000).contains(&too_long));
        assert!(refused("", 300).contains("expected less than the text's 0"));
        // No end of a sentence anywhere: all of it is one.
        let giant = "and so on ".repeat(400);
        let line = refused(&giant, 300);
        assert!(line.contains("300, the text's sentences fill"), "{line}");
    }

    /// Tokenizers join what stands at the seams of parts, or need more for the whole.
    #[test]
    fn prompts_are_as_long_as_was_said_where_parts_do_not_add_up() {
        let made =
            |count: &dyn Fn(&str) -> Result<usize>| questions(&prose(), &options(6, 400, 3), count);
        let more = |text: &str| {
            let n = text.split_whitespace().count();
            Ok(n + n * n / 2000)
        };
        // A third less for the whole than for its parts.
        let less = |text: &str| {
            let n = text.split_whitespace().count();
            Ok(if n < 100 { n } else { n * 2 / 3 })
        };
        for count in [&more as &dyn Fn(&str) -> Result<usize>, &less] {
            let lines = made(count).unwrap();
            assert_eq!(lines.len(), 36);
            for line in &lines {
                let first = line.first();
                let n = |text: &str| count(text).unwrap();
                let longer = n(&first.question).max(n(&first.prompt));
                assert!((360..=400).contains(&longer), "{longer}");
            }
        }
    }

    /// One token too many, and the sentence that goes for it is long: shorter ones take its place.
    #[test]
    fn a_long_sentence_that_goes_leaves_no_gap() {
        let long = format!("It was {}long. ", "very ".repeat(60));
        let text: String = (0..400)
            .map(|i| {
                if i % 3 == 0 {
                    long.as_str()
                } else {
                    "So they went home. "
                }
            })
            .collect();
        // As words are counted without a tokenizer: each part is rounded down.
        let rounded = |text: &str| Ok(text.split_whitespace().count() * 7 / 5);
        for seed in 0..8 {
            for line in questions(&text, &options(2, 400, seed), &rounded).unwrap() {
                let first = line.first();
                let n = |text: &str| text.split_whitespace().count() * 7 / 5;
                let longer = n(&first.question).max(n(&first.prompt));
                assert!((360..=400).contains(&longer), "{longer}");
            }
        }
    }

    #[test]
    fn lines_are_read_back() {
        let lines = questions(&prose(), &options(2, 200, 7), &words).unwrap();
        let text: Vec<String> = lines
            .iter()
            .map(|line| serde_json::to_string(line).unwrap())
            .collect();
        let file = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
        std::fs::write(file.path(), text.join("\n")).unwrap();
        let source = Source {
            path: file.path().to_owned(),
            ..Source::default()
        };
        let (_, read) = source.read().unwrap();
        assert_eq!(read.len(), lines.len());
        for (line, question) in lines.iter().zip(&read) {
            assert_eq!(question.id, line.id);
            assert_eq!(question.turns.len(), line.asked().count());
            for (turn, ask) in question.turns.iter().zip(line.asked()) {
                assert_eq!((&turn.task, &turn.text), (&ask.task, &ask.question));
                assert_eq!(turn.raw.as_ref(), Some(&ask.prompt));
                let expected = Expected::Held {
                    right: vec![ask.answer.clone()],
                    wrong: ask.wrong.clone(),
                };
                assert_eq!(turn.expected, expected);
            }
        }
    }
}
