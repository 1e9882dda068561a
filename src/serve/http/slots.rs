//! `/slots`: what each does, and keeping what they hold in files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Path as UrlPath, Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::body::{MaybeBody, read};
use super::failure::Failure;
use super::service::Service;
use crate::error::{Error, Result as OwnResult};

/// Asked of `/slots`.
#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    fail_on_no_slot: Option<String>,
}

/// What is to be done with a slot.
#[derive(Debug, Deserialize)]
pub(super) struct ActionQuery {
    action: Option<String>,
}

/// Where a slot is kept.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct SlotRequest {
    /// A name without folders.
    pub filename: Option<String>,
}

/// `GET /slots`
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, Failure> {
    if !service.rules.show_slots {
        let reason = "the slots are not shown: the server was started with `no_slots`";
        return Err(Failure::unsupported(reason));
    }
    let slots = service.hall.slots();
    let wants_one = query.fail_on_no_slot.is_some_and(|value| !value.is_empty());
    if wants_one && slots.iter().all(|slot| slot.is_processing) {
        return Err(Failure::unavailable("no slot is idle"));
    }
    let shown = slots.iter().map(|slot| {
        let mut shown = json!(slot);
        shown["n_ctx"] = service.hall.facts().n_ctx.into();
        shown["speculative"] = false.into();
        shown
    });
    Ok(Json(shown.collect()))
}

/// `POST /slots/{id}?action=save|restore|erase`
pub(super) async fn act(
    State(service): State<Arc<Service>>,
    UrlPath(id): UrlPath<String>,
    Query(query): Query<ActionQuery>,
    MaybeBody(body): MaybeBody,
) -> Result<Json<Value>, Failure> {
    let Some(folder) = service.rules.slot_save_path.clone() else {
        let reason = "slots are not kept: the server was started without `slot_save_path`";
        return Err(Failure::unsupported(reason));
    };
    let slots = service.hall.facts().slots;
    let slot = id.parse().ok().filter(|&slot: &usize| slot < slots);
    let slot = slot.ok_or_else(|| {
        let last = slots.saturating_sub(1);
        Failure::invalid(format!("slot {id}, but the slots are 0 to {last}"))
    })?;
    let request: SlotRequest = read(&body)?;
    let action = query.action.unwrap_or_default();
    let done = match action.as_str() {
        "erase" => {
            let erased = waiting(&service, move |service| service.hall.erase(slot)).await?;
            return Ok(Json(json!({ "id_slot": slot, "n_erased": erased })));
        }
        "save" | "restore" => {
            let name = request
                .filename
                .ok_or_else(|| Failure::invalid("`filename`: is missing"))?;
            let path = below(&folder, &name)
                .ok_or_else(|| Failure::invalid("`filename`: expected a name without folders"))?;
            let saves = action == "save";
            if !saves && !path.is_file() {
                return Err(Failure::invalid("`filename`: no such file"));
            }
            let start = Instant::now();
            let done = waiting(&service, move |service| match saves {
                true => service.hall.save(slot, &path),
                false => service.hall.restore(slot, &path),
            });
            let (tokens, bytes) = done.await?;
            let ms = start.elapsed().as_secs_f64() * 1e3;
            match saves {
                true => json!({
                    "id_slot": slot, "filename": name, "n_saved": tokens, "n_written": bytes,
                    "timings": { "save_ms": ms },
                }),
                false => json!({
                    "id_slot": slot, "filename": name, "n_restored": tokens, "n_read": bytes,
                    "timings": { "restore_ms": ms },
                }),
            }
        }
        _ => {
            let reason = "`action`: expected save, restore or erase";
            return Err(Failure::invalid(reason));
        }
    };
    Ok(Json(done))
}

/// Runs what waits for the model's thread where it holds nobody up.
pub(super) async fn waiting<T: Send + 'static>(
    service: &Arc<Service>,
    work: impl FnOnce(&Service) -> OwnResult<T> + Send + 'static,
) -> Result<T, Failure> {
    let service = Arc::clone(service);
    let timeout = service.rules.timeout;
    let work = tokio::task::spawn_blocking(move || work(&service));
    let done = tokio::time::timeout(timeout, work).await;
    let done = done.map_err(|_| Failure::too_slow(timeout.as_secs()))?;
    let done = done.map_err(|_| Failure::server("the model's thread gave up"))?;
    done.map_err(|e| match e {
        // A folder of the server's own is no business of the client's.
        Error::Io { cause, .. } => Failure::server(format!("the file: {cause}")),
        Error::File { reason, .. } => Failure::invalid(format!("`filename`: {reason}")),
        other => other.into(),
    })
}

/// A file right below the folder; `None`: the name leads elsewhere.
fn below(folder: &Path, name: &str) -> Option<PathBuf> {
    let plain = |c: char| !c.is_control() && !"/\\:*?\"<>|".contains(c);
    let ok = !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && !name.ends_with(['.', ' '])
        && name.chars().all(plain);
    if !ok {
        return None;
    }
    let path = folder.join(name);
    // A link is followed by whoever reads and writes it.
    let is_link = path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
    (!is_link).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "slot1.bin", "a b-c_d", "é.bin"] {
            assert_eq!(below(folder.path(), name), Some(folder.path().join(name)));
        }
        let long = "x".repeat(256);
        for name in [
            "",
            ".",
            "..",
            ".hidden",
            "../a",
            "a/b",
            "/etc/passwd",
            "a\\b",
            "c:a",
            "a\0",
            "a\n",
            "a.",
            "a ",
            &long,
        ] {
            assert_eq!(below(folder.path(), name), None, "{name:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_no_files_of_slots() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("a")).unwrap();
        assert_eq!(below(folder.path(), "a"), None);
    }
}
