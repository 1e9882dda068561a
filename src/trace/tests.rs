use std::io::Write;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_bytes::ByteBuf;

use super::*;
use crate::cache::Pos;
use crate::controller::{After, Event, Origin, Recorder};
use crate::engine::Observation;
use crate::policy::Plan;

fn header(policy: &str) -> Header {
    let limits = Limits {
        n_layer: 6,
        n_cells: 512,
    };
    let options = PolicyOptions::default();
    Header::new(
        "a model".into(),
        limits,
        &crate::policy::PolicySpec::new(policy, options),
        vec![0, 5],
    )
}

/// A file in a folder of its own, which goes with it.
fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn parsed(bytes: &[u8], cut: Cut) -> Result<(Header, Vec<Record>)> {
    let mut reader = Reader::new(Path::new("a.trace"), bytes.to_vec(), cut)?;
    let records = reader.rest()?;
    Ok((reader.header().clone(), records))
}

/// A trace of a prompt and some steps, with the records that are in it.
fn sample(policy: &str, steps: usize) -> (Vec<u8>, Vec<Record>) {
    let (_folder, path) = file(&[]);
    let mut writer = Writer::create(&path, header(policy)).unwrap();
    let precision = header(policy).precision;
    let mut records = Vec::new();
    let mut tell = |event: Event<'_>| {
        records.push(Record::of(event, precision));
        writer.record(event);
    };
    let cells: Vec<u32> = (0..40).collect();
    let pos: Vec<Pos> = (0..40).collect();
    tell(Event::Turn);
    let origin = Origin::picture(3);
    let (cells, pos) = (&cells[..], &pos[..]);
    tell(Event::Inserted { cells, pos, origin });
    for step in 0..steps {
        let pos = 40 + step as Pos;
        let row: Vec<f32> = (0..=pos).map(|key| 1.0 / (1.0 + key as f32)).collect();
        tell(Event::Text {
            pos,
            bytes: b" word",
        });
        tell(Event::Inserted {
            cells: &[pos as u32],
            pos: &[pos],
            origin: Origin::TEXT,
        });
        tell(Event::Observed(&Observation {
            sum: row.clone(),
            max: row,
            queries: vec![pos],
            ..Observation::default()
        }));
        let counts = [None, Some(0), Some(step as u32 % 7), None];
        tell(Event::Looked {
            layers: 6,
            counts: &counts,
        });
        let plan = Plan {
            bin: vec![step as u32],
            ..Plan::default()
        };
        let after = match step {
            0 => After::Prompt { pruned: false },
            _ => After::Step,
        };
        tell(Event::Planned { after, plan: &plan });
    }
    writer.finish().unwrap();
    drop(writer);
    (std::fs::read(&path).unwrap(), records)
}

#[test]
fn what_is_written_is_read() {
    for policy in ["full", "hae"] {
        let (bytes, records) = sample(policy, 30);
        let mut reader = Reader::new(Path::new("a.trace"), bytes, Cut::Refuse).unwrap();
        assert_eq!(*reader.header(), header(policy));
        for expected in &records {
            assert_eq!(reader.record().unwrap().as_ref(), Some(expected));
        }
        assert_eq!(reader.record().unwrap(), None);
        assert!(reader.is_complete());
    }
}

#[test]
fn a_run_that_breaks_off_keeps_what_it_wrote() {
    let (_folder, path) = file(&[]);
    let mut writer = Writer::create(&path, header("hae")).unwrap();
    writer.record(Event::Turn);
    writer.record(Event::Rewound(7));
    drop(writer);
    let mut reader = Reader::open(&path, Cut::Refuse).unwrap();
    assert_eq!(reader.record().unwrap(), Some(Record::Turn));
    assert_eq!(reader.record().unwrap(), Some(Record::Rewound(7)));
    assert_eq!(reader.record().unwrap(), None);
    assert!(!reader.is_complete());
}

/// Cut anywhere, a file is refused in one line, or gives a beginning of what it held.
#[test]
fn cut_files() {
    let (bytes, records) = sample("hae", 12);
    for end in 0..bytes.len() {
        match parsed(&bytes[..end], Cut::Refuse) {
            Ok((_, kept)) => assert!(records.starts_with(&kept), "whole blocks only"),
            Err(error) => {
                let line = error.to_string();
                assert!(
                    line.starts_with("a.trace: ") && !line.contains('\n'),
                    "{line}"
                );
            }
        }
        match parsed(&bytes[..end], Cut::Accept) {
            Ok((found, kept)) => {
                assert_eq!(found, header("hae"));
                assert!(records.starts_with(&kept));
            }
            // Not even the header is whole.
            Err(_) => assert!(end < bytes.len() / 2, "{end}"),
        }
    }
}

/// No byte can be another without being found out.
#[test]
fn damaged_files() {
    let (bytes, _) = sample("full", 3);
    for at in 0..bytes.len() {
        for bit in [1, 0x80] {
            let mut damaged = bytes.clone();
            damaged[at] ^= bit;
            let line = parsed(&damaged, Cut::Refuse).unwrap_err().to_string();
            assert!(
                line.starts_with("a.trace: ") && !line.contains('\n'),
                "{line}"
            );
        }
    }
}

/// A file with these bytes as the records of its only block.
fn with_records(records: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.write_all(&block::pack(records).unwrap()).unwrap();
    bytes
}

#[test]
fn headers_that_lie() {
    let refused = |change: fn(&mut Header)| {
        let mut header = header("hae");
        change(&mut header);
        let record = Record::Header(Box::new(header));
        let bytes = with_records(&postcard::to_stdvec(&record).unwrap());
        parsed(&bytes, Cut::Refuse).unwrap_err().to_string()
    };
    assert!(refused(|h| h.n_cells = usize::MAX).contains("a cache of"));
    assert!(refused(|h| h.n_cells = 0).contains("a cache of 0 cells"));
    assert!(refused(|h| h.n_layer = u32::MAX).contains("layers"));
    assert!(refused(|h| h.layers = vec![6]).contains("layers [6] of 6"));
    assert!(refused(|h| h.layers = vec![1, 1]).contains("layers [1, 1]"));
    let bytes = with_records(&postcard::to_stdvec(&Record::Turn).unwrap());
    let line = parsed(&bytes, Cut::Refuse).unwrap_err().to_string();
    assert!(line.ends_with("is damaged: it has no header"), "{line}");
    let mut other = with_records(&[]);
    other[8] = 9;
    let line = parsed(&other, Cut::Refuse).unwrap_err().to_string();
    assert!(
        line.ends_with("is a trace of version 9, expected 1 to 4"),
        "{line}"
    );
}

#[test]
fn older_traces_are_read() {
    let (bytes, records) = sample("hae", 3);
    for version in OLDEST..=VERSION {
        let mut other = bytes.clone();
        other[8..12].copy_from_slice(&version.to_le_bytes());
        assert_eq!(parsed(&other, Cut::Refuse).unwrap().1, records);
    }
}

#[test]
fn choices_that_cannot_be() {
    let refused = |layers: u32, counts: &[Option<u32>]| {
        let counts = Counts::new(counts);
        let mut records = postcard::to_stdvec(&Record::Header(Box::new(header("hae")))).unwrap();
        records.extend(postcard::to_stdvec(&Record::Looked { layers, counts }).unwrap());
        let read = parsed(&with_records(&records), Cut::Refuse);
        read.map_err(|error| error.to_string())
    };
    assert!(refused(6, &[Some(6), None, Some(0)]).is_ok());
    assert!(refused(6, &[Some(0); 512]).is_ok());
    for (layers, counts, reason) in [
        (0, vec![], "0 layers chose, of 6"),
        (7, vec![], "7 layers chose, of 6"),
        (6, vec![Some(0); 513], "choices among 513 cells of 512"),
        (5, vec![None, Some(6)], "a cell that 6 of 5 layers chose"),
        (6, vec![Some(u32::MAX)], "a cell that 65534 of 6 layers"),
    ] {
        let line = refused(layers, &counts).unwrap_err();
        assert!(line.contains(reason), "{line}");
    }
}

#[test]
fn counts_are_kept() {
    let counts = [None, Some(0), Some(1), None, Some(300), Some(4096), None];
    let kept = Counts::new(&counts);
    // Behind the last choice there is none.
    assert!(kept.iter().eq(counts[..6].iter().copied()));
    assert_eq!(kept.len(), 6);
    assert!(Counts::new(&[None, None]).is_empty());
}

/// A small file cannot ask for much memory: a block that promises 256 MiB, and a vector that
/// promises as much.
#[test]
fn small_files_cost_little() {
    let (good, _) = sample("hae", 1);
    let mut promises = good.clone();
    // The size that the first block unpacks to.
    promises[16..20].copy_from_slice(&(block::MOST as u32).to_le_bytes());
    let mut vector = postcard::to_stdvec(&Record::Header(Box::new(header("hae")))).unwrap();
    vector.extend(postcard::to_stdvec(&Record::Skipped(Vec::new())).unwrap());
    vector.pop();
    vector.extend([0xff, 0xff, 0xff, 0xff, 0x0f]);
    for bytes in [promises, with_records(&vector)] {
        let cost = allocation_counter::measure(|| {
            assert!(parsed(&bytes, Cut::Refuse).is_err());
        });
        assert!(cost.bytes_max < 4 << 20, "{} bytes", cost.bytes_max);
    }
}

#[test]
fn rounding_is_within_its_bound() {
    let values: Vec<f32> = (0..4000)
        .map(|i| 1.37f32.powi(-(i % 200)) * i as f32)
        .collect();
    let rounded = Values::new(&values, Precision::Rounded);
    assert_eq!(rounded.len(), values.len());
    for (value, kept) in values.iter().zip(rounded.iter()) {
        assert!((value - kept).abs() <= value / 256.0, "{value} {kept}");
    }
    let exact = Values::new(&values, Precision::Exact);
    assert!(exact.iter().eq(values.iter().copied()));
    // Trailing zeros are no values.
    let short = Values::new(&[0.0, 0.5, 0.0, 0.0], Precision::Exact);
    assert_eq!(short.iter().collect::<Vec<_>>(), [0.0, 0.5]);
    // Bytes that are no whole number of values.
    let odd = Values::Exact(ByteBuf::from(vec![0; 7]));
    assert_eq!(odd.iter().count(), 1);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        whole in any::<bool>(),
    ) {
        let mut records = postcard::to_stdvec(&Record::Header(Box::new(header("hae")))).unwrap();
        records.extend(&bytes);
        let bytes = match whole {
            true => with_records(&records),
            false => [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat(),
        };
        for cut in [Cut::Refuse, Cut::Accept] {
            if let Err(error) = parsed(&bytes, cut) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
