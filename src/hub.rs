//! Models by their name on the Hugging Face hub, as llama.cpp fetches them: `user/repo`, with the
//! quantization behind a colon. Files lie where every program that knows the hub keeps them, and what
//! is there is not fetched again.

mod choice;
mod download;

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Deserialize;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;

use crate::error::{Error, Result};
use crate::llama::gguf::parts;
use download::Remote;

/// A model on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `user/repo`.
    repo: String,
    /// What a file's name must hold, such as `Q8_0`.
    tag: Option<String>,
    /// The very file, in place of a tag.
    file: Option<String>,
    /// Whether the vision file is wanted, too, where there is one.
    mmproj: bool,
}

impl Wanted {
    /// `name`: `user/repo` or `user/repo:tag`. `file`: the very file, whatever the tag says.
    ///
    /// # Errors
    /// [`Error::Option`] for a name or file that no repository can have.
    pub fn new(name: &str, file: Option<&str>, mmproj: bool) -> Result<Self> {
        let (repo, tag) = match name.split_once(':') {
            Some((repo, tag)) => (repo, Some(tag)),
            None => (name, None),
        };
        let is_word = |text: &str| {
            let usual = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            text.chars().all(usual) && !text.is_empty() && text.len() <= 96
        };
        let is_part = |part: &str| is_word(part) && !part.starts_with('.') && !part.contains("--");
        let parts: Vec<&str> = repo.split('/').collect();
        if parts.len() != 2 || !parts.iter().all(|part| is_part(part)) || !tag.is_none_or(is_word) {
            let reason = format!("{name:?}, expected <user>/<model>[:quant]");
            return Err(Error::option("hf_repo", reason));
        }
        if let Some(file) = file.filter(|file| !is_inside(file) || !file.ends_with(".gguf")) {
            let reason = format!("{file:?}, expected the name of a GGUF in the repository");
            return Err(Error::option("hf_file", reason));
        }
        Ok(Wanted {
            repo: repo.to_owned(),
            tag: tag.map(str::to_owned),
            file: file.map(str::to_owned),
            mmproj,
        })
    }

    /// The model's file, all of its parts, and the vision file, of those that are there.
    ///
    /// # Errors
    /// [`Failure::Hub`] saying what is not there.
    fn choose(&self, files: &[String]) -> Result<Chosen, Failure> {
        let model = match &self.file {
            Some(file) => files.iter().find(|f| *f == file),
            None => choice::model(files, self.tag.as_deref()),
        };
        let Some(model) = model else {
            let wanted = match (&self.file, &self.tag) {
                (Some(file), _) => file.clone(),
                (None, Some(tag)) => format!("GGUF of {tag}"),
                (None, None) => "GGUF".to_owned(),
            };
            return Err(Failure::Hub(match there(files) {
                Some(there) => format!("has no {wanted}, there are {there}"),
                None => format!("has no {wanted}"),
            }));
        };
        let parts = parts(model);
        if let Some(missing) = parts.iter().find(|part| !files.contains(part)) {
            return Err(Failure::Hub(format!("{model} lacks its part {missing}")));
        }
        let mmproj = choice::mmproj(files, model).filter(|_| self.mmproj);
        Ok(Chosen {
            parts,
            mmproj: mmproj.cloned(),
        })
    }
}

/// The GGUFs among the files, as many as a line holds.
fn there(files: &[String]) -> Option<String> {
    const MOST: usize = 12;
    let ggufs: Vec<&str> = files
        .iter()
        .map(|f| &**f)
        .filter(|f| f.ends_with(".gguf"))
        .collect();
    let more = ggufs.len().saturating_sub(MOST);
    let listed = ggufs[..ggufs.len() - more].join(", ");
    match (ggufs.is_empty(), more) {
        (true, _) => None,
        (_, 0) => Some(listed),
        (_, more) => Some(format!("{listed} and {more} more")),
    }
}

struct Chosen {
    parts: Vec<String>,
    mmproj: Option<String>,
}

/// A model's files, on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The text model, or the first of its parts: the others lie beside it.
    pub model: PathBuf,
    /// The vision file, where one was wanted and is there.
    pub mmproj: Option<PathBuf>,
    /// Why the hub could not be asked, where these are from an earlier time.
    pub stale: Option<String>,
}

/// How far a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'f> {
    /// The hub's name of it.
    pub file: &'f str,
    /// Bytes that are here.
    pub bytes: u64,
    /// Bytes that there are.
    pub of: u64,
}

/// Why a model is not here.
enum Failure {
    /// The hub was not reached, or could not answer now: what is in the cache may do.
    Away(String),
    /// It answered, and there is no model in it.
    Hub(String),
    /// Ours.
    Own(Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Own(e)
    }
}

impl From<ureq::Error> for Failure {
    fn from(e: ureq::Error) -> Self {
        match e {
            ureq::Error::StatusCode(status @ (401 | 403)) => Failure::Hub(format!(
                "the hub answers {status}: the repository is private, gated or not there; give `hf_token`, or set HF_TOKEN"
            )),
            ureq::Error::StatusCode(404) => Failure::Hub("is not on the hub (404)".into()),
            ureq::Error::StatusCode(status @ (429 | 500..)) => {
                Failure::Away(format!("the hub answers {status}"))
            }
            ureq::Error::StatusCode(status) => Failure::Hub(format!("the hub answers {status}")),
            ureq::Error::Json(e) => {
                Failure::Hub(format!("the hub's answer is no list of files: {e}"))
            }
            e => Failure::Away(e.to_string()),
        }
    }
}

impl From<ApiError> for Failure {
    fn from(e: ApiError) -> Self {
        match e {
            ApiError::RequestError(e) => (*e).into(),
            e => Failure::Hub(format!("the hub's answer is not as expected: {e}")),
        }
    }
}

/// What the hub says of a repository.
#[derive(Deserialize)]
struct Listing {
    /// The commit.
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Whether a name leads to a place inside the folder that it is appended to, on every system.
fn is_inside(name: &str) -> bool {
    let plain = |c: char| !c.is_control() && c != '\\' && c != ':';
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_));
    !name.is_empty() && name.chars().all(plain) && Path::new(name).components().all(inside)
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The hub, and the folder that keeps what came from it.
pub struct Hub {
    cache: Cache,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// As the environment says: `HF_ENDPOINT`; `LLAMA_CACHE`, `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME` or
    /// `XDG_CACHE_HOME` for the cache, as llama.cpp reads them; `HF_TOKEN`, or what `hf auth login` left,
    /// where no `token` is given. `offline`: from the cache alone.
    ///
    /// # Errors
    /// [`Error::Option`] for a token that cannot be one, or where there is no home folder.
    pub fn from_env(token: Option<&str>, offline: bool) -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let places = [
            ("LLAMA_CACHE", ""),
            ("HF_HUB_CACHE", ""),
            ("HUGGINGFACE_HUB_CACHE", ""),
            ("HF_HOME", "hub"),
            ("XDG_CACHE_HOME", "huggingface/hub"),
        ];
        let named = places
            .iter()
            .find_map(|(name, inside)| Some(PathBuf::from(set(name)?).join(inside)));
        let home = || Some(std::env::home_dir()?.join(".cache/huggingface/hub"));
        let Some(folder) = named.or_else(home) else {
            let reason = "there is no home folder to keep models in: set HF_HOME";
            return Err(Error::option("hf_repo", reason));
        };
        let var = |name| set(name).and_then(|value| value.into_string().ok());
        let token = token.map(str::to_owned).or_else(|| var("HF_TOKEN"));
        let token = token.or_else(|| Cache::new(folder.clone()).token());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Hub::new(&folder, &endpoint, token.as_deref(), offline)
    }

    /// `folder` keeps what comes from `endpoint`, an address without a path.
    ///
    /// # Errors
    /// [`Error::Option`] for a token that cannot be one.
    pub fn new(folder: &Path, endpoint: &str, token: Option<&str>, offline: bool) -> Result<Self> {
        if token.is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            let reason = "holds characters that no token has";
            return Err(Error::option("hf_token", reason));
        }
        // The links of the cache are relative to one another.
        let folder = std::path::absolute(folder).map_err(|e| Error::io(folder, e))?;
        Ok(Hub {
            cache: Cache::new(folder),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()).map(str::to_owned),
            offline,
        })
    }

    /// The files of a model: those of the hub's newest commit, fetched where they are not in the cache. When
    /// the hub cannot be reached, and when it may not be, those that the cache has. `progress` hears of
    /// every piece, and ends the download with its error.
    ///
    /// # Errors
    /// [`Error::Hub`] when there is no such model, or it came damaged; [`Error::Io`] when the
    /// cache cannot be written; those of `progress`.
    pub fn fetch(
        &self,
        wanted: &Wanted,
        progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
    ) -> Result<Found> {
        let failed = |reason: String| Error::Hub {
            repo: wanted.repo.clone(),
            reason,
        };
        let cached = || {
            let repo = self.cache.model(wanted.repo.clone());
            let (folder, files) = cached(&repo)?;
            let chosen = wanted.choose(&files).ok()?;
            Some(found(&folder, &chosen))
        };
        if self.offline {
            let place = self.cache.path().display();
            return cached().ok_or_else(|| {
                failed(format!(
                    "is not in {place}, and with `offline` nothing is fetched"
                ))
            });
        }
        match self.online(wanted, progress) {
            Ok(found) => Ok(found),
            Err(Failure::Own(e)) => Err(e),
            Err(Failure::Hub(reason)) => Err(failed(reason)),
            Err(Failure::Away(reason)) => match cached() {
                Some(found) => Ok(Found {
                    stale: Some(reason),
                    ..found
                }),
                None => Err(failed(format!("cannot be fetched: {reason}"))),
            },
        }
    }

    fn online(
        &self,
        wanted: &Wanted,
        progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
    ) -> Result<Found, Failure> {
        let api = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .build()?;
        let main = api.model(wanted.repo.clone());
        let listing: Listing = main.info_request().call()?.body_mut().read_json()?;
        let files: Vec<String> = listing.siblings.into_iter().map(|s| s.rfilename).collect();
        if let Some(wrong) = files.iter().find(|file| !is_inside(file)) {
            let reason = format!("the hub lists {wrong:?}, which would lie outside of the cache");
            return Err(Failure::Hub(reason));
        }
        if !is_hex(&listing.sha, 40) {
            let reason = format!("the hub calls a commit {:?}", listing.sha);
            return Err(Failure::Hub(reason));
        }
        let chosen = wanted.choose(&files)?;
        let repo = Repo::with_revision(wanted.repo.clone(), RepoType::Model, listing.sha.clone());
        let fetcher = Fetcher {
            hub: self,
            // All files are of the one commit that was listed, whatever becomes the newest meanwhile.
            remote: api.repo(repo),
            cache: self.cache.model(wanted.repo.clone()),
            commit: &listing.sha,
            agent: agent(10),
            asker: agent(0),
        };
        for file in chosen.parts.iter().chain(&chosen.mmproj) {
            fetcher.file(file, progress)?;
        }
        let refs = fetcher.cache.create_ref(&listing.sha);
        refs.map_err(|e| Error::io(self.cache.path(), e))?;
        Ok(found(&fetcher.cache.pointer_path(&listing.sha), &chosen))
    }
}

/// Shows the token to the host that was asked, and to none that this one names.
fn agent(redirections: u32) -> Agent {
    Agent::config_builder()
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .max_redirects(redirections)
        .timeout_connect(Some(Duration::from_secs(30)))
        .build()
        .into()
}

fn found(folder: &Path, chosen: &Chosen) -> Found {
    Found {
        model: folder.join(&chosen.parts[0]),
        mmproj: chosen.mmproj.as_ref().map(|file| folder.join(file)),
        stale: None,
    }
}

/// The folder of the commit that the cache calls the newest, and the files in it.
fn cached(repo: &CacheRepo) -> Option<(PathBuf, Vec<String>)> {
    // The library has no name for the file itself.
    let refs = repo.blob_path("").parent()?.join("refs/main");
    let commit = fs::read_to_string(refs).ok()?;
    let commit = commit.trim();
    let folder = repo.pointer_path(commit);
    let mut files = Vec::new();
    let mut open = vec![is_hex(commit, 40).then(|| folder.clone())?];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(next).ok()?.flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path);
            } else if path.exists() {
                let inside = path.strip_prefix(&folder).ok()?.to_str()?;
                files.push(inside.replace('\\', "/"));
            }
        }
    }
    files.sort_unstable();
    Some((folder, files))
}

/// What stands for itself in the path of an address, beside letters and digits.
const IN_PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// Of one commit.
struct Fetcher<'h> {
    hub: &'h Hub,
    remote: ApiRepo,
    cache: CacheRepo,
    commit: &'h str,
    agent: Agent,
    /// Follows no redirection.
    asker: Agent,
}

impl Fetcher<'_> {
    /// Sees to it that a file of the commit is in the cache.
    fn file(
        &self,
        name: &str,
        progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
    ) -> Result<(), Failure> {
        let pointer = self.cache.pointer_path(self.commit).join(name);
        if pointer.exists() {
            return Ok(());
        }
        let url = self
            .remote
            .url(&utf8_percent_encode(name, IN_PATH).to_string());
        let (sha256, bytes) = self.told(&url)?;
        let sha256 = &*sha256;
        let Some(bytes) = bytes.filter(|_| is_hex(sha256, 64)) else {
            let reason = format!("the hub gives no SHA-256 and size of {name}, but {sha256:?}");
            return Err(Failure::Hub(reason));
        };
        let blob = self.cache.blob_path(sha256);
        for path in [&blob, &pointer] {
            let folder = path.parent().unwrap_or(path);
            fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        if !blob.exists() {
            let remote = Remote {
                url,
                name,
                bytes,
                sha256,
                token: self.hub.token.as_deref(),
            };
            download::fetch(&self.agent, &remote, &blob, progress)?;
        }
        // A link to what is not there any more.
        let _ = fs::remove_file(&pointer);
        link(&blob, &pointer, name).map_err(|e| Error::io(&pointer, e))?;
        Ok(())
    }
}

impl Fetcher<'_> {
    /// The checksum and the size of a file, as the hub says them before it sends one elsewhere for it.
    /// hf-hub would show the token there, too.
    fn told(&self, url: &str) -> Result<(String, Option<u64>), Failure> {
        let mut url = url.to_owned();
        // A repository may have got another name.
        for _ in 0..5 {
            let mut request = self.asker.head(&url);
            if let Some(token) = &self.hub.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.header("Accept-Encoding", "identity").call()?;
            let header = |name| response.headers().get(name)?.to_str().ok();
            let elsewhere = header("Location").filter(|to| !to.contains("//"));
            if let Some(path) = elsewhere.filter(|_| response.status().is_redirection()) {
                url = format!("{}{path}", self.hub.endpoint);
                continue;
            }
            let sha256 = header("X-Linked-ETag").or_else(|| header("ETag"));
            let sha256 = sha256.unwrap_or_default().trim_matches('"').to_owned();
            let of_itself = || header("Content-Length").filter(|_| response.status() == 200);
            let bytes = header("X-Linked-Size").or_else(of_itself);
            return Ok((sha256, bytes.and_then(|bytes| bytes.parse().ok())));
        }
        Err(Failure::Hub("the hub redirects without an end".into()))
    }
}

/// From a commit's folder, in which the file is called `name`.
#[cfg(unix)]
fn link(blob: &Path, pointer: &Path, name: &str) -> std::io::Result<()> {
    let up = "../".repeat(2 + name.matches('/').count());
    let file = blob.file_name().unwrap_or_default();
    std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(file), pointer)
}

/// Where links need rights that few have.
#[cfg(not(unix))]
fn link(blob: &Path, pointer: &Path, _: &str) -> std::io::Result<()> {
    fs::hard_link(blob, pointer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_users_and_models() {
        let wanted = Wanted::new("a-b/c.d_e:q4_0", None, true).unwrap();
        assert_eq!(wanted.repo, "a-b/c.d_e");
        assert_eq!(wanted.tag.as_deref(), Some("q4_0"));
        for wrong in [
            "",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "a/b:",
            "a/b:c/d",
            "../b",
            "a/..",
            "a b/c",
            "a/b?c",
            "a--b/c",
            "http://x/y",
        ] {
            let error = Wanted::new(wrong, None, true).unwrap_err().to_string();
            let expected = format!("`hf_repo`: {wrong:?}, expected <user>/<model>[:quant]");
            assert_eq!(error, expected);
        }
        for wrong in [
            "../x.gguf",
            "/x.gguf",
            "x.bin",
            "",
            "a/../../x.gguf",
            "c:x.gguf",
        ] {
            let error = Wanted::new("a/b", Some(wrong), true).unwrap_err();
            assert!(error.to_string().starts_with("`hf_file`: "), "{error}");
        }
    }

    #[test]
    fn what_is_missing_is_said_with_what_is_there() {
        let files = ["a-Q8_0.gguf", "b-00001-of-00002.gguf", "x.txt"].map(String::from);
        let reason = |name: &str, file| {
            let chosen = Wanted::new(name, file, true).unwrap().choose(&files);
            match chosen {
                Err(Failure::Hub(reason)) => reason,
                _ => panic!("expected a reason"),
            }
        };
        let there = "there are a-Q8_0.gguf, b-00001-of-00002.gguf";
        assert_eq!(
            reason("u/r:F16", None),
            format!("has no GGUF of F16, {there}")
        );
        assert_eq!(
            reason("u/r", Some("c.gguf")),
            format!("has no c.gguf, {there}")
        );
        assert_eq!(
            reason("u/r", Some("b-00001-of-00002.gguf")),
            "b-00001-of-00002.gguf lacks its part b-00002-of-00002.gguf"
        );
    }
}
