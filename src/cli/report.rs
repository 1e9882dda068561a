//! `hae report`: results and traces as one HTML file.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Done, note, warn};
use hae::Error;
use hae::outfile::{FilesInUse, OutFile};
use hae::report::{Results, Traced, html};
use hae::trace::Cut;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Results that `hae eval` or `hae compare` saved
    #[arg(value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// Trace to show, with its pictures and text. Repeat for several. Without it, those that the
    /// results name
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
    /// Most prompts to show of the traces that the results name
    #[arg(long, default_value_t = 12, value_name = "N")]
    prompts: usize,
    /// Take what there is of a trace that is cut off
    #[arg(long)]
    partial: bool,
    /// The HTML file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(args: &Args) -> Result<Done> {
    if args.results.is_empty() && args.trace.is_empty() {
        let reason = "nothing to show, expected results, or a trace with --trace";
        return Err(Error::option("hae report", reason).into());
    }
    let results = args.results.iter().map(|path| Results::read(path));
    let results = results.collect::<hae::Result<Vec<_>>>()?;
    let cut = match args.partial {
        true => Cut::Accept,
        false => Cut::Refuse,
    };
    let paths = match args.trace.is_empty() {
        false => args.trace.clone(),
        true => named(&results, args.prompts),
    };
    let mut in_use = FilesInUse::default();
    let read = args.results.iter().chain(&paths);
    read.for_each(|path| in_use.reads("one that is shown", path));
    in_use.writes("-o", &args.output)?;
    let traces = paths.iter().map(|path| Traced::read(path, cut));
    let traces = traces.collect::<hae::Result<Vec<_>>>()?;
    let page = html(&results, &traces)?;
    let out = OutFile::create(&args.output)?;
    let written = out.file().write_all(page.as_bytes());
    written.map_err(|e| Error::io(&args.output, e))?;
    out.commit()?;
    note(&format!(
        "{}: {} results, {} traces, {} KiB",
        args.output.display(),
        results.iter().map(|r| r.answers.len()).sum::<usize>(),
        traces.len(),
        page.len().div_ceil(1024)
    ));
    Ok(Done::Whole)
}

/// Traces that the results name, relative to the results file or to here. Results are often read
/// elsewhere than they were made, so one that is gone is no error.
fn named(results: &[Results], most: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut gone = 0;
    for result in results {
        let folder = result.path.parent().unwrap_or(Path::new("."));
        for name in result.traces() {
            let places = [folder.join(name), PathBuf::from(name)];
            match places.into_iter().find(|place| place.is_file()) {
                Some(place) => found.push(place),
                None => gone += 1,
            }
        }
    }
    if gone > 0 {
        warn(&format!(
            "{gone} traces that the results name are not there"
        ));
    }
    found.truncate(most);
    found
}
