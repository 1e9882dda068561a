//! What the server is: `/health`, `/v1/models`, `/props`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::failure::Failure;
use super::fields::settings;
use super::messages::MEDIA;
use super::report;
use super::service::Service;

/// `GET /health`: whoever can be asked has loaded its model.
pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// `GET /v1/models`, in OpenAI's shape and beside it in the one that llama.cpp adds.
pub(super) async fn models(State(service): State<Arc<Service>>) -> Json<Value> {
    let facts = service.hall.facts();
    let name = service.name();
    let capabilities: &[&str] = match facts.vision {
        true => &["completion", "multimodal"],
        false => &["completion"],
    };
    let inputs: &[&str] = match facts.vision {
        true => &["text", "image"],
        false => &["text"],
    };
    Json(json!({
        "object": "list",
        "data": [{
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "hae",
            "aliases": service.names(),
            "tags": service.about.tags,
            "architecture": { "input_modalities": inputs, "output_modalities": ["text"] },
            "meta": {
                "n_vocab": facts.n_vocab,
                "n_ctx": facts.n_ctx,
                "n_ctx_train": facts.n_ctx_train,
                "n_embd": facts.n_embd,
                "n_params": facts.n_params,
                "size": facts.size,
            },
        }],
        "models": [{
            "name": name,
            "model": name,
            "type": "model",
            "description": facts.description,
            "capabilities": capabilities,
            "details": { "format": "gguf", "family": facts.arch },
        }],
    }))
}

/// `GET /props`
pub(super) async fn props(State(service): State<Arc<Service>>) -> Result<Json<Value>, Failure> {
    let facts = service.hall.facts();
    let mut params = report::settings(&settings(&service, &json!({}))?);
    // As it was given: where there is none, each answer has another one.
    params["seed"] = match service.about.random_seed {
        true => u32::MAX,
        false => service.about.sampler.seed,
    }
    .into();
    // The folder is no business of the client's.
    let file = facts
        .model_path
        .file_name()
        .map(|name| name.to_string_lossy());
    Ok(Json(json!({
        "default_generation_settings": { "n_ctx": facts.n_ctx, "params": params },
        "total_slots": facts.slots,
        "model_alias": service.name(),
        "model_path": file,
        "modalities": { "vision": facts.vision, "audio": false, "video": false },
        "media_marker": MEDIA,
        "endpoint_slots": service.rules.show_slots,
        "endpoint_metrics": service.rules.metrics,
        "endpoint_props": false,
        "chat_template": service.render.as_ref().map(|render| render.text()),
        "bos_token": facts.bos,
        "eos_token": facts.eos,
        "build_info": service.about.build,
        "is_sleeping": false,
        "hae": {
            "policy": facts.policy,
            "policy_params": facts.policy_params,
            "policies": crate::policy::names().collect::<Vec<_>>(),
            "attend": facts.attend,
            "score_layers": facts.score_layers,
            "type_k": facts.type_k,
            "type_v": facts.type_v,
            "limits": {
                "body": service.rules.body,
                "pictures": service.rules.pictures,
                "picture_bytes": service.rules.picture.file,
                "pixels": service.rules.pixels,
                "answers": service.rules.answers,
                "seconds": service.rules.timeout.as_secs(),
            },
        },
    })))
}
