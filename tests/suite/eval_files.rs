//! Results files: begun, gone on with, and what is wrong with them.

use std::fs;
use std::path::Path;

use hae::answer::{Evicted, Kv, Timings, Tokens};
use hae::cache::Counts;
use hae::eval::record::{
    Answer, Contender, Distance, FactScore, FileId, Header, QuestionSet, VERSION,
};
use hae::eval::results::{self, Results};
use hae::eval::summary::{Measure, Summary, Verdict};
use hae::generate::Finish;
use hae::policy::Amount;
use serde_json::json;

pub fn header(contenders: &[(&str, Option<f64>)]) -> Header {
    let id = |file: &str| FileId {
        file: file.into(),
        sha256: "00".into(),
    };
    Header {
        version: VERSION,
        command: "eval".into(),
        time: 1,
        build: json!({"version": "0"}),
        model: id("m.gguf"),
        mmproj: None,
        questions: QuestionSet {
            file: id("q.jsonl"),
            format: "jsonl".into(),
            part: None,
            every: 1,
            limit: None,
            n: 10,
        },
        context: json!({"n_ctx": 4096}),
        seed: 0,
        n_predict: None,
        distance: false,
        contenders: contenders
            .iter()
            .map(|&(policy, share)| Contender {
                name: name(policy, share),
                policy: policy.into(),
                budget: share.map(Amount::Share),
                params: json!({}),
                cache: None,
            })
            .collect(),
    }
}

fn name(policy: &str, share: Option<f64>) -> String {
    share.map_or_else(|| policy.to_owned(), |share| format!("{policy}@{share}"))
}

pub fn answer(id: usize, policy: &str, share: Option<f64>, right: bool) -> Answer {
    Answer {
        id: id.to_string(),
        turn: 0,
        task: if id.is_multiple_of(2) { "even" } else { "odd" }.into(),
        contender: name(policy, share),
        policy: policy.into(),
        budget: share.map(Amount::Share),
        images: vec!["a.png".into()],
        num_crops: Some(4),
        prompt: "Why?\n\"quoted\"".into(),
        expected: vec!["x".into()],
        answer: if right { "x" } else { "y" }.into(),
        right: Some(right),
        chosen: None,
        facts: None,
        anls: None,
        finish: Finish::Eog,
        tokens: Tokens {
            prompt: Default::default(),
            images: vec![199],
            generated: 2,
        },
        kv: Kv {
            cells: Counts::default(),
            peak_decoding: 90,
            n_cells: 4096,
            bytes_per_cell: 8,
            bytes_in_use: if share.is_some() { 400 } else { 1000 },
            bytes_peak: 1000,
            bytes_peak_decoding: 720,
            bytes_allocated: 2048,
            bytes_allocated_peak: 4096,
            bytes_host: 0,
        },
        attended: None,
        timings: Timings {
            vision_encode_ms: 1.5,
            probe_ms: 0.0,
            prefill_ms: 2.5,
            ttft_ms: Some(4.0),
            tpot_ms: None,
            decode_ms: 0.25,
        },
        evicted: Evicted {
            after_prefill: 1,
            in_decoding: 2,
            flushes: 1,
            restores: 0,
            recalled: 0,
        },
        bin: None,
        distance: None,
        trace: None,
    }
}

fn fails(path: &Path, header: &Header, expected: &str) {
    let error = Results::open(path, header).unwrap_err().to_string();
    assert!(
        error.contains(expected),
        "expected {expected:?} in: {error}"
    );
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_file_goes_on_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    let header = header(&[("full", None), ("hae", Some(0.4))]);
    let answers: Vec<Answer> = (0..3).map(|i| answer(i, "full", None, true)).collect();
    let (mut results, begun) = Results::open(&path, &header).unwrap();
    assert!(begun.is_empty());
    for answer in &answers {
        results.add(answer).unwrap();
    }
    drop(results);
    assert_eq!(
        results::read(&path).unwrap(),
        (header.clone(), answers.clone())
    );

    // An interrupted write: part of a line, which the next run replaces.
    let whole = fs::read(&path).unwrap();
    for cut in [1, 40, 300] {
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        let later = Header {
            time: 2,
            ..header.clone()
        };
        let (mut results, begun) = Results::open(&path, &later).unwrap();
        assert_eq!(begun, answers[..2]);
        assert!(results.saved().starts_with("2 answers are saved in "));
        results.add(&answers[2]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
    // So early that there is no header yet.
    fs::write(&path, &whole[..50]).unwrap();
    let (_, begun) = Results::open(&path, &header).unwrap();
    assert!(begun.is_empty());
    assert_eq!(results::read(&path).unwrap(), (header, Vec::new()));
}

#[test]
fn a_file_of_another_run_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    let header = header(&[("full", None), ("hae", Some(0.4))]);
    let (mut results, _) = Results::open(&path, &header).unwrap();
    results.add(&answer(1, "full", None, true)).unwrap();
    fails(&path, &header, "is in use by another run of hae");
    drop(results);
    let before = fs::read(&path).unwrap();

    let mut other = header.clone();
    other.model.sha256 = "11".into();
    fails(
        &path,
        &other,
        "was begun with model.sha256 \"00\", this run has \"11\": expected the same, or another `out`",
    );
    let mut other = header.clone();
    other.contenders.pop();
    fails(
        &path,
        &other,
        "was begun with contenders full,hae@0.4, this run has full",
    );
    let mut other = header.clone();
    other.contenders[1].params = json!({"bin": 1});
    fails(
        &path,
        &other,
        "was begun with hae@0.4.params.bin null, this run has 1",
    );
    let mut other = header.clone();
    other.questions.every = 5;
    fails(
        &path,
        &other,
        "was begun with questions.every 1, this run has 5",
    );
    let mut other = header.clone();
    other.seed = 3;
    fails(&path, &other, "was begun with seed 0, this run has 3");
    // Where files lie does not matter, what is in them does.
    let mut other = header.clone();
    other.model.file = "elsewhere.gguf".into();
    assert_eq!(Results::open(&path, &other).unwrap().1.len(), 1);
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn what_is_no_results_file_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    let header = header(&[("full", None)]);
    let line = |record: serde_json::Value| format!("{record}\n");
    let first = line(json!({"record": "header"}));
    drop(Results::open(&path, &header).unwrap());
    let head = fs::read_to_string(&path).unwrap();
    let mut answer_line = serde_json::to_value(answer(1, "full", None, true)).unwrap();
    answer_line["record"] = json!("answer");
    let answer_line = line(answer_line);
    for (text, expected) in [
        ("hello".to_owned(), "no results file of hae"),
        ("hello\n".to_owned(), "line 1: "),
        (first, "line 1: missing field"),
        (
            answer_line.clone(),
            "line 1: an answer, expected the header first",
        ),
        (head.clone() + "{\n" + &answer_line, "line 2: "),
        (head.clone() + &head, "line 2: a second header"),
        (
            head.clone() + &answer_line + &answer_line,
            "line 3: 1 under full is there twice",
        ),
        (
            head.replace("\"version\":1", "\"version\":9"),
            "line 1: results of version 9, expected at most 1",
        ),
    ] {
        fs::write(&path, &text).unwrap();
        fails(&path, &header, expected);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    fails(folder.path(), &header, "");
    fails(
        &folder.path().join("none/r.jsonl"),
        &header,
        "none/r.jsonl: ",
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_with_what_was_saved() {
    let header = header(&[("full", None)]);
    let error = Results::open(Path::new("/dev/full"), &header).unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("/dev/full: No space left on device"),
        "{error}"
    );
    assert!(error.ends_with("; 0 answers are saved in it"), "{error}");
}

/// 40 questions: full answers all, hae all but one, random all but twelve.
fn three() -> (Header, Vec<Answer>) {
    let contenders = [("full", None), ("hae", Some(0.4)), ("random", Some(0.4))];
    let answers = (0..40).flat_map(|id| {
        contenders.map(|(policy, share)| {
            let wrong = match policy {
                "hae" => id < 1,
                "random" => id < 12,
                _ => false,
            };
            answer(id, policy, share, !wrong)
        })
    });
    (header(&contenders), answers.collect())
}

#[test]
fn summaries_count_and_compare() {
    let (header, answers) = three();
    let summary = Summary::of(&header, &answers);
    let rows: Vec<_> = summary.overall().collect();
    let right: Vec<usize> = rows.iter().map(|r| r.right).collect();
    assert_eq!(right, [40, 39, 28]);
    assert_eq!(rows[2].accuracy, Some(0.7));
    assert_eq!(rows[1].kv_of_first, Some(0.4));
    assert_eq!(rows[1].agreement, Some(39.0 / 40.0));
    assert_eq!(rows[0].ttft_ms, Some(4.0));
    assert_eq!(rows[0].kl_mean, None);
    let odd = summary
        .rows
        .iter()
        .find(|r| r.task == "odd" && r.policy == "random");
    assert_eq!(odd.map(|r| (r.n, r.right)), Some((20, 14)));

    let [hae, random] = &summary.against_first[..] else {
        panic!("{summary:?}")
    };
    assert_eq!(
        (hae.first.as_str(), hae.measure),
        ("full", Measure::Accuracy)
    );
    assert_eq!((hae.only_first, hae.only_second), (Some(1), Some(0)));
    assert_eq!((hae.p, hae.verdict), (1.0, Verdict::None));
    // 2 * 2^-12, and twice that for two comparisons.
    assert!((random.p - 2f64.powi(-11)).abs() < 1e-12);
    assert!((random.p_holm - 2f64.powi(-10)).abs() < 1e-12);
    assert_eq!(random.verdict, Verdict::Worse);
    assert!((random.difference + 0.3).abs() < 1e-12);
    let [at_budget] = &summary.at_budget[..] else {
        panic!("{summary:?}")
    };
    assert_eq!(
        (at_budget.first.as_str(), at_budget.second.as_str()),
        ("hae@0.4", "random@0.4")
    );
    assert_eq!(
        (at_budget.only_first, at_budget.only_second),
        (Some(11), Some(0))
    );
}

#[test]
fn similarities_are_averaged_where_there_are_some() {
    let (header, mut answers) = three();
    for (i, answer) in answers.iter_mut().enumerate() {
        answer.anls = (answer.contender == "full" && i < 60).then_some([0.0, 0.75][i / 3 % 2]);
    }
    let summary = Summary::of(&header, &answers);
    let all: Vec<Option<f64>> = summary.overall().map(|row| row.anls).collect();
    assert_eq!(all, [Some(0.375), None, None]);
}

/// An interrupted run has answers of some policies only: pairs are what both answered.
#[test]
fn comparisons_take_what_both_answered() {
    let (header, mut answers) = three();
    answers.truncate(61);
    let summary = Summary::of(&header, &answers);
    let n: Vec<usize> = summary.overall().map(|r| r.n).collect();
    assert_eq!(n, [21, 20, 20]);
    assert!(summary.against_first.iter().all(|c| c.n == 20));
    let nothing = Summary::of(&header, &[]);
    assert!(nothing.against_first.is_empty() && nothing.overall().all(|r| r.accuracy.is_none()));
}

#[test]
fn stories_and_distances_are_pooled() {
    let header = header(&[("full", None), ("hae", Some(0.4))]);
    let mut answers = Vec::new();
    for id in 0..6 {
        for (policy, share, made) in [("full", None, [3, 2]), ("hae", Some(0.4), [2, 2])] {
            let mut answer = answer(id, policy, share, policy == "full");
            answer.facts = Some(FactScore {
                required: 6,
                made: made.iter().sum(),
                said: 8,
                correct: 6,
                by_fact: made.to_vec(),
            });
            let kl: Vec<f32> = (0..=id).map(|i| i as f32).collect();
            answer.distance = Some(Distance {
                kl_mean: 0.0,
                kl_median: 0.0,
                kl_p99: 0.0,
                top1: 1.0 / (id + 1) as f64,
                ppl_ratio: 1.0,
                attention_lost: None,
                first_differing: (id == 5).then_some(3),
                lost: vec![0.25; id],
                log_prob_full: -1.0,
                log_prob: -3.0,
                n_tokens: kl.len(),
                kl,
            });
            answers.push(answer);
        }
    }
    let summary = Summary::of(&header, &answers);
    let [full, hae] = summary.overall().collect::<Vec<_>>()[..] else {
        panic!("{summary:?}")
    };
    assert_eq!((full.scored, full.stories, full.stories_whole), (0, 6, 6));
    assert_eq!(
        (hae.facts_required, hae.facts_made, hae.accuracy),
        (36, 24, None)
    );
    assert_eq!(
        (full.recall, full.precision),
        (Some(30.0 / 36.0), Some(0.75))
    );
    assert_eq!((full.facts_kept, hae.facts_kept), (Some(1.0), Some(0.8)));
    // 21 predictions, 0 six times, 1 five times, ... 5 once: their sum is 35.
    assert_eq!((hae.predictions, hae.kl_mean), (21, Some(35.0 / 21.0)));
    assert_eq!(hae.kl_median, Some(1.0));
    assert_eq!(hae.top1, Some(6.0 / 21.0));
    assert!((hae.ppl_ratio.unwrap() - (12.0f64 / 21.0).exp()).abs() < 1e-12);
    assert_eq!(hae.attention_lost, Some(0.25));
    assert_eq!(
        (hae.never_differing, hae.first_differing),
        (Some(5.0 / 6.0), Some(3.0))
    );
    let [facts] = &summary.against_first[..] else {
        panic!("{summary:?}")
    };
    assert_eq!(
        (facts.measure, facts.n, facts.verdict),
        (Measure::Facts, 6, Verdict::Worse)
    );
    assert!((facts.difference + 1.0 / 6.0).abs() < 1e-12);
}
