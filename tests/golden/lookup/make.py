"""What lookups have to equal: every layer attends to the cells that its own query asks for, in numpy.

    python make.py CHECKPOINT GOLDEN OUT

Arguments and needs are those of ../masked/make.py, whose decoder this extends: the prompt sees everything, and each
token behind it, in each layer, only what may not be left out and the best of each kind by that layer's attention,
averaged over heads. The weights of what is left are a softmax of their own. Everything runs in float64.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "masked"))
from make import Decoder, prompt_rows  # noqa: E402

SEED = 20261128
ALWAYS, VISION, TEXT = 0, 1, 2


class Looking(Decoder):
    """`kinds` by position and `counts` by kind hold for rows that are fed one by one."""

    kinds, counts, first_layer = None, None, 0

    def layer(self, layer, x, positions, seen):
        if self.kinds is None or layer < self.first_layer:
            if self.kinds is not None:
                self.gaps.append(1.0)
                self.sets.append(seen[0].copy())
            return super().layer(layer, x, positions, seen)
        # Everything as ever, on copies, for the weights alone.
        keys, values = self.keys[layer], self.values[layer]
        _, weights = super().layer(layer, x, positions, seen)
        self.keys[layer], self.values[layer] = keys, values
        kinds = self.kinds[self.positions]
        chosen = seen[0] & (kinds == ALWAYS)
        gap = 1.0
        for kind, count in self.counts.items():
            group = np.flatnonzero(seen[0] & (kinds == kind))
            order = group[np.argsort(-weights[0, group], kind="stable")]
            chosen[order[:count]] = True
            if 0 < count < len(order):
                best, next_best = weights[0, order[count - 1]], weights[0, order[count]]
                gap = min(gap, (best - next_best) / best)
        self.gaps.append(gap)
        self.sets.append(chosen)
        return super().layer(layer, x, positions, chosen[None])


def main():
    checkpoint, golden, out = map(Path, sys.argv[1:4])
    decoder = Looking(checkpoint)
    prompts = {p["id"]: p for p in json.loads((golden / "index.json").read_text())["prompts"]}
    rng = np.random.default_rng(SEED)
    arrays, scenarios = {}, []

    for name, steps in [("story0", 20), ("two0", 10)]:
        prompt = prompts[name]
        rows = prompt_rows(decoder, golden, prompt)
        ids = (prompt["greedy_ids"][:-1] + prompts["caption0"]["greedy_ids"])[:steps]
        n = len(rows)
        visual = np.array(prompt["input_ids"]) < 0
        text = np.concatenate([~visual, np.ones(steps, dtype=bool)])
        visual = np.concatenate([visual, np.zeros(steps, dtype=bool)])
        some_text = text & (rng.random(n + steps) < 0.7)
        some_text[:2] = False

        def run(kinds, counts, first_layer):
            """Logits [steps, vocab] and what each layer saw: [steps, layers, positions]."""
            decoder.clear()
            decoder.kinds = None
            decoder.forward(rows, np.arange(n))
            decoder.counts, decoder.first_layer, decoder.gaps = counts, first_layer, []
            logits, sets = [], np.zeros((steps, decoder.layers, n + steps), dtype=bool)
            for step, token in enumerate(ids):
                # What is fed is seen by itself.
                decoder.kinds = kinds.copy()
                decoder.kinds[n + step] = ALWAYS
                decoder.sets = []
                out, _ = decoder.forward(decoder.embed([token]), [n + step])
                logits.append(out)
                for layer, chosen in enumerate(decoder.sets):
                    sets[step, layer, : n + step + 1] = chosen
            return np.stack(logits), sets

        everything = np.where(visual, VISION, np.where(some_text, TEXT, ALWAYS))
        full, _ = run(np.zeros_like(everything), {}, 0)

        def scenario(title, kinds, counts, first_layer=0):
            # One that is too close to tell apart in float32 makes room for the next larger one.
            while True:
                logits, sets = run(kinds, counts, first_layer)
                gap = min(decoder.gaps, default=1)
                if gap > 1e-4:
                    break
                counts[VISION] += 1
            key = f"{name}_{title}"
            print(f"{key}: {counts}, {sets.mean():.3f} seen, smallest relative gap {gap:.1e}, "
                  f"logits move by up to {np.abs(logits - full).max():.2f}")
            arrays[key] = logits.astype(np.float32)
            arrays[key + "_gaps"] = np.array(decoder.gaps, dtype=np.float32).reshape(steps, -1)
            arrays[key + "_sets"] = sets.astype(np.float32)
            scenarios.append({
                "name": key, "prompt": name, "ids": [int(i) for i in ids], "kinds": kinds.tolist(),
                "n_vision": counts.get(VISION, 0), "n_text": counts.get(TEXT, 0), "first_layer": first_layer,
            })
            return logits

        scenario("pictures", np.where(visual, VISION, ALWAYS), {VISION: 9 if name == "story0" else 31})
        scenario("both", everything, {VISION: 14, TEXT: 5})
        scenario("none_of_one", everything, {VISION: 0, TEXT: 6})
        scenario("behind2", everything, {VISION: 13, TEXT: 4}, first_layer=2)
        same = scenario("more_than_there_are", everything, {VISION: n, TEXT: n})
        assert np.abs(same - full).max() < 1e-9

    np.savez_compressed(out / "lookup.npz", **arrays)
    note = (
        "logits[k] follow the feeding of ids[k] at position prompt length + k, which attends to itself; sets are "
        "[steps, layers, positions]: what each layer attended to; gaps [steps, layers]: how much less than the last "
        "chosen weight the next one is; kinds by position, 0 always, 1 and 2 chosen from"
    )
    (out / "lookup.json").write_text(json.dumps({"note": note, "scenarios": scenarios}) + "\n")
    print(f"{len(scenarios)} scenarios, {(out / 'lookup.npz').stat().st_size} bytes")


main()
