//! Calibrations. What was read is written as it was.

#![no_main]

use hae::calibrate::file::Calibration;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let read = |bytes: &[u8]| hae_fuzz::one_line(Calibration::decode("f".as_ref(), bytes));
    if let Some(calibration) = read(data) {
        let written = serde_json::to_vec(&calibration).unwrap();
        assert_eq!(read(&written), Some(calibration));
    }
});
