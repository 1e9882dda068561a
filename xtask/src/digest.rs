//! SHA-256 of what is fetched.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

/// In hexadecimal, of all that `from` gives; it is copied to `to` on the way.
///
/// # Errors
/// When one cannot be read, or the other not written.
pub fn sha256(mut from: impl Read, to: &mut impl Write) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut part = vec![0; 1 << 16];
    loop {
        let n = from.read(&mut part)?;
        if n == 0 {
            return Ok(format!("{:x}", hash.finalize()));
        }
        hash.update(&part[..n]);
        to.write_all(&part[..n])?;
    }
}
