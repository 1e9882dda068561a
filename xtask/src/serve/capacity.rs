//! `cargo xtask serve capacity`: how many chats about pictures fit at once into the same bytes of KV cache.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::client::{Client, Reply, Said};
use super::program::Served;
use super::questions::{self, Question, first, further, request, said};
use super::server::Server;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    served: Served,
    /// Two-turn chats
    #[arg(long, default_value_t = 64)]
    chats: usize,
    /// Pictures of each
    #[arg(long, default_value_t = 1)]
    pictures: usize,
    /// F16 cells that give the bytes
    #[arg(long, default_value_t = 2048)]
    cells: usize,
    /// Most slots that are tried
    #[arg(long, default_value_t = 64)]
    most: usize,
    /// Rows of the table, counted from 1; otherwise all
    #[arg(long, value_delimiter = ',')]
    rows: Vec<usize>,
}

/// Tokens of an answer at most.
const ANSWER: usize = 16;
/// The cache is laid out in such steps.
const PAD: usize = 256;
/// A q8_0 element in F16 ones: 34 bytes for 32 elements.
const Q8_0: f64 = 34.0 / 64.0;

/// What is compared.
const ROWS: [(&str, &str, &[&str]); 4] = [
    (
        "`full`, F16: what llama.cpp's server holds",
        "f16",
        &["--kv-policy", "full"],
    ),
    ("`full`, q8_0", "q8_0", &["--kv-policy", "full"]),
    ("`hae`, q8_0", "q8_0", &["--kv-policy", "hae"]),
    (
        "`hae --kv-budget 0.25`, q8_0",
        "q8_0",
        &["--kv-policy", "hae", "--kv-budget", "0.25"],
    ),
];

/// How all chats went with so many slots.
struct Round {
    /// Chats whose second turn found the first one in its slot.
    held: usize,
    chats: usize,
    right: usize,
    tokens: usize,
    seconds: f64,
    /// Of the looks at the server, those that found a question waiting beside a free slot.
    waits: f64,
    allocated: f64,
}

/// Prints a row for each way to hold chats.
///
/// # Errors
/// When a server cannot be started or does not answer.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    let program = args.served.program(root)?;
    let folder = root.join(&args.served.questions);
    let mut chats = questions::pairs(&questions::read(&folder, "understanding.jsonl")?);
    chats.retain(|[one, _]| one.images.len() == args.pictures);
    ensure!(!chats.is_empty(), "no question has so many pictures");
    // Chats about the same pictures would share a slot.
    let different: BTreeSet<&[String]> = chats.iter().map(|[one, _]| &one.images[..]).collect();
    let most = args.most.min(different.len());
    chats.truncate(args.chats);
    println!(
        "{} chats of two turns, pictures in each: {}\n",
        chats.len(),
        args.pictures
    );
    println!(
        "| cache | cells | KV bytes | chats at once | right answers | questions that wait | answer tokens/s | chats/min |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|");
    for (i, (name, kind, flags)) in ROWS.into_iter().enumerate() {
        if !args.rows.is_empty() && !args.rows.contains(&(i + 1)) {
            continue;
        }
        let cells = match kind {
            "f16" => args.cells,
            _ => (args.cells as f64 / Q8_0) as usize / PAD * PAD,
        };
        let mut all = args.served.flags(root);
        let cells_text = cells.to_string();
        all.extend(["-c", &cells_text, "-ctk", kind, "-ctv", kind].map(str::to_owned));
        all.extend(flags.iter().map(|&flag| flag.to_owned()));
        let most = most.min(chats.len());
        let slots = largest(most, |slots| {
            let round = chat(&program, &all, slots, &folder, &chats, true)?;
            Ok(round.held == round.chats)
        })?;
        let round = chat(&program, &all, slots.max(1), &folder, &chats, false)?;
        let questions = 2 * round.chats;
        println!(
            "| {name} | {cells} | {:.1} MB | {slots} | {} of {questions} | {:.0} % | {:.1} | {:.0} |",
            round.allocated / 1e6,
            round.right,
            100.0 * round.waits,
            round.tokens as f64 / round.seconds,
            60.0 * round.chats as f64 / round.seconds
        );
    }
    Ok(())
}

/// The most for which it is true, of those up to `most`; it is true up to some number and false behind it. 0: for none.
fn largest(most: usize, mut fits: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
    // Upwards first: what does not fit takes longest.
    let (mut good, mut bad) = (0, most + 1);
    let mut next = 1;
    while bad - good > 1 {
        if fits(next)? {
            good = next;
        } else {
            bad = next;
        }
        next = match bad == most + 1 {
            true => (2 * good).clamp(1, most),
            false => good.midpoint(bad),
        };
    }
    Ok(good)
}

/// Groups of as many chats as there are slots: all first questions at once, then all second ones.
/// `search`: no more than needed to know whether chats lose their slots.
fn chat(
    program: &Path,
    flags: &[String],
    slots: usize,
    folder: &Path,
    chats: &[[Question; 2]],
    search: bool,
) -> Result<Round> {
    let mut flags = flags.to_vec();
    flags.extend(["-np".to_owned(), slots.to_string()]);
    let server = Server::start(program, &flags)?;
    let client = Client::new(&server.address);
    let mut round = Round {
        held: 0,
        chats: 0,
        right: 0,
        tokens: 0,
        seconds: 0.0,
        waits: 0.0,
        allocated: 0.0,
    };
    let watched = Watched::default();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| watched.watch(&client, slots));
        let done = groups(&client, slots, folder, chats, search, &mut round);
        watched.over.store(true, Ordering::Relaxed);
        done
    })?;
    round.seconds = start.elapsed().as_secs_f64();
    round.waits = watched.share();
    round.allocated = watched.allocated.load(Ordering::Relaxed) as f64;
    server.end()?;
    Ok(round)
}

fn groups(
    client: &Client,
    slots: usize,
    folder: &Path,
    chats: &[[Question; 2]],
    search: bool,
    round: &mut Round,
) -> Result<()> {
    for group in chats.chunks(slots) {
        let firsts = group.iter().map(|[one, _]| Ok(vec![first(folder, one)?]));
        let mut messages = firsts.collect::<Result<Vec<Vec<Value>>>>()?;
        let answers = all_at_once(client, &messages)?;
        for ((messages, [_, two]), answer) in messages.iter_mut().zip(group).zip(&answers) {
            messages.extend([said(&answer.text), further(&two.question)]);
        }
        let seconds = all_at_once(client, &messages)?;
        for (([one, two], a), b) in group.iter().zip(&answers).zip(&seconds) {
            round.chats += 1;
            // All chats begin alike, which is no more than a few tokens.
            round.held += usize::from(2 * b.cached > b.prompt);
            round.right += usize::from(one.is_right(&a.text)) + usize::from(two.is_right(&b.text));
            round.tokens += a.tokens + b.tokens;
        }
        // The first group has the cache for itself; those behind it find it full.
        if search && (round.held < round.chats || round.chats > slots) {
            break;
        }
    }
    Ok(())
}

fn all_at_once(client: &Client, all: &[Vec<Value>]) -> Result<Vec<Said>> {
    let asked = |messages: &Vec<Value>| match client.ask(&request(messages, ANSWER, false))? {
        Reply::Said(said) => Ok(said),
        Reply::Busy(_) => anyhow::bail!("the queue is full"),
    };
    std::thread::scope(|scope| {
        let asking: Vec<_> = all
            .iter()
            .map(|messages| scope.spawn(move || asked(messages)))
            .collect();
        let joined = asking.into_iter().map(|thread| thread.join());
        joined
            .map(|answer| answer.unwrap_or_else(|_| anyhow::bail!("a client broke")))
            .collect()
    })
}

/// Looks at the server while it is asked.
#[derive(Default)]
struct Watched {
    over: AtomicBool,
    looks: AtomicUsize,
    /// Looks that found a question waiting beside a free slot.
    waits: AtomicUsize,
    /// Most bytes of the cache's buffers.
    allocated: AtomicU64,
}

impl Watched {
    fn watch(&self, client: &Client, slots: usize) {
        while !self.over.load(Ordering::Relaxed) {
            if let Ok(counts) = client.metrics() {
                let count = |name| counts.get(name).copied().unwrap_or(0.0);
                let waiting = count("llamacpp:requests_deferred") > 0.0;
                let free = count("llamacpp:requests_processing") < slots as f64;
                // A cache gives back what nothing is in: the most is what it may take.
                let allocated = count("hae:kv_bytes_allocated") as u64;
                self.allocated.fetch_max(allocated, Ordering::Relaxed);
                self.looks.fetch_add(1, Ordering::Relaxed);
                self.waits
                    .fetch_add(usize::from(waiting && free), Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn share(&self) -> f64 {
        let looks = self.looks.load(Ordering::Relaxed).max(1);
        self.waits.load(Ordering::Relaxed) as f64 / looks as f64
    }
}

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn the_largest_that_fits_is_found() {
        for most in [1, 5, 64] {
            for limit in 0..=most {
                let found = largest(most, |n| {
                    assert!((1..=most).contains(&n));
                    Ok(n <= limit)
                });
                assert_eq!(found.unwrap(), limit, "of {most}");
            }
        }
    }
}
