//! `cargo xtask serve load`: many clients at once for some minutes. Every answer has to be the one that the
//! same question gets alone, none may be lost, and the server's memory may not grow.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::client::{Client, Pace, Reply};
use super::program::Served;
use super::questions::{self, first, further, request, said};
use super::server::Server;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    served: Served,
    /// Minutes for each policy, after those of warming up
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Minutes of the same before memory is read for comparison
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Clients at once
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Conversations that the server answers at once
    #[arg(long, default_value_t = 4)]
    slots: usize,
    /// Questions that may wait: fewer than there are clients, so that some are sent away
    #[arg(long, default_value_t = 16)]
    queue: usize,
    /// Policies, one server each
    #[arg(long, value_delimiter = ',', default_value = "full,hae")]
    kv_policy: Vec<String>,
    /// Cells that the slots share
    #[arg(short = 'c', default_value_t = 4096)]
    n_ctx: usize,
    /// Different questions
    #[arg(long, default_value_t = 24)]
    asks: usize,
    /// MiB that the server's memory may grow by after warming up
    #[arg(long, default_value_t = 32.0)]
    growth: f64,
}

/// Tokens of a short answer, and of a long one, in which clients vanish.
const SHORT: usize = 24;
const LONG: usize = 64;

/// A question and what is answered to it alone.
struct Known {
    name: String,
    request: Value,
    /// Under a policy that evicts, a second turn's answer depends on whether the slot still held the first:
    /// that of a slot that did, then that of one that did not.
    answers: Vec<String>,
    long: bool,
}

/// What became of all requests.
#[derive(Default)]
struct Tally {
    same: u64,
    vanished: u64,
    garbage: u64,
    busy: u64,
    /// Differing and lost answers, in words.
    different: Vec<String>,
    lost: Vec<String>,
}

/// Runs it for each policy, and prints a row each.
///
/// # Errors
/// When a server cannot be started or asked alone.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    ensure!(args.clients > 0 && args.asks > 0, "nobody asks anything");
    let program = args.served.program(root)?;
    println!(
        "| policy | answers as alone | different | lost | vanished | garbage | 503 | questions/s | memory before | warm | at the end |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let mut failed = Vec::new();
    for policy in &args.kv_policy {
        failed.extend(one(root, &program, policy, args)?);
    }
    for reason in &failed {
        println!("\n{reason}");
    }
    Ok(u8::from(!failed.is_empty()))
}

/// One server; what was wrong.
fn one(root: &Path, program: &Path, policy: &str, args: &Args) -> Result<Vec<String>> {
    let mut flags = args.served.flags(root);
    for (flag, value) in [
        ("-c", args.n_ctx.to_string()),
        ("-np", args.slots.to_string()),
        ("--queue", args.queue.to_string()),
        ("--kv-policy", policy.to_owned()),
    ] {
        flags.extend([flag.to_owned(), value]);
    }
    let server = Server::start(program, &flags)?;
    let before = server.resident()?;
    let client = Client::new(&server.address);
    let known = alone(root, &client, args)?;
    let warm_up = Duration::from_secs_f64(args.warm_up * 60.0);
    let mut all = together(&client, &known, args.clients, warm_up);
    let warm = idle(&client).and_then(|()| server.resident())?;
    let start = Instant::now();
    let tally = together(
        &client,
        &known,
        args.clients,
        Duration::from_secs_f64(args.minutes * 60.0),
    );
    let rate = tally.same as f64 / start.elapsed().as_secs_f64();
    all.add(tally);
    idle(&client)?;
    let end = server.resident()?;
    server.end()?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "| `{policy}` | {} | {} | {} | {} | {} | {} | {rate:.1} | {:.0} MiB | {:.0} MiB | {:.0} MiB |",
        all.same,
        all.different.len(),
        all.lost.len(),
        all.vanished,
        all.garbage,
        all.busy,
        mib(before),
        mib(warm),
        mib(end)
    );
    let mut failed = Vec::new();
    for (what, cases) in [("different", &all.different), ("lost", &all.lost)] {
        // A few say what all of them have in common.
        failed.extend(
            cases
                .iter()
                .take(5)
                .map(|case| format!("{policy}: {what}: {case}")),
        );
    }
    let growth = mib(end.saturating_sub(warm));
    if growth > args.growth {
        let most = args.growth;
        failed.push(format!(
            "{policy}: memory grew by {growth:.0} MiB, more than {most:.0}"
        ));
    }
    if all.same == 0 {
        failed.push(format!("{policy}: nothing was answered"));
    }
    Ok(failed)
}

/// Asks every question alone.
fn alone(root: &Path, client: &Client, args: &Args) -> Result<Vec<Known>> {
    let folder = root.join(&args.served.questions);
    let short = questions::read(&folder, "understanding.jsonl")?;
    let stories = questions::read(&folder, "story.jsonl")?;
    let answer = |request: &Value| match client.ask(request)? {
        Reply::Said(said) => Ok(said),
        Reply::Busy(_) => bail!("a server that nobody asked is busy"),
    };
    let mut known = Vec::new();
    let step = (short.len() / args.asks).max(1);
    let chosen = short.iter().step_by(step).take(args.asks);
    let captions = short.iter().filter(|q| q.task == "caption");
    let long = stories.iter().take(4).chain(captions.take(4));
    let all = chosen.map(|q| (q, SHORT)).chain(long.map(|q| (q, LONG)));
    for (question, n) in all {
        let request = request(&[first(&folder, question)?], n, false);
        let answers = vec![answer(&request)?.text];
        known.push(Known {
            name: question.id.clone(),
            request,
            answers,
            long: n == LONG,
        });
    }
    for pair in questions::pairs(&short).iter().step_by(12) {
        let [one, two] = pair;
        let before = first(&folder, one)?;
        let turn = answer(&request(std::slice::from_ref(&before), SHORT, false))?;
        let messages = [before, said(&turn.text), further(&two.question)];
        let request = request(&messages, SHORT, false);
        let held = answer(&request)?;
        ensure!(
            held.cached > 0,
            "{}: a second turn found no first one",
            two.id
        );
        let mut cold = request.clone();
        cold["cache_prompt"] = false.into();
        known.push(Known {
            name: format!("{} after {}", two.id, one.id),
            request,
            answers: vec![held.text, answer(&cold)?.text],
            long: false,
        });
    }
    Ok(known)
}

/// All clients at once, for so long.
fn together(client: &Client, known: &[Known], clients: usize, time: Duration) -> Tally {
    let tally = Mutex::new(Tally::default());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for n in 0..clients {
            let (tally, over) = (&tally, &over);
            scope.spawn(move || {
                let mut random = Random(n as u64);
                while !over.load(Ordering::Relaxed) {
                    let done = visit(client, known, &mut random);
                    tally
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .add(done);
                }
            });
        }
        std::thread::sleep(time);
        over.store(true, Ordering::Relaxed);
    });
    tally.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// One request of one client, until it is answered.
fn visit(client: &Client, known: &[Known], random: &mut Random) -> Tally {
    let mut tally = Tally::default();
    let dice = random.below(100);
    if dice < 6 {
        let kind = random.below(6);
        match client.garbage(kind) {
            Ok(()) => tally.garbage += 1,
            Err(e) => tally.lost.push(format!("{e:#}")),
        }
        return tally;
    }
    let vanishes = dice < 16;
    let asked = loop {
        let known = &known[random.below(known.len())];
        if known.long || !vanishes {
            break known;
        }
    };
    let pace = match dice {
        _ if vanishes => Some(Pace::Vanishes(1 + random.below(12))),
        16..=23 => Some(Pace::Slow(Duration::from_millis(100))),
        24..=49 => Some(Pace::Fast),
        _ => None,
    };
    let said = loop {
        match answer(client, asked, pace) {
            Ok(Ok(said)) => break said,
            Ok(Err(seconds)) => {
                tally.busy += 1;
                std::thread::sleep(Duration::from_secs(seconds.min(10)));
            }
            Err(e) => {
                tally.lost.push(format!("{}: {e:#}", asked.name));
                return tally;
            }
        }
    };
    let fits = |answer: &String| match vanishes {
        true => answer.starts_with(&said),
        false => *answer == said,
    };
    match asked.answers.iter().any(fits) {
        true if vanishes => tally.vanished += 1,
        true => tally.same += 1,
        false => tally.different.push(format!(
            "{}: {said:?} ({pace:?}), alone {:?}",
            asked.name, asked.answers
        )),
    }
    tally
}

/// The text, or the seconds to wait.
fn answer(
    client: &Client,
    asked: &Known,
    pace: Option<Pace>,
) -> Result<std::result::Result<String, u64>> {
    let Some(pace) = pace else {
        return Ok(match client.ask(&asked.request)? {
            Reply::Said(said) => Ok(said.text),
            Reply::Busy(seconds) => Err(seconds),
        });
    };
    let mut request = asked.request.clone();
    request["stream"] = true.into();
    client.stream(&request, pace)
}

/// Waits until nothing is answered any more.
fn idle(client: &Client) -> Result<()> {
    let start = Instant::now();
    loop {
        let counts = client.metrics()?;
        let busy = ["llamacpp:requests_processing", "llamacpp:requests_deferred"];
        if busy.iter().all(|name| counts.get(*name) == Some(&0.0)) {
            return Ok(());
        }
        let long = start.elapsed() > Duration::from_secs(60);
        ensure!(!long, "slots stay busy though nobody asks");
        std::thread::sleep(Duration::from_millis(100));
    }
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.same += other.same;
        self.vanished += other.vanished;
        self.garbage += other.garbage;
        self.busy += other.busy;
        self.different.extend(other.different);
        self.lost.extend(other.lost);
    }
}

/// Numbers that are the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}
