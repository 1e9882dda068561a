//! Decodes a picture as `--image` does and writes it as a PPM: `cargo run --release --example rgb -- PICTURE OUT.ppm`

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use hae::image::{Limits, load};
use hae::{Error, Result};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [picture, out] = &args[..] else {
        eprintln!("usage: rgb PICTURE OUT.ppm");
        return ExitCode::from(2);
    };
    match write(Path::new(picture), Path::new(out)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn write(picture: &Path, out: &Path) -> Result<()> {
    let picture = load(picture, &Limits::default())?;
    let io = |cause| Error::Io {
        path: out.to_owned(),
        cause,
    };
    let mut file = std::fs::File::create(out).map_err(io)?;
    writeln!(file, "P6 {} {} 255", picture.width, picture.height).map_err(io)?;
    file.write_all(&picture.rgb).map_err(io)
}
