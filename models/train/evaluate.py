"""Scores of a checkpoint directory on a set: python evaluate.py SET --checkpoint DIR [--device cuda]

Understanding and chats by exact match of the greedy answer (chats: each turn behind the right
answers of the turns before), stories by the facts they state.  Intervals are Wilson's, 95 %.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from model import Attention
from runner import Runner
from scoring import STORY_LIMITS, Row, Told, chat_scores, read, story_scores, turns_of, understanding_scores


def score_rows(run: Runner, folder: Path, rows: list[Row], tokens: int) -> dict[str, bool]:
    hits: dict[str, bool] = {}
    for b in run.batches(folder, rows, tokens, answers=True):
        hits |= {r["id"]: ok for r, ok in zip(b.rows, run.right(b, run.full))}
    return hits


def understanding(run: Runner, folder: Path, tokens: int) -> dict[str, Any]:
    rows = read(folder / "understanding.jsonl")
    return understanding_scores(rows, score_rows(run, folder, rows, tokens))


def chat(run: Runner, folder: Path, tokens: int) -> dict[str, Any]:
    rows = turns_of(read(folder / "chat.jsonl"))
    return chat_scores(rows, score_rows(run, folder, rows, tokens))


def story(run: Runner, folder: Path, tokens: int) -> dict[str, Any]:
    rows = read(folder / "story.jsonl")
    told: dict[str, Told] = {}
    for kind, limit in STORY_LIMITS.items():
        for b in run.batches(folder, [r for r in rows if r["kind"] == kind], tokens * 2, answers=False):
            told |= {r["id"]: Told(run.text(ids), len(ids), ids[-1] in run.stop) for r, ids in zip(b.rows, run.decode(b, limit))}
    return story_scores(rows, told)


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
