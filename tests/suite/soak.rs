//! `cargo xtask soak`: conversations under every policy for minutes, each step of which is compared with
//! llama.cpp's cells and with a cache from which nothing is ever removed (`kv_session.rs`), while the memory of the
//! process is watched.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use hae::policy::names;

use crate::kv_session::Models;

/// Says how long; some seconds otherwise, so that it is a test like others.
const MINUTES: &str = "HAE_SOAK_MINUTES";
const SECONDS: f64 = 3.0;
/// Of an F32 cache without flash attention: sums in another order.
const BOUND: f32 = 1e-3;
/// Buffers that grow once have grown by then: a share of the time.
const WARM: f64 = 0.25;
const EVERY: Duration = Duration::from_secs(2);

/// Of the process, in MiB; `None` where the system does not say.
fn resident() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

/// By least squares: how much the second number grows by with the first.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let over: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let under: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    (under > 0.0).then(|| over / under)
}

#[test]
fn a_slope_is_that_of_the_line() {
    let line: Vec<(f64, f64)> = (0..9)
        .map(|x| (x.into(), 3.0 * f64::from(x) - 1.0))
        .collect();
    assert!((slope(&line).unwrap() - 3.0).abs() < 1e-12);
    assert_eq!(slope(&line[..1]), None);
}

#[test]
fn chats_for_minutes() {
    let minutes: f64 = std::env::var(MINUTES).map_or(SECONDS / 60.0, |text| text.parse().unwrap());
    let whole = Duration::from_secs_f64(60.0 * minutes);
    let models = Models::load();
    // It moves positions, which the cache that nothing is removed from cannot be compared with.
    let policies: Vec<&str> = names().filter(|name| *name != "context_shift").collect();
    let begun = Instant::now();
    let (mut chats, mut steps, mut decoded, mut reopened, mut removed) = (0u64, 0, 0, 0, 0);
    let (mut worst, mut differences) = (0.0f32, Vec::new());
    let mut memory: Vec<(f64, f64)> = Vec::new();
    let mut sampled = begun;
    while begun.elapsed() < whole {
        let policy = policies[chats as usize % policies.len()];
        let done = catch_unwind(AssertUnwindSafe(|| models.converse(policy, chats)));
        match done {
            Ok(tally) => {
                steps += tally.steps;
                decoded += tally.decoded;
                reopened += tally.reopened;
                removed += tally.removed;
                worst = worst.max(tally.worst);
                if tally.worst > BOUND {
                    differences.push(format!("{policy}, seed {chats}: logits by {}", tally.worst));
                }
            }
            Err(_) => differences.push(format!("{policy}, seed {chats}")),
        }
        chats += 1;
        if sampled.elapsed() >= EVERY {
            sampled = Instant::now();
            memory.extend(resident().map(|mib| (begun.elapsed().as_secs_f64() / 3600.0, mib)));
        }
    }
    let warm = WARM * whole.as_secs_f64() / 3600.0;
    let warmed: Vec<(f64, f64)> = memory.into_iter().filter(|&(at, _)| at >= warm).collect();
    println!(
        "| minutes | chats | rows | decoding steps | tokens removed | sessions reopened | differences | worst logit | MiB when warm | MiB at the end | MiB an hour |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mib = |point: Option<&(f64, f64)>| point.map_or("".into(), |(_, mib)| format!("{mib:.1}"));
    println!(
        "| {minutes} | {chats} | {decoded} | {steps} | {removed} | {reopened} | {} | {worst:.1e} | {} | {} | {} |",
        differences.len(),
        mib(warmed.first()),
        mib(warmed.last()),
        slope(&warmed).map_or("".into(), |slope| format!("{slope:.1}")),
    );
    assert!(chats > 0 && decoded > 0);
    assert!(differences.is_empty(), "{differences:#?}");
}
