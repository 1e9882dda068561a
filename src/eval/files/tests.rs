//! Small files of each format, as their authors publish them.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

use super::*;
use crate::eval::question::{Image, Question};

/// A picture that decodes.
fn png() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo.png");
    fs::read(path).unwrap()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn source(path: PathBuf) -> Source {
    Source {
        path,
        ..Source::default()
    }
}

fn read(path: PathBuf) -> (Format, Vec<Question>) {
    source(path).read().unwrap()
}

fn refused(path: PathBuf, expected: &str) {
    let error = source(path.clone()).read().unwrap_err().to_string();
    assert!(error.starts_with(&path.display().to_string()), "{error}");
    assert!(
        error.contains(expected),
        "expected {expected:?} in: {error}"
    );
    assert!(!error.contains('\n'), "{error}");
}

fn words(question: &Question) -> &[String] {
    match &question.turns[0].expected {
        Expected::Words(words) => words,
        other => panic!("{other:?}"),
    }
}

fn choice(question: &Question) -> (&[String], usize) {
    match &question.turns[0].expected {
        Expected::Choice { options, answer } => (options, *answer),
        other => panic!("{other:?}"),
    }
}

#[test]
fn our_own_sets_are_read_whole() {
    let set = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/eval/small-phi3v");
    for part in ["dev", "test"] {
        let (format, questions) = read(set.join(part).join("understanding.jsonl"));
        assert_eq!((format, questions.len()), (Format::Jsonl, 657));
        let first = &questions[0];
        assert_eq!((first.id.as_str(), first.num_crops), ("u0000", Some(4)));
        assert!(first.turns[0].text.ends_with('?'));
        assert!(first.turns[0].raw.as_ref().unwrap().starts_with("<|user|>"));
        assert!(first.images[0].load(Some(4)).is_ok());

        let (_, chats) = read(set.join(part).join("chat.jsonl"));
        let turns: usize = chats.iter().map(|chat| chat.turns.len()).sum();
        assert_eq!((chats.len(), turns), (16, 128));

        let (_, stories) = read(set.join(part).join("story.jsonl"));
        let sagas = stories.iter().filter(|q| q.turns[0].task == "saga").count();
        assert_eq!((stories.len(), sagas), (28, 8));
        for story in &stories {
            assert!(matches!(&story.turns[0].expected, Expected::Facts(facts) if facts.len() > 20));
        }
    }
}

#[test]
fn lines_say_what_they_ask_in_few_words() {
    let folder = Folder::new();
    folder.write("a.png", png());
    let path = folder.write(
        "q.jsonl",
        concat!(
            r#"{"image": "a.png", "question": "Why?", "answer": "Because"}"#,
            "\n\n",
            r#"{"id": 7, "question": "Which?", "options": ["red", "B", "blue"], "answer": "blue", "task": "t"}"#,
            "\n",
            r#"{"id": "x", "question": "Which?", "options": ["red", "blue"], "answer": "B"}"#,
            "\n",
            r#"{"id": "y", "question": "Which?", "options": ["red", "blue"], "answer": 0}"#,
            "\n",
            r#"{"id": "z", "prompt": "<|user|> Who?", "answers": ["I", "me"]}"#,
        ),
    );
    let (_, questions) = read(path);
    let ids: Vec<&str> = questions.iter().map(|q| q.id.as_str()).collect();
    assert_eq!(ids, ["1", "7", "x", "y", "z"]);
    assert_eq!(words(&questions[0]), ["Because"]);
    assert_eq!(questions[1].place, "line 3");
    assert_eq!(choice(&questions[1]).1, 2);
    assert_eq!(
        questions[1].turns[0].text,
        "Which?\nA. red\nB. B\nC. blue\nAnswer with the option's letter from the given choices directly."
    );
    assert_eq!((choice(&questions[2]).1, choice(&questions[3]).1), (1, 0));
    assert_eq!(words(&questions[4]), ["I", "me"]);
    assert_eq!(questions[4].turns[0].text, "<|user|> Who?");
}

#[test]
fn lines_say_how_answers_are_compared() {
    let folder = Folder::new();
    let path = folder.write(
        "q.jsonl",
        concat!(
            r#"{"question": "?", "answer": "x", "match": "exact"}"#,
            "\n",
            r#"{"question": "?", "answer": 12, "match": "contains", "wrong": ["13", 14]}"#,
            "\n",
            r#"{"turns": [{"question": "?", "answers": ["a", "b"], "match": "anls"}]}"#,
        ),
    );
    let (_, questions) = read(path);
    let expected: Vec<&Expected> = questions.iter().map(|q| &q.turns[0].expected).collect();
    let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    assert_eq!(
        expected,
        [
            &Expected::Words(own(&["x"])),
            &Expected::Held {
                right: own(&["12"]),
                wrong: own(&["13", "14"]),
            },
            &Expected::Near(own(&["a", "b"])),
        ]
    );
}

#[test]
fn broken_lines_are_named() {
    let folder = Folder::new();
    folder.write("a.png", png());
    let good = r#"{"image": "a.png", "question": "Why?", "answer": "Because"}"#;
    for (line, expected) in [
        ("{", "line 2: column 1: EOF"),
        ("[]", "line 2: "),
        (r#"{"question": 3, "answer": "x"}"#, "line 2: "),
        (
            r#"{"question": "?", "answer": ""}"#,
            "line 2: the answer is empty",
        ),
        (
            r#"{"question": "?", "answers": []}"#,
            "line 2: the answer is empty",
        ),
        (
            r#"{"question": " ", "answer": "x"}"#,
            "line 2: the question is empty",
        ),
        (r#"{"question": "?"}"#, "line 2: has no answer"),
        (r#"{"answer": "x"}"#, "line 2: has no question"),
        (
            r#"{"question": "?", "answer": "x", "answers": ["y"]}"#,
            "line 2: both answer and answers",
        ),
        (
            r#"{"question": "?", "answer": "x", "match": "near"}"#,
            "unknown variant `near`, expected one of `exact`, `contains`, `anls`",
        ),
        (
            r#"{"question": "?", "answer": "", "match": "contains"}"#,
            "line 2: the answer is empty",
        ),
        (
            r#"{"question": "?", "answer": " \".", "match": "contains"}"#,
            "line 2: \" \\\".\" is nothing to look for",
        ),
        (
            r#"{"question": "?", "answers": [], "match": "anls"}"#,
            "line 2: the answer is empty",
        ),
        (
            r#"{"question": "?", "answer": "x", "match": "contains", "wrong": [" "]}"#,
            "line 2: a wrong answer is empty",
        ),
        (
            r#"{"question": "?", "answer": "X.", "match": "contains", "wrong": ["x"]}"#,
            "line 2: \"X.\" is right and wrong",
        ),
        (
            r#"{"question": "?", "answer": "x", "wrong": ["y"]}"#,
            "line 2: wrong without match \"contains\"",
        ),
        (
            r#"{"question": "?", "options": ["a", "b"], "answer": "A", "match": "anls"}"#,
            "line 2: match beside facts or options",
        ),
        (
            r#"{"image": "b.png", "question": "?", "answer": "x"}"#,
            "line 2: there is no picture ",
        ),
        (
            r#"{"image": "", "question": "?", "answer": "x"}"#,
            "line 2: there is no picture ",
        ),
        (
            r#"{"image": "a", "images": [], "question": "?", "answer": "x"}"#,
            "line 2: both image and images",
        ),
        (
            r#"{"num_crops": 0, "question": "?", "answer": "x"}"#,
            "line 2: num_crops is 0",
        ),
        (
            r#"{"id": 1, "question": "?", "answer": "x"}"#,
            "line 2: the id \"1\" is there twice",
        ),
        (
            r#"{"question": "?", "options": ["a"], "answer": "A"}"#,
            "line 2: 1 options, expected 2 to 26",
        ),
        (
            r#"{"question": "?", "options": ["a", "b"], "answer": "C"}"#,
            "line 2: the answer \"C\" is none of its 2 options",
        ),
        (
            r#"{"question": "?", "options": ["a", " "], "answer": "A"}"#,
            "line 2: an option is empty",
        ),
        (r#"{"question": "?", "facts": []}"#, "line 2: no facts"),
        (r#"{"question": "?", "turns": []}"#, "line 2: no turns"),
        (
            r#"{"turns": [{"answer": "x"}]}"#,
            "line 2: a turn has no question",
        ),
        (
            r#"{"question": "?", "facts": [{"name": "Leo", "attribute": "a", "value": "b", "mentions": 0}]}"#,
            "0 mentions",
        ),
    ] {
        refused(
            folder.write("q.jsonl", format!("{good}\n{line}\n")),
            expected,
        );
    }
    refused(folder.write("q.jsonl", ""), "holds no question");
    refused(
        folder.write("q.jsonl", [0xff, 0xff]),
        "is not UTF-8 at byte 0",
    );
    refused(
        folder.write("q.jsonl", [0xff, 0xfe]),
        "is UTF-16, expected UTF-8",
    );
    refused(folder.write("q.txt", good), "cannot tell its format");
    refused(folder.write("q.json", "{}"), "cannot tell its format");
    let missing = folder.0.path().join("none.jsonl");
    assert!(matches!(source(missing).read(), Err(Error::Io { .. })));
}

/// A prompt without an answer is no question, but something to compare on.
#[test]
fn answers_may_be_missing_where_nothing_is_scored() {
    let folder = Folder::new();
    let mut source = source(folder.write("q.jsonl", r#"{"question": "Why?"}"#));
    assert!(source.read().is_err());
    source.unanswered = true;
    assert_eq!(source.read().unwrap().1.len(), 1);
}

/// As in `testdev_balanced_questions.json`.
const GQA: &str = r#"{
 "201307251": {"semantic": [{"operation": "select", "dependencies": [], "argument": "airplane (0)"}],
  "entailed": ["201307247"], "equivalent": ["201307251"], "question": "Is it overcast?",
  "imageId": "n161313", "isBalanced": true, "groups": {"global": null, "local": "13-weather_cloudy"},
  "answer": "no", "semanticStr": "select: scene->verify weather: cloudy [0]",
  "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
  "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
  "fullAnswer": "No, it is clear."},
 "201640614": {"question": "Who is wearing the dress?", "imageId": "n235859", "isBalanced": true,
  "answer": "woman", "types": {"detailed": "relO", "semantic": "rel", "structural": "query"}}
}"#;

#[test]
fn gqa_files_are_read() {
    let folder = Folder::new();
    folder.write("images/n161313.jpg", png());
    folder.write("elsewhere/n161313.jpg", png());
    refused(
        folder.write("gqa.json", GQA),
        "question 201640614: there is no picture ",
    );
    folder.write("images/n235859.jpg", png());
    let (format, questions) = read(folder.write("gqa.json", GQA));
    assert_eq!((format, questions.len()), (Format::Gqa, 2));
    let Question { id, turns, .. } = &questions[0];
    assert_eq!(
        (id.as_str(), turns[0].task.as_str()),
        ("201307251", "verify")
    );
    assert!(turns[0].text.starts_with("Is it overcast?\n"));
    assert_eq!(words(&questions[0]), ["no"]);
    assert_eq!(words(&questions[1]), ["woman"]);
    assert!(questions[1].images[0].name().ends_with("n235859.jpg"));

    for (was, is, expected) in [
        (
            "\"imageId\": \"n161313\",",
            "",
            "question 201307251: missing field `imageId`",
        ),
        (
            "\"answer\": \"woman\"",
            "\"answer\": \"\"",
            "question 201640614: the answer is empty",
        ),
        (
            "\"question\": \"Is it overcast?\"",
            "\"question\": 1",
            "question 201307251: invalid type",
        ),
        ("\"fullAnswer\": \"No, it is clear.\"},", "", "line "),
    ] {
        let changed = GQA.replace(was, is);
        assert_ne!(changed, GQA);
        refused(folder.write("gqa.json", changed), expected);
    }
    let elsewhere = Source {
        path: folder.write("gqa.json", GQA),
        image_dir: Some(folder.0.path().join("elsewhere")),
        ..Source::default()
    };
    let error = elsewhere.read().unwrap_err().to_string();
    assert!(error.contains("question 201640614"), "{error}");
}

/// As in `problems.json`.
const SCIENCEQA: &str = r#"{
 "1": {"question": "Which of these states is farthest north?",
  "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"], "answer": 0, "hint": "",
  "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "social science",
  "topic": "geography", "category": "Geography", "skill": "Read a map", "lecture": "Maps.",
  "solution": "Look.", "split": "train"},
 "4": {"question": "Which word comes first?", "choices": ["apple", "box"], "answer": 1,
  "hint": "Think of the alphabet.", "image": null, "task": "closed choice", "grade": "grade2",
  "subject": "language science", "topic": "order", "category": "Order", "skill": "Order",
  "lecture": "", "solution": "", "split": "test"},
 "5": {"question": "What is shown?", "choices": ["one", "two", "three"], "answer": 2, "hint": "",
  "image": "image.png", "subject": "natural science", "split": "test"}
}"#;

#[test]
fn scienceqa_files_are_read() {
    let folder = Folder::new();
    let path = folder.write("problems.json", SCIENCEQA);
    refused(path.clone(), "problem 5: there is no picture ");
    folder.write("images/test/5/image.png", png());
    let (format, questions) = read(path.clone());
    assert_eq!((format, questions.len()), (Format::ScienceQa, 2));
    let Question {
        id, images, turns, ..
    } = &questions[0];
    assert_eq!((id.as_str(), images.len()), ("4", 0));
    assert_eq!(turns[0].task, "language science");
    assert!(
        turns[0]
            .text
            .starts_with("Think of the alphabet.\nWhich word comes first?\nA. apple\nB. box\n")
    );
    assert_eq!(choice(&questions[0]).1, 1);
    assert_eq!(questions[1].images.len(), 1);

    let mut val = source(path);
    val.subset = Some("val".into());
    let error = val.read().unwrap_err().to_string();
    assert!(
        error.contains("no problem of the split \"val\"") && error.contains("train, test"),
        "{error}"
    );
    refused(
        folder.write(
            "problems.json",
            SCIENCEQA.replace("\"answer\": 2", "\"answer\": 3"),
        ),
        "problem 5: the answer is option 3 of 3",
    );
}

/// As in `mmbench_dev_en.tsv`.
fn mmbench(answer: &str) -> String {
    let image = STANDARD.encode(png());
    format!(
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit\n\
         241\tWhich is right?\tLook at \"\"it\"\".\tone\ttwo\t\t\t{answer}\tidentity_reasoning\t{image}\treasoning\tattribute\tnan\tdev\n\
         1000241\t\"Which, then?\n(look)\"\tnan\ttwo\tone\tthree\tnan\tC\tidentity_reasoning\t241\treasoning\tattribute\tnan\tdev\n"
    )
}

#[test]
fn mmbench_files_are_read() {
    let folder = Folder::new();
    let (format, questions) = read(folder.write("dev.tsv", mmbench("B")));
    assert_eq!((format, questions.len()), (Format::MmBench, 2));
    let (options, answer) = choice(&questions[0]);
    assert_eq!(
        (options, answer),
        (&["one".to_owned(), "two".to_owned()][..], 1)
    );
    assert_eq!(questions[0].turns[0].task, "identity_reasoning");
    assert_eq!(choice(&questions[1]).0.len(), 3);
    assert!(
        questions[1].turns[0]
            .text
            .starts_with("Which, then?\n(look)\nA. two\n")
    );
    // The second has the first one's picture.
    assert_eq!(questions[0].images, questions[1].images);
    assert!(questions[0].images[0].name().ends_with("dev.tsv#241"));
    let picture = questions[0].images[0].load(None).unwrap();
    assert_eq!((picture.width, picture.height), (672, 672));

    refused(
        folder.write("x.tsv", mmbench("C")),
        "line 2: the answer \"C\" is none of its 2 options",
    );
    refused(
        folder.write("x.tsv", mmbench("")),
        "line 2: answer is empty",
    );
    let without = mmbench("B").replace("\tanswer\t", "\tgiven\t");
    refused(
        folder.write("x.tsv", without),
        "has no column answer, expected a split",
    );
    let broken = mmbench("B").replace("\t241\t", "\t242\t");
    refused(
        folder.write("x.tsv", broken),
        "line 3: its picture is that of row 242",
    );
    let broken = mmbench("B").replace("iVBOR", "iV*OR");
    refused(
        folder.write("x.tsv", broken),
        "line 2: the picture is no base64",
    );
    let broken = mmbench("B") + "1\t2\t3\n";
    refused(folder.write("x.tsv", broken), "3 columns, expected 14");
}

/// A page's header that says that there is more than a file has: fuzzing found that this took minutes.
#[test]
#[cfg(feature = "parquet")]
fn what_lies_behind_a_files_end_is_not_skipped() {
    let find =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/questions/mmmu-behind-its-end");
    let bytes = std::fs::read(find).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.parquet");
    // The first byte says the format, to the target.
    std::fs::write(&path, &bytes[1..]).unwrap();
    let source = Source {
        path,
        ..Source::default()
    };
    let error = source.read().unwrap_err().to_string();
    assert!(error.contains("q.parquet: row 1: is damaged"), "{error}");
}

/// `tests/data/make_mmmu.py` wrote it with pyarrow.
#[cfg(feature = "parquet")]
#[test]
fn mmmu_files_are_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/mmmu.parquet");
    let (format, questions) = read(path.clone());
    assert_eq!((format, questions.len()), (Format::Mmmu, 3));
    let (options, answer) = choice(&questions[0]);
    assert_eq!(options, ["red", "it's blue", "the \"other\""]);
    assert_eq!(answer, 1);
    assert_eq!(questions[0].turns[0].task, "Art_Theory");
    assert!(
        questions[0].turns[0]
            .text
            .starts_with("What color is <|image_1|>?\nA. red\n")
    );
    let picture = questions[0].images[0].load(None).unwrap();
    assert_eq!(
        (picture.width, picture.height, &picture.rgb[..3]),
        (8, 6, &[0, 0, 255][..])
    );
    assert_eq!(
        (questions[1].images.len(), words(&questions[1])),
        (2, &["2".to_owned()][..])
    );
    assert_eq!(words(&questions[2]), ["no", "not at all"]);
    assert!(
        questions[2].turns[0]
            .text
            .starts_with("Is <|image_1|> like it?")
    );
    let Image::Inside { name, .. } = &questions[2].images[0] else {
        panic!("{:?}", questions[2].images)
    };
    assert!(
        name.ends_with("mmmu.parquet#validation_Art_Theory_3/image_2"),
        "{name}"
    );

    let folder = Folder::new();
    let bytes = fs::read(path).unwrap();
    refused(
        folder.write("x.parquet", &bytes[..bytes.len() - 9]),
        "is no parquet file",
    );
    refused(folder.write("x.parquet", ""), "is no parquet file");
}

#[cfg(not(feature = "parquet"))]
#[test]
fn mmmu_files_name_the_feature_that_reads_them() {
    let folder = Folder::new();
    refused(folder.write("x.parquet", ""), "without the feature parquet");
}
