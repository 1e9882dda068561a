"""A checkpoint directory, ready to be asked: one prompt at a time, or many in batches."""
from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from model import Phi3V, rotate
from preprocess import crops, hd_image
from scoring import Row
from tokenizer import Tok


@dataclass
class Asked:
    """Prompts with the same pictures' layout, right-padded, with their answers behind them."""

    rows: list[Row]
    ids: Tensor          # [n, t]; -k stands for a token of picture k
    x: Tensor            # [n, t, h] embedded
    prompt: Tensor       # [n] tokens of the prompt
    total: Tensor        # [n] tokens of prompt and answer
    visual: Tensor       # [v] columns of the visual tokens, the same in all rows


class Runner:
    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.cfg = json.loads((folder / "config.json").read_text())
        self.tok, self.dev = Tok(folder), torch.device(device)
        self.model = Phi3V(self.cfg).eval()
        self.model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        self.model.to(self.dev)
        self.stop = {self.tok.end, self.tok.endoftext}
        self._seen: dict[tuple[Path, int], Tensor] = {}

    # ------------------------------------------------------------------ one prompt
    @torch.no_grad()
    def image(self, path: Path, num_crops: int) -> Tensor:
        """Projected visual tokens [tokens, h]."""
        key = path, num_crops
        if key not in self._seen:
            hd = torch.from_numpy(np.array(hd_image(Image.open(path), num_crops))).unsqueeze(0)
            self._seen[key] = self.model.images(*crops(hd.to(self.dev)))[0]
        return self._seen[key]

    @torch.no_grad()
    def prompt(self, images: list[Path], num_crops: int, text: str) -> tuple[list[int], Tensor]:
        """Token ids (picture k = -k) and the embedded sequence [1, t, h]."""
        feats = [self.image(p, num_crops) for p in images]
        ids = self.tok.prompt(text, [len(f) for f in feats])
        return ids, self.model.embed(torch.tensor([ids], device=self.dev), torch.cat(feats))

    def ask(self, images: list[Path], num_crops: int, text: str, limit: int) -> tuple[list[int], str]:
        out, _ = self.model.greedy(self.prompt(images, num_crops, text)[1], self.stop, limit)
        return out, self.text(out)

    def text(self, ids: list[int]) -> str:
        return self.tok.decode([i for i in ids if i not in self.stop]).strip()

    # ------------------------------------------------------------------ many prompts
    @torch.no_grad()
    def batches(self, folder: Path, rows: list[Row], tokens: int, answers: bool) -> Iterator[Asked]:
        """Rows (``images``, ``num_crops``, ``prompt``, ``answer``) grouped by layout, about ``tokens`` a batch."""
        groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for r in rows:
            groups[r["layout"], len(r["images"])].append(r)
        for group in groups.values():
            coded = []
            for r in group:
                feats = [self.image(folder / p, r["num_crops"]) for p in r["images"]]
                ids = self.tok.prompt(r["prompt"], [len(f) for f in feats])
                tail = self.tok.t.encode(r["answer"] + "<|end|>", add_special_tokens=False).ids if answers else []
                coded.append((r, ids, tail, feats))
            coded.sort(key=lambda c: len(c[1]) + len(c[2]))
            size = max(1, tokens // max(len(c[1]) + len(c[2]) for c in coded))
            for i in range(0, len(coded), size):
                yield self._batch(coded[i:i + size])

    def _batch(self, coded: list[tuple[Row, list[int], list[int], list[Tensor]]]) -> Asked:
        width = max(len(p) + len(t) for _, p, t, _ in coded)
        ids = torch.tensor([p + t + [0] * (width - len(p) - len(t)) for _, p, t, _ in coded], device=self.dev)
        x = self.model.embed(ids, torch.cat([f for _, _, _, feats in coded for f in feats]))
        prompt = torch.tensor([len(p) for _, p, _, _ in coded], device=self.dev)
        total = torch.tensor([len(p) + len(t) for _, p, t, _ in coded], device=self.dev)
        return Asked([c[0] for c in coded], ids, x, prompt, total, (ids[0] < 0).nonzero().flatten())

    @torch.no_grad()
    def right(self, b: Asked, hidden: Callable[[Asked], Tensor]) -> list[bool]:
        """Whether greedy decoding would give exactly the answer.

        It would just if every token of the answer (with <|end|>) is the likeliest one behind those
        before it; so one pass over prompt and answer tells.  ``hidden`` gives the last hidden states [n, t, h].
        """
        h = hidden(b)
        best = self.model.lm_head(h[:, :-1]).argmax(-1)
        at = torch.arange(best.shape[1], device=self.dev)
        learned = (at >= b.prompt[:, None] - 1) & (at < b.total[:, None] - 1)
        return [bool(v) for v in ((best == b.ids[:, 1:]) | ~learned).all(1).tolist()]

    def full(self, b: Asked) -> Tensor:
        return self.model.hidden(b.x)[0]

    @torch.no_grad()
    def decode(self, b: Asked, limit: int) -> list[list[int]]:
        """Greedy continuations of prompts of different lengths (with the stop token, if it came)."""
        net, n, width = self.model, len(b.rows), b.x.shape[1]
        h, past = net.hidden(b.x)
        room = [[F.pad(z, (0, 0, 0, limit)) for z in kv] for kv in past]  # [n, heads, width + limit, d]
        rows, length = torch.arange(n, device=self.dev), b.prompt.clone()
        best = net.lm_head(h[rows, length - 1]).argmax(-1)
        out, open_ = [best], ~torch.isin(best, torch.tensor(sorted(self.stop), device=self.dev))
        keys = torch.arange(width + limit, device=self.dev)
        stop = torch.tensor(sorted(self.stop), device=self.dev)
        for step in range(1, limit):
            if step % 16 == 0 and not bool(open_.any()):
                break
            x, rope = net.model.embed_tokens(best)[:, None], net.rope(length[:, None], width + limit)
            sees = (keys <= length[:, None])[:, None, None]
            for layer, (k, v) in zip(net.model.layers, room):
                a = layer.self_attn
                qkv = a.qkv_proj(layer.input_layernorm(x)).view(n, 1, a.heads + 2 * a.kv, a.hd)
                qk = rotate(qkv[:, :, :a.heads + a.kv], *rope)
                k[rows, :, length], v[rows, :, length] = qk[:, 0, a.heads:], qkv[:, 0, a.heads + a.kv:]
                y = F.scaled_dot_product_attention(qk[:, :, :a.heads].transpose(1, 2), k, v, sees)
                x = x + a.o_proj(y.transpose(1, 2).reshape(n, 1, -1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            length = length + 1
            best = net.lm_head(net.model.norm(x[:, 0])).argmax(-1)
            out.append(best)
            open_ &= ~torch.isin(best, stop)
        result = []
        for ids in torch.stack(out, 1).tolist():
            end = next((i for i, x in enumerate(ids) if x in self.stop), len(ids) - 1)
            result.append(ids[:end + 1])
        return result
