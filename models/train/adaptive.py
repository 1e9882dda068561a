"""Rules that say how many visual tokens to keep: python adaptive.py SET --checkpoint DIR [--every N]

After the whole prompt, visual tokens are hidden from the tokens of the answer; those that the last token of
the prompt looks at most (mean over heads and layers) stay.  How many, each rule reads from the same attention:

keep S     this share of them
top-p P    the fewest that hold the share P of it
tau T      those with T times the mean or more
entropy F  F times exp(entropy)
spread F   F times (sum a)^2 / sum a^2

With --every, captions and counts are asked all the same, and the others weigh as much more.
"""
from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import Attention, Cache, Phi3V, rotate
from runner import Runner
from scoring import Row, read

WHOLE = ("caption", "count", "multi_count")  # what asks about more than a part of the picture
VALUES = {"keep": (0.2, 0.4, 0.6, 0.8), "top-p": (0.6, 0.7, 0.8, 0.9, 0.95, 0.97), "tau": (1.0, 0.7, 0.5, 0.4, 0.3, 0.2),
          "entropy": (0.5, 0.75, 1.0, 1.25, 1.5), "spread": (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)}
RULES = [(rule, value) for rule, values in VALUES.items() for value in values]


def spread(a: Tensor) -> float:
    return float(a.sum() ** 2 / (a * a).sum())


def count(rule: str, value: float, a: Tensor) -> int:
    """How many of the visual tokens with attention ``a`` [v] a rule keeps."""
    n, p = len(a), a / a.sum()
    if rule == "top-p":
        kept: float = int((p.sort(descending=True).values.cumsum(0) < value).sum()) + 1
    elif rule == "tau":
        kept = int((a >= value * a.mean()).sum())
    elif rule == "entropy":
        kept = value * math.exp(float(-torch.special.xlogy(p, p).sum()))
    else:
        kept = value * (n if rule == "keep" else spread(a))
    return min(n, max(1, round(kept)))


def attention(run: Runner, folder: Path, r: Row) -> tuple[Tensor, Tensor, Tensor, Cache]:
    """Last hidden state, visual columns, the last token's attention to them, and the prompt's cache."""
    ids, x = run.prompt([folder / p for p in r["images"]], r["num_crops"], r["prompt"])
    probs: list[Tensor] = []
    h, past = run.model.hidden(x, probs=probs)
    visual = torch.tensor([i for i, t in enumerate(ids) if t < 0])
    return h[0, -1], visual, torch.stack([p[0, :, -1, visual] for p in probs]).mean((0, 1)), past


def behind(net: Phi3V, past: Cache, ids: list[int], sees: Tensor) -> Tensor:
    """Logits [r, a, vocabulary] behind each of ``ids``, which see what ``sees`` [r, t] leaves of the prompt."""
    (n, t), a = sees.shape, len(ids)
    hidden = torch.zeros(n, 1, 1, t).masked_fill(~sees[:, None, None], float("-inf"))
    later = torch.full((a, a), float("-inf")).triu(1)
    x = net.model.embed_tokens(torch.tensor(ids)).expand(n, -1, -1)
    rope = net.rope(torch.arange(t, t + a)[None], t + a)
    for layer, (k, v) in zip(net.model.layers, past):
        at = layer.self_attn
        qkv = at.qkv_proj(layer.input_layernorm(x)).view(n, a, at.heads + 2 * at.kv, at.hd)
        qk = rotate(qkv[:, :, :at.heads + at.kv], *rope).transpose(1, 2)
        q, new = qk.split([at.heads, at.kv], 1)
        scores = [q @ k.transpose(-1, -2) / math.sqrt(at.hd) + hidden, q @ new.transpose(-1, -2) / math.sqrt(at.hd) + later]
        p = torch.cat(scores, -1).softmax(-1)
        y = p[..., :t] @ v + p[..., t:] @ qkv[:, :, at.heads + at.kv:].transpose(1, 2)
        x = x + at.o_proj(y.transpose(1, 2).reshape(n, a, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return net.lm_head(net.model.norm(x))


def answered(run: Runner, folder: Path, r: Row) -> tuple[list[float], list[bool], float]:
    """For each of RULES the share kept and whether the answer is right; and the share that attention is spread over."""
    last, visual, a, past = attention(run, folder, r)
    tail = run.tok.t.encode(r["answer"] + "<|end|>", add_special_tokens=False).ids
    counts = [count(rule, value, a) for rule, value in RULES]
    order = a.argsort(descending=True)
    sees = torch.ones(len(counts), past[0][0].shape[2], dtype=torch.bool)
    for row, kept in zip(sees, counts):
        row[visual[order[kept:]]] = False
    first = int(run.model.lm_head(last).argmax()) == tail[0]  # saw everything
    parts = sees.split(max(1, 2000 // len(tail)))
    best = torch.cat([behind(run.model, past, tail[:-1], part).argmax(-1) for part in parts])
    right = (best == torch.tensor(tail[1:])).all(1) & first
    return [c / len(a) for c in counts], right.tolist(), spread(a) / len(a)


@torch.no_grad()
def study(run: Runner, folder: Path, every: int) -> dict[str, Any]:
    rows = read(folder / "understanding.jsonl")
    parts = [r for r in rows if r["task"] not in WHOLE]
    asked = parts[::every]
    weight = len(parts) / len(asked)
    shares: dict[str, list[float]] = defaultdict(list)
    seen = []
    for r in asked + [r for r in rows if r["task"] in WHOLE]:
        kept, right, wide = answered(run, folder, r)
        kind = r["task"] if r["task"] in WHOLE else "part"
        shares[kind].append(wide)
        seen.append((weight if kind == "part" else 1.0, kind, kept, right))
    for r in read(folder / "story.jsonl"):
        a = attention(run, folder, r)[2]
        shares[r["kind"]].append(spread(a) / len(a))
    table = []
    for i, (rule, value) in enumerate(RULES):
        line: dict[str, Any] = {"rule": rule, "value": value,
                                "kept": round(sum(w * k[i] for w, _, k, _ in seen) / len(rows), 4),
                                "accuracy": round(sum(w * ok[i] for w, _, _, ok in seen) / len(rows), 4)}
        for kind in ("part", *WHOLE):
            some = [(k[i], ok[i]) for _, its, k, ok in seen if its == kind]
            line[kind] = {"n": len(some), "right": sum(ok for _, ok in some), "kept": round(sum(k for k, _ in some) / len(some), 4)}
        table.append(line)
    return {"rules": table, "spread": {k: {"n": len(v), "mean": round(sum(v) / len(v), 4), "least": round(min(v), 4),
                                           "most": round(max(v), 4)} for k, v in shares.items()}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--every", type=int, default=1)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, help="default: FOLDER/adaptive.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    Attention.flash = False
    result = study(Runner(a.checkpoint), a.folder, a.every)
    (a.out or a.folder / "adaptive.json").write_text(json.dumps(result, indent=1) + "\n")
    kinds = ("part", *WHOLE)
    print("| rule | kept | right | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 3) + "|")
    for x in result["rules"]:
        cells = [f"{x[k]['right']} of {x[k]['n']} with {100 * x[k]['kept']:.0f}" for k in kinds]
        print(f"| {x['rule']} {x['value']:g} | {100 * x['kept']:.1f} | {100 * x['accuracy']:.1f} | " + " | ".join(cells) + " |")
    for kind, s in result["spread"].items():
        mean, least, most = (f"{100 * s[k]:.1f}" for k in ("mean", "least", "most"))
        print(f"{kind} ({s['n']}): attention spread over {mean} % of the visual tokens ({least} to {most})")


if __name__ == "__main__":
    main()
