"""Train the small Phi-3.5-V: python train.py --out run --minutes 20

First the vision tower alone learns to say what each visual token shows (a linear head that is
thrown away later), then the whole model learns to answer, list, chat and tell stories.  The clock
rules: the learning rate ends when the minutes do.  SIGTERM saves and leaves; --resume goes on, also
with other --minutes or on another machine.  --from DIR begins with the weights of a Hugging Face
directory that export.py wrote; optimiser and clock begin anew.  Runs on CUDA or CPU.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from asking import SINGLE, TASKS
from batches import KINDS, Batch, Maker, stream
from draw import HEADS
from learner import Learner
from model import Attention, default_config
from optimiser import Muon
from packed import error
from tokenizer import FILES, Tok, build
from world import LAYOUTS, SMALL

WATCH_SEED = 3_000_000_000_000  # pictures of the periodic scores; training draws seeds below 2**40


def watch_batches(maker: Maker, scale: float) -> list[Batch]:
    """Held-out batches for the periodic scores."""
    plan = [("qa", SMALL, 1, 48), ("qa", LAYOUTS["6x4"], 1, 24), ("qa", LAYOUTS["6x6"], 1, 24), ("qa", LAYOUTS["8x8"], 1, 16),
            ("multi", SMALL, 2, 40), ("multi", SMALL, 3, 40), ("chat", SMALL, 1, 48), ("chat", SMALL, 3, 32),
            ("story", SMALL, 1, 40), ("saga", SMALL, 3, 12)]
    return [maker.make(kind, WATCH_SEED + i, layout, pictures, n=max(1, round(n * scale)))
            for i, (kind, layout, pictures, n) in enumerate(plan)]


def flash_works(device: torch.device) -> bool:
    """Whether the packed attention is right on this machine; the masked one is slower and always works."""
    try:
        off = error(device, torch.bfloat16)
    except Exception as e:  # noqa: BLE001  private PyTorch operators: anything may be different there
        off = f"{type(e).__name__}: {e}"  # type: ignore[assignment]
    print(f"packed attention: relative error {off}", flush=True)
    return isinstance(off, float) and off < 0.02


class Trainer:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.out, self.dev = a, Path(a.out), torch.device(a.device)
        self.last = self.out / "last.pt"
        if a.resume != self.last.exists():
            sys.exit(f"{self.last}: " + ("not there, expected a run to go on with" if a.resume else
                                         "a run is here, expected --resume or another --out"))
        saved = torch.load(self.last, map_location=self.dev) if a.resume else None
        self.tok = Tok(self.tokenizer())
        self.maker = Maker(self.tok, a.tokens)
        torch.manual_seed(a.seed)
        self.cfg = (saved["config"] if saved else json.loads((a.start / "config.json").read_text()) if a.start else
                    default_config(a.layers, a.hidden, a.inner, a.vision_layers, a.vision, self.tok.vocab))
        self.done, self.weight = torch.zeros(()).share_memory_(), torch.ones(len(TASKS)).share_memory_()
        self.step, self.spent, self.tokens, self.pictures, self.starts = 0, 0.0, 0, 0, 0
        self.net = Learner(self.cfg).to(self.dev)
        if self.dev.type == "cuda" and not flash_works(self.dev):
            Attention.flash = False
        last = self.cfg["img_processor"]["num_hidden_layers"] - 1  # the layer after ``layer_idx`` is in the checkpoint and never runs
        self.opt = Muon([(n, p) for n, p in self.net.named_parameters()
                         if "post_layernorm" not in n and f"encoder.layers.{last}." not in n])
        self.right, self.asked = torch.zeros(len(TASKS), device=self.dev), torch.zeros(len(TASKS), device=self.dev)
        self.meter: dict[str, Tensor] = {}
        self.count: dict[str, int] = dict.fromkeys(KINDS, 0)
        if saved:
            self.resume(saved)
        elif a.start:
            self.net.model.load_state_dict(load_file(a.start / "model.safetensors", str(self.dev)))
        self.halt = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "halt", True))

    def tokenizer(self) -> Path:
        """The run's own copy, built or taken from where the weights come from."""
        folder = self.out / "tok"
        if self.a.start:
            folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                shutil.copy(self.a.start / name, folder / name)
        elif not all((folder / name).exists() for name in FILES):
            build(folder)
        return folder

    # ------------------------------------------------------------------ schedule
    def rate(self) -> float:
        a, done = self.a, float(self.done)
        warm = min(1.0, (self.step + 1) / a.warmup)
        if done < a.vision_part:
            return warm * (1 - 0.5 * done / a.vision_part)
        late = (done - a.vision_part) / (1 - a.vision_part)
        return a.peak * min(warm, late / 0.02 + 0.02, 1.0) * max(0.002, min(1.0, (1 - late) / a.decay))

    def patch_weight(self) -> float:
        a, done = self.a, float(self.done)
        return 1.0 if done < a.vision_part else 0.3 * (1 - (done - a.vision_part) / (1 - a.vision_part))

    def tick(self, began: float) -> None:
        self.spent = began + time.monotonic() - self.clock
        self.done.fill_(min(1.0, self.spent / max(self.a.minutes * 60, 1e-9)))

    # ------------------------------------------------------------------ work
    def see(self, key: str, value: Tensor) -> None:
        value = value.detach()
        self.meter[key] = self.meter[key].lerp(value, 0.05) if key in self.meter else value.clone()

    def learn(self, b: Batch) -> None:
        with torch.autocast(self.dev.type, torch.bfloat16):
            r = self.net(b, self.patch_weight())
        (r.loss / self.a.accumulate).backward()
        self.right.mul_(0.999).add_(r.right)
        self.asked.mul_(0.999).add_(r.asked)
        if b.kind != "patch":
            self.see("hit." + b.kind, r.hits)
        self.see("loss." + b.kind, r.loss)
        if r.patch is not None:
            self.see("patch", r.patch)
        if r.place is not None:
            self.see("loss.place", r.place)
        self.tokens += b.ids.numel()
        self.pictures += 0 if b.px is None else len(b.px)
        self.count[b.kind] += 1

    def balance(self) -> None:
        """Tasks with more errors get asked more often."""
        miss = 1 - (self.right / self.asked.clamp(min=1)).cpu()
        self.weight.copy_(0.15 + 2 * miss.clamp(0, 0.5))

    @torch.no_grad()
    def score(self, batches: list[Batch]) -> dict[str, Any]:
        self.net.eval()
        right, asked = torch.zeros_like(self.right), torch.zeros_like(self.asked)
        out: dict[str, Any] = {}
        for b in batches:
            if self.halt:  # who sends SIGTERM does not want to wait for scores
                break
            with torch.autocast(self.dev.type, torch.bfloat16), torch.compiler.set_stance("force_eager"):
                r = self.net(b.to(self.dev), 0.0)
            right, asked = right + r.right, asked + r.asked
            name = f"{b.kind} {b.layout.name}" + (f" x{b.pictures}" if b.pictures > 1 else "")
            out[name] = round(float(r.right.sum() / r.asked.sum()), 4) if r.asked.sum() else round(float(r.hits), 4)
        self.net.train()
        rates = (right / asked.clamp(min=1)).tolist()
        out["tasks"] = {t: round(x, 3) for t, x, n in zip(TASKS, rates, asked.tolist()) if n}
        return out

    def note(self, batches: list[Batch], file: TextIO) -> None:
        result = {"minutes": round(self.spent / 60, 2), "step": self.step, **self.score(batches)}
        if not self.halt:
            print(json.dumps(result), file=file, flush=True)

    def line(self, pace: float, wait: float) -> str:
        kinds = " ".join(f"{k[5:]} {float(v):.3f}/{float(self.meter.get('hit.' + k[5:], 0)):.3f}"
                         for k, v in sorted(self.meter.items()) if k.startswith("loss."))
        patch = " ".join(f"{n} {v:.3f}" for n, v in zip(HEADS, self.meter["patch"].tolist())) if "patch" in self.meter else ""
        rates = (self.right / self.asked.clamp(min=1)).tolist()
        some = " ".join(f"{t} {x:.3f}" for t, x in zip(TASKS, rates) if t in SINGLE)
        return (f"{self.spent / 60:6.2f} min step {self.step} pictures {self.pictures} tokens {self.tokens / 1e6:.0f}M "
                f"{pace:.0f} tokens/s wait {wait:.0%} rate {self.rate():.3f} | {kinds} | {patch} | {some}")

    def run(self) -> None:
        a = self.a
        self.starts += 1
        began, self.clock = self.spent, time.monotonic()
        self.tick(began)
        feed = stream(self.maker, a.vision_part, hash((a.seed, self.starts)), self.done, self.weight,
                      a.workers, self.dev.type == "cuda")
        if a.compile:
            self.net.speed_up()
        watch = watch_batches(self.maker, a.watch_scale)
        log, scores = (self.out / "train.log").open("a"), (self.out / "scores.jsonl").open("a")
        saved = shown = scored = time.monotonic()
        tokens, waited = self.tokens, 0.0
        while True:
            self.tick(began)
            if float(self.done) >= 1 or self.halt or (a.steps and self.step >= a.steps):
                break
            for p in self.net.parameters():
                p.grad = None
            for _ in range(a.accumulate):
                before = time.monotonic()
                b = next(feed)
                waited += time.monotonic() - before
                self.learn(b.to(self.dev))
            self.opt.step(self.rate(), 1.0 if float(self.done) < a.vision_part else a.tower)
            self.step += 1
            if self.step % a.show == 0:
                self.balance()  # waits for the device, which also keeps the clock honest
                now = time.monotonic()
                text = self.line((self.tokens - tokens) / (now - shown), waited / (now - shown))
                print(text, file=log, flush=True)
                print(text, flush=True)
                shown, tokens, waited = now, self.tokens, 0.0
            if time.monotonic() - scored > a.score_every and float(self.done) > a.vision_part:
                self.note(watch, scores)
                scored = time.monotonic()
            if time.monotonic() - saved > a.save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        self.note(watch, scores)

    # ------------------------------------------------------------------ state
    def save(self) -> None:
        """The optimiser's state is kept in bfloat16: half the size, and it is forgotten in seconds."""
        opt = self.opt.state()
        for k in ("m", "v"):
            opt[k] = {n: x.bfloat16() for n, x in opt[k].items()}
        torch.save({"net": self.net.state_dict(), "opt": opt, "config": self.cfg, "weight": self.weight.clone(),
                    **{k: getattr(self, k) for k in ("step", "spent", "tokens", "pictures", "starts", "count")}},
                   self.out / "last.tmp")
        os.replace(self.out / "last.tmp", self.last)

    def resume(self, c: dict[str, Any]) -> None:
        self.net.load_state_dict(c["net"])
        self.opt.load(c["opt"])
        self.weight.copy_(c["weight"])
        for k in ("step", "spent", "tokens", "pictures", "starts", "count"):
            setattr(self, k, c[k])


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="run")
    p.add_argument("--minutes", type=float, default=20, help="of training, counted from nothing over all restarts")
    p.add_argument("--steps", type=int, default=0, help="stop after this many steps (0: only the clock stops it)")
    begin = p.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on with the run in --out")
    begin.add_argument("--from", dest="start", type=Path, metavar="DIR", help="begin with these weights (and their sizes)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile of the layers")
    p.add_argument("--tokens", type=int, default=0, help="per batch; 0: 40000 on CUDA, 3000 on CPU")
    p.add_argument("--accumulate", type=int, default=2, help="batches (of different kinds) per step")
    p.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that draw and write")
    p.add_argument("--peak", type=float, default=0.6, help="rate of the joint phase, relative to the tower phase")
    p.add_argument("--tower", type=float, default=0.5, help="the tower's rate in the joint phase, relative to that")
    p.add_argument("--decay", type=float, default=0.5, help="last share of the joint phase, rate falling to 0")
    p.add_argument("--warmup", type=int, default=50)
    p.add_argument("--vision-part", type=float, help="share of the time for the tower alone (default: 0.06, none after --from)")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--inner", type=int, default=768)
    p.add_argument("--vision-layers", type=int, default=5)
    p.add_argument("--vision", type=int, default=192)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--show", type=int, default=50, help="steps between progress lines")
    p.add_argument("--score-every", type=float, default=0, help="seconds; 0: 60 on CUDA, 1200 on CPU")
    p.add_argument("--save-every", type=float, default=120, help="seconds")
    p.add_argument("--watch-scale", type=float, default=0, help="size of the periodic held-out scores; 0: 1 on CUDA, 0.2 on CPU")
    a = p.parse_args()
    cuda = torch.device(a.device).type == "cuda"
    a.tokens = a.tokens or (40_000 if cuda else 3_000)
    a.score_every = a.score_every or (60 if cuda else 1200)
    a.watch_scale = a.watch_scale or (1.0 if cuda else 0.2)
    if a.vision_part is None:
        a.vision_part = 0.0 if a.start else 0.06
    return a


def main() -> None:
    a = arguments()
    random.seed(a.seed)
    if a.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - a.workers))
    torch.backends.cuda.matmul.allow_tf32 = True
    t = Trainer(a)
    (t.out / "train.pid").write_text(str(os.getpid()))
    (t.out / "config.json").write_text(json.dumps(t.cfg, indent=2))
    t.run()


if __name__ == "__main__":
    main()
