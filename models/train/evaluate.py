"""Scores of a checkpoint directory on a set: python evaluate.py SET --checkpoint DIR [--device cuda]

Understanding and chats by exact match of the greedy answer (chats: each turn behind the right
answers of the turns before), stories by the facts they state.  Intervals are Wilson's, 95 %.
"""
from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

import stories
from model import Attention
from runner import Row, Runner, read


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    p, d = hits / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: list[bool]) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return {"accuracy": round(sum(hits) / max(1, len(hits)), 4), "n": len(hits), "low": round(low, 4), "high": round(high, 4)}


def by(rows: list[Row], hits: dict[str, bool], key: Any) -> dict[str, Any]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for r in rows:
        groups[str(key(r))].append(hits[r["id"]])
    return {k: share(v) for k, v in sorted(groups.items())}


def score_rows(run: Runner, folder: Path, rows: list[Row], tokens: int) -> dict[str, bool]:
    hits: dict[str, bool] = {}
    for b in run.batches(folder, rows, tokens, answers=True):
        hits |= {r["id"]: ok for r, ok in zip(b.rows, run.right(b, run.full))}
    return hits


def understanding(run: Runner, folder: Path, tokens: int) -> dict[str, Any]:
    rows = read(folder / "understanding.jsonl")
    hits = score_rows(run, folder, rows, tokens)
    pictures = lambda r: f"{len(r['images'])} x {r['layout']}"  # noqa: E731
    return {**share([hits[r["id"]] for r in rows]), "by_task": by(rows, hits, lambda r: r["task"]),
            "by_pictures": by([r for r in rows if r["task"] != "caption"], hits, pictures),
            "wrong": [i for i, ok in hits.items() if not ok]}


def turns_of(rows: list[Row]) -> list[Row]:
    """Every turn of every chat as a row of its own, with the turns before it in its prompt."""
    out = []
    for r in rows:
        prompt = r["prompt"]
        for k, t in enumerate(r["turns"]):
            if k:
                prompt += f"{r['turns'][k - 1]['answer']}<|end|>\n<|user|>\n{t['question']}<|end|>\n<|assistant|>\n"
            out.append({**r, **t, "id": f"{r['id']}.{k}", "chat": r["id"], "prompt": prompt})
    return out


def chat(run: Runner, folder: Path, tokens: int) -> dict[str, Any]:
    rows = turns_of(read(folder / "chat.jsonl"))
    hits = score_rows(run, folder, rows, tokens)
    whole: dict[str, bool] = {}
    for r in rows:
        whole[r["chat"]] = whole.get(r["chat"], True) and hits[r["id"]]
    return {**share([hits[r["id"]] for r in rows]), "whole_chats": share(list(whole.values())),
            "follow": share([hits[r["id"]] for r in rows if r["task"] == "follow"]),
            "by_pictures": by(rows, hits, lambda r: len(r["images"]))}


def score_story(text: str, facts: list[dict[str, Any]]) -> dict[str, int]:
    """required, made: mentions the story must make and makes; said, true: statements, and those true of the pictures."""
    want = {(f["name"], f["attribute"], f["value"]): f["mentions"] for f in facts}
    got = Counter(stories.story_facts(text))
    return {"required": sum(want.values()), "made": sum(min(got[k], c) for k, c in want.items()),
            "said": sum(got.values()), "true": sum(c for k, c in got.items() if k in want)}


def story(run: Runner, folder: Path, tokens: int) -> dict[str, Any]:
    rows = read(folder / "story.jsonl")
    per: list[dict[str, Any]] = []
    for kind, limit in (("story", 560), ("saga", 1500)):
        mine = [r for r in rows if r["kind"] == kind]
        for b in run.batches(folder, mine, tokens * 2, answers=False):
            for r, ids in zip(b.rows, run.decode(b, limit)):
                text = run.text(ids)
                want, got = Counter(stories.story_facts(r["reference"])), Counter(stories.story_facts(text))
                missed = Counter(a for (_, a, _), c in (want - got).items() for _ in range(c))
                per.append({"id": r["id"], "kind": kind, "tokens": len(ids), "ended": ids[-1] in run.stop, "missed": dict(missed),
                            "exact": text == r["reference"], **score_story(text, r["facts"]), "text": text})
    out: dict[str, Any] = {}
    for kind in ("story", "saga"):
        some = [p for p in per if p["kind"] == kind]
        total = {k: sum(p[k] for p in some) for k in ("required", "made", "said", "true")}
        out[kind] = {"n": len(some), "recall": round(total["made"] / max(1, total["required"]), 4),
                     "precision": round(total["true"] / max(1, total["said"]), 4), "facts": total["required"],
                     "exact": share([p["exact"] for p in some])["accuracy"], "ended": share([p["ended"] for p in some])["accuracy"],
                     "mean_tokens": round(sum(p["tokens"] for p in some) / max(1, len(some)), 1),
                     "missed": dict(sum((Counter(p["missed"]) for p in some), Counter()))}
    return {**out, "texts": {p["id"]: p["text"] for p in per}}


def score(run: Runner, folder: Path, tokens: int, parts: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, part in (("understanding", understanding), ("chat", chat), ("story", story)):
        if name in parts:
            began = time.monotonic()
            out[name] = part(run, folder, tokens)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--tokens", type=int, default=0, help="per batch; 0: 30000 on CUDA, 4000 on CPU")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--parts", default="understanding,chat,story")
    p.add_argument("--out", type=Path, help="default: FOLDER/scores.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    Attention.flash = False  # float32
    result = score(Runner(a.checkpoint, a.device), a.folder, a.tokens or (30_000 if a.device == "cuda" else 4_000), a.parts)
    (a.out or a.folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
    for part in result.values():
        part.pop("texts", None)
        part.pop("wrong", None)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
