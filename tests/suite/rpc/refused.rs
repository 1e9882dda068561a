//! Workers that are none, places where a model cannot go, and workers that cannot be: one line each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::{Worker, free_port};
use crate::bin::{answer, hae, refusal};

/// Listens, and answers each connection's first message with these bytes.
fn pretender(bytes: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 64]);
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read(&mut [0; 64]);
        }
    });
    address
}

/// A worker's first answer.
fn greeting(version: [u8; 3]) -> Vec<u8> {
    let mut bytes = 28u64.to_le_bytes().to_vec();
    bytes.extend(version);
    bytes.extend([0; 25]);
    bytes
}

/// No file is looked at before the workers.
fn refused(args: &[&str]) -> String {
    refusal(&[&["run", "-m", "/nowhere.gguf", "-p", "Hi"][..], args].concat())
}

#[test]
fn workers_that_are_none() {
    let line = |address: &str| refused(&["--rpc", address]);
    for address in [
        "localhost",
        "localhost:0",
        "localhost:x",
        ":50052",
        "",
        "127.0.0.1:70000",
    ] {
        let said = line(address);
        assert!(
            said.contains("--rpc: ") && said.contains("expected HOST:PORT"),
            "{said}"
        );
    }
    let nobody = format!("127.0.0.1:{}", free_port());
    assert!(line(&nobody).contains(&format!("--rpc: \"{nobody}\": no worker answers there")));
    let said = line("no.such.host.invalid:50052");
    assert!(said.contains("has no such host"), "{said}");
    let other = pretender(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec());
    assert!(line(&other).contains("is no worker, or one of another version of ggml"));
    for version in [[6, 0, 0], [8, 0, 0], [7, 1, 0], [7, 0, 1]] {
        let said = line(&pretender(greeting(version)));
        let [a, b, c] = version;
        assert!(
            said.contains(&format!(
                "speaks version {a}.{b}.{c} of ggml's RPC, expected 7.0.0"
            )),
            "{said}"
        );
    }
    let said = line(&pretender(greeting([7, 0, 0])));
    assert!(said.contains("does not say its devices"), "{said}");
    let mut none = greeting([7, 0, 0]);
    none.extend(4u64.to_le_bytes());
    none.extend([0; 4]);
    assert!(line(&pretender(none)).contains("has no devices"));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let said = line(&silent.local_addr().unwrap().to_string());
    assert!(
        said.contains("says nothing for 5 s: it serves another client, or is no worker"),
        "{said}"
    );
    let worker = Worker::start();
    let twice = format!("{0},{0}", worker.address);
    assert!(line(&twice).contains("is given twice"));
    // The second is looked at before ggml is told of the first.
    assert!(line(&format!("{},{nobody}", worker.address)).contains("no worker answers there"));
    // One that serves somebody else.
    let _other = TcpStream::connect(&worker.address).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(line(&worker.address).contains("it serves another client"));
}

#[test]
fn places_that_are_none() {
    let [worker, other] = Worker::two();
    // This machine may have devices of its own.
    let there = ["-dev", "RPC0"];
    let both = format!("{},{}", worker.address, other.address);
    let rpc = ["--rpc", &both];
    for (args, expected) in [
        (
            &["-dev", "RPC2"][..],
            "--device: no device \"RPC2\", expected some of ",
        ),
        (&["-dev", "CPU"], "--device: no device \"CPU\""),
        (&["-dev", "RPC0,"], "--device: \"RPC0,\", expected names"),
        (
            &[&there[..], &["-ts", "1,1"]].concat(),
            "--tensor-split: 2 shares for 1 devices",
        ),
        (
            &["-dev", "RPC0,RPC1", "-ts", "1"],
            "--tensor-split: 1 shares for 2 devices",
        ),
        (
            &[&there[..], &["-ts", "-1"]].concat(),
            "--tensor-split: a share of -1",
        ),
        (
            &["-ts", "much"],
            "--tensor-split: \"much\", expected numbers",
        ),
        (
            &[&there[..], &["-sm", "none", "-mg", "1"]].concat(),
            "--main-gpu: no device 1, expected 0 to 0",
        ),
        (
            &["-sm", "tensor"],
            "--split-mode: tensor cuts each layer's cache by heads",
        ),
        (
            &[&there[..], &["-sm", "row"]].concat(),
            "--split-mode: row: RPC0 cannot hold rows of a weight",
        ),
        (
            &["-ot", "ffn"],
            "--override-tensor: \"ffn\", expected PATTERN=BUFFER",
        ),
        (
            &["-ot", "ffn=GPU"],
            "--override-tensor: no buffer type \"GPU\", expected one of ",
        ),
    ] {
        let said = refused(&[&rpc[..], args].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let devices = answer(&[&["run", "--list-devices"][..], &rpc].concat());
    let line = format!("  RPC0: {} (", worker.address);
    assert!(
        devices.starts_with("Available devices:\n") && devices.contains(&line),
        "{devices}"
    );
    // A pattern that is none is llama.cpp's to refuse.
    let said = refusal(&["run", "-p", "Hi", "-ot", "(=CPU"]);
    assert!(said.contains("cannot be loaded"), "{said}");
}

#[test]
fn workers_that_cannot_be() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, expected) in [
        (&["-p", &port][..], format!("--port: 127.0.0.1:{port}: ")),
        (&["-H", "192.0.2.1"], "--port: 192.0.2.1:50052: ".into()),
        (
            &["-d", "GPU7"],
            "--device: no device \"GPU7\", expected some of ".into(),
        ),
        (
            &["-d", "none"],
            "--device: none, expected the name of one".into(),
        ),
    ] {
        let output = hae().arg("rpc-worker").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(&expected), "{args:?}: {said}");
    }
    for args in [["-H", "localhost"], ["-p", "0"], ["-t", "0"]] {
        let output = hae().arg("rpc-worker").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn who_listens_to_everybody_is_warned() {
    let port = free_port().to_string();
    let mut child = Command::new(hae().get_program())
        .args(["rpc-worker", "-H", "0.0.0.0", "-p", &port, "-t", "1"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        line.contains("can be reached from other machines")
            && line.contains("networks that you trust"),
        "{line}"
    );
}

/// The folder that keeps weights, so that they are sent once.
#[test]
fn a_worker_keeps_large_tensors() {
    let dir = TempDir::new().unwrap();
    let _worker = Worker::with(|command| {
        command.arg("-c").env("LLAMA_CACHE", dir.path());
    });
    assert!(dir.path().join("rpc").is_dir());
}
