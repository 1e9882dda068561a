//! `/metrics` in Prometheus' text format: llama.cpp's names for what it counts, too, `hae` for the rest.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::super::ask::{SlotState, Stats};
use super::failure::Failure;
use super::service::Service;

pub(super) async fn metrics(State(service): State<Arc<Service>>) -> Result<Response, Failure> {
    if !service.rules.metrics {
        let reason = "there are no metrics: the server was started without `metrics`";
        return Err(Failure::unsupported(reason));
    }
    let text = text(&service.hall.stats(), &service.hall.slots());
    let kind = "text/plain; version=0.0.4";
    let started = service.started.to_string();
    let headers = [
        ("Process-Start-Time-Unix", started.as_str()),
        (header::CONTENT_TYPE.as_str(), kind),
    ];
    Ok((headers, text).into_response())
}

fn text(stats: &Stats, slots: &[SlotState]) -> String {
    let rate = |n: u64, s: f64| if s > 0.0 { n as f64 / s } else { 0.0 };
    let (prompt_s, predicted_s) = (stats.prompt_seconds, stats.predicted_seconds);
    let (counter, gauge) = ("counter", "gauge");
    let lines = [
        (
            counter,
            "llamacpp:prompt_tokens_total",
            "Prompt tokens that went through the model.",
            stats.prompt_tokens as f64,
        ),
        (
            counter,
            "llamacpp:prompt_tokens_cached_total",
            "Prompt tokens that a slot held already.",
            stats.cached_tokens as f64,
        ),
        (
            counter,
            "llamacpp:prompt_seconds_total",
            "Seconds that prompts took, added up over slots.",
            prompt_s,
        ),
        (
            counter,
            "llamacpp:tokens_predicted_total",
            "Tokens of answers.",
            stats.predicted_tokens as f64,
        ),
        (
            counter,
            "llamacpp:tokens_predicted_seconds_total",
            "Seconds that answers took, added up over slots.",
            predicted_s,
        ),
        (
            counter,
            "llamacpp:n_decode_total",
            "Steps of the loop over all slots.",
            stats.steps as f64,
        ),
        (
            counter,
            "llamacpp:n_tokens_max",
            "Most cells that were ever in use, added up over slots.",
            stats.cells.peak as f64,
        ),
        (
            gauge,
            "llamacpp:prompt_tokens_seconds",
            "Prompt tokens a second, on average.",
            rate(stats.prompt_tokens, prompt_s),
        ),
        (
            gauge,
            "llamacpp:predicted_tokens_seconds",
            "Tokens of answers a second, on average.",
            rate(stats.predicted_tokens, predicted_s),
        ),
        (
            gauge,
            "llamacpp:requests_processing",
            "Questions in slots.",
            stats.processing as f64,
        ),
        (
            gauge,
            "llamacpp:requests_deferred",
            "Questions that wait for a slot.",
            stats.waiting as f64,
        ),
        (
            gauge,
            "llamacpp:n_busy_slots_per_decode",
            "Slots that took part in a step, on average.",
            rate(stats.slot_steps, stats.steps as f64),
        ),
        // No draft model is run; who reads llama.cpp's names finds them.
        (
            counter,
            "llamacpp:spec_decode_num_drafts_total",
            "Drafts.",
            0.0,
        ),
        (
            counter,
            "llamacpp:spec_decode_num_draft_tokens_total",
            "Tokens of drafts.",
            0.0,
        ),
        (
            counter,
            "llamacpp:spec_decode_num_accepted_tokens_total",
            "Tokens of drafts that were kept.",
            0.0,
        ),
        (
            counter,
            "hae:questions_total",
            "Questions that a slot took.",
            stats.questions as f64,
        ),
        (
            counter,
            "hae:refused_total",
            "Questions that found the queue full.",
            stats.refused as f64,
        ),
        (
            counter,
            "hae:evicted_total",
            "Tokens that left the cache.",
            stats.evicted as f64,
        ),
        (
            counter,
            "hae:restored_total",
            "Times that a token came back from the recycle bin.",
            stats.restored as f64,
        ),
        (
            counter,
            "hae:recalled_total",
            "Times that an evicted token was called back.",
            stats.recalled as f64,
        ),
        (
            gauge,
            "hae:kv_cells",
            "Cells that the cache can hold.",
            stats.n_cells as f64,
        ),
        (
            gauge,
            "hae:kv_bytes_in_use",
            "Bytes of the cells in use.",
            stats.bytes_in_use as f64,
        ),
        (
            gauge,
            "hae:kv_bytes_allocated",
            "Bytes of the buffers behind the cache.",
            stats.bytes_allocated as f64,
        ),
        (
            gauge,
            "hae:kv_bytes_host",
            "Bytes of evicted rows in main memory.",
            stats.bytes_host as f64,
        ),
        (
            gauge,
            "hae:picture_cache_bytes",
            "Bytes of the embeddings that are kept.",
            stats.pictures.bytes as f64,
        ),
        (
            counter,
            "hae:picture_cache_hits_total",
            "Pictures that needed no encoding.",
            stats.pictures.hits as f64,
        ),
        (
            counter,
            "hae:picture_cache_misses_total",
            "Pictures that were encoded.",
            stats.pictures.misses as f64,
        ),
    ];
    let mut out = String::new();
    // Writing to a string cannot fail.
    for (kind, name, help, value) in lines {
        let _ = write!(
            out,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
        );
    }
    out += "# HELP hae:cells Cells in use, by what is in them.\n# TYPE hae:cells gauge\n";
    for slot in slots {
        let cells = &slot.cells;
        for (state, of) in [("live", &cells.live), ("binned", &cells.binned)] {
            for (modality, n) in [("text", of.text), ("vision", of.vision)] {
                let _ = writeln!(
                    out,
                    "hae:cells{{slot=\"{}\",modality=\"{modality}\",state=\"{state}\"}} {n}",
                    slot.id
                );
            }
        }
    }
    out
}
