//! Over real sockets: clients that go, and an end with answers still under way.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::*;
use crate::serve::http::listen;

struct Running {
    server: Server,
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    fn start(server: Server, drain: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (service, stops) = (Arc::clone(&server.service), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            listen::run(vec![listener], &service, drain, move || {
                stops.load(Ordering::SeqCst)
            })
        });
        Running {
            server,
            address,
            stop,
            thread: Some(thread),
        }
    }

    fn ask(&self, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let body = body.to_string();
        let host = self.address;
        let n = body.len();
        write!(
            stream,
            "POST /completion HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

fn all(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn slow(letters: usize) -> Server {
    let hall = Scripted {
        pause: Duration::from_millis(10),
        ..Scripted::new(&"x".repeat(letters))
    };
    Server::with(hall, |_, _| {})
}

fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "it never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_connection_that_breaks_stops_its_answer() {
    let mut running = Running::start(slow(100_000), Duration::from_millis(100));
    for (n, stream) in [(1, false), (2, true)] {
        let connection = running.ask(&json!({ "prompt": "x", "stream": stream }));
        let hall = Arc::clone(&running.server.hall);
        wait_for(|| hall.open.load(Ordering::SeqCst) == 1);
        drop(connection);
        wait_for(|| hall.gone.load(Ordering::SeqCst) == n);
        wait_for(|| hall.open.load(Ordering::SeqCst) == 0);
    }
    running.stop();
}

#[test]
fn answers_under_way_are_finished_before_the_end() {
    let mut running = Running::start(slow(40), Duration::from_secs(10));
    let whole = running.ask(&json!({ "prompt": "x" }));
    let hall = Arc::clone(&running.server.hall);
    wait_for(|| hall.open.load(Ordering::SeqCst) == 1);
    running.stop();
    let text = all(whole);
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(text.contains(&"x".repeat(40)));
    assert!(
        TcpStream::connect(running.address).is_err(),
        "somebody still listens"
    );
}

#[test]
fn answers_that_take_too_long_are_cut_short_at_the_end() {
    let mut running = Running::start(slow(100_000), Duration::from_millis(100));
    let streamed = running.ask(&json!({ "prompt": "x", "stream": true }));
    let whole = running.ask(&json!({ "prompt": "x" }));
    let mut streamed = BufReader::new(streamed);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        streamed.read_line(&mut line).unwrap();
    }
    let start = Instant::now();
    running.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
    let mut rest = String::new();
    streamed.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"unavailable_error\""), "{rest}");
    let whole = all(whole);
    assert!(whole.starts_with("HTTP/1.1 503"), "{whole}");
}

/// Who sends a letter now and then holds neither a connection nor a handler for ever.
#[test]
fn slow_clients_are_let_go() {
    let server = Server::with(Scripted::new("abc"), |_, rules| {
        rules.patience = Duration::from_millis(300);
        rules.upload = Duration::from_millis(300);
    });
    let mut running = Running::start(server, Duration::from_millis(100));
    let connect = || TcpStream::connect(running.address).unwrap();
    let drip = |mut stream: TcpStream, head: &str| {
        let wait = Some(Duration::from_millis(50));
        stream.set_read_timeout(wait).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        let mut text = Vec::new();
        let mut some = [0; 1024];
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            // It may be closed already.
            let _ = stream.write_all(b"a");
            match stream.read(&mut some) {
                Ok(0) => return String::from_utf8(text).unwrap(),
                Ok(n) => text.extend_from_slice(&some[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return String::from_utf8(text).unwrap(),
            }
        }
        panic!("a slow client is waited for");
    };
    drip(connect(), "");
    drip(
        connect(),
        "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    );
    let told = drip(
        connect(),
        "POST /completion HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 1000000\r\n\r\n",
    );
    assert!(told.starts_with("HTTP/1.1 408"), "{told}");
    // Others were answered meanwhile, and are.
    let whole = all(running.ask(&json!({ "prompt": "x" })));
    assert!(whole.starts_with("HTTP/1.1 200"), "{whole}");
    running.stop();
}
