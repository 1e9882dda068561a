//! Question files of every format; the first byte says which.

#![no_main]

use hae::eval::files::{Format, Source};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let Some((&first, data)) = data.split_first() else {
        return;
    };
    let formats = Format::ALL;
    hae_fuzz::with_file(data, |path| {
        let source = Source {
            path: path.to_owned(),
            format: Some(formats[usize::from(first) % formats.len()]),
            unanswered: first >= 128,
            ..Source::default()
        };
        hae_fuzz::one_line(source.read());
    });
});
