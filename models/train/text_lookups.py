"""Lookups on a language model's text, without llama.cpp: python text_lookups.py MODEL.gguf TOKENS --prompt N [--device cuda]

What `hae eval --text ... --attend-text SHARE` measures, in PyTorch: windows of a text, each with a prompt whose
rows attend to everything and a part behind it, teacher-forced, each row of which attends in every layer to the cells that the
layer itself chooses.  Always attended to are the first 4 positions, the last 16, the row itself and the last 64
of the prompt; of the others, SHARE of them, those with the largest attention, softmax over all cells in view, mean over
heads (src/attend.rs).  Keys and values are rounded to F16, as a cache holds them; everything else is F32.

MODEL has the architecture llama and weights that are not quantized.  TOKENS is what `hae eval --text FILE --chunks N
--kl-divergence-base TOKENS` writes: its token ids are read, its predictions are not.
"""
from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from gguf import GGUFReader
from torch import Tensor

SINKS, RECENT, QUESTION = 4, 16, 64


def tokens_of(path: Path) -> Tensor:
    """The ids that llama-perplexity's file holds: magic, n_ctx, n_vocab, n_chunk, then n_ctx * n_chunk ids."""
    with path.open("rb") as file:
        if file.read(8) != b"_logits_":
            raise SystemExit(f"{path}: not a file of llama-perplexity's")
        n_ctx, _, n_chunk = struct.unpack("<iii", file.read(12))
        ids = struct.unpack(f"<{n_ctx * n_chunk}i", file.read(4 * n_ctx * n_chunk))
    return torch.tensor(ids)


class Llama:
    """A model of the architecture llama, in F32."""

    def __init__(self, path: Path, device: str) -> None:
        reader = GGUFReader(path)
        field = lambda name: reader.fields[f"llama.{name}"].contents()
        self.layers = field("block_count")
        self.heads, self.kv_heads = field("attention.head_count"), field("attention.head_count_kv")
        self.eps, self.base = field("attention.layer_norm_rms_epsilon"), field("rope.freq_base")
        self.w = {t.name: torch.from_numpy(t.data.copy()).to(device).float() for t in reader.tensors}
        self.head_dim = self.w["token_embd.weight"].shape[1] // self.heads

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.w[name]

    def rope(self, x: Tensor) -> Tensor:
        """[heads, rows, head_dim], neighbouring pairs turned: GGUFs of this architecture hold Q and K permuted so."""
        n, d = x.shape[1], self.head_dim
        freq = self.base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
        angle = torch.arange(n, device=x.device, dtype=torch.float64)[:, None] * freq
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def predict(self, ids: Tensor, prompt: int, share: float | None) -> tuple[Tensor, float]:
        """Log-probabilities [rows, vocab] of the ids behind the prompt, and the share of cells that was attended to."""
        n = len(ids)
        x = self.w["token_embd.weight"][ids]
        row = torch.arange(prompt, n, device=x.device)[:, None]
        col = torch.arange(n, device=x.device)[None]
        view = col <= row
        always = (col < SINKS) | (col >= row - RECENT) | ((col >= prompt - QUESTION) & (col < prompt))
        choice = view & ~always
        kept = []
        for i in range(self.layers):
            w = lambda name: self.w[f"blk.{i}.{name}.weight"]  # noqa: B023
            h = self.norm(x, f"blk.{i}.attn_norm.weight")
            heads = lambda name, of: (h @ w(name).T).view(n, of, self.head_dim).transpose(0, 1)  # noqa: B023
            q, k, v = self.rope(heads("attn_q", self.heads)), self.rope(heads("attn_k", self.kv_heads)), heads("attn_v", self.kv_heads)
            k, v = (t.half().float().repeat_interleave(self.heads // self.kv_heads, 0) for t in (k, v))
            y = torch.empty_like(q)
            y[:, :prompt] = F.scaled_dot_product_attention(q[None, :, :prompt], k[None, :, :prompt], v[None, :, :prompt], is_causal=True)[0]
            s = (q[:, prompt:] @ k.transpose(1, 2)) / math.sqrt(self.head_dim)
            s = s.masked_fill(~view, float("-inf"))
            if share is not None:
                score = s.softmax(-1).mean(0).masked_fill(~choice, -1.0)
                order = score.argsort(-1, descending=True).argsort(-1)
                wanted = (choice.sum(-1).double() * share).round()[:, None]
                keep = (always & view) | (choice & (order < wanted))
                kept.append((keep.sum(-1) / view.sum(-1)).mean().item())
                s = s.masked_fill(~keep, float("-inf"))
            y[:, prompt:] = s.softmax(-1) @ v
            x = x + y.transpose(0, 1).reshape(n, -1) @ w("attn_output").T
            h = self.norm(x, f"blk.{i}.ffn_norm.weight")
            x = x + (F.silu(h @ w("ffn_gate").T) * (h @ w("ffn_up").T)) @ w("ffn_down").T
        out = self.w.get("output.weight", self.w["token_embd.weight"])
        logits = self.norm(x[prompt - 1 : n - 1], "output_norm.weight") @ out.T
        return logits.log_softmax(-1), sum(kept) / len(kept) if kept else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--predict", type=int, default=256)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--shares", default="0.1,0.17,0.25")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = Llama(args.model, args.device)
    ids = tokens_of(args.tokens).to(args.device)
    size = args.prompt + args.predict
    windows = [ids[i * size : (i + 1) * size] for i in range(min(args.limit, len(ids) // size))]
    full = [model.predict(window, args.prompt, None)[0] for window in windows]
    nll = [-f.gather(1, w[args.prompt :, None]).mean().item() for f, w in zip(full, windows)]
    print(json.dumps({"share": None, "perplexity": math.exp(sum(nll) / len(nll))}))
    for share in map(float, args.shares.split(",")):
        rows = []
        for window, f in zip(windows, full):
            own, attended = model.predict(window, args.prompt, share)
            kl = (f.exp() * (f - own)).sum(-1).mean().item()
            same = (own.argmax(-1) == f.argmax(-1)).float().mean().item()
            rows.append((kl, same, attended))
        kl, same, attended = (sum(x) / len(rows) for x in zip(*rows))
        row = {"share": share, "attended": attended, "kl": kl, "same_first_choice": same, "kl_of_windows": [r[0] for r in rows]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
