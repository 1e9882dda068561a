"""The pruning study: python pruning.py SET --checkpoint DIR [--device cuda]

Visual tokens are thrown away before layer k of the decoder, everything else stays, positions
included (k = 0: nothing ever sees them; k = 1: layer 0 has seen them).  Which are kept:

random     any
oracle     those that show the cells asked about, filled up with random ones
blank      the same, filled up with those that show no object at all before random ones: no other object is half seen
text L     largest attention of layer L from the question's tokens (sum over them, mean over heads: the paper's G)
last L     largest attention of layer L from the last token of the prompt
mean ...   the same, averaged over all layers

Each is tried as it is and with the separators (the visual tokens that end a row) kept first, within
the same number of tokens.  Captions are left out: they ask for everything.
"""
from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from draw import cell_box, num_visual, token_boxes, tokens_of
from model import Attention
from runner import Asked, Runner
from scoring import Row, read, share
from world import LAYOUTS

SHARES = (0.6, 0.4, 0.3, 0.2, 0.1)
CONTROLS = ("random", "oracle", "blank")  # what asks no layer


def about(r: Row) -> Tensor:
    """Which visual tokens of the row's pictures show the cells asked about, bool [v]."""
    layout = LAYOUTS[r["layout"]]
    parts = [tokens_of(layout, [cell_box((y, x)) for p, y, x in r["about"] if p == k]) for k in range(len(r["images"]))]
    assert all(len(p) == num_visual(layout) for p in parts)
    return torch.cat([torch.from_numpy(p) for p in parts])


def separators(r: Row) -> Tensor:
    """The visual tokens that show nothing: ends of rows, and the one before the global view, bool [v]."""
    one = np.isnan(token_boxes(LAYOUTS[r["layout"]])[:, 0])
    return torch.from_numpy(one).repeat(len(r["images"]))


def blank(folder: Path, r: Row) -> Tensor:
    """The visual tokens whose part of the picture has one colour, bool [v]."""
    out = []
    for name in r["images"]:
        art = np.asarray(Image.open(folder / name))
        for box in token_boxes(LAYOUTS[r["layout"]]):
            if np.isnan(box[0]):
                out.append(False)
                continue
            x0, y0, x1, y1 = (max(0, int(v)) for v in box)
            part = art[y0:y1, x0:x1].reshape(-1, 3)
            out.append(len(part) == 0 or bool((part == part[0]).all()))
    return torch.tensor(out)


def pruned(run: Runner, b: Asked, keep: Tensor, before: int) -> Tensor:
    """Last hidden states [n, t, h] when only the visual tokens ``keep`` [n, v] live from layer ``before`` on.

    What was thrown away keeps its old (unused) state; it is put back to have all columns in place.
    """
    net, (n, t) = run.model, b.ids.shape
    stays = torch.ones(n, t, dtype=torch.bool, device=run.dev)
    stays[:, b.visual] = keep
    columns = stays.nonzero()[:, 1].view(n, -1)  # every row keeps as many
    every = torch.arange(t, device=run.dev).expand(n, t)
    x = b.x
    for i, layer in enumerate(net.model.layers):
        if i == before:
            x = x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x, _ = layer(x, net.rope(columns if i >= before else every, t))
    if before < len(net.model.layers):
        x = torch.zeros_like(b.x).scatter(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x)
    return net.model.norm(x)


def scores(run: Runner, b: Asked) -> dict[str, Tensor]:
    """Attention to the visual tokens [n, v] by layer, from the question's tokens and from the last of the prompt."""
    probs: list[Tensor] = []
    end = int(b.prompt.max())
    run.model.hidden(b.x[:, :end], probs=probs)
    at = torch.arange(end, device=run.dev)
    question = ((at > b.visual[-1]) & (at < b.prompt[:, None])).float()
    last = (at == b.prompt[:, None] - 1).float()
    out: dict[str, Tensor] = {}
    for name, rows in (("text", question), ("last", last)):
        per = [torch.einsum("nhqk,nq->nk", p, rows)[:, b.visual] / p.shape[1] for p in probs]
        out |= {f"{name} {i}": s for i, s in enumerate(per)}
        out[f"mean {name}"] = torch.stack(per).mean(0)
    return out


def largest(score: Tensor, count: int) -> Tensor:
    """bool [n, v]: the count largest of every row."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(count, 1).indices, True)


def variants(share: float, method: str) -> list[tuple[int, bool]]:
    """(before which layer, separators kept) to try at this share."""
    if share == 0.3:
        return [(0, False), (0, True), (1, False), (1, True), (2, False)]
    return [(0, False), (0, True)] if method in CONTROLS else [(0, False)]


def label(method: str, share: float, before: int, kept: bool) -> str:
    return f"{method} @{share:g} before {before}" + (" with separators" if kept else "")


@torch.no_grad()
def study(run: Runner, folder: Path, tokens: int, shares: tuple[float, ...], limit: int = 0,
          only: list[str] | None = None) -> dict[str, Any]:
    rows = [r for r in read(folder / "understanding.jsonl") if r["task"] != "caption"]
    rows = rows[:: -(-len(rows) // limit)] if limit else rows
    hits: dict[str, dict[str, bool]] = defaultdict(dict)  # method -> question -> right
    points: dict[str, list[float]] = defaultdict(list)
    dice = torch.Generator().manual_seed(0)
    for b in run.batches(folder, rows, tokens, answers=True):
        names = [r["id"] for r in b.rows]
        asked = torch.stack([about(r) for r in b.rows]).to(run.dev)
        ends = torch.stack([separators(r) for r in b.rows]).to(run.dev)
        noise = torch.rand(asked.shape, generator=dice).to(run.dev)
        empty = torch.stack([blank(folder, r) for r in b.rows]).to(run.dev)
        methods = {"random": noise, "oracle": noise + asked, "blank": noise + empty + 2 * asked}
        if not only or set(only) - set(methods):
            methods |= scores(run, b)
        methods = {k: v for k, v in methods.items() if not only or k in only}
        hits["full"] |= dict(zip(names, run.right(b, run.full)))
        for method, score in methods.items():
            if method not in CONTROLS:
                point_out(points, method, score, asked)
            first = score + ends * (score.max() + 1)
            for s in shares:
                for before, kept in variants(s, method):
                    keep = largest(first if kept else score, max(1, round(s * score.shape[1])))
                    got = run.right(b, partial(pruned, run, keep=keep, before=before))
                    hits[label(method, s, before, kept)] |= dict(zip(names, got))
    detail = ["full"] + [label(m, 0.3, *v) for m in CONTROLS for v in variants(0.3, m)]
    return {"n": len(rows), "accuracy": {k: share(list(v.values())) for k, v in hits.items()},
            "by_task": {m: by_task(rows, hits[m]) for m in detail if m in hits},
            "wrong": {m: [i for i, ok in hits[m].items() if not ok] for m in detail if m in hits and not m.startswith("random")},
            "pointing": {m: {"lift": round(sum(v[::2]) / len(v[::2]), 3), "found_in_30pct": round(sum(v[1::2]) / len(v[1::2]), 3)}
                         for m, v in points.items()}}


def point_out(points: dict[str, list[float]], method: str, score: Tensor, asked: Tensor) -> None:
    """Lift: the asked tokens' share of the visual attention, over their share of the tokens; and how many are in the top 30 %."""
    some = asked.any(1) & ~asked.all(1)
    s, a = score[some], asked[some].float()
    if not len(s):
        return
    lift = (s * a).sum(1) / s.sum(1).clamp(min=1e-9) / a.mean(1)
    found = (largest(s, round(0.3 * s.shape[1])) * a).sum(1) / a.sum(1)
    for x, y in zip(lift.tolist(), found.tolist()):
        points[method] += [x, y]


def by_task(rows: list[Row], hits: dict[str, bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for r in rows:
        groups[r["task"]].append(hits[r["id"]])
    return {k: share(v)["accuracy"] for k, v in sorted(groups.items())}


def table(result: dict[str, Any], shares: tuple[float, ...]) -> str:
    acc = result["accuracy"]
    extra = [(0, True), (1, False), (1, True), (2, False)]
    lines = [f"full {acc['full']['accuracy']:.3f} of {result['n']}",
             "| kept | " + " | ".join(f"{s:.0%}" for s in shares)
             + " | 30% + separators | 30% after layer 0 | + separators | 30% after layer 1 | lift | found |",
             "|---" * (len(shares) + 7) + "|"]

    def cell(method: str, share: float, before: int, kept: bool) -> str:
        hit = acc.get(label(method, share, before, kept))
        return f"{100 * hit['accuracy']:.1f}" if hit else "-"

    for m in dict.fromkeys(k.split(" @")[0] for k in acc if "@" in k):
        p = result["pointing"].get(m)
        cells = [cell(m, s, 0, False) for s in shares] + [cell(m, 0.3, *x) for x in extra]
        lines.append(f"| {m} | " + " | ".join(cells) + (f" | {p['lift']:.1f} | {p['found_in_30pct']:.2f} |" if p else " | - | - |"))
    for m in dict.fromkeys(k.split(" @")[0] for k in acc if "@" in k and k.split(" @")[0] in CONTROLS):
        lines.append(f"{m} with separators: " + ", ".join(f"{s:.0%} {cell(m, s, 0, True)}" for s in shares))
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--tokens", type=int, default=0, help="per batch; 0: 20000 on CUDA, 4000 on CPU")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--limit", type=int, default=0, help="use about so many questions (0: all)")
    p.add_argument("--methods", default="", help="comma-separated (default: all)")
    p.add_argument("--shares", default=",".join(map(str, SHARES)))
    p.add_argument("--out", type=Path, help="default: FOLDER/pruning.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    Attention.flash = False
    shares = tuple(float(s) for s in a.shares.split(","))
    result = study(Runner(a.checkpoint, a.device), a.folder, a.tokens or (20_000 if a.device == "cuda" else 4_000), shares,
                   a.limit, [m for m in a.methods.split(",") if m])
    (a.out or a.folder / "pruning.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result, shares))
    for m, tasks in result["by_task"].items():
        print(m, json.dumps(tasks))


if __name__ == "__main__":
    main()
