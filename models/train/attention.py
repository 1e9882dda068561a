"""Where each layer looks: python attention.py SET --checkpoint DIR

Averages over heads and over the positions that generate the answer (greedy text), for questions and
for stories: how much of the attention falls on visual tokens, on how many of them, how much of that
on the cells asked about and on the separators.
"""
from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning import about, separators
from runner import Runner
from scoring import Row, read


@torch.no_grad()
def statistics(run: Runner, folder: Path, rows: list[Row], limit: int) -> list[dict[str, float]]:
    total: list[dict[str, float]] = [defaultdict(float) for _ in range(run.cfg["num_hidden_layers"])]
    asked_rows = 0
    for r in rows:
        ids, x = run.prompt([folder / p for p in r["images"]], r["num_crops"], r["prompt"])
        out, _ = run.model.greedy(x, run.stop, limit)
        x = torch.cat([x, run.model.embed(torch.tensor([out[:-1]], dtype=torch.long))], 1)
        probs: list[Tensor] = []
        run.model.hidden(x, probs=probs)
        visual = torch.tensor([i < 0 for i in ids] + [False] * (len(out) - 1))
        asked = about(r) if r.get("about") else None
        asked_rows += asked is not None
        for layer, p in enumerate(probs):
            v = p[0, :, len(ids) - 1:][..., visual]  # [heads, generated, visual tokens]
            mass = v.sum(-1)
            w = v / mass.clamp(min=1e-9).unsqueeze(-1)
            s = w.sort(-1, descending=True).values
            t = total[layer]
            t["visual_mass"] += float(mass.mean())
            t["visual_mass_min_head"] += float(mass.mean(1).min())
            t["visual_mass_max_head"] += float(mass.mean(1).max())
            t["effective_share"] += float((-(w * w.clamp(min=1e-12).log()).sum(-1)).exp().mean()) / w.shape[-1]
            t["share_for_90pct"] += float((s.cumsum(-1) < 0.9).sum(-1).float().add(1).mean()) / w.shape[-1]
            t["top10pct_share"] += float(s[..., : max(1, s.shape[-1] // 10)].sum(-1).mean())
            t["on_separators"] += float(w[..., separators(r)].sum(-1).mean())
            if asked is not None:
                t["on_asked"] += float(w[..., asked].sum(-1).mean())
    return [{k: round(x / (asked_rows if k == "on_asked" else len(rows)), 4) for k, x in t.items()} for t in total]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--questions", type=int, default=120)
    p.add_argument("--stories", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, help="default: FOLDER/attention.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    run = Runner(a.checkpoint)
    asks = [r for r in read(a.folder / "understanding.jsonl") if r["task"] != "caption"]
    tales = read(a.folder / "story.jsonl")
    result: dict[str, Any] = {
        "questions": statistics(run, a.folder, asks[:: max(1, len(asks) // a.questions)], 16),
        "stories": statistics(run, a.folder, [r for r in tales if r["kind"] == "story"][: a.stories], 560),
        "sagas": statistics(run, a.folder, [r for r in tales if r["kind"] == "saga"][: max(1, a.stories // 2)], 1500)}
    (a.out or a.folder / "attention.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, layers in result.items():
        keys = list(layers[0])
        print(f"{name}\n| layer | " + " | ".join(keys) + " |\n" + "|---" * (len(keys) + 1) + "|")
        for i, t in enumerate(layers):
            print(f"| {i} | " + " | ".join(f"{t[k]:.2f}" for k in keys) + " |")


if __name__ == "__main__":
    main()
