//! Blocks: records that were packed together, each with its sizes and a checksum.
//!
//! A block is the bytes that follow (u32, little-endian), the bytes that they unpack to (u32),
//! the CRC-32 of what follows (u32), and the packed records.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;

/// What a block unpacks to at most: an observation of the largest cache there is fits.
pub const MOST: usize = 256 << 20;

const HEADER: usize = 12;

/// Packs records into a block.
pub fn pack(records: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut block = vec![0; HEADER];
    let mut encoder = DeflateEncoder::new(&mut block, Compression::fast());
    encoder.write_all(records)?;
    encoder.finish()?;
    let too_large = |_| std::io::Error::other("a block of more than 4 GiB");
    let packed = u32::try_from(block.len() - HEADER).map_err(too_large)?;
    let unpacked = u32::try_from(records.len()).map_err(too_large)?;
    let sum = crc32fast::hash(&block[HEADER..]);
    for (i, number) in [packed, unpacked, sum].into_iter().enumerate() {
        block[4 * i..4 * i + 4].copy_from_slice(&number.to_le_bytes());
    }
    Ok(block)
}

/// Unpacks the block that `bytes` begins with, and gives what follows it.
///
/// # Errors
/// What is wrong with it; [`Broken::Cut`] where the bytes end before the block does.
pub fn unpack(bytes: &[u8]) -> Result<(Vec<u8>, &[u8]), Broken> {
    let (header, rest) = bytes.split_at_checked(HEADER).ok_or(Broken::Cut)?;
    let number = |i: usize| {
        let bytes = [0, 1, 2, 3].map(|byte| header[4 * i + byte]);
        u32::from_le_bytes(bytes)
    };
    let (packed, unpacked, sum) = (number(0) as usize, number(1) as usize, number(2));
    if unpacked > MOST {
        return Err(Broken::Damaged(format!(
            "a block of {unpacked} bytes, expected at most {MOST}"
        )));
    }
    let (body, rest) = rest.split_at_checked(packed).ok_or(Broken::Cut)?;
    if crc32fast::hash(body) != sum {
        return Err(Broken::Damaged("its checksum does not match".into()));
    }
    // The buffer grows with what comes out, whatever the header promised.
    let mut records = Vec::new();
    let most = unpacked as u64 + 1;
    let read = DeflateDecoder::new(body)
        .take(most)
        .read_to_end(&mut records);
    match read {
        Err(e) => Err(Broken::Damaged(e.to_string())),
        Ok(n) if n != unpacked => Err(Broken::Damaged(format!(
            "it does not unpack to {unpacked} bytes"
        ))),
        Ok(_) => Ok((records, rest)),
    }
}

/// Why there is no block.
#[derive(Debug)]
pub enum Broken {
    /// The file ends in it.
    Cut,
    Damaged(String),
}
