//! Traces. The first byte says whether the rest is a file or the records that are packed into one: a checksum
//! and deflate would stop almost every other change. What is read is then replayed and reported.

#![no_main]

use std::io::Write;
use std::path::Path;
use std::rc::Rc;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use hae::PolicySpec;
use hae::replay::{Player, replay, tapes, verify};
use hae::report::{Traced, html, stories};
use hae::trace::{Cut, Reader};
use libfuzzer_sys::fuzz_target;

/// A trace may speak of a cache of millions of cells, which takes its time and shows nothing else.
const MOST_CELLS: usize = 4096;

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    match data.split_first() {
        Some((&first, rest)) if first & 1 == 0 => read(packed(rest), first),
        Some((&first, rest)) => read(rest.to_vec(), first),
        None => {}
    }
});

fn packed(records: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::none());
    encoder.write_all(records).unwrap();
    let body = encoder.finish().unwrap();
    let mut file = b"HAE-TRAC".to_vec();
    for number in [
        4,
        body.len() as u32,
        records.len() as u32,
        crc32fast::hash(&body),
    ] {
        file.extend(number.to_le_bytes());
    }
    file.extend(body);
    file
}

fn read(bytes: Vec<u8>, first: u8) {
    let path = Path::new("f");
    let cut = match first & 2 {
        0 => Cut::Accept,
        _ => Cut::Refuse,
    };
    let Some(mut reader) = hae_fuzz::one_line(Reader::new(path, bytes, cut)) else {
        return;
    };
    let Some(records) = hae_fuzz::one_line(reader.rest()) else {
        return;
    };
    let header = reader.header().clone();
    if header.n_cells > MOST_CELLS {
        return;
    }
    let mut player = Player::new(&records);
    for record in &records {
        if hae_fuzz::one_line(player.take(record)).is_none() {
            break;
        }
    }
    hae_fuzz::one_line(verify(path, &header, &records));
    for tape in hae_fuzz::one_line(tapes(path, &header, &records)).unwrap_or_default() {
        let tape = Rc::new(tape);
        for policy in [PolicySpec::full(), PolicySpec::hae()] {
            hae_fuzz::one_line(replay(&header, &tape, &policy));
        }
    }
    if let Some(stories) = hae_fuzz::one_line(stories(path, &records)).filter(|s| !s.is_empty()) {
        let traced = Traced {
            path: path.to_owned(),
            header,
            stories,
            complete: reader.is_complete(),
        };
        hae_fuzz::one_line(html(&[], &[traced]));
    }
}
