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

/// What is allocated and not freed, of C++ and Rust, in MiB; `None` where the C library does not say. It counts its
/// first arena: all of it with `MALLOC_ARENA_MAX=1`.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn allocated() -> Option<f64> {
    // SAFETY: it takes nothing and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    Some((info.uordblks + info.hblkhd) as f64 / f64::from(1 << 20))
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn allocated() -> Option<f64> {
    None
}

/// The first, the last and how much comes in an hour, as columns.
fn columns(points: &[(f64, f64)]) -> String {
    let number = |x: Option<f64>| x.map_or("".into(), |x| format!("{x:.1}"));
    let of = |point: Option<&(f64, f64)>| number(point.map(|&(_, mib)| mib));
    format!(
        "{} | {} | {}",
        of(points.first()),
        of(points.last()),
        number(slope(points))
    )
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
    let (mut memory, mut held) = (Vec::new(), Vec::new());
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
            let at = begun.elapsed().as_secs_f64() / 3600.0;
            memory.extend(resident().map(|mib| (at, mib)));
            // Between chats, when nothing of them should be left.
            held.extend(allocated().map(|mib| (at, mib)));
        }
    }
    let warm = WARM * whole.as_secs_f64() / 3600.0;
    let warmed = |points: Vec<(f64, f64)>| -> Vec<(f64, f64)> {
        points.into_iter().filter(|&(at, _)| at >= warm).collect()
    };
    println!(
        "| minutes | chats | rows | decoding steps | tokens removed | sessions reopened | differences | worst logit | \
         MiB allocated when warm | at the end | an hour | MiB resident when warm | at the end | an hour |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    println!(
        "| {minutes} | {chats} | {decoded} | {steps} | {removed} | {reopened} | {} | {worst:.1e} | {} | {} |",
        differences.len(),
        columns(&warmed(held)),
        columns(&warmed(memory)),
    );
    assert!(chats > 0 && decoded > 0);
    assert!(differences.is_empty(), "{differences:#?}");
}
