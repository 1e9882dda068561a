//! A browser without a window, driven over a pipe: Chromium's DevTools protocol.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// How long the browser may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a page that something is waited for on.
const PAUSE: Duration = Duration::from_millis(50);

/// What the browser may be called.
const NAMES: [&str; 4] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
];

/// What a request is answered with in the server's place.
#[derive(Clone, Debug)]
pub enum Canned {
    /// Status, headers and body.
    Answer(u16, Vec<(&'static str, &'static str)>, String),
    /// As if nobody were there.
    Away,
    /// Nothing ever.
    Silence,
}

/// A browser with one page. Ends with the value.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    next: u64,
    session: Option<String>,
    canned: Option<(String, Canned)>,
    wrong: Vec<String>,
    waiting: VecDeque<Value>,
    _home: tempfile::TempDir,
}

/// The browser's program.
///
/// # Errors
/// Where there is none.
pub fn find() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CHROMIUM") {
        return Ok(PathBuf::from(path));
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&folders).collect();
    let found = NAMES
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|path| path.is_file());
    found
        .context("missing: Chromium; install it (Debian: apt-get install chromium) or set CHROMIUM")
}

impl Browser {
    /// # Errors
    /// When the browser does not start.
    pub fn start() -> Result<Self> {
        let program = find()?;
        let home = tempfile::tempdir()?;
        // The browser reads commands from file 3 and writes answers to file 4.
        let mut child = Command::new("sh")
            .args([
                "-c",
                "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1",
                "sh",
            ])
            .arg(&program)
            .args([
                "--headless=new",
                "--remote-debugging-pipe",
                // It opens the page that is tested and nothing else; root has no sandbox.
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--hide-scrollbars",
                "--lang=en",
            ])
            .arg(format!("--user-data-dir={}", home.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let to = child.stdin.take().context("no pipe to the browser")?;
        let out = child.stdout.take().context("no pipe from the browser")?;
        let (sender, from) = channel();
        thread::spawn(move || {
            let messages = BufReader::new(out).split(0);
            let messages = messages.map_while(std::io::Result::ok);
            for message in messages.filter_map(|m| serde_json::from_slice(&m).ok()) {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Browser {
            child,
            to,
            from,
            next: 0,
            session: None,
            canned: None,
            wrong: Vec::new(),
            waiting: VecDeque::new(),
            _home: home,
        };
        let page = browser.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let attach = json!({ "targetId": page["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attach)?;
        let session = session["sessionId"].as_str().context("no session")?;
        browser.session = Some(session.to_owned());
        for domain in ["Page", "Runtime", "Log", "DOM", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Asks the browser.
    ///
    /// # Errors
    /// When it refuses, or does not answer.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        let id = self.send(method, params)?;
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let message = match self.from.recv_timeout(left) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => bail!("{method}: the browser does not answer"),
                Err(RecvTimeoutError::Disconnected) => bail!("{method}: the browser has ended"),
            };
            if message["id"] == id {
                if let Some(error) = message.get("error") {
                    bail!("{method}: {}", error["message"]);
                }
                self.events()?;
                return Ok(message["result"].clone());
            }
            self.waiting.push_back(message);
        }
    }

    fn send(&mut self, method: &str, params: Value) -> Result<u64> {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).context("the browser has ended")?;
        Ok(self.next)
    }

    /// What came beside answers: requests that wait for theirs, and what went wrong on the page.
    fn events(&mut self) -> Result<()> {
        while let Some(message) = self.waiting.pop_front() {
            let params = &message["params"];
            match message["method"].as_str().unwrap_or_default() {
                "Fetch.requestPaused" => {
                    let (id, url) = (&params["requestId"], &params["request"]["url"]);
                    let url = url.as_str().unwrap_or_default();
                    let canned = self.canned.clone();
                    let canned = canned.filter(|(part, _)| url.contains(part.as_str()));
                    self.reply(id, canned.map(|(_, canned)| canned))?;
                }
                "Runtime.exceptionThrown" => {
                    let details = &params["exceptionDetails"];
                    self.wrong
                        .push(format!("{}", details["exception"]["description"]));
                }
                // Statuses such as 401 are looked for on the page.
                "Log.entryAdded" if params["entry"]["source"] != "network" => {
                    self.wrong.push(format!("{}", params["entry"]["text"]));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn reply(&mut self, id: &Value, canned: Option<Canned>) -> Result<()> {
        match canned {
            None => self.send("Fetch.continueRequest", json!({ "requestId": id }))?,
            Some(Canned::Away) => {
                let how = json!({ "requestId": id, "errorReason": "ConnectionRefused" });
                self.send("Fetch.failRequest", how)?
            }
            Some(Canned::Silence) => return Ok(()),
            Some(Canned::Answer(status, headers, body)) => {
                let headers = headers
                    .iter()
                    .map(|(name, value)| json!({ "name": name, "value": value }));
                let answer = json!({
                    "requestId": id,
                    "responseCode": status,
                    "responseHeaders": headers.collect::<Vec<_>>(),
                    "body": STANDARD.encode(body),
                });
                self.send("Fetch.fulfillRequest", answer)?
            }
        };
        Ok(())
    }

    /// From now on requests for addresses with this part are answered so.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn can(&mut self, part: &str, canned: Canned) -> Result<()> {
        self.canned = Some((part.to_owned(), canned));
        self.call("Fetch.enable", json!({})).map(drop)
    }

    /// The server answers again.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn uncan(&mut self) -> Result<()> {
        self.canned = None;
        self.call("Fetch.disable", json!({})).map(drop)
    }

    /// Opens a page.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn open(&mut self, url: &str) -> Result<()> {
        self.call("Page.navigate", json!({ "url": url }))?;
        self.until("document.readyState === 'complete'", PATIENCE)
    }

    /// The value of an expression on the page; promises are waited for.
    ///
    /// # Errors
    /// What it throws.
    pub fn value(&mut self, script: &str) -> Result<Value> {
        let how = json!({ "expression": script, "awaitPromise": true, "returnByValue": true });
        let done = self.call("Runtime.evaluate", how)?;
        if let Some(thrown) = done.get("exceptionDetails") {
            bail!("{script}: {}", thrown["exception"]["description"]);
        }
        Ok(done["result"]["value"].clone())
    }

    /// The text of an element, as it is shown.
    ///
    /// # Errors
    /// Where there is none.
    pub fn text(&mut self, selector: &str) -> Result<String> {
        let text = self.value(&format!("document.querySelector({selector:?}).textContent"))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until an expression holds.
    ///
    /// # Errors
    /// When it does not within that time.
    pub fn until(&mut self, script: &str, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while self.value(script)? != json!(true) {
            ensure!(
                Instant::now() < end,
                "not within {} s: {script}",
                time.as_secs()
            );
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Clicks the middle of an element, which has to be there for a mouse.
    ///
    /// # Errors
    /// When it is not.
    pub fn click(&mut self, selector: &str) -> Result<()> {
        let found = self.value(&format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{ block: 'nearest' }}); \
             const b = e.getBoundingClientRect(); const at = [b.x + b.width / 2, b.y + b.height / 2]; \
             const top = document.elementFromPoint(...at); return e.contains(top) ? at : null; }})()"
        ))?;
        ensure!(!found.is_null(), "{selector} is not to be clicked");
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({
                "type": kind, "x": found[0], "y": found[1], "button": "left", "clickCount": 1,
            });
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    /// Types into what has the focus.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({ "text": text }))
            .map(drop)
    }

    /// Presses a key: `Enter`, `Tab`, `Escape`.
    ///
    /// # Errors
    /// As [`Browser::call`], or for other keys.
    pub fn press(&mut self, key: &str, shift: bool) -> Result<()> {
        let (code, text) = match key {
            "Enter" => (13, "\r"),
            "Tab" => (9, ""),
            "Escape" => (27, ""),
            _ => return Err(anyhow!("no such key: {key}")),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({
                "type": kind,
                "key": key,
                "code": key,
                "windowsVirtualKeyCode": code,
                "modifiers": if shift { 8 } else { 0 },
            });
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// Chooses a file, as in the dialog that a file input opens.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn choose(&mut self, selector: &str, file: &Path) -> Result<()> {
        let document = self.call("DOM.getDocument", json!({}))?;
        let root = &document["root"]["nodeId"];
        let find = json!({ "nodeId": root, "selector": selector });
        let found = self.call("DOM.querySelector", find)?;
        let how = json!({ "nodeId": found["nodeId"], "files": [file] });
        self.call("DOM.setFileInputFiles", how).map(drop)
    }

    /// The screen: pixels, and whether it is a phone's.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn screen(&mut self, width: u32, height: u32, phone: bool) -> Result<()> {
        let how = json!({
            "width": width,
            "height": height,
            "deviceScaleFactor": if phone { 2 } else { 1 },
            "mobile": phone,
        });
        self.call("Emulation.setDeviceMetricsOverride", how)?;
        // The page draws again a little later.
        thread::sleep(Duration::from_millis(400));
        Ok(())
    }

    /// What the reader prefers: `prefers-color-scheme` and the like.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn prefer(&mut self, name: &str, value: &str) -> Result<()> {
        let how = json!({ "features": [{ "name": name, "value": value }] });
        self.call("Emulation.setEmulatedMedia", how).map(drop)
    }

    /// Takes a picture of the page, of all of it or of what the screen shows.
    ///
    /// # Errors
    /// As [`Browser::call`], or when the file cannot be written.
    pub fn shoot(&mut self, file: &Path, all: bool) -> Result<()> {
        let how = json!({ "format": "png", "captureBeyondViewport": all });
        let shot = self.call("Page.captureScreenshot", how)?;
        let data = shot["data"].as_str().unwrap_or_default();
        fs::write(file, STANDARD.decode(data)?).with_context(|| file.display().to_string())
    }

    /// What went wrong on the page since the last time that this was asked: errors of scripts, and what the
    /// page's own rules stopped.
    ///
    /// # Errors
    /// As [`Browser::call`].
    pub fn wrong(&mut self) -> Result<Vec<String>> {
        // What is on its way comes before the answer to a question.
        self.value("1")?;
        Ok(std::mem::take(&mut self.wrong))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended by itself; asked so it ends with all of its processes.
        let session = self.session.take();
        if self.send("Browser.close", json!({})).is_err() || session.is_none() {
            let _ = self.child.kill();
        }
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(PAUSE);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
