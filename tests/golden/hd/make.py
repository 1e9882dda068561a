"""Golden visual embeddings for pictures that are not square, from numpy and Pillow alone.

    python make.py CHECKPOINT [--check GOLDEN]

CHECKPOINT is a Phi-3.5-vision directory in Hugging Face form (config.json, preprocessor_config.json,
model.safetensors).  The script draws the pictures, runs the image processor, the CLIP tower, the HD
transform and the projection in float64, and writes one PNG and one NPZ a picture and index.json
beside itself.  It shares no code with the runtime under test.

--check GOLDEN compares this port with embeddings and pixels that PyTorch computed (a directory with
an index.json of prompts, see its `note`) and stops if they differ.
"""
from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Width and height: wide, tall, a strip, an ordinary photograph, a very tall strip.
SIZES = [(500, 200), (200, 500), (1000, 90), (640, 480), (37, 911)]


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float64 (the file holds F16, F32 or BF16)."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    out = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + o for o in info["data_offsets"])
        if info["dtype"] == "BF16":
            raw = np.frombuffer(data[start:end], "<u2").astype("<u4") << 16
            array = raw.view("<f4")
        else:
            array = np.frombuffer(data[start:end], {"F16": "<f2", "F32": "<f4"}[info["dtype"]])
        out[name] = array.reshape(info["shape"]).astype(np.float64)
    return out


# ------------------------------------------------------------------------------- image processor
def hd_image(img: Image.Image, num_crops: int, side: int) -> Image.Image:
    """The largest grid of at most num_crops crops, white above and below; tall pictures transposed."""
    img = img.convert("RGB")
    flip = img.width < img.height
    if flip:
        img = img.transpose(Image.Transpose.TRANSPOSE)
    ratio = img.width / img.height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    w = scale * side
    h = int(w / ratio)
    if (w, h) != img.size:
        img = img.resize((w, h), Image.Resampling.BILINEAR)
    full = math.ceil(h / side) * side
    page = Image.new("RGB", (w, full), (255, 255, 255))
    page.paste(img, (0, (full - h) // 2))
    return page.transpose(Image.Transpose.TRANSPOSE) if flip else page


def bicubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in] weights of torch's bicubic: a = -0.75, no antialiasing, align_corners = False."""
    a = -0.75
    m = np.zeros((n_out, n_in))
    for i in range(n_out):
        center = (i + 0.5) * n_in / n_out - 0.5
        first = math.floor(center)
        for k in range(-1, 3):
            x = abs(center - (first + k))
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            m[i, min(max(first + k, 0), n_in - 1)] += weight
    return m


def preprocess(img: Image.Image, pre: dict, side: int) -> tuple[np.ndarray, int, int]:
    """-> normalised crops [1 + rows*cols, 3, side, side] with the global view first, rows, cols."""
    page = np.asarray(hd_image(img, pre["num_crops"], side), np.float64).transpose(2, 0, 1) / 255
    x = (page - np.reshape(pre["image_mean"], (3, 1, 1))) / np.reshape(pre["image_std"], (3, 1, 1))
    _, h, w = x.shape
    rows, cols = h // side, w // side
    glb = bicubic_matrix(h, side) @ x @ bicubic_matrix(w, side).T
    sub = x.reshape(3, rows, side, cols, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    return np.concatenate([glb[None], sub]), rows, cols


# ---------------------------------------------------------------------------------------- model
ERF = np.vectorize(math.erf, otypes=[np.float64])


class VisionModel:
    """CLIP tower, HD transform in sub_glb order, projection; sizes from config.json."""

    def __init__(self, checkpoint: Path) -> None:
        self.cfg = json.loads((checkpoint / "config.json").read_text())
        self.pre = json.loads((checkpoint / "preprocessor_config.json").read_text())
        self.c = self.cfg["img_processor"]
        self.w = load_safetensors(checkpoint / "model.safetensors")
        self.tower_prefix = "model.vision_embed_tokens.img_processor.vision_model."

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        eps = self.c.get("layer_norm_eps", 1e-5)
        return (x - mean) / np.sqrt(var + eps) * self.w[name + ".weight"] + self.w[name + ".bias"]

    def tower(self, px: np.ndarray) -> np.ndarray:
        """[n, 3, s, s] -> hidden state `layer_idx` without the class token [n, patches, d]."""
        c, t = self.c, self.tower_prefix
        n, p, heads = len(px), c["patch_size"], c["num_attention_heads"]
        g = c["image_size"] // p
        patches = px.reshape(n, 3, g, p, g, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, g * g, -1)
        kernel = self.w[t + "embeddings.patch_embedding.weight"]
        x = patches @ kernel.reshape(len(kernel), -1).T
        cls = np.broadcast_to(self.w[t + "embeddings.class_embedding"], (n, 1, x.shape[-1]))
        x = np.concatenate([cls, x], 1) + self.w[t + "embeddings.position_embedding.weight"]
        x = self.norm(x, t + "pre_layrnorm")
        for i in range(c["num_hidden_layers"] + 1 + c["layer_idx"]):
            b = f"{t}encoder.layers.{i}."
            y = self.norm(x, b + "layer_norm1")
            q, k, v = (self.linear(y, f"{b}self_attn.{s}_proj").reshape(n, x.shape[1], heads, -1).transpose(0, 2, 1, 3)
                       for s in "qkv")
            score = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
            score = np.exp(score - score.max(-1, keepdims=True))
            y = (score / score.sum(-1, keepdims=True)) @ v
            x = x + self.linear(y.transpose(0, 2, 1, 3).reshape(x.shape), b + "self_attn.out_proj")
            y = self.linear(self.norm(x, b + "layer_norm2"), b + "mlp.fc1")
            x = x + self.linear(y / (1 + np.exp(-1.702 * y)), b + "mlp.fc2")
        return x[:, 1:]

    def merged(self, x: np.ndarray, rows: int, cols: int) -> np.ndarray:
        """[rows*cols, g*g, d] -> 2x2 patches side by side, a newline after every row [tokens, 4d]."""
        g, d = math.isqrt(x.shape[1]), x.shape[2]
        x = x.reshape(rows, cols, g // 2, 2, g // 2, 2, d).transpose(0, 2, 1, 4, 3, 5, 6)
        x = x.reshape(rows * g // 2, cols * g // 2, 4 * d)
        newline = np.broadcast_to(self.w["model.vision_embed_tokens.sub_GN"].reshape(1, 1, -1), (len(x), 1, 4 * d))
        return np.concatenate([x, newline], 1).reshape(-1, 4 * d)

    def embed(self, px: np.ndarray, rows: int, cols: int) -> np.ndarray:
        """-> [tokens, hidden]: crops, one separator, global view, all projected."""
        f, e = self.tower(px), "model.vision_embed_tokens."
        x = np.concatenate([self.merged(f[1:], rows, cols), self.w[e + "glb_GN"].reshape(1, -1), self.merged(f[:1], 1, 1)])
        x = self.linear(x, e + "img_projection.0")
        x = x * (1 + ERF(x / math.sqrt(2))) / 2
        return self.linear(x, e + "img_projection.2")

    def run(self, img: Image.Image) -> tuple[np.ndarray, np.ndarray, int, int]:
        px, rows, cols = preprocess(img, self.pre, self.c["image_size"])
        return px, self.embed(px, rows, cols), rows, cols


# ------------------------------------------------------------------------------------- pictures
def draw(width: int, height: int) -> Image.Image:
    """Shapes with hard edges, thin lines and two flat gradients: every resampling error shows."""
    img = Image.new("RGB", (width, height), (236, 228, 214))
    d = ImageDraw.Draw(img)
    for i in range(16):
        d.rectangle([width * i // 32, 0, width * (i + 1) // 32 - 1, height // 3], fill=(15 * i, 90, 240 - 13 * i))
        d.rectangle([width // 2, height * i // 16, width * 3 // 4, height * (i + 1) // 16 - 1], fill=(200, 14 * i, 60 + 9 * i))
    d.ellipse([width // 10, height // 4, width * 2 // 5, height * 9 // 10], fill=(214, 40, 40))
    d.polygon([(width * 4 // 5, height // 8), (width - 1, height * 3 // 5), (width * 7 // 10, height * 4 // 5)], fill=(32, 120, 60))
    for i in range(0, max(width, height), 11):
        d.line([(i, 0), (i // 2, height - 1)], fill=(20, 20, 30))
        d.line([(width - 1, i), (width * 2 // 3, i // 3)], fill=(250, 200, 0))
    return img


def check(model: VisionModel, golden: Path) -> None:
    for prompt in json.loads((golden / "index.json").read_text())["prompts"]:
        if "embeddings" not in prompt:
            continue
        runs = [model.run(Image.open(golden / name)) for name in prompt["images"]]
        got = np.concatenate([r[1] for r in runs])
        with np.load(golden / prompt["embeddings"]) as z:
            want = np.concatenate([z[k].reshape(-1, got.shape[1]) for k in sorted(z.files)])
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        line = f"{prompt['id']}: embeddings {error:.1e}"
        if error > 1e-5:
            raise SystemExit(f"{line}: this port differs from PyTorch")
        if "pixels" in prompt:
            with np.load(golden / prompt["pixels"]) as z:
                px = np.concatenate([z[k].reshape(-1, *runs[0][0].shape[1:]) for k in sorted(z.files)])
            error = np.abs(px - np.concatenate([r[0] for r in runs])).max()
            line += f", pixels {error:.1e}"
            if error > 1e-5:
                raise SystemExit(f"{line}: this port differs from PyTorch")
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--check", type=Path, metavar="GOLDEN")
    args = parser.parse_args()
    model, here = VisionModel(args.checkpoint), Path(__file__).parent
    if args.check:
        check(model, args.check)
    index = []
    for width, height in SIZES:
        name = f"{width}x{height}"
        draw(width, height).save(here / f"{name}.png", optimize=True)
        _, embeddings, rows, cols = model.run(Image.open(here / f"{name}.png"))
        np.savez_compressed(here / f"{name}.npz", embeddings=embeddings.astype(np.float32))
        index.append({"image": f"{name}.png", "embeddings": f"{name}.npz", "width": width, "height": height,
                      "rows": rows, "cols": cols, "tokens": len(embeddings)})
        print(f"{name}: {rows} x {cols} crops, {len(embeddings)} tokens")
    note = "projected visual embeddings [tokens, hidden], computed in float64 by make.py from the fp16 checkpoint"
    (here / "index.json").write_text(json.dumps({"note": note, "pictures": index}, indent=1) + "\n")


if __name__ == "__main__":
    main()
