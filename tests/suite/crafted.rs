//! Sessions and traces that somebody made up: every checksum is right and what they say is not.
//! Each is refused with one line, or harmless; nothing that they say is believed.

use std::io::Write;
use std::path::{Path, PathBuf};

use hae::cache::{Modality, State};
use hae::saved::Saved;
use hae::trace::{Cut, Record};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal, refusal_of};
use crate::model::{PICTURE, TEXT, VISION, WHERE, repository};

struct Made {
    _dir: TempDir,
    session: PathBuf,
    trace: PathBuf,
}

/// Runs with the small model's own files.
fn args(rest: &[&str]) -> Vec<String> {
    let [model, mmproj] = [TEXT, VISION].map(|path| repository(path).display().to_string());
    let start = [
        "run", "-t", "1", "--temp", "0", "-n", "8", "-m", &model, "--mmproj", &mmproj,
    ];
    start
        .iter()
        .chain(rest)
        .map(|&word| word.to_owned())
        .collect()
}

/// A question about a picture with half of it evicted, in a session and a trace.
fn made() -> Made {
    let dir = TempDir::new().unwrap();
    let [session, trace] = ["s", "t"].map(|name| dir.path().join(name));
    let picture = repository(PICTURE).display().to_string();
    let [to, traced] = [&session, &trace].map(|path| path.display().to_string());
    let rest = [
        "--image",
        &picture,
        "-p",
        WHERE,
        "--kv-policy",
        "hae",
        "--dap-keep",
        "40",
        "--kv-budget",
        "0.5",
        "--session",
        &to,
        "--trace",
        &traced,
    ];
    answer(&args(&rest));
    Made {
        session,
        trace,
        _dir: dir,
    }
}

const GO_ON: [&str; 8] = [
    "-p",
    "Hi",
    "--kv-policy",
    "hae",
    "--dap-keep",
    "40",
    "--kv-budget",
    "0.5",
];

fn go_on(session: &Path) -> Vec<String> {
    let path = session.display().to_string();
    let rest = [&GO_ON[..], &["--session", &path]].concat();
    args(&rest)
}

/// Another value in the place of a field, however private it is.
fn changed<T: serde::Serialize + serde::de::DeserializeOwned>(
    value: &T,
    at: &str,
    new: Value,
) -> T {
    let mut json = serde_json::to_value(value).unwrap();
    *json.pointer_mut(at).unwrap_or_else(|| panic!("{at}")) = new;
    serde_json::from_value(json).unwrap()
}

#[test]
fn sessions_that_cannot_be() {
    let made = made();
    let good = Saved::read(&made.session).unwrap();
    good.write(&made.session).unwrap();
    let text = answer(&go_on(&made.session));
    assert!(!text.is_empty());

    let refused = |change: &dyn Fn(&mut Saved), expected: &str| {
        let mut saved = good.clone();
        change(&mut saved);
        saved.write(&made.session).unwrap();
        let bytes = std::fs::read(&made.session).unwrap();
        let line = refusal(&go_on(&made.session));
        assert!(line.starts_with("hae: --session: "), "{line}");
        assert!(line.contains(expected), "{expected}: {line}");
        assert_eq!(std::fs::read(&made.session).unwrap(), bytes, "{expected}");
    };
    for token in [-1, 1 << 20, i32::MIN, i32::MAX] {
        let expected = format!("token {token} is not in the vocabulary");
        refused(&|s| s.pending = Some(token), &expected);
        refused(&|s| s.sampled[0] = token, &expected);
        refused(
            &|s| s.history = changed(&s.history, "/pieces/0/segment/Tokens/0", token.into()),
            &expected,
        );
    }
    for images in [0, u32::MAX] {
        refused(&|s| s.images = images, "picture");
    }
    for value in [f32::NAN, f32::INFINITY, -1.0] {
        refused(&|s| s.ledger.entries[3].sum = value, "has a score of");
        refused(&|s| s.ledger.entries[3].max = value, "has a score of");
        refused(&|s| s.ledger.entries[3].seen = value, "has a score of");
    }
    // Near the largest number there is no room for what follows.
    for pos in [-1, i32::MAX, i32::MAX - 8] {
        refused(&|s| s.ledger.entries.last_mut().unwrap().pos = pos, "");
    }
    refused(&|s| s.ledger.entries[3].pos += 1, "");
    refused(&|s| s.ledger.entries[0].state = State::Binned, "");
    refused(&|s| s.ledger.entries[0].modality = Modality::Vision, "");
    refused(&|s| s.ledger.entries.truncate(9), "");
    refused(&|s| s.ledger.entries.clear(), "");
    for (at, value) in [
        ("/counts/live/text", json!(0)),
        ("/counts/live/vision", json!(u64::MAX)),
        ("/counts/binned/text", json!(3)),
        ("/counts/evicted/vision", json!(u64::MAX)),
        ("/counts/peak", json!(1)),
        ("/first", json!(100_000)),
        ("/first", Value::Null),
        ("/turn", json!(u32::MAX)),
    ] {
        refused(
            &|s| s.ledger = changed(&s.ledger, at, value.clone()),
            "is damaged: ",
        );
    }
    let picture = "/pieces/1/segment/Image";
    for (at, value) in [
        ("/pieces/1/base", json!(0)),
        ("/pieces/1/base", json!(i32::MAX)),
        ("/pieces/0/base", json!(-5)),
        (&*format!("{picture}/n"), json!(0)),
        (&*format!("{picture}/n"), json!(7)),
        (&*format!("{picture}/n"), json!(1u64 << 60)),
        (&*format!("{picture}/image"), json!(9)),
        (&*format!("{picture}/embeddings/5"), json!(1e39)),
        (&*format!("{picture}/embeddings"), json!([0.5])),
    ] {
        refused(
            &|s| s.history = changed(&s.history, at, value.clone()),
            "is damaged: ",
        );
    }
    refused(
        &|s| {
            let rows = hae::generate::Saved {
                pos: vec![0, 0],
                rows: vec![0; 64],
            };
            s.host_bin.push(rows);
        },
        "is damaged: ",
    );
    // What is no state of llama.cpp's, or one of other tokens.
    let state = |s: &Saved| postcard::to_stdvec(s).unwrap();
    assert!(state(&good).len() > 100_000);
}

/// Bytes of a session at random places, under a checksum that is right: whatever they mean, the
/// program ends in order.
#[test]
fn sessions_with_other_bytes() {
    use sha2::{Digest, Sha256};

    const HEADER: usize = 8 + 4 + 32;
    let made = made();
    let good = std::fs::read(&made.session).unwrap();
    let mut state = 7u64;
    let mut random = |below: usize| {
        // xorshift64: the same files in every run.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    // The books are at the beginning, llama.cpp's own part at the end with its numbers in front.
    let state_at = good.len() - llama_bytes(&made.session);
    let mut refused = 0;
    for round in 0..36 {
        let mut bytes = good.clone();
        let at = match round % 3 {
            0 => HEADER + random(2000),
            1 => state_at + random(400),
            _ => HEADER + random(bytes.len() - HEADER),
        };
        bytes[at] = [0, 0x7f, 0xff, 0x80, random(256) as u8][random(5)];
        let digest = Sha256::digest(&bytes[HEADER..]);
        bytes[HEADER - 32..HEADER].copy_from_slice(&digest);
        std::fs::write(&made.session, &bytes).unwrap();
        let output = hae().args(go_on(&made.session)).output().unwrap();
        match output.status.code() {
            Some(0) => {}
            _ => {
                refusal_of(&output);
                refused += 1;
            }
        }
    }
    assert!(refused > 6, "{refused} of 36");
}

/// Bytes of llama.cpp's part, which is the last of a session.
fn llama_bytes(session: &Path) -> usize {
    Saved::read(session).unwrap().state.len()
}

/// A trace with these records, in one block.
fn write_trace(path: &Path, records: &[Record]) {
    let mut body = Vec::new();
    for record in records {
        body.extend(postcard::to_stdvec(record).unwrap());
    }
    let mut packed = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&body).unwrap();
    let packed = packed.finish().unwrap();
    let mut bytes = b"HAE-TRAC".to_vec();
    for number in [
        1,
        packed.len() as u32,
        body.len() as u32,
        crc32fast::hash(&packed),
    ] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(packed);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn traces_that_cannot_be() {
    let made = made();
    let (header, mut good) = hae::trace::read(&made.trace, Cut::Refuse).unwrap();
    good.insert(0, Record::Header(Box::new(header.clone())));
    good.push(Record::End);
    let path = made.trace.display().to_string();
    let page = made.trace.with_extension("html").display().to_string();
    write_trace(&made.trace, &good);
    answer(&["replay", &path]);
    answer(&["report", "--trace", &path, "-o", &page]);

    let find = |what: fn(&Record) -> bool| good.iter().position(what).unwrap();
    let inserted = find(|r| matches!(r, Record::Inserted { .. }));
    let observed = find(|r| matches!(r, Record::Observed { queries, .. } if !queries.is_empty()));
    let planned = find(|r| matches!(r, Record::Planned { .. }));
    let many = 1u32 << 31;
    let cases: Vec<(usize, &str, Value)> = vec![
        (0, "/Header/n_cells", json!(u64::MAX)),
        (0, "/Header/n_layer", json!(0)),
        (0, "/Header/layers", json!([9, 3])),
        (inserted, "/Inserted/cells/0", json!(many)),
        (inserted, "/Inserted/cells", json!([])),
        (inserted, "/Inserted/pos/0", json!(i32::MAX)),
        (inserted, "/Inserted/pos/0", json!(-7)),
        (observed, "/Observed/queries/0", json!(i32::MAX)),
        (observed, "/Observed/queries", json!([5, 4])),
        (planned, "/Planned/evict", json!([many])),
        (planned, "/Planned/bin", json!([many])),
        (planned, "/Planned/shift", json!([4, -4])),
        (planned, "/Planned/shift", json!([i32::MAX, i32::MIN])),
    ];
    for (i, at, value) in cases {
        let mut records = good.clone();
        records[i] = changed(&records[i], at, value.clone());
        write_trace(&made.trace, &records);
        for args in [
            &["replay", &path][..],
            &["replay", &path, "--kv-policy", "h2o"],
            &["report", "--trace", &path, "-o", &page],
        ] {
            let line = refusal(args);
            assert!(
                line.starts_with(&format!("hae: {path}: is damaged")),
                "{at} {value}: {line}"
            );
        }
    }
    // A saved ledger in a trace is held to what one in a session is.
    let session = Saved::read(&made.session).unwrap();
    let cells: Vec<u32> = (0..session.ledger.entries.len() as u32).collect();
    let mut ledger = session.ledger.clone();
    ledger.entries[3].sum = f32::NAN;
    for saved in [
        ledger,
        changed(&session.ledger, "/counts/live/text", json!(u64::MAX)),
    ] {
        let cells = cells.clone();
        let records = [
            good[0].clone(),
            Record::Loaded { saved, cells },
            Record::Turn,
            Record::End,
        ];
        write_trace(&made.trace, &records);
        let line = refusal(&["replay", &path]);
        assert!(line.contains("cannot be replayed: "), "{line}");
        let line = refusal(&["report", "--trace", &path, "-o", &page]);
        assert!(line.contains("cannot be shown: "), "{line}");
    }
}

/// Of a trace that is damaged and cut short stderr has one line, and one for each that is only cut.
#[test]
fn a_damaged_trace_is_one_line() {
    let made = made();
    let (header, records) = hae::trace::read(&made.trace, Cut::Refuse).unwrap();
    let header = Record::Header(Box::new(header));
    let whole = |records: &[Record]| [std::slice::from_ref(&header), records].concat();
    let path = made.trace.display().to_string();
    // No end.
    write_trace(&made.trace, &whole(&records));
    let output = hae().args(["replay", &path, &path]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let line = format!("hae: {path}: the run did not come to its end");
    assert_eq!(said.lines().collect::<Vec<_>>(), [&line, &line]);
    // Nor a beginning.
    let turn = records.iter().position(|r| *r == Record::Turn).unwrap();
    let mut broken = records.clone();
    broken.insert(turn, Record::Separators(vec![200]));
    write_trace(&made.trace, &whole(&broken));
    for args in [
        &["replay", &path][..],
        &["replay", &path, "--kv-policy", "h2o"],
    ] {
        let line = refusal(args);
        assert!(
            line.ends_with("; the run did not come to its end"),
            "{line}"
        );
    }
}
