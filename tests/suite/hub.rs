//! Models from a hub of the test's own, on the loopback interface: nothing here leaves the machine.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hae::hub::{Found, Hub, Wanted};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::bin::{hae, refusal_of};
use crate::fixture::{halves, root};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub has and how it fails.
#[derive(Clone, Default)]
struct Served {
    files: BTreeMap<String, Vec<u8>>,
    /// Listed beside the files.
    listed: Vec<String>,
    /// Instead of the files' own.
    etag: Option<String>,
    /// Every request for what follows the n-th byte of a file ends after so many bytes.
    cut: Option<usize>,
    /// Ranges are ignored where a file itself is sent.
    no_ranges: bool,
    /// Of every answer.
    status: Option<u16>,
    /// Only who shows it is answered.
    token: Option<&'static str>,
}

/// A hub, and what it was asked.
struct TestHub {
    address: String,
    served: Arc<Mutex<Served>>,
    asked: Arc<Mutex<Vec<String>>>,
    cache: TempDir,
}

impl TestHub {
    fn new(served: Served) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (served, asked) = (Arc::new(Mutex::new(served)), Arc::default());
        let hub = TestHub {
            address: format!("http://127.0.0.1:{port}"),
            served: Arc::clone(&served),
            asked: Arc::clone(&asked),
            cache: TempDir::new().unwrap(),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, asked) = (Arc::clone(&served), Arc::clone(&asked));
                std::thread::spawn(move || serve(stream, port, &served, &asked));
            }
        });
        hub
    }

    /// One with these files, each of which holds its own name many times.
    fn of(names: &[&str]) -> Self {
        let files = names
            .iter()
            .map(|name| ((*name).to_owned(), name.repeat(9000).into()));
        TestHub::new(Served {
            files: files.collect(),
            ..Served::default()
        })
    }

    fn change(&self, change: impl FnOnce(&mut Served)) {
        change(&mut self.served.lock().unwrap());
    }

    /// What was asked since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn fetch_as(&self, token: Option<&str>, offline: bool, name: &str) -> hae::Result<Found> {
        let hub = Hub::new(self.cache.path(), &self.address, token, offline)?;
        hub.fetch(&Wanted::new(name, None, true)?, &mut |_| Ok(()))
    }

    fn fetch(&self, name: &str) -> hae::Result<Found> {
        self.fetch_as(None, false, name)
    }

    fn fails(&self, name: &str) -> String {
        let error = self.fetch(name).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 1, "{error}");
        error
    }

    fn repo(&self) -> PathBuf {
        self.cache.path().join("models--u--r")
    }

    fn blobs(&self) -> Vec<String> {
        names_in(&self.repo().join("blobs"))
    }

    fn content(&self, name: &str) -> Vec<u8> {
        self.served.lock().unwrap().files[name].clone()
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Answers one request.
fn serve(stream: TcpStream, port: u16, served: &Mutex<Served>, asked: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<(String, String)> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_ascii_lowercase(), value.to_owned()))
        })
        .collect();
    let header = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| &**v);
    let target = request.split(' ').nth(1).unwrap();
    let authorization = header("authorization");
    asked.lock().unwrap().push(format!(
        "{target} {} {}",
        header("range").unwrap_or("-"),
        authorization.unwrap_or("-")
    ));
    let served = served.lock().unwrap().clone();
    let path = target.split('?').next().unwrap();
    let mut out = &stream;
    let mut answer = |status: u16, headers: &str, length: usize, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        // Whoever asked may be gone.
        let _ = out
            .write_all(head.as_bytes())
            .and_then(|()| out.write_all(body));
    };
    let plain = |status| (status, String::new(), 0, Vec::new());
    let sent = path.strip_prefix("/files/");
    let (status, headers, length, body) = if let Some(status) = served.status {
        plain(status)
    } else if let (Some(token), None) = (served.token.filter(|t| authorization != Some(*t)), sent) {
        assert!(!token.is_empty());
        plain(401)
    } else if path == "/api/models/u/r/revision/main" {
        let names = served.files.keys().chain(&served.listed);
        let siblings: Vec<_> = names
            .map(|name| serde_json::json!({"rfilename": name}))
            .collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        (200, String::new(), body.len(), body.into_bytes())
    } else if let Some(file) = path.strip_prefix("/u/r/resolve/") {
        // A repository that was renamed.
        let headers = format!("Location: /new/r/resolve/{file}\r\n");
        (307, headers, 0, Vec::new())
    } else if let Some(name) = path.strip_prefix(&format!("/new/r/resolve/{COMMIT}/")) {
        match served.files.get(&name.replace("%20", " ")) {
            Some(bytes) => {
                let size = bytes.len();
                let etag = served.etag.unwrap_or_else(|| sha256(bytes));
                let headers = format!(
                    "Location: http://localhost:{port}/files/{name}\r\nX-Repo-Commit: {COMMIT}\r\n\
                     X-Linked-ETag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nETag: \"other\"\r\n"
                );
                (302, headers, 0, Vec::new())
            }
            None => plain(404),
        }
    } else if let Some(bytes) = sent.and_then(|name| served.files.get(&name.replace("%20", " "))) {
        let range = header("range").and_then(|range| range.strip_prefix("bytes="));
        let (from, to) = range.map_or(("0", ""), |range| range.split_once('-').unwrap());
        let end = to.parse::<usize>().map_or(bytes.len(), |last| last + 1);
        let from: usize = from.parse().unwrap();
        let (status, part) = match range.is_some() && !served.no_ranges {
            true => (206, &bytes[from..end]),
            false => (200, &bytes[..]),
        };
        let all = bytes.len();
        let headers = match status {
            206 => format!("Content-Range: bytes {from}-{}/{all}\r\n", end - 1),
            _ => String::new(),
        };
        let cut = served.cut.unwrap_or(all).min(part.len());
        (status, headers, part.len(), part[..cut].to_vec())
    } else {
        plain(404)
    };
    answer(status, &headers, length, &body);
}

#[test]
fn a_model_is_fetched_once_with_its_vision_file() {
    let hub = TestHub::of(&[
        "README.md",
        "m-F16.gguf",
        "m-Q4_K_M.gguf",
        "mmproj-m-F16.gguf",
        "mmproj-m-Q8_0.gguf",
    ]);
    let found = hub.fetch("u/r").unwrap();
    let folder = hub.repo().join("snapshots").join(COMMIT);
    assert_eq!(found.model, folder.join("m-Q4_K_M.gguf"));
    assert_eq!(found.mmproj, Some(folder.join("mmproj-m-Q8_0.gguf")));
    assert_eq!(found.stale, None);
    assert_eq!(
        fs::read(&found.model).unwrap(),
        hub.content("m-Q4_K_M.gguf")
    );
    // As every program that knows the hub keeps them.
    let mut expected =
        ["m-Q4_K_M.gguf", "mmproj-m-Q8_0.gguf"].map(|name| sha256(&hub.content(name)));
    expected.sort();
    assert_eq!(hub.blobs(), expected);
    assert_eq!(
        fs::read_to_string(hub.repo().join("refs/main")).unwrap(),
        COMMIT
    );
    #[cfg(unix)]
    assert!(fs::read_link(&found.model).unwrap().is_relative());
    assert!(hub.asked().len() > 3);

    assert_eq!(hub.fetch("u/r").unwrap(), found);
    assert_eq!(hub.asked().len(), 1, "the list alone");
    assert_eq!(hub.fetch_as(None, true, "u/r").unwrap(), found);
    assert_eq!(hub.asked(), Vec::<String>::new());

    let other = hub.fetch("u/r:f16").unwrap();
    assert_eq!(other.model, folder.join("m-F16.gguf"));
    assert_eq!(other.mmproj, Some(folder.join("mmproj-m-F16.gguf")));
    let text = Wanted::new("u/r:F16", None, false).unwrap();
    let offline = Hub::new(hub.cache.path(), &hub.address, None, true).unwrap();
    assert_eq!(offline.fetch(&text, &mut |_| Ok(())).unwrap().mmproj, None);
}

#[test]
fn all_parts_are_fetched_and_names_may_be_odd() {
    let hub = TestHub::of(&[
        "Q4_K_M/a b-Q4_K_M-00001-of-00002.gguf",
        "Q4_K_M/a b-Q4_K_M-00002-of-00002.gguf",
    ]);
    let found = hub.fetch("u/r").unwrap();
    let folder = found.model.parent().unwrap();
    assert!(folder.ends_with("Q4_K_M"));
    for part in names_in(folder) {
        let name = format!("Q4_K_M/{part}");
        assert_eq!(fs::read(folder.join(part)).unwrap(), hub.content(&name));
    }
    assert_eq!(names_in(folder).len(), 2);
    assert_eq!(hub.fetch_as(None, true, "u/r:q4_k_m").unwrap(), found);
    // A part that is not there.
    hub.change(|served| {
        served.files.remove("Q4_K_M/a b-Q4_K_M-00002-of-00002.gguf");
    });
    assert!(hub.fails("u/r").contains("lacks its part"));
}

#[test]
fn what_was_cut_off_goes_on_where_it_ended() {
    let hub = TestHub::of(&["m-Q8_0.gguf"]);
    let size = hub.content("m-Q8_0.gguf").len();
    hub.change(|served| served.cut = Some(size / 3 + 1));
    let mut seen = 0;
    let own = Hub::new(hub.cache.path(), &hub.address, None, false).unwrap();
    let wanted = Wanted::new("u/r", None, true).unwrap();
    let found = own.fetch(&wanted, &mut |progress| {
        assert!(progress.bytes >= seen && progress.of == size as u64);
        seen = progress.bytes;
        Ok(())
    });
    assert_eq!(
        fs::read(found.unwrap().model).unwrap(),
        hub.content("m-Q8_0.gguf")
    );
    assert_eq!(seen, size as u64);
    let ranges: Vec<String> = hub
        .asked()
        .iter()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let path = words.next()?;
            let range = words.next()?.to_owned();
            path.starts_with("/files/").then_some(range)
        })
        .collect();
    let third = size / 3 + 1;
    let expected = [
        "-".to_owned(),
        format!("bytes={third}-"),
        format!("bytes={}-", 2 * third),
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn an_ended_run_leaves_what_the_next_goes_on_from() {
    let hub = TestHub::of(&["m-Q8_0.gguf"]);
    let content = hub.content("m-Q8_0.gguf");
    let third = content.len() / 3;
    hub.change(|served| served.cut = Some(third));
    let own = Hub::new(hub.cache.path(), &hub.address, None, false).unwrap();
    let wanted = Wanted::new("u/r", None, true).unwrap();
    let ended = own.fetch(&wanted, &mut |progress| match progress.bytes {
        0 => Ok(()),
        _ => Err(hae::Error::option("x", "enough")),
    });
    assert_eq!(ended.unwrap_err().to_string(), "`x`: enough");
    let incomplete = format!("{}.incomplete", sha256(&content));
    assert_eq!(hub.blobs(), [&*incomplete]);
    assert!(hub.fetch_as(None, true, "u/r").is_err());
    hub.change(|served| served.cut = None);
    hub.asked();
    let found = hub.fetch("u/r").unwrap();
    assert_eq!(fs::read(found.model).unwrap(), content);
    assert!(
        hub.asked()
            .iter()
            .any(|line| line.contains(&format!("bytes={third}-")))
    );

    // Of a server that knows no ranges all of it comes again; and what is too long is no part of it.
    for left in [content[..third].to_vec(), vec![7; content.len() + 5]] {
        fs::remove_dir_all(hub.repo()).unwrap();
        fs::create_dir_all(hub.repo().join("blobs")).unwrap();
        fs::write(hub.repo().join("blobs").join(&incomplete), left).unwrap();
        hub.change(|served| served.no_ranges = true);
        let found = hub.fetch("u/r").unwrap();
        assert_eq!(fs::read(found.model).unwrap(), content);
    }
}

#[test]
fn what_came_damaged_is_thrown_away() {
    let hub = TestHub::of(&["m-Q8_0.gguf"]);
    let other = sha256(b"other");
    hub.change(|served| served.etag = Some(other.clone()));
    let error = hub.fails("u/r");
    assert!(
        error.starts_with("u/r: m-Q8_0.gguf came with SHA-256 "),
        "{error}"
    );
    assert!(error.contains(&other), "{error}");
    assert_eq!(hub.blobs(), Vec::<String>::new());
    assert!(hub.fetch_as(None, true, "u/r").is_err());
    // A part that an earlier run left, and something else on disk than was fetched.
    hub.change(|served| served.etag = None);
    let content = hub.content("m-Q8_0.gguf");
    let incomplete = hub
        .repo()
        .join("blobs")
        .join(format!("{}.incomplete", sha256(&content)));
    fs::write(&incomplete, "not the beginning").unwrap();
    assert!(hub.fails("u/r").contains("came with SHA-256"));
    assert!(!incomplete.exists());
    hub.fetch("u/r").unwrap();
}

#[test]
fn nothing_of_the_hubs_leaves_the_cache() {
    for name in [
        "../evil.gguf",
        "/evil.gguf",
        "a/../../evil.gguf",
        "a\\evil.gguf",
        "c:evil.gguf",
    ] {
        let hub = TestHub::of(&["m-Q8_0.gguf"]);
        hub.change(|served| served.listed.push(name.to_owned()));
        let error = hub.fails("u/r");
        assert!(error.contains("outside of the cache"), "{error}");
        assert!(!hub.repo().exists());
    }
    // The checksum becomes a file's name.
    for etag in ["../../../evil", "abc", &"G".repeat(64)] {
        let hub = TestHub::of(&["m-Q8_0.gguf"]);
        hub.change(|served| served.etag = Some(etag.to_owned()));
        let error = hub.fails("u/r");
        assert!(
            error.contains("gives no SHA-256 and size of m-Q8_0.gguf"),
            "{error}"
        );
        assert_eq!(hub.blobs(), Vec::<String>::new());
    }
}

#[test]
fn a_hub_that_says_no_is_one_line() {
    let hub = TestHub::of(&["m-Q8_0.gguf"]);
    hub.fetch("u/r").unwrap();
    for (status, expected) in [
        (
            401,
            "u/r: the hub answers 401: the repository is private, gated or not there; give `hf_token`, or set HF_TOKEN",
        ),
        (
            403,
            "u/r: the hub answers 403: the repository is private, gated or not there; give `hf_token`, or set HF_TOKEN",
        ),
        (404, "u/r: is not on the hub (404)"),
        (418, "u/r: the hub answers 418"),
    ] {
        hub.change(|served| served.status = Some(status));
        assert_eq!(hub.fails("u/r"), expected);
    }
    // It may be there again tomorrow: what is in the cache does.
    hub.change(|served| served.status = Some(503));
    let found = hub.fetch("u/r").unwrap();
    assert_eq!(found.stale.as_deref(), Some("the hub answers 503"));
    assert_eq!(
        hub.fails("u/other"),
        "u/other: cannot be fetched: the hub answers 503"
    );
    hub.change(|served| served.status = None);
    assert_eq!(hub.fails("u/other"), "u/other: is not on the hub (404)");
    assert_eq!(
        hub.fails("u/r:Q2_K"),
        "u/r: has no GGUF of Q2_K, there are m-Q8_0.gguf"
    );
    // Nobody listens any more.
    let away = Hub::new(hub.cache.path(), "http://127.0.0.1:1", None, false).unwrap();
    let found = away.fetch(&Wanted::new("u/r", None, true).unwrap(), &mut |_| Ok(()));
    assert!(found.unwrap().stale.is_some());
}

#[test]
fn a_token_is_shown_to_the_hub_and_to_nobody_else() {
    let hub = TestHub::of(&["m-Q8_0.gguf"]);
    hub.change(|served| served.token = Some("Bearer hf_secret"));
    let error = hub
        .fetch_as(Some("hf_wrong"), false, "u/r")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("401") && !error.contains("hf_wrong"),
        "{error}"
    );
    hub.asked();
    hub.fetch_as(Some("hf_secret"), false, "u/r").unwrap();
    let asked = hub.asked();
    assert!(asked.iter().any(|line| line.starts_with("/files/")));
    for line in asked {
        assert_eq!(
            line.starts_with("/files/"),
            !line.contains("hf_secret"),
            "{line}"
        );
    }
    let error = hub
        .fetch_as(Some("hf\n"), false, "u/r")
        .unwrap_err()
        .to_string();
    assert_eq!(error, "`hf_token`: holds characters that no token has");
}

/// The program, with the hub in its environment.
fn with(hub: &TestHub) -> assert_cmd::Command {
    let mut command = hae();
    for name in [
        "LLAMA_CACHE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_TOKEN",
        "http_proxy",
        "HTTP_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", &hub.address)
        .env("HF_HOME", hub.cache.path());
    command
}

#[test]
fn the_program_takes_a_model_from_the_hub() {
    let read = |name: &str| fs::read(root().join("models").join(name)).unwrap();
    let [first, second] = halves(&root().join("models/small-phi3v-Q8_0.gguf"));
    let hub = TestHub::new(Served {
        files: [
            ("small-Q8_0-00001-of-00002.gguf".to_owned(), first),
            ("small-Q8_0-00002-of-00002.gguf".to_owned(), second),
            (
                "mmproj-small-F16.gguf".to_owned(),
                read("mmproj-small-phi3v-F16.gguf"),
            ),
        ]
        .into(),
        ..Served::default()
    });
    let picture = root().join("models/demo.png");
    let asked = [
        "-p",
        "Where is the red triangle?",
        "--num-crops",
        "16",
        "--image",
    ];
    let run = |more: &[&str]| {
        let mut command = with(&hub);
        command
            .args(["run", "-hf", "u/r"])
            .args(more)
            .args(asked)
            .arg(&picture);
        command.output().unwrap()
    };
    let first = run(&[]);
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    let text = String::from_utf8(first.stdout).unwrap();
    assert!(text.contains("Row 6, column 7"), "{text}");
    let told = String::from_utf8(first.stderr).unwrap();
    assert!(
        told.contains("fetching small-Q8_0-00002-of-00002.gguf"),
        "{told}"
    );
    hub.change(|served| served.status = Some(500));
    let offline = run(&["--offline"]);
    assert_eq!(String::from_utf8(offline.stdout).unwrap(), text);
    let away = run(&[]);
    assert_eq!(String::from_utf8(away.stdout).unwrap(), text);
    assert!(
        String::from_utf8(away.stderr)
            .unwrap()
            .contains("the hub was not reached")
    );
    // Without its vision file it sees no picture.
    let blind = refusal_of(&run(&["--offline", "--no-mmproj"]));
    assert!(blind.contains("--mmproj"), "{blind}");

    let refusal = |args: &[&str]| refusal_of(&with(&hub).args(args).output().unwrap());
    let error = refusal(&["bench", "-hf", "u/other", "--offline"]);
    assert!(error.starts_with("hae: u/other: is not in "), "{error}");
    assert!(
        error.ends_with("and with --offline nothing is fetched"),
        "{error}"
    );
    let error = refusal(&["run", "-hf", "u", "-p", "x"]);
    assert_eq!(
        error,
        "hae: --hf-repo: \"u\", expected <user>/<model>[:quant]"
    );
}
