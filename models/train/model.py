"""Phi-3.5-vision architecture (phi3_v), written small: CLIP tower + HD merge + Phi-3 decoder.

Module and parameter names reproduce the Hugging Face checkpoint, so ``state_dict()`` is the
checkpoint.  Nothing here depends on the sizes: they all come from ``config.json``.

Training answers many questions behind one picture.  A *pack* is a head (the picture) followed by
questions of equal length, each of which sees the head and itself, at the positions it would have
alone.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packed import Pack, packed, plain

Cache = list[tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


# ----------------------------------------------------------------------------- vision tower
class ClipEmbeddings(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, p = c["hidden_size"], c["patch_size"]
        self.side, self.patch = c["image_size"] // p, p
        self.class_embedding = nn.Parameter(torch.randn(d) * 0.02)
        self.patch_embedding = nn.Conv2d(3, d, p, p, bias=False)
        self.position_embedding = nn.Embedding(self.side**2 + 1, d)

    def forward(self, px: Tensor) -> Tensor:
        n, s, p = px.shape[0], self.side, self.patch
        patches = px.view(n, 3, s, p, s, p).permute(0, 2, 4, 1, 3, 5).reshape(n, s * s, 3 * p * p)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))  # = the convolution
        cls = self.class_embedding.to(x.dtype).expand(n, 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight


class ClipAttention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.v_proj, self.out_proj = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).reshape(n, t, d))


class ClipMLP(nn.Module):
    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class ClipLayer(nn.Module):
    def __init__(self, d: int, heads: int, inner: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attn, self.mlp = ClipAttention(d, heads), ClipMLP(d, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipVisionTransformer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d = c["hidden_size"]
        self.embeddings = ClipEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(d)  # the spelling of the original
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(
            ClipLayer(d, c["num_attention_heads"], c["intermediate_size"])
            for _ in range(c["num_hidden_layers"]))
        self.post_layernorm = nn.LayerNorm(d)  # in the checkpoint, unused by layer_idx -2
        self.run_layers = c["num_hidden_layers"] + 1 + c["layer_idx"]

    def forward(self, px: Tensor) -> Tensor:
        """[n, 3, s, s] -> hidden state ``layer_idx``, class token dropped: [n, patches, d]."""
        x = self.pre_layrnorm(self.embeddings(px))
        for layer in self.encoder.layers[: self.run_layers]:
            x = layer(x)
        return x[:, 1:]


class VisionEmbedding(nn.Module):
    """HD transform "sub_glb": crops, row separators, one global separator, projection."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        c = cfg["img_processor"]
        d, h = c["image_dim_out"] * 4, cfg["hidden_size"]
        self.crop = c["image_size"]
        self.img_processor: Any = nn.Module()
        self.img_processor.vision_model = ClipVisionTransformer(c)
        self.glb_GN = nn.Parameter(torch.randn(1, 1, d) * 0.1)
        self.sub_GN = nn.Parameter(torch.randn(1, 1, 1, d) * 0.1)
        self.img_projection = nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, h))

    @staticmethod
    def merge(x: Tensor, rows: int, cols: int) -> Tensor:
        """[n*rows*cols, s*s, d] -> [n, rows*s/2, cols*s/2, 4d]: 2x2 patches side by side."""
        s, d = math.isqrt(x.shape[1]), x.shape[2]
        x = x.view(-1, rows, cols, s // 2, 2, s // 2, 2, d)
        return x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(-1, rows * s // 2, cols * s // 2, 4 * d)

    def newline(self, x: Tensor) -> Tensor:
        n, r, _, d = x.shape
        return torch.cat([x, self.sub_GN.to(x.dtype).expand(n, r, 1, d)], 2).flatten(1, 2)

    def forward(self, px: Tensor, rows: int, cols: int) -> Tensor:
        """px [n, 1 + rows*cols, 3, s, s] (global view first) -> [n, tokens, hidden]."""
        n = px.shape[0]
        f = self.img_processor.vision_model(px.flatten(0, 1))
        f = f.view(n, -1, *f.shape[1:])[:, : 1 + rows * cols]
        sub = self.newline(self.merge(f[:, 1:].flatten(0, 1), rows, cols))
        glb = self.newline(self.merge(f[:, 0], 1, 1))
        return self.img_projection(torch.cat([sub, self.glb_GN.to(f.dtype).expand(n, 1, -1), glb], 1))


# ----------------------------------------------------------------------------- decoder
class LongRope(nn.Module):
    """Phi-3 "su"/longrope: divided frequencies, and cos/sin multiplied by one constant."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        d = cfg["hidden_size"] // cfg["num_attention_heads"]
        self.orig = cfg["original_max_position_embeddings"]
        scale = cfg["max_position_embeddings"] / self.orig
        self.mul = math.sqrt(1 + math.log(scale) / math.log(self.orig)) if scale > 1 else 1.0
        base = cfg["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
        for name in ("short", "long"):
            factor = torch.tensor(cfg["rope_scaling"][f"{name}_factor"], dtype=torch.float32)
            self.register_buffer(name, 1.0 / (factor * base), persistent=False)

    short: Tensor
    long: Tensor

    def forward(self, pos: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """pos [n or 1, t], all below ``longest`` -> cos, sin [n or 1, t, 1, head_dim]."""
        freq = self.long if longest > self.orig else self.short
        a = pos.float()[:, :, None, None] * freq
        a = torch.cat([a, a], -1)
        return a.cos() * self.mul, a.sin() * self.mul


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    flash = True  # packs through packed.packed instead of a mask

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
        d = cfg["hidden_size"]
        self.hd = d // self.heads
        self.qkv_proj = nn.Linear(d, (self.heads + 2 * self.kv) * self.hd, bias=False)
        self.o_proj = nn.Linear(self.heads * self.hd, d, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None = None,
                probs: list[Tensor] | None = None, pack: Pack | None = None
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n, t, _ = x.shape
        qkv = self.qkv_proj(x).view(n, t, self.heads + 2 * self.kv, self.hd)
        qk, v = qkv.split([self.heads + self.kv, self.kv], 2)
        qk = rotate(qk, rope[0].to(qk.dtype), rope[1].to(qk.dtype)).transpose(1, 2)
        q, k = qk.split([self.heads, self.kv], 1)
        v = v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if probs is not None:  # slow path that shows the attention weights
            s = q @ k.transpose(-1, -2) / math.sqrt(self.hd)
            m = torch.ones(t, k.shape[2], dtype=torch.bool, device=x.device).triu(k.shape[2] - t + 1)
            p = s.masked_fill(m, float("-inf")).softmax(-1)
            probs.append(p)
            y = p @ v
        elif pack is not None:
            y = packed(q, k, v, pack[0], pack[1])[0] if self.flash else plain(q, k, v, pack)
        elif past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # one new token sees everything
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(n, t, -1)), (k, v)


class MLP(nn.Module):
    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        d, eps = cfg["hidden_size"], cfg["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn, self.mlp = Attention(cfg), MLP(d, cfg["intermediate_size"])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None = None,
                probs: list[Tensor] | None = None, pack: Pack | None = None
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, kv = self.self_attn(self.input_layernorm(x), rope, past, probs, pack)
        x = x + a
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Phi3V(nn.Module):
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.cfg = cfg
        m: Any = nn.Module()
        m.embed_tokens = nn.Embedding(cfg["vocab_size"], cfg["hidden_size"])
        m.vision_embed_tokens = VisionEmbedding(cfg)
        m.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg["num_hidden_layers"]))
        m.norm = RMSNorm(cfg["hidden_size"], cfg["rms_norm_eps"])
        self.model: Any = m
        self.lm_head = nn.Linear(cfg["hidden_size"], cfg["vocab_size"], bias=False)
        self.rope = LongRope(cfg)
        self.reset()

    def reset(self) -> None:
        for name, p in self.named_parameters():
            if p.ndim >= 2 and not name.endswith("_GN"):
                fan_in = p[0].numel()
                std = 0.6 / math.sqrt(fan_in)
                if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                    std *= 0.3
                if "embed_tokens.weight" in name or "position_embedding" in name:
                    std = 0.3
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def images(self, px: Tensor, rows: int, cols: int) -> Tensor:
        return self.model.vision_embed_tokens(px, rows, cols)

    def embed(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        """ids [n, t]; negative ids are image placeholders, filled in order from image [*, h]."""
        x = self.model.embed_tokens(ids.clamp(min=0))
        if image is not None:
            x = x.masked_scatter((ids < 0).unsqueeze(-1), image.to(x.dtype))
        return x

    def embed_at(self, ids: Tensor, image: Tensor, at: Tensor) -> Tensor:
        """As ``embed`` when all rows have their images at the same places ``at``: image [n, len(at), h]."""
        x = self.model.embed_tokens(ids.clamp(min=0))
        return x.index_copy(1, at, image.to(x.dtype))

    def hidden(self, x: Tensor, past: Cache | None = None, probs: list[Tensor] | None = None,
               pack: Pack | None = None, states: list[Tensor] | None = None) -> tuple[Tensor, Cache]:
        """Embedded tokens -> normalised last hidden states and the KV cache.

        ``probs`` collects the attention weights of every layer, ``states`` what every layer puts out.
        """
        start = past[0][0].shape[2] if past else 0
        longest = pack[0] + pack[2] if pack else start + x.shape[1]
        rope, new = self.rope(self.positions(x.shape[1], start, pack, x.device), longest), []
        for i, layer in enumerate(self.model.layers):
            x, kv = layer(x, rope, past[i] if past else None, probs, pack)
            new.append(kv)
            if states is not None:
                states.append(x)
        return self.model.norm(x), new

    @staticmethod
    def positions(t: int, start: int, pack: Pack | None, device: torch.device) -> Tensor:
        """[1, t]: counting on, or, for a pack, every question right behind the head."""
        if pack is None:
            return torch.arange(start, start + t, device=device).unsqueeze(0)
        head, count, length = pack
        each = torch.arange(head, head + length, device=device).repeat(count)
        return torch.cat([torch.arange(head, device=device), each]).unsqueeze(0)

    @torch.no_grad()
    def greedy(self, x: Tensor, stop: set[int], limit: int) -> tuple[list[int], Tensor]:
        """Greedy continuation of embedded prompt x [1, t, h]; also the prefill's last logits."""
        h, past = self.hidden(x)
        logits = first = self.lm_head(h[:, -1]).float()
        out: list[int] = []
        while len(out) < limit:
            out.append(int(logits.argmax()))
            if out[-1] in stop:
                break
            h, past = self.hidden(self.model.embed_tokens(torch.tensor([[out[-1]]], device=x.device)), past)
            logits = self.lm_head(h[:, -1]).float()
        return out, first[0]


def default_config(layers: int = 8, hidden: int = 256, inner: int = 768, vision_layers: int = 5, vision: int = 192,
                   vocab: int = 1024) -> dict[str, Any]:
    """The model trained here.  Widths are multiples of 256 where k-quants need it, heads have 64 dimensions."""
    half = 32
    return {
        "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v",
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "intermediate_size": inner, "vocab_size": vocab,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
        "rope_scaling": {
            "type": "su",
            "short_factor": [round(1.0 + 0.1 * i / (half - 1), 4) for i in range(half)],
            "long_factor": [round(1.0 + 31.0 * (i / (half - 1)) ** 2, 4) for i in range(half)],
        },
        "sliding_window": 262144, "tie_word_embeddings": False, "attention_dropout": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": vocab - 64, "torch_dtype": "float16",
        "img_processor": {
            "image_dim_out": vision, "model_name": "small", "name": "clip_vision_model",
            "num_img_tokens": 36, "hidden_size": vision, "num_hidden_layers": vision_layers,
            "num_attention_heads": vision // 32, "intermediate_size": 4 * vision, "image_size": 168,
            "patch_size": 14, "layer_idx": -2, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "type_feature": "patch",
        },
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
    }
