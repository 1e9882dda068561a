//! What a model that is split over two workers sends: counted, and delayed, on the way to them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hae::attend::{Attend, Kind, Lookup};
use hae::cache::Pos;
use hae::engine::Engine;
use hae::llama::{CacheType, ContextOptions, FlashAttention, Model, ModelOptions, Placement};
use hae::policy::Amount;

use super::{WORKERS, Worker, fill, on_workers, step};
use crate::model::{TEXT, engine, exact, repository};

/// A wire between a client and a worker that counts bytes, to the worker and from it, and may take long.
pub struct Wire {
    pub address: String,
    seen: Arc<Seen>,
    /// Milliseconds of each way.
    delay: Arc<AtomicU64>,
}

#[derive(Default)]
struct Seen {
    bytes: [AtomicU64; 2],
    /// Whether the last that went by was an answer.
    answered: AtomicBool,
    /// How often an answer followed a request.
    turns: AtomicU64,
}

impl Seen {
    fn part(&self, way: usize, n: usize) {
        self.bytes[way].fetch_add(n as u64, Ordering::Relaxed);
        if !self.answered.swap(way == 1, Ordering::Relaxed) && way == 1 {
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Wire {
    pub fn to(worker: &str) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (seen, delay) = (Arc::default(), Arc::default());
        let wire = Wire {
            address,
            seen,
            delay,
        };
        let (worker, seen, delay) = (worker.to_owned(), wire.seen.clone(), wire.delay.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&worker) else {
                    return;
                };
                for (i, (from, to)) in [(&client, &server), (&server, &client)]
                    .into_iter()
                    .enumerate()
                {
                    to.set_nodelay(true).unwrap();
                    let ends = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    Wire::carry(ends, i, seen.clone(), delay.clone());
                }
            }
        });
        wire
    }

    /// What comes in goes out after the delay, whatever comes in meanwhile.
    fn carry(
        (mut from, mut to): (TcpStream, TcpStream),
        way: usize,
        seen: Arc<Seen>,
        delay: Arc<AtomicU64>,
    ) {
        let (sender, receiver) = std::sync::mpsc::channel::<(Instant, Vec<u8>)>();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n) = from.read(&mut buffer)
                && n > 0
            {
                let delay = Duration::from_millis(delay.load(Ordering::Relaxed));
                if sender
                    .send((Instant::now() + delay, buffer[..n].to_vec()))
                    .is_err()
                {
                    return;
                }
            }
        });
        std::thread::spawn(move || {
            for (due, part) in receiver {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                seen.part(way, part.len());
                if to.write_all(&part).is_err() {
                    return;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }

    /// Bytes since the last time, to the worker and from it.
    pub fn take(&self) -> [u64; 2] {
        [0, 1].map(|i| self.seen.bytes[i].swap(0, Ordering::Relaxed))
    }
}

/// Bytes that go to two workers and come back, of a token and of what the cache does, and a table of them:
/// `cargo test --release --test suite rpc::wire::what_a_token_sends -- --nocapture`.
#[test]
fn what_a_token_sends() {
    let Ok(workers) = std::env::var(WORKERS) else {
        let workers = Worker::two();
        let text = on_workers(&workers, &["rpc::wire::what_a_token_sends"]);
        let table: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        println!("\n{}", table.join("\n"));
        assert!(table.len() > 8, "{text}");
        return;
    };
    let wires: Vec<Wire> = workers.split(',').map(Wire::to).collect();
    let addresses: Vec<String> = wires.iter().map(|wire| wire.address.clone()).collect();
    hae::llama::add_workers(&addresses).unwrap();
    let options = ModelOptions {
        placement: Placement {
            tensor_split: vec![1.0, 1.0],
            ..Placement::default()
        },
        ..ModelOptions::default()
    };
    let model = Model::load(&repository(TEXT), &options).unwrap();
    let sent = |name: &str, n: u64, work: &mut dyn FnMut()| {
        // What was on its way is there.
        let settle = || std::thread::sleep(Duration::from_millis(50));
        settle();
        for wire in &wires {
            wire.take();
        }
        work();
        settle();
        let all: Vec<[u64; 2]> = wires
            .iter()
            .map(|wire| wire.take().map(|bytes| bytes / n))
            .collect();
        println!(
            "| {name} | {} | {} |",
            all[0][0] + all[1][0],
            all[0][1] + all[1][1]
        );
        all
    };
    let sum = |all: &[[u64; 2]]| all.iter().flatten().sum::<u64>();
    println!(
        "\n| n_embd {}, n_vocab {}, {} layers | to workers | from workers |",
        model.n_embd(),
        model.n_vocab(),
        model.n_layer()
    );
    let context = |n_ctx, layers: Vec<u32>| ContextOptions {
        flash_attention: FlashAttention::On,
        type_k: CacheType::F16,
        type_v: CacheType::F16,
        score_layers: layers,
        ..exact(n_ctx)
    };
    let mut tokens = Vec::new();
    for n in [200, 900, 3900] {
        let mut engine = engine(&model, context(4096, Vec::new()));
        fill(&mut engine, n);
        let mut first = || drop(step(&mut engine, n, &[], None));
        match n {
            900 => drop(sent(
                "a token behind 900 others, with a graph that is new",
                1,
                &mut first,
            )),
            _ => first(),
        }
        let name = format!("a token behind {n} others");
        let mut at = n;
        tokens.push(sum(&sent(&name, 8, &mut || {
            for _ in 0..8 {
                at += 1;
                step(&mut engine, at, &[], None);
            }
        })));
    }
    // The mask of each worker: an F16 a cell.
    assert_eq!(tokens[2] - tokens[0], 2 * 2 * (4096 - 256));

    let layers: Vec<u32> = (0..model.n_layer()).collect();
    let mut tapped = engine(&model, context(4096, layers));
    fill(&mut tapped, 900);
    step(&mut tapped, 900, &[0], None);
    let mut at = 900;
    let scored = sent(
        "the same behind 900, with the attention of all layers",
        8,
        &mut || {
            for _ in 0..8 {
                at += 1;
                step(&mut tapped, at, &[0], None);
            }
        },
    );
    // Sums and maxima of each cell come back.
    assert!(sum(&scored) < tokens[1] + 4 * 4 * 1024 + 4096, "{scored:?}");

    let looking = ContextOptions {
        attend: Attend {
            vision: Some(Amount::Cells(1)),
            text: Some(Amount::Cells(1)),
            ..Attend::default()
        },
        ..context(4096, Vec::new())
    };
    let mut looking = engine(&model, looking);
    fill(&mut looking, 900);
    let lookup = Lookup {
        kinds: vec![Kind::Text; 900],
        n_vision: 0,
        n_text: 200,
    };
    step(&mut looking, 900, &[], Some(&lookup));
    let mut at = 900;
    sent(
        "the same behind 900, with lookups of as many cells",
        8,
        &mut || {
            for _ in 0..8 {
                at += 1;
                step(&mut looking, at, &[], Some(&lookup));
            }
        },
    );
    sent(
        "the same behind 900, with lookups of one cell more each time",
        8,
        &mut || {
            for n in 0..8 {
                at += 1;
                let more = Lookup {
                    n_text: 201 + n,
                    ..lookup.clone()
                };
                step(&mut looking, at, &[], Some(&more));
            }
        },
    );

    let grows = ContextOptions {
        kv_size: Some(1024),
        ..context(4096, Vec::new())
    };
    let mut engine = engine(&model, grows);
    fill(&mut engine, 900);
    step(&mut engine, 900, &[], None);
    let mut rows = Vec::new();
    sent("8 rows to the host", 1, &mut || {
        rows.clear();
        assert!(
            engine
                .save_rows(&[1, 3, 5, 7, 9, 11, 13, 15], &mut rows)
                .unwrap()
        );
    });
    let gone: Vec<_> = (0..8).map(|i| 2 * i + 1..2 * i + 2).collect();
    let removed = sent("8 tokens removed", 1, &mut || {
        engine.remove(0, &gone).unwrap()
    });
    assert_eq!(sum(&removed), 0);
    let pos: Vec<Pos> = gone.iter().map(|range| range.start).collect();
    sent("the 8 rows back", 1, &mut || {
        engine
            .restore_rows(0, &pos, &rows, &mut Vec::new())
            .unwrap();
    });
    let half: Vec<_> = (0..400).map(|i| 2 * i + 1..2 * i + 2).collect();
    engine.remove(0, &half).unwrap();
    sent(
        "400 of 900 removed, the others moved together",
        1,
        &mut || {
            engine.compact(0, &mut Vec::new()).unwrap();
        },
    );
    let bytes = engine.kv_bytes();
    assert!(bytes.allocated < 1024 * bytes.per_cell, "{bytes:?}");
    step(&mut engine, 901, &[], None);
    let mut at = 901;
    let fewer = sent("a token behind the 500 that are left", 8, &mut || {
        for _ in 0..8 {
            at += 1;
            step(&mut engine, at, &[], None);
        }
    });
    assert!(sum(&fewer) < tokens[1], "{fewer:?}");

    // How often a token waits for a way there and back.
    const DELAY: u64 = 100;
    let slow = |delay: u64| {
        wires
            .iter()
            .for_each(|wire| wire.delay.store(delay, Ordering::Relaxed))
    };
    slow(DELAY);
    let turns = || -> u64 {
        let turns = |wire: &Wire| wire.seen.turns.load(Ordering::Relaxed);
        wires.iter().map(turns).sum()
    };
    let before = turns();
    let begun = Instant::now();
    step(&mut engine, at + 1, &[], None);
    let trips = begun.elapsed().as_secs_f64() * 1e3 / (2 * DELAY) as f64;
    slow(0);
    let turns = turns() - before;
    println!("| round trips that a token waits for, one behind the other | {trips:.1} | |");
    println!("| requests of a token that are answered | {turns} | |");
    // Two workers, one behind the other; how long more than the delays it takes is the machine's.
    assert!(trips >= 1.9, "{trips}");
    assert!((2..=5).contains(&turns), "{turns}");
}
