"""How answers are scored, whoever gave them: rows of a set and hits or texts in, shares with intervals out."""
from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stories

Row = dict[str, Any]
STORY_LIMITS = {"story": 560, "saga": 1500}  # tokens of an answer at most


@dataclass
class Told:
    """A story as it was told; ``ended``: by the model."""

    text: str
    tokens: int
    ended: bool


def read(path: Path) -> list[Row]:
    return [json.loads(x) for x in path.read_text().splitlines()]


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


def score_story(text: str, facts: list[dict[str, Any]]) -> dict[str, int]:
    """required, made: mentions the story must make and makes; said, true: statements, and those true of the pictures."""
    want = {(f["name"], f["attribute"], f["value"]): f["mentions"] for f in facts}
    got = Counter(stories.story_facts(text))
    return {"required": sum(want.values()), "made": sum(min(got[k], c) for k, c in want.items()),
            "said": sum(got.values()), "true": sum(c for k, c in got.items() if k in want)}


def understanding_scores(rows: list[Row], hits: dict[str, bool]) -> dict[str, Any]:
    singles = [r for r in rows if r["task"] != "caption"]
    return {**share([hits[r["id"]] for r in rows]), "by_task": by(rows, hits, lambda r: r["task"]),
            "by_pictures": by(singles, hits, lambda r: f"{len(r['images'])} x {r['layout']}"),
            "wrong": [i for i, ok in hits.items() if not ok]}


def chat_scores(rows: list[Row], hits: dict[str, bool]) -> dict[str, Any]:
    """``rows`` from turns_of."""
    whole: dict[str, bool] = {}
    for r in rows:
        whole[r["chat"]] = whole.get(r["chat"], True) and hits[r["id"]]
    return {**share([hits[r["id"]] for r in rows]), "whole_chats": share(list(whole.values())),
            "follow": share([hits[r["id"]] for r in rows if r["task"] == "follow"]),
            "by_pictures": by(rows, hits, lambda r: len(r["images"]))}


def story_scores(rows: list[Row], told: dict[str, Told]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in STORY_LIMITS:
        some = [r for r in rows if r["kind"] == kind and r["id"] in told]
        facts = [score_story(told[r["id"]].text, r["facts"]) for r in some]
        total = {k: sum(f[k] for f in facts) for k in ("required", "made", "said", "true")}
        missed: Counter[str] = Counter()
        for r in some:
            want, got = (Counter(stories.story_facts(t)) for t in (r["reference"], told[r["id"]].text))
            missed.update(a for (_, a, _), c in (want - got).items() for _ in range(c))
        out[kind] = {"n": len(some), "recall": round(total["made"] / max(1, total["required"]), 4),
                     "precision": round(total["true"] / max(1, total["said"]), 4), "facts": total["required"],
                     "exact": share([told[r["id"]].text == r["reference"] for r in some])["accuracy"],
                     "ended": share([told[r["id"]].ended for r in some])["accuracy"],
                     "mean_tokens": round(sum(told[r["id"]].tokens for r in some) / max(1, len(some)), 1),
                     "missed": dict(missed)}
    return {**out, "texts": {i: t.text for i, t in told.items()}}
