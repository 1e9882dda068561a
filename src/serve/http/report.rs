//! What answers say beside their text: tokens, times, the cache.

use serde_json::{Value, json};

use super::super::ask::{Choice, End};
use super::answering::{Listening, Prob, Progress, Whole};
use super::fields::Settings;
use crate::generate::Finish;

/// OpenAI's `usage` of `n` answers to each of some prompts, which count once.
pub(super) fn usage(answers: &[Whole], n: usize) -> Value {
    let firsts = || answers.iter().step_by(n.max(1));
    let prompt: usize = firsts().map(|whole| whole.prompt).sum();
    let cached: usize = firsts().map(|whole| whole.cached).sum();
    let completion: usize = answers.iter().map(Whole::predicted).sum();
    json!({
        "completion_tokens": completion,
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

/// The `usage` of `/v1/responses`.
pub(super) fn responses_usage(whole: &Whole) -> Value {
    let completion = whole.predicted();
    json!({
        "input_tokens": whole.prompt,
        "input_tokens_details": { "cached_tokens": whole.cached },
        "output_tokens": completion,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": whole.prompt + completion,
    })
}

/// llama.cpp's `timings`. Milliseconds; rates of what took no time are 0.
fn timings_of(
    cached: usize,
    prompt: usize,
    prompt_ms: f64,
    predicted: usize,
    predicted_ms: f64,
) -> Value {
    let each = |ms: f64, n: usize| if n > 0 { ms / n as f64 } else { 0.0 };
    let rate = |n: usize, ms: f64| if ms > 0.0 { n as f64 * 1e3 / ms } else { 0.0 };
    // The first token comes of the prompt's last row, and costs no step.
    let steps = predicted.saturating_sub(1);
    json!({
        "cache_n": cached,
        "prompt_n": prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": each(prompt_ms, prompt),
        "prompt_per_second": rate(prompt, prompt_ms),
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": each(predicted_ms, steps),
        "predicted_per_second": rate(steps, predicted_ms),
    })
}

pub(super) fn timings(whole: &Whole) -> Value {
    let times = &whole.answer.timings;
    let prompt_ms = times.vision_encode_ms + times.probe_ms + times.prefill_ms;
    let prompt = whole.prompt.saturating_sub(whole.cached);
    timings_of(
        whole.cached,
        prompt,
        prompt_ms,
        whole.predicted(),
        times.decode_ms,
    )
}

/// Those of an answer that goes on; the clock began with the question.
pub(super) fn timings_so_far(listening: &Listening, first: Option<std::time::Duration>) -> Value {
    let (prompt, cached) = listening.sizes();
    let (predicted, now) = listening.so_far();
    let first = first.unwrap_or(now);
    let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
    let prompt = prompt.saturating_sub(cached);
    timings_of(
        cached,
        prompt,
        ms(first),
        predicted,
        ms(now.saturating_sub(first)),
    )
}

/// Those of a prompt that goes in.
pub(super) fn timings_of_progress(progress: &Progress) -> Value {
    let rows = progress.processed.saturating_sub(progress.cache);
    let ms = if rows > 0 {
        progress.time.as_secs_f64() * 1e3
    } else {
        0.0
    };
    timings_of(progress.cache, rows, ms, 0, 0.0)
}

pub(super) fn progress(progress: &Progress) -> Value {
    json!({
        "total": progress.total,
        "cache": progress.cache,
        "processed": progress.processed,
        "time_ms": progress.time.as_millis() as u64,
    })
}

/// What the cache did: `hae` of an answer.
pub(super) fn hae(whole: &Whole) -> Value {
    let answer = &whole.answer;
    let kv = &answer.kv;
    let mut hae = json!({
        "policy": answer.policy,
        "cells": kv.cells,
        "n_cells": kv.n_cells,
        "peak_decoding": kv.peak_decoding,
        "bytes": {
            "per_cell": kv.bytes_per_cell,
            "in_use": kv.bytes_in_use,
            "peak": kv.bytes_peak,
            "peak_decoding": kv.bytes_peak_decoding,
            "allocated": kv.bytes_allocated,
            "host": kv.bytes_host,
        },
        "evicted": answer.evicted,
        "tokens": answer.tokens,
        "timings": answer.timings,
        "attended": answer.attended,
    });
    if let Some(bin) = &answer.bin {
        hae["bin"] = json!(bin);
    }
    hae
}

/// llama.cpp's words for the end of an answer, and the text that ended it.
pub(super) fn stop_type(end: &End) -> (&'static str, &str) {
    match end {
        End::Stop(text) => ("word", text),
        End::Finish(Finish::Eog) => ("eos", ""),
        End::Finish(Finish::Length | Finish::Context | Finish::Positions) => ("limit", ""),
        End::Finish(Finish::Cancelled) => ("none", ""),
    }
}

/// llama.cpp's `generation_settings`.
pub(super) fn settings(settings: &Settings) -> Value {
    let sampler = &settings.sampler;
    let n_predict = settings.n_predict.map_or(json!(-1), |n| json!(n));
    let bias = settings.shape.bias.iter();
    // JSON has no infinity: null stands for a token that never comes.
    let bias: Vec<Value> = bias
        .map(|&(token, bias)| json!({ "token": token, "bias": bias.is_finite().then_some(bias) }))
        .collect();
    json!({
        "seed": sampler.seed,
        "temperature": sampler.temp,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "min_p": sampler.min_p,
        "repeat_last_n": sampler.repeat_last_n,
        "repeat_penalty": sampler.repeat_penalty,
        "presence_penalty": settings.shape.presence,
        "frequency_penalty": settings.shape.frequency,
        "logit_bias": bias,
        "ignore_eos": settings.ignore_eos,
        "max_tokens": n_predict,
        "n_predict": n_predict,
        "n_probs": settings.n_probs,
        "stop": settings.stop,
        "stream": settings.stream,
        "timings_per_token": settings.timings_per_token,
        // Samplers that are not here, with the values that change nothing: clients look for them.
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "xtc_probability": 0.0,
        "dry_multiplier": 0.0,
        "mirostat": 0,
        "adaptive_target": -1.0,
        "adaptive_decay": 0.9,
    })
}

fn choice(choice: &Choice) -> Value {
    json!({
        "id": choice.token,
        "token": String::from_utf8_lossy(&choice.bytes),
        "bytes": choice.bytes,
        "logprob": finite(choice.logprob),
    })
}

/// A token that could not come is very unlikely: JSON has no infinity.
fn finite(logprob: f32) -> f32 {
    match logprob.is_finite() {
        true => logprob.min(0.0),
        false => -1e9,
    }
}

/// A token with `top` of the likeliest, in the shape that OpenAI's chats and llama.cpp share.
pub(super) fn prob(prob: &Prob, top: usize) -> Value {
    let mut out = choice(&prob.chosen);
    let likeliest = prob.likeliest.iter().take(top);
    out["top_logprobs"] = likeliest.map(choice).collect();
    out
}

/// The same with probabilities instead of their logarithms: llama.cpp's `post_sampling_probs`. They are
/// those before sampling.
pub(super) fn prob_plain(of: &Prob, top: usize) -> Value {
    let plain = |of: &Choice| {
        let mut out = choice(of);
        if let Some(out) = out.as_object_mut() {
            out.shift_remove("logprob");
            out.insert("prob".into(), of.logprob.exp().into());
        }
        out
    };
    let mut out = plain(&of.chosen);
    let likeliest = of.likeliest.iter().take(top);
    out["top_probs"] = likeliest
        .filter(|c| c.logprob.exp() > 0.0)
        .map(plain)
        .collect();
    out
}

/// `logprobs` of OpenAI's completions, and beside it llama.cpp's.
pub(super) fn completion_logprobs(probs: &[Prob], top: usize, mut offset: usize) -> Value {
    let text = |choice: &Choice| String::from_utf8_lossy(&choice.bytes).into_owned();
    let mut offsets = Vec::new();
    for prob in probs {
        offsets.push(offset);
        offset += text(&prob.chosen).chars().count();
    }
    let tops: Vec<Value> = (probs.iter())
        .map(|prob| {
            let likeliest = prob.likeliest.iter().take(top);
            likeliest
                .map(|c| (text(c), json!(finite(c.logprob))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        })
        .collect();
    json!({
        "tokens": probs.iter().map(|p| text(&p.chosen)).collect::<Vec<_>>(),
        "token_logprobs": probs.iter().map(|p| finite(p.chosen.logprob)).collect::<Vec<_>>(),
        "top_logprobs": tops,
        "text_offset": offsets,
        "content": probs.iter().map(|p| prob(p, top)).collect::<Vec<_>>(),
    })
}
