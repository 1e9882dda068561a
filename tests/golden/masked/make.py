"""What eviction has to equal: the decoder of Phi-3.5-vision with positions masked, in numpy.

    python make.py CHECKPOINT GOLDEN OUT

CHECKPOINT is the Hugging Face directory of the tiny model, GOLDEN the folder with its golden
index.json, OUT the folder that gets masked.npz and masked.json. Needs numpy and safetensors.

Everything runs in float64 on the checkpoint's fp16 weights. The decoder is written from the
model's description (RMS norm, fused q/k/v and gate/up projections, rotary positions with the
"su" short factors, SwiGLU) and shares no code with the runtime. Visual tokens enter as the
golden embeddings, so that the vision tower does not matter here.

Nothing is ever removed: an evicted position keeps its key and value and its place, and is masked
for every later query. Each scenario feeds a fixed continuation token by token.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

SEED = 20260202


class Decoder:
    """Weights, and the keys and values of one sequence."""

    def __init__(self, checkpoint):
        config = json.loads((checkpoint / "config.json").read_text())
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        assert config["num_key_value_heads"] == self.heads
        self.hidden = config["hidden_size"]
        self.head_dim = self.hidden // self.heads
        self.eps = config["rms_norm_eps"]
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        # "su" multiplies cos and sin by this, for the short factors as well.
        self.rope_scale = np.sqrt(1 + np.log(stretch) / np.log(original))
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        factors = np.array(config["rope_scaling"]["short_factor"])
        self.inv_freq = 1.0 / (factors * config["rope_theta"] ** exponents)
        self.original = original

        with safe_open(str(checkpoint / "model.safetensors"), "np") as file:
            names = [n for n in file.keys() if "vision" not in n]
            self.w = {n: file.get_tensor(n).astype(np.float64) for n in names}
        self.clear()

    def clear(self):
        empty = np.zeros((0, self.heads, self.head_dim))
        self.keys = [empty] * self.layers
        self.values = [empty] * self.layers
        self.positions = np.zeros(0, dtype=np.int64)
        self.masked = set()

    def norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[weight]

    def rotate(self, x, positions):
        """x: [n, heads, head_dim]. Pairs are (i, i + head_dim / 2)."""
        angles = positions[:, None] * self.inv_freq
        angles = np.concatenate([angles, angles], axis=1)[:, None, :]
        half = self.head_dim // 2
        turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return (x * np.cos(angles) + turned * np.sin(angles)) * self.rope_scale

    def layer(self, layer, x, positions, seen):
        """One layer for x: [n, hidden]; seen: [n, positions so far]. Returns its result and the
        attention, mean over heads: [n, positions so far]."""
        p = f"model.layers.{layer}."
        h = self.norm(x, p + "input_layernorm.weight")
        qkv = h @ self.w[p + "self_attn.qkv_proj.weight"].T
        q, k, v = (a.reshape(-1, self.heads, self.head_dim) for a in np.split(qkv, 3, axis=1))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        self.keys[layer] = np.concatenate([self.keys[layer], k])
        self.values[layer] = np.concatenate([self.values[layer], v])
        scores = np.einsum("qhd,khd->hqk", q, self.keys[layer]) / np.sqrt(self.head_dim)
        scores = np.where(seen[None], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        weights = scores / scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, self.values[layer]).reshape(-1, self.hidden)
        x = x + mixed @ self.w[p + "self_attn.o_proj.weight"].T
        h = self.norm(x, p + "post_attention_layernorm.weight")
        gate, up = np.split(h @ self.w[p + "mlp.gate_up_proj.weight"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[p + "mlp.down_proj.weight"].T
        return x, weights.mean(0)

    def forward(self, x, positions, behind=0, holes=(), drop=False):
        """Appends x: [n, hidden] at the positions. Layers from `behind` on do not see the holes,
        which are masked there, or with `drop` (the first rows of a sequence only) are taken out.
        Returns the logits of the last row: [vocab], and the attention of all rows, mean over
        heads: [layers, n, positions so far] (without `drop`)."""
        positions = np.asarray(positions)
        assert positions.max() < self.original
        self.positions = np.concatenate([self.positions, positions])
        keep = ~np.isin(self.positions, holes)
        seen = self.positions[None, :] <= positions[:, None]
        seen &= ~np.isin(self.positions, sorted(self.masked))[None, :]
        assert seen.any(1).all(), "a row that sees nothing has no softmax"
        attention = []
        for layer in range(self.layers):
            if layer == behind and drop:
                x, positions, seen = x[keep], positions[keep], seen[keep][:, keep]
            elif layer == behind:
                seen = seen & keep[None, :]
            x, weights = self.layer(layer, x, positions, seen)
            attention.append(weights)
        if drop:
            self.positions = positions
            for layer in range(behind):
                self.keys[layer], self.values[layer] = self.keys[layer][keep], self.values[layer][keep]
        logits = self.norm(x[-1], "model.norm.weight") @ self.w["lm_head.weight"].T
        return logits, None if drop else np.stack(attention)

    def embed(self, ids):
        return self.w["model.embed_tokens.weight"][np.asarray(ids)]

    def drop(self, positions):
        """Really removes positions: only to check that masking is the same."""
        keep = ~np.isin(self.positions, positions)
        self.positions = self.positions[keep]
        self.keys = [k[keep] for k in self.keys]
        self.values = [v[keep] for v in self.values]


def prompt_rows(decoder, golden, prompt):
    """[positions, hidden], visual rows from the golden embeddings."""
    ids = np.array(prompt["input_ids"])
    rows = decoder.embed(np.maximum(ids, 0))
    arrays = np.load(golden / prompt["embeddings"])
    for span in prompt["image_spans"]:
        start, image = span["start"], arrays[f"image_{span['image']}"].astype(np.float64)
        assert (ids[start : start + span["length"]] == -span["image"]).all()
        rows[start : start + span["length"]] = image
    return rows


def eviction_sets(prompt, rng):
    ids = np.array(prompt["input_ids"])
    visual = np.flatnonzero(ids < 0)
    # Question text behind the pictures, without the last two tokens of the prompt.
    text = np.arange(visual[-1] + 1, len(ids) - 2)
    first = prompt["image_spans"][0]
    return {
        "thirds": visual[::3],
        "random60": rng.choice(visual, round(0.6 * len(visual)), replace=False),
        "block": np.arange(first["start"] + 40, first["start"] + 140),
        "text": text[1:-1:2],
        "scattered": np.concatenate(
            [rng.choice(visual, round(0.4 * len(visual)), replace=False), text[::3]]
        ),
    }


def run(decoder, rows, ids, evictions, holes=(), behind=0, drop=False):
    """Prefills, then feeds the ids. `evictions` maps a step to the positions that go before it.
    The first `behind` layers see the holes of the prompt, what is fed later never does.
    Returns the prefill's logits, logits [steps, vocab], and attention [steps, layers, positions]
    over the positions of the whole run (0 where masked or not yet there)."""
    decoder.clear()
    if behind:
        prefill, _ = decoder.forward(rows, np.arange(len(rows)), behind, holes, drop)
        if not drop:
            decoder.masked.update(int(p) for p in holes)
    else:
        keep = np.setdiff1d(np.arange(len(rows)), holes)
        prefill, _ = decoder.forward(rows[keep], keep)
    logits, attention = [], []
    for step, token in enumerate(ids):
        gone = evictions.get(step, [])
        if drop:
            decoder.drop(gone)
        else:
            decoder.masked.update(int(p) for p in gone)
        out, weights = decoder.forward(decoder.embed([token]), [len(rows) + step])
        logits.append(out)
        spread = np.zeros((decoder.layers, len(rows) + len(ids)))
        spread[:, decoder.positions] = weights[:, 0]
        attention.append(spread)
    return prefill, np.stack(logits), np.stack(attention)


def main():
    checkpoint, golden, out = map(Path, sys.argv[1:4])
    decoder = Decoder(checkpoint)
    prompts = {p["id"]: p for p in json.loads((golden / "index.json").read_text())["prompts"]}
    rng = np.random.default_rng(SEED)
    arrays, scenarios = {}, []

    # Answers of a word or two go on with a caption: what is fed is fixed, any text serves.
    caption = prompts["caption0"]["greedy_ids"]
    fed = {
        "story0": prompts["story0"]["greedy_ids"][:24],
        "qa0": (prompts["qa0"]["greedy_ids"][:-1] + caption)[:12],
        "two0": (prompts["two0"]["greedy_ids"][:-1] + caption)[:12],
    }
    for name, ids in fed.items():
        prompt = prompts[name]
        rows = prompt_rows(decoder, golden, prompt)
        n = len(rows)

        def scenario(title, evictions, holes=(), behind=0, attention=False):
            evictions = {s: np.unique(p) for s, p in evictions.items()}
            holes = np.unique(np.asarray(holes, dtype=np.int64))
            prefill, logits, weights = run(decoder, rows, ids, evictions, holes, behind)
            _, removed, _ = run(decoder, rows, ids, evictions, holes, behind, drop=True)
            assert np.abs(logits - removed).max() < 1e-9, "masking and removing differ"
            key = f"{name}_{title}"
            arrays[key] = logits.astype(np.float32)
            entry = {
                "name": key,
                "prompt": name,
                "ids": ids,
                "evictions": [{"step": s, "positions": p.tolist()} for s, p in evictions.items()],
                "holes": holes.tolist(),
                "behind": behind,
                "attention": attention,
            }
            if attention:
                arrays[key + "_attention"] = weights.astype(np.float32)
            if len(holes):
                arrays[key + "_prefill"] = prefill.astype(np.float32)
            scenarios.append(entry)
            return prefill, logits

        prefill, full = scenario("full", {})
        stored = np.load(golden / prompt["logits"])["logits"]
        difference = np.abs(prefill - stored).max()
        print(f"{name}: {n} positions, last logits differ from the golden ones by {difference:.2e}")
        assert difference < 1e-3
        own = prompt["greedy_ids"]
        for step in range(min(len(ids), len(own) - 1)):
            if ids[step] != own[step]:
                break
            assert full[step].argmax() == own[step + 1], (name, step)
        if "attention" in prompt:
            decoder.clear()
            _, weights = decoder.forward(rows, np.arange(n))
            stored = np.load(golden / prompt["attention"])["layer_0"].mean(0)
            difference = np.abs(weights[0] - stored).max()
            print(f"{name}: layer 0 attention differs from the golden one by {difference:.2e}")
            assert difference < 1e-4
        # Token by token, and the whole sequence at once, are the same computation.
        decoder.clear()
        last, _ = decoder.forward(np.concatenate([rows, decoder.embed(ids)]), np.arange(n + len(ids)))
        assert np.abs(last - full[-1]).max() < 1e-9

        sets = eviction_sets(prompt, rng)
        for title, positions in sets.items():
            _, logits = scenario(title, {0: positions}, attention=name == "story0" and title == "scattered")
            print(f"  {title}: {len(positions)} evicted, logits move by up to {np.abs(logits - full).max():.2f}")
        # More goes midway: visual tokens, and text that was decoded in between.
        left = np.setdiff1d(np.flatnonzero(np.array(prompt["input_ids"]) < 0), sets["thirds"])
        half = len(ids) // 2
        later = np.concatenate([rng.choice(left, len(left) // 2, replace=False), n + np.arange(1, half - 1, 2)])
        scenario("midway", {0: sets["thirds"], half: later})
        # The visual tokens are never prefilled; the others keep their positions.
        holes, _ = scenario("holes", {}, holes=sets["random60"])
        # The first layers see them, the others do not.
        for behind in (1, 3):
            some, _ = scenario(f"behind{behind}", {}, holes=sets["random60"], behind=behind)
            print(f"  behind layer {behind}: {np.abs(some - holes).max():.2f} from before the first")

    np.savez_compressed(out / "masked.npz", **arrays)
    note = (
        "logits[k] follow the feeding of ids[k] at position prompt length + k; an eviction happens before its "
        "step and holds for all later queries; holes are positions of the prompt that only its first `behind` "
        "layers see and that are never seen later (0: they were never prefilled), and _prefill are the logits of "
        "the prompt's last position then; attention is [steps, layers, positions], mean over heads, 0 where masked"
    )
    text = json.dumps({"note": note, "scenarios": scenarios})
    (out / "masked.json").write_text(text + "\n")
    print(f"{len(scenarios)} scenarios, {(out / 'masked.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
