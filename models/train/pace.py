"""How fast this machine draws and trains: python pace.py [--compile] [--workers 15]"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from asking import TASKS
from batches import Batch, Maker, stream
from learner import Learner
from model import Attention, default_config
from optimiser import Muon
from tokenizer import Tok, build
from train import flash_works
from world import LAYOUTS

CASES = (("patch", "4x4", 1), ("qa", "4x4", 1), ("qa", "8x8", 1), ("multi", "4x4", 3), ("chat", "4x4", 1), ("story", "4x4", 1),
         ("saga", "4x4", 3))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tok", type=Path, default=Path("run/tok"))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--tokens", type=int, default=40_000)
    p.add_argument("--workers", type=int, default=0, help="measure drawing with this many processes, too")
    p.add_argument("--rounds", type=int, default=8)
    a = p.parse_args()
    if not (a.tok / "tokenizer.json").exists():
        build(a.tok)
    tok = Tok(a.tok)
    maker, net = Maker(tok, a.tokens), Learner(default_config(vocab=tok.vocab)).to(a.device)
    if a.device == "cuda" and not flash_works(torch.device(a.device)):
        Attention.flash = False
    opt = Muon(list(net.named_parameters()))
    if a.compile:
        net.speed_up()

    def sync() -> float:
        if a.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def step(b: Batch) -> None:
        for q in net.parameters():
            q.grad = None
        with torch.autocast(a.device, torch.bfloat16):
            loss = net(b, 0.3).loss
        loss.backward()

    for kind, layout, pictures in CASES:
        b = maker.make(kind, 1, LAYOUTS[layout], pictures).to(torch.device(a.device))
        began = sync()
        step(b)
        first = sync()
        for _ in range(a.rounds):
            step(b)
        each = (sync() - first) / a.rounds
        memory = torch.cuda.max_memory_allocated() / 2**30 if a.device == "cuda" else 0
        print(f"{kind} {layout} x{pictures}: first {first - began:.1f} s, then {each * 1e3:.1f} ms, {b.ids.numel() / each:.0f} tokens/s, "
              f"{0 if b.px is None else len(b.px) / each:.0f} pictures/s, {memory:.1f} GiB", flush=True)
    began = sync()
    for _ in range(a.rounds):
        opt.step(0.001, 0.5)
    print(f"optimiser {(sync() - began) / a.rounds * 1e3:.1f} ms")
    if a.workers:
        feed = stream(maker, 0.0, 0, torch.tensor(0.7), torch.ones(len(TASKS)), a.workers, a.device == "cuda")
        for _ in range(a.workers):
            next(feed)
        began, tokens, pictures = time.monotonic(), 0, 0
        while time.monotonic() - began < 8:
            b = next(feed)
            tokens, pictures = tokens + b.ids.numel(), pictures + (0 if b.px is None else len(b.px))
        spent = time.monotonic() - began
        print(f"{a.workers} workers: {tokens / spent:.0f} tokens/s, {pictures / spent:.0f} pictures/s")


if __name__ == "__main__":
    main()
