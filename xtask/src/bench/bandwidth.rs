//! The yardstick of a decoded token, which reads all weights and the cache once: how fast the same
//! threads read main memory. A sum over a large buffer, as STREAM's without the writes.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Far beyond every processor's cache.
const BYTES: usize = 1 << 30;
const PASSES: usize = 5;

/// Bytes a second, the best of several passes. `quick`: of one pass over less.
pub fn read(n_threads: usize, quick: bool) -> f64 {
    match quick {
        true => read_buffer(n_threads, BYTES / 16, 1),
        false => read_buffer(n_threads, BYTES, PASSES),
    }
}

fn read_buffer(n_threads: usize, bytes: usize, passes: usize) -> f64 {
    let share = bytes / n_threads.max(1) / size_of::<u64>();
    // Each thread fills its own share, so that it lies in the memory next to it.
    let parts: Vec<Vec<u64>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads as u64)
            .map(|i| scope.spawn(move || vec![i + 1; share]))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a filled share"))
            .collect()
    });
    let mut best = f64::INFINITY;
    for _ in 0..passes {
        let start = Instant::now();
        thread::scope(|scope| {
            for part in &parts {
                scope.spawn(|| black_box(sum(black_box(part))));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (share * n_threads.max(1) * size_of::<u64>()) as f64 / best
}

/// Several sums side by side, so that no addition waits for the one before.
fn sum(values: &[u64]) -> u64 {
    const LANES: usize = 64;
    let mut lanes = [0u64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(0, |sum, value| sum.wrapping_add(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_read() {
        let values: Vec<u64> = (1..=1000).collect();
        assert_eq!(sum(&values), 500_500);
        assert_eq!(sum(&values[..3]), 6);
    }

    #[test]
    fn a_rate_comes_of_any_number_of_threads() {
        for threads in [1, 3] {
            let rate = read_buffer(threads, 1 << 16, 2);
            assert!(rate.is_finite() && rate > 1e6, "{rate}");
        }
    }
}
