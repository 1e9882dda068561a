//! Pictures that requests bring or name: in the request itself, in a folder that was opened for them, or
//! on another machine.

mod address;
mod files;
mod inline;
mod remote;

use std::path::PathBuf;
use std::sync::Arc;

use super::failure::Failure;
use super::service::{Rules, Service};
use crate::error::Error;
use crate::image::{self, Picture};

/// Reads the pictures of one request, and counts them.
pub(super) struct Pictures<'a> {
    service: &'a Service,
    done: usize,
    pixels: u64,
}

impl<'a> Pictures<'a> {
    pub fn new(service: &'a Service) -> Self {
        Pictures {
            service,
            done: 0,
            pixels: service.rules.pixels,
        }
    }

    /// The next one. `source`: an address (`data:`, `file:`, `https:`), a path, or base64.
    pub async fn read(&mut self, source: &str) -> Result<Arc<Picture>, Failure> {
        let rules = &self.service.rules;
        if !self.service.hall.facts().vision {
            let reason = "this model sees no pictures: the server has no vision file";
            return Err(Failure::invalid(reason));
        }
        if self.done == rules.pictures {
            let reason = format!("more than {} pictures in one request", rules.pictures);
            return Err(Failure::invalid(reason));
        }
        self.done += 1;
        let name = PathBuf::from(format!("picture {}", self.done));
        let blamed = |reason: String| Failure::invalid(format!("{}: {reason}", name.display()));
        let source = Source::of(source, rules).map_err(blamed)?;
        let limits = image::Limits {
            pixels: rules.picture.pixels.min(self.pixels),
            ..rules.picture
        };
        // Owned, so that it is held as long as the work goes on, whoever still waits for it.
        let permit = Arc::clone(&self.service.decoders).acquire_owned().await;
        let label = name.clone();
        let read = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let bytes = source.bytes(limits.file)?;
            image::decode(&label, &bytes, &limits).map_err(|e| match e {
                Error::File { reason, .. } => reason,
                other => other.to_string(),
            })
        });
        let picture = read
            .await
            .map_err(|_| Failure::server("a picture's reader gave up"))?;
        let picture = picture.map_err(blamed)?;
        let pixels = u64::from(picture.width) * u64::from(picture.height);
        self.pixels = self.pixels.saturating_sub(pixels);
        Ok(Arc::new(Picture {
            num_crops: rules.num_crops,
            ..picture
        }))
    }
}

/// Where a picture's bytes are.
enum Source {
    Here(Vec<u8>),
    File(PathBuf),
    Remote(url::Url),
}

impl Source {
    /// By its looks: what has no scheme is a path where it has a dot, which base64 has not.
    fn of(source: &str, rules: &Rules) -> Result<Self, String> {
        let most = rules.picture.file;
        let scheme = source
            .split_once(':')
            .map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            Some("data") => inline::data(source, most).map(Source::Here),
            Some("https") => match rules.media_remote {
                true => remote::parse(source).map(Source::Remote),
                false => {
                    Err("pictures of other machines are not fetched here: send it as data".into())
                }
            },
            Some("http") => Err("an http address, expected https, or the picture as data".into()),
            Some("file") => {
                let path = source.get("file:".len()..).unwrap_or_default();
                let path = path.strip_prefix("//").unwrap_or(path);
                files::below(rules.media_path.as_deref(), path).map(Source::File)
            }
            Some(other) if other.len() < 16 => Err(format!(
                "an address that begins with {other:?}, expected data, https or file"
            )),
            _ if source.contains('.') => {
                files::below(rules.media_path.as_deref(), source).map(Source::File)
            }
            _ => inline::base64(source, most).map(Source::Here),
        }
    }

    fn bytes(self, most: u64) -> Result<Vec<u8>, String> {
        match self {
            Source::Here(bytes) => Ok(bytes),
            Source::File(path) => files::read(&path, most),
            Source::Remote(url) => remote::fetch(&url, most),
        }
    }
}
