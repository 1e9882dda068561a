//! Every policy with any parameters, over an engine without a model that refuses what llama.cpp would, or would
//! get wrong: the books and the cache stay in step, nobody is lost, and budgets hold.

#![no_main]

use arbitrary::{Result as Drawn, Unstructured};
use hae::cache::State;
use hae::controller::Controller;
use hae::engine::scripted::{Scripted, hashed};
use hae::generate::{Segment, Session};
use hae::policy::{Limits, PolicyOptions, create, names};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

const LAYERS: u32 = 3;

fn number(u: &mut Unstructured<'_>) -> Drawn<Value> {
    Ok(match u.int_in_range(0..=9)? {
        0 => json!(u.arbitrary::<f64>()?),
        1 => json!(u.arbitrary::<u64>()?),
        2..=5 => json!(u.int_in_range(0..=40u32)?),
        _ => json!(f64::from(u.int_in_range(0..=100u32)?) / 100.0),
    })
}

/// The parameters as a trace or a calibration holds them, some of them others.
fn options(u: &mut Unstructured<'_>) -> Drawn<Option<PolicyOptions>> {
    let base = match u.arbitrary()? {
        true => PolicyOptions::default(),
        false => PolicyOptions::paper(),
    };
    let Ok(mut all) = serde_json::to_value(&base) else {
        return Ok(None);
    };
    let Some(fields) = all.as_object_mut() else {
        return Ok(None);
    };
    change(u, fields, 0)?;
    Ok(serde_json::from_value(all).ok())
}

fn change(u: &mut Unstructured<'_>, fields: &mut Map<String, Value>, depth: usize) -> Drawn<()> {
    for (name, field) in fields.iter_mut() {
        if !u.ratio(1, 3)? {
            continue;
        }
        match field {
            Value::Bool(is) => *is = u.arbitrary()?,
            Value::Object(inner) if depth < 3 => change(u, inner, depth + 1)?,
            Value::Null | Value::Object(_) if name == "kv_budget" => {
                *field = match u.arbitrary()? {
                    true => json!({ "cells": u.int_in_range(0..=80u32)? }),
                    false => json!({ "share": number(u)? }),
                };
            }
            Value::Number(_) => *field = number(u)?,
            Value::String(text) => {
                let words = [
                    "all", "last", "sum", "perquery", "exact", "early", "off", "cheap",
                ];
                *text = (*u.choose(&words)?).to_owned();
            }
            _ => {}
        }
    }
    Ok(())
}

fn play(u: &mut Unstructured<'_>) -> Drawn<()> {
    let all: Vec<&str> = names().collect();
    let name = *u.choose(&all)?;
    let n_cells = u.int_in_range(8..=160usize)?;
    let Some(options) = options(u)? else {
        return Ok(());
    };
    let limits = Limits {
        n_layer: LAYERS,
        n_cells,
    };
    let Some(policy) = hae_fuzz::one_line(create(name, &options, limits)) else {
        return Ok(());
    };
    let (seed, n_batch) = (u.arbitrary()?, u.int_in_range(1..=12usize)?);
    let engine = Scripted::new(n_cells, n_batch).with_attention(move |q, k| hashed(seed, q, k));
    let engine = if u.arbitrary()? {
        engine.patched()
    } else {
        engine
    };
    let mut session = Session::new(engine, Controller::new(policy, n_cells));
    let mut image = 0;
    for _ in 0..u.int_in_range(1..=4)? {
        if u.arbitrary()? {
            session.expect(u.int_in_range(0..=40usize)?);
        }
        let mut prompt = Vec::new();
        for _ in 0..u.int_in_range(0..=3)? {
            let n = u.int_in_range(1..=24usize)?;
            prompt.push(match u.arbitrary()? {
                true => Segment::Image {
                    embeddings: (0..2 * n).map(|x| x as f32).collect(),
                    n,
                    image,
                    axes: None,
                    separators: (4..n as u32).step_by(5).collect(),
                },
                false => Segment::Tokens(vec![3; n]),
            });
            image += 1;
        }
        prompt.push(Segment::Tokens(vec![4; u.int_in_range(1..=6)?]));
        if hae_fuzz::one_line(session.prefill(&prompt, &|| false)).is_none() {
            return Ok(());
        }
        in_step(&session);
        for _ in 0..u.int_in_range(0..=30)? {
            if hae_fuzz::one_line(session.step(3)).is_none() {
                return Ok(());
            }
            in_step(&session);
        }
    }
    Ok(())
}

fn in_step(session: &Session<Scripted>) {
    let ledger = session.controller.ledger();
    let held: Vec<_> = ledger.entries().map(|e| (e.cell, e.pos)).collect();
    assert_eq!(held, session.engine.occupied());
    let counts = ledger.counts();
    assert_eq!(counts.cells(), held.len());
    let binned = ledger
        .entries()
        .filter(|e| e.state == State::Binned)
        .count();
    assert_eq!(counts.binned.total(), binned);
}

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let _ = play(&mut Unstructured::new(data));
});
