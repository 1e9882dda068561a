//! Chat templates, which come with models from strangers, and the messages that they are given. Behind the
//! first zero byte stand messages as JSON; without them, some of every kind.

#![no_main]

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use hae::llama::Around;
use hae::prompt::{ChatTemplate, Input, Transcript};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

static MESSAGES: LazyLock<Value> = LazyLock::new(|| {
    json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": [{ "type": "image" }, { "type": "text", "text": "What?" }] },
        { "role": "assistant", "content": null, "tool_calls": [
            { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"a\": 1}" } }] },
        { "role": "tool", "content": "7", "tool_call_id": "1" },
        { "role": "user", "content": "And é?" },
    ])
});

static TOOLS: LazyLock<Value> = LazyLock::new(|| {
    json!([{ "type": "function", "function": {
        "name": "f", "description": "d", "parameters": { "type": "object", "properties": { "a": { "type": "integer" } } } } }])
});

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let (text, rest) = match data.iter().position(|&byte| byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[][..]),
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let around = Around {
        bos: "<s>".into(),
        eos: "</s>".into(),
        adds_bos: true,
        adds_eos: false,
    };
    let made = ChatTemplate::new(text, true, around, Map::new());
    let Some(template) = hae_fuzz::one_line(made) else {
        return;
    };
    let given: Option<Value> = serde_json::from_slice(rest).ok();
    let messages = given.as_ref().and_then(Value::as_array);
    let all = MESSAGES.as_array().map_or(&[][..], Vec::as_slice);
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    for (messages, tools) in [(messages.map_or(all, Vec::as_slice), None), (&all[..1], Some(&*TOOLS))] {
        hae_fuzz::one_line(template.render(&Input {
            messages,
            tools,
            add_generation_prompt: true,
            media: "<__media__>",
            now: Some(now),
            ..Input::default()
        }));
    }
    let mut transcript = Transcript::new(Some(template), Some("Be brief.".into()));
    if hae_fuzz::one_line(transcript.ask("What?".into())).is_some() {
        transcript.answered("That.");
        hae_fuzz::one_line(transcript.ask("And?".into()));
    }
});
