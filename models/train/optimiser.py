"""Muon for the matrices of the layers, AdamW for everything else.

Muon: Keller Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024).
Matrices of one shape are worked off together, so that a step is a few dozen launches.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MUON_LR, ADAM_LR, DECAY = 0.015, 0.002, 0.05


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices: [k, rows, cols]."""
    x = g.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, a, x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Muon:
    """``step`` takes a rate relative to MUON_LR and ADAM_LR, and a factor on it for the vision tower."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.mat: list[tuple[str, nn.Parameter]] = []
        self.rest: list[tuple[str, nn.Parameter]] = []
        for name, p in named:
            inner = ".layers." in name or "img_projection" in name
            (self.mat if inner and p.ndim == 2 else self.rest).append((name, p))
        self.m = {n: torch.zeros_like(p) for n, p in named}
        self.v = {n: torch.zeros_like(p) for n, p in self.rest}
        self.count = 0
        self.groups: dict[tuple[int, ...], list[tuple[str, nn.Parameter, int]]] = {}
        for name, p in self.mat:  # fused projections are several matrices
            parts = 3 if "qkv_proj" in name else 2 if "gate_up" in name else 1
            shape = (p.shape[0] // parts, p.shape[1])
            self.groups.setdefault(shape, []).append((name, p, parts))

    @staticmethod
    def _tower(name: str) -> bool:
        return "vision_embed" in name or name.startswith(("aux.", "place."))

    @torch.no_grad()
    def step(self, rate: float, vision: float) -> None:
        grad = {n: p.grad for n, p in self.mat + self.rest if p.grad is not None}
        grads = list(grad.values())
        total = torch.stack(torch._foreach_norm(grads)).norm()
        clip = (1.0 / (total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, clip)
        self.count += 1
        self._matrices(grad, rate * MUON_LR, vision)
        self._others(grad, rate * ADAM_LR, vision)

    def _matrices(self, grad: dict[str, Tensor], rate: float, vision: float) -> None:
        mine = [n for n, _ in self.mat if n in grad]
        torch._foreach_lerp_([self.m[n] for n in mine], [grad[n] for n in mine], 0.05)
        ahead = dict(zip(mine, torch._foreach_lerp([grad[n] for n in mine], [self.m[n] for n in mine], 0.95)))
        updates: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for (rows, cols), members in self.groups.items():
            here = [x for x in members if x[0] in grad]
            if not here:
                continue
            u = orthogonal(torch.cat([ahead[n].view(parts, rows, cols) for n, _, parts in here]))
            u = u * max(1.0, rows / cols) ** 0.5
            for (name, p, _), piece in zip(here, u.split([parts for _, _, parts in here])):
                lr = rate * (vision if self._tower(name) else 1.0)
                ps, us = updates.setdefault(lr, ([], []))
                ps.append(p.data)
                us.append(piece.reshape(p.shape))
        for lr, (ps, us) in updates.items():
            torch._foreach_mul_(ps, 1 - lr * DECAY)
            torch._foreach_add_(ps, us, alpha=-lr)

    def _others(self, grad: dict[str, Tensor], rate: float, vision: float) -> None:
        """Adam's moments with rates 0.1 and 0.02, no weight decay."""
        mine = [(n, p) for n, p in self.rest if n in grad]
        m, v, g = [self.m[n] for n, _ in mine], [self.v[n] for n, _ in mine], [grad[n] for n, _ in mine]
        torch._foreach_lerp_(m, g, 0.1)
        torch._foreach_lerp_(v, torch._foreach_mul(g, g), 0.02)
        scale = 1 / (1 - 0.9**self.count)
        root = torch._foreach_sqrt(torch._foreach_mul(v, 1 / (1 - 0.98**self.count)))
        torch._foreach_add_(root, 1e-8)
        update = torch._foreach_div(torch._foreach_mul(m, scale), root)
        rates = [-rate * (vision if self._tower(n) else 1.0) for n, _ in mine]
        torch._foreach_add_([p.data for _, p in mine], torch._foreach_mul(update, rates))

    def state(self) -> dict[str, Any]:
        return {"m": self.m, "v": self.v, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        for mine, theirs in ((self.m, state["m"]), (self.v, state["v"])):
            for n, x in theirs.items():
                mine[n].copy_(x)
        self.count = int(state["count"])
