//! Pictures from memory, of every format that is read.

#![no_main]

use hae::image::{Limits, decode};
use libfuzzer_sys::fuzz_target;

/// Small enough that a run takes no second.
const LIMITS: Limits = Limits {
    file: 1 << 20,
    min_side: 2,
    max_side: 4096,
    pixels: 1 << 20,
    aspect: 100,
    memory: 64 << 20,
};

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    if let Some(picture) = hae_fuzz::one_line(decode("f".as_ref(), data, &LIMITS)) {
        let (width, height) = (picture.width as usize, picture.height as usize);
        assert_eq!(picture.rgb.len(), width * height * 3);
    }
});
