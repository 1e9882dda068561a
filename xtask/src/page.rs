//! `cargo xtask page`: the page of `hae serve`, used as a person would, in a browser without a window.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::browser::{Browser, Canned};
use crate::{setup, steps, vendor};

/// What the server asks for.
const KEY: &str = "a-key-of-this-test";
/// How long an answer of the small model may take.
const ANSWER: Duration = Duration::from_secs(120);
/// How long the page may take to show what is there already.
const SOON: Duration = Duration::from_secs(10);
/// What would run if an answer were read as HTML.
const TRAP: &str =
    "<img src=x onerror=\"window.trapped=1\"><script>window.trapped=1</script>**bold**";

#[derive(clap::Args)]
pub struct Args {
    /// A program that is built already, in the place of one that is built first
    #[arg(long, value_name = "FILE")]
    hae: Option<PathBuf>,
    /// Where pictures of the page go
    #[arg(long, default_value = "target/page", value_name = "DIR")]
    shots: PathBuf,
}

/// Uses the page; 0: all of it was as it should be.
///
/// # Errors
/// At the first thing that is not, and when something cannot be run.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let program = match &args.hae {
        Some(program) => program.clone(),
        None => {
            setup::run()?;
            vendor::run(root)?;
            let build = steps::cargo(root, &["build", "--release", "--bin", "hae"])?;
            ensure!(build.success(), "the build failed");
            root.join("target/release/hae")
        }
    };
    let shots = root.join(&args.shots);
    fs::create_dir_all(&shots).with_context(|| shots.display().to_string())?;
    let server = Server::start(&program)?;
    let mut page = Page {
        browser: Browser::start()?,
        shots,
        n: 0,
    };
    page.browser.screen(1280, 860, false)?;
    page.browser.open(&server.address)?;
    page.key()?;
    page.pictures(&root.join("models/demo.png"))?;
    page.answer()?;
    page.looks()?;
    page.second()?;
    page.trap()?;
    page.failures()?;
    page.ends()?;
    eprintln!(
        "{} checks passed; pictures in {}",
        page.n,
        page.shots.display()
    );
    Ok(0)
}

/// `hae serve` with the model that is in the program. Ends with the value.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(program: &Path) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["serve", "--port", "0", "--api-key", KEY])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let out = child.stdout.take();
        let mut server = Server {
            child,
            address: String::new(),
        };
        let mut lines = BufReader::new(out.context("no output of the server")?).lines();
        let line = lines.next().context("the server has ended")??;
        let address = line.strip_prefix("listening at ");
        server.address = address.with_context(|| line.clone())?.to_owned();
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The open page.
struct Page {
    browser: Browser,
    shots: PathBuf,
    n: usize,
}

impl Page {
    fn check(&mut self, what: &str, script: &str) -> Result<()> {
        self.browser
            .until(script, SOON)
            .with_context(|| what.to_owned())?;
        self.passed(what);
        Ok(())
    }

    fn passed(&mut self, what: &str) {
        self.n += 1;
        eprintln!("ok: {what}");
    }

    fn shoot(&mut self, name: &str, all: bool) -> Result<()> {
        let file = self.shots.join(format!("{name}.png"));
        self.browser.shoot(&file, all)
    }

    /// No script failed, and none was stopped.
    fn sound(&mut self, when: &str) -> Result<()> {
        let wrong = self.browser.wrong()?;
        ensure!(wrong.is_empty(), "{when}: {wrong:?}");
        self.passed(&format!("nothing went wrong in scripts: {when}"));
        Ok(())
    }

    fn ask(&mut self, question: &str) -> Result<()> {
        self.browser
            .value("document.getElementById('question').focus()")?;
        self.browser.write(question)?;
        self.browser.press("Enter", false)
    }

    /// Until the answer is whole: its text.
    fn wait(&mut self) -> Result<String> {
        let done = "document.getElementById('stop').hidden \
            && document.querySelector('.message.assistant:last-child')?.getAttribute('aria-busy') === 'false'";
        if let Err(e) = self.browser.until(done, ANSWER) {
            let trouble = self.browser.text("#trouble")?;
            bail!("no answer: {trouble:?}, {e}");
        }
        self.browser.text(".message.assistant:last-child .said")
    }

    fn key(&mut self) -> Result<()> {
        self.check(
            "the page asks for the key",
            "document.getElementById('key-dialog').open",
        )?;
        self.shoot("key", false)?;
        self.browser.press("Escape", false)?;
        self.browser
            .value("new Promise((done) => setTimeout(done, 4000))")?;
        self.check(
            "who gives none is left alone",
            "!document.getElementById('key-dialog').open",
        )?;
        self.ask("Where is it?")?;
        self.check(
            "until something is asked",
            "document.getElementById('key-dialog').open \
             && document.getElementById('question').value === 'Where is it?'",
        )?;
        self.browser
            .value("document.getElementById('question').value = ''")?;
        self.browser.write("another key")?;
        self.browser.press("Enter", false)?;
        self.check(
            "a wrong key is asked for again",
            "document.getElementById('key-dialog').open \
             && document.getElementById('key-text').textContent.includes('does not know')",
        )?;
        self.browser.write(KEY)?;
        self.browser.press("Enter", false)?;
        self.check(
            "the right key opens the page",
            "document.getElementById('state').textContent === 'ready'",
        )?;
        self.shoot("empty", false)?;
        let policies =
            "[...document.getElementById('policy').options].map((o) => o.value).includes('hae')";
        self.check("the policies are there to choose", policies)?;
        self.names()?;
        self.sound("at the beginning")
    }

    /// Everything that can be used says what it is.
    fn names(&mut self) -> Result<()> {
        self.browser
            .value("document.getElementById('settings').open = true")?;
        let tree = self
            .browser
            .call("Accessibility.getFullAXTree", json!({}))?;
        let mut n = 0;
        for node in tree["nodes"].as_array().into_iter().flatten() {
            let role = node["role"]["value"].as_str().unwrap_or_default();
            let used = [
                "button",
                "textbox",
                "spinbutton",
                "combobox",
                "log",
                "img",
                "DisclosureTriangle",
            ];
            if node["ignored"] == true || !used.contains(&role) {
                continue;
            }
            let name = node["name"]["value"].as_str().unwrap_or_default();
            ensure!(!name.is_empty(), "a {role} without a name: {node}");
            n += 1;
        }
        ensure!(n >= 10, "{n} controls");
        self.passed(&format!("each of {n} controls has a name"));
        self.shoot("settings", false)?;
        self.browser
            .value("document.getElementById('settings').open = false")
            .map(drop)
    }

    fn pictures(&mut self, file: &Path) -> Result<()> {
        let thumbs = |n: usize| format!("document.querySelectorAll('#thumbs img').length === {n}");
        self.browser.choose("#files", file)?;
        self.check("a picture is chosen", &thumbs(1))?;
        let made = "window.made = async () => { const c = document.createElement('canvas'); c.width = c.height = 8; \
            const b = await new Promise((r) => c.toBlob(r)); const t = new DataTransfer(); \
            t.items.add(new File([b], 'made.png', { type: 'image/png' })); return t; }";
        self.browser.value(made)?;
        let paste = "window.made().then((t) => document.getElementById('question').dispatchEvent( \
            new ClipboardEvent('paste', { clipboardData: t, bubbles: true, cancelable: true }))).then(() => 1)";
        self.browser.value(paste)?;
        self.check("a picture is pasted", &thumbs(2))?;
        let drop = "window.made().then((t) => { for (const kind of ['dragover', 'drop']) \
            document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: t, bubbles: true, cancelable: true })); })";
        self.browser.value(drop)?;
        self.check("a picture is dropped", &thumbs(3))?;
        self.check(
            "the mark of dropping is gone",
            "document.getElementById('drop').hidden",
        )?;
        for n in [2, 1] {
            self.browser.click("#thumbs li:last-child button")?;
            self.check("a picture is removed", &thumbs(n))?;
        }
        let text = "(() => { const t = new DataTransfer(); t.items.add(new File(['x'], 'x.txt', { type: 'text/plain' })); \
            document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: t, bubbles: true, cancelable: true })); })()";
        self.browser.value(text)?;
        self.check(
            "what is no picture is refused",
            "document.getElementById('trouble').textContent.includes('x.txt is no picture')",
        )?;
        self.check("and not kept", &thumbs(1))
    }

    fn answer(&mut self) -> Result<()> {
        self.browser.value(
            "document.getElementById('policy').value = 'hae'; document.getElementById('budget').value = '0.5'; \
             document.getElementById('temperature').value = '0'; window.live = 0; \
             new MutationObserver(() => { \
             if (document.querySelector('.message[aria-busy=true]')) window.live += 1; \
             }).observe(document.getElementById('pictures'), \
             { subtree: true, attributes: true, attributeFilter: ['data-states'] })",
        )?;
        self.ask("Where is the red triangle?")?;
        let text = self.wait()?;
        ensure!(
            text.starts_with("Row "),
            "an answer of another kind: {text:?}"
        );
        self.passed(&format!("the answer is shown: {text:?}"));
        let told = self
            .browser
            .value("document.querySelector('#pictures canvas').dataset.states")?;
        let counts: Vec<usize> = told
            .as_str()
            .unwrap_or_default()
            .split(' ')
            .filter_map(|n| n.parse().ok())
            .collect();
        let [kept, binned, evicted, looked_up] = counts[..] else {
            bail!("patches: {told}");
        };
        ensure!(
            evicted > 0 && kept + binned + looked_up > 0,
            "patches that were evicted and others, but {counts:?}"
        );
        self.passed(&format!(
            "patches are marked: {kept} kept, {binned} binned, {evicted} evicted"
        ));
        self.check(
            "and drawn again while the answer is written",
            "window.live >= 2",
        )?;
        self.check(
            "they are drawn on the picture",
            "(() => { const c = document.querySelector('#pictures canvas'); \
             const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; \
             const seen = new Set(); for (let i = 0; i < d.length; i += 4) \
             seen.add(d[i] >> 5 << 6 | d[i + 1] >> 5 << 3 | d[i + 2] >> 5); return seen.size > 4; })()",
        )?;
        let number = |id: &str| {
            format!("Number(document.getElementById('{id}').textContent.replaceAll(',', ''))")
        };
        let (text, vision, whole) = (
            number("cells-text"),
            number("cells-vision"),
            number("cells-whole"),
        );
        self.check(
            "cells are counted, and fewer than a full cache holds",
            &format!("{text} > 0 && {vision} > 0 && {whole} > {text} + {vision}"),
        )?;
        self.check(
            "they are drawn over time",
            "document.querySelectorAll('#chart polygon').length === 2 \
             && document.querySelectorAll('#chart polyline').length === 1",
        )?;
        self.check(
            "bytes are told",
            "/^[0-9.]+ ([KMG]iB|bytes)$/.test(document.getElementById('saved').textContent) \
             && /^[1-9][0-9]* % of a full cache$/.test(document.getElementById('saved-share').textContent) \
             && document.getElementById('allocated').textContent.includes('iB')",
        )?;
        self.check(
            "so are rates and the policy",
            "document.getElementById('answer-rate').textContent.endsWith('tokens/s') \
             && document.getElementById('policy-used').textContent === 'hae, at most 50 %'",
        )?;
        self.sound("in an answer")
    }

    /// Light and dark, wide and narrow.
    fn looks(&mut self) -> Result<()> {
        for scheme in ["light", "dark"] {
            self.browser.prefer("prefers-color-scheme", scheme)?;
            self.shoot(scheme, false)?;
        }
        self.browser.screen(390, 844, true)?;
        self.check(
            "a phone scrolls up and down only",
            "document.documentElement.scrollWidth <= window.innerWidth",
        )?;
        self.check(
            "and has the cache below the chat",
            "document.querySelector('.side').getBoundingClientRect().top \
             >= document.querySelector('.chat').getBoundingClientRect().bottom - 1",
        )?;
        self.shoot("phone-dark", false)?;
        self.browser.prefer("prefers-color-scheme", "light")?;
        self.shoot("phone", true)?;
        self.browser
            .value("document.querySelector('.side').scrollIntoView()")?;
        self.shoot("phone-cache", false)?;
        self.browser.value("window.scrollTo(0, 0)")?;
        self.browser.screen(1280, 860, false)
    }

    fn second(&mut self) -> Result<()> {
        self.browser
            .value("document.getElementById('question').focus()")?;
        self.browser.write("Where is")?;
        self.browser.press("Enter", true)?;
        self.browser.write("the blue circle?")?;
        self.check(
            "Shift+Enter begins a line",
            "document.getElementById('question').value === 'Where is\\nthe blue circle?'",
        )?;
        self.browser.press("Enter", false)?;
        let text = self.wait()?;
        self.passed(&format!("a second answer: {text:?}"));
        self.check(
            "the prompt was held already",
            "/^[1-9][0-9,]* of/.test(document.getElementById('cached').textContent)",
        )?;
        self.check(
            "the questions are told apart in the chart",
            "document.querySelectorAll('#chart .turn').length === 1",
        )?;
        self.shoot("second", false)?;
        for id in ["question", "add", "send"] {
            self.check(
                &format!("Tab comes to {id}"),
                &format!("document.activeElement.id === '{id}'"),
            )?;
            self.browser.press("Tab", false)?;
        }
        self.sound("in a second answer")
    }

    fn trap(&mut self) -> Result<()> {
        let piece = |delta: Value, end: Value| {
            let choice = json!({ "index": 0, "delta": delta, "finish_reason": end });
            format!("data: {}\n\n", json!({ "choices": [choice] }))
        };
        let stream = [
            piece(json!({ "content": TRAP }), Value::Null),
            piece(json!({}), json!("stop")),
            "data: [DONE]\n\n".to_owned(),
        ];
        let kind = ("Content-Type", "text/event-stream");
        let canned = Canned::Answer(200, vec![kind], stream.concat());
        self.browser.can("chat/completions", canned)?;
        self.ask("Say something bad")?;
        let text = self.wait()?;
        ensure!(text == TRAP, "{text:?}");
        self.passed("HTML in an answer is shown as it was written");
        self.check(
            "and nothing of it is there or runs",
            "!document.querySelector('.said *') && window.trapped === undefined",
        )?;
        self.sound("with HTML in an answer")
    }

    fn failures(&mut self) -> Result<()> {
        let error = |code: u16, kind: &str, message: &str| {
            json!({ "error": { "code": code, "type": kind, "message": message } }).to_string()
        };
        let kind = ("Content-Type", "application/json");
        let cases = [
            (
                Canned::Answer(
                    503,
                    vec![kind, ("Retry-After", "5")],
                    error(503, "unavailable_error", "the queue is full"),
                ),
                "The server is busy: the queue is full. Try again in 5 seconds.",
            ),
            (
                Canned::Answer(413, vec![kind], error(413, "invalid_request_error", "long")),
                "limit of 64.0 MiB a request",
            ),
            (
                Canned::Answer(
                    400,
                    vec![kind],
                    error(400, "exceed_context_size_error", "x"),
                ),
                "does not fit into the cache",
            ),
            (
                Canned::Answer(
                    200,
                    vec![("Content-Type", "text/event-stream")],
                    String::new(),
                ),
                "broke off",
            ),
            (Canned::Away, "Is hae serve still running?"),
        ];
        for (canned, words) in cases {
            self.browser.can("chat/completions", canned)?;
            self.ask("Once more")?;
            self.check(
                &format!("a failure is told: {words}"),
                &format!("document.getElementById('trouble').textContent.includes({words:?})"),
            )?;
            self.check(
                "the question is there to be sent again",
                "document.getElementById('question').value === 'Once more' \
                 && document.querySelectorAll('.message.user').length === 3",
            )?;
            if words.contains("seconds") {
                self.shoot("trouble", false)?;
            }
            self.browser
                .value("document.getElementById('question').value = ''")?;
        }
        self.browser.can("chat/completions", Canned::Silence)?;
        self.ask("Wait")?;
        self.check(
            "an answer can be stopped",
            "!document.getElementById('stop').hidden",
        )?;
        self.browser.press("Escape", false)?;
        self.check(
            "Escape stops it",
            "document.getElementById('stop').hidden && document.getElementById('question').value === 'Wait'",
        )?;
        self.browser.uncan()?;
        self.sound("in failures")
    }

    fn ends(&mut self) -> Result<()> {
        self.browser.click("#new-chat")?;
        self.check(
            "a new chat is empty",
            "!document.querySelector('.message') && !document.querySelector('#pictures canvas') \
             && !document.getElementById('welcome').hidden",
        )?;
        self.browser.prefer("prefers-reduced-motion", "reduce")?;
        self.check(
            "who wants no motion sees none",
            "(() => { const m = document.createElement('div'); m.className = 'message'; \
             m.setAttribute('aria-busy', 'true'); const s = document.createElement('div'); s.className = 'said'; \
             m.append(s); document.body.append(m); const name = getComputedStyle(s, '::after').animationName; \
             m.remove(); return name === 'none'; })()",
        )?;
        self.sound("at the end")
    }
}
