"""Golden prompts with every intermediate a port needs to check itself: python goldens.py CHECKPOINT OUT

Float32 PyTorch on the fp16 weights of the checkpoint; see ``note`` in index.json.
"""
from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import asking
import stories
from draw import draw
from export import write_json
from preprocess import hd_image, preprocess
from pruning import scores
from runner import Asked, Runner
from scoring import turns_of
from sets import GOLDEN_SEED
from tokenizer import chat
from world import LAYOUTS, Scene, make_scene

NOTE = ("fp32 PyTorch on the fp16 weights; num_crops is what the image processor was given; in input_ids -k stands for a visual "
        "token of image k; logits are those of the last prompt position; attention is [heads, query, key] of layer 0 after "
        "softmax; scores are [layers, visual tokens]: attention to the visual tokens, mean over heads, summed over the text "
        "tokens behind the last image (text) or of the last prompt token alone (last); pixels are the normalised crops, global "
        "view first; greedy_ids include the stop token.")


@dataclass
class Case:
    name: str
    task: str
    scenes: list[Scene]
    prompt: str
    answer: str
    limit: int = 64


def find(task: str, layouts: list[str], seed: int, rng: random.Random, holds: str = "") -> tuple[list[Scene], asking.Ask]:
    """The first scenes (and question) that have a question of this task, containing ``holds``."""
    while True:
        scenes = [make_scene(seed + k, LAYOUTS[x]) for k, x in enumerate(layouts)]
        asks = asking.questions(scenes[0], rng) if len(scenes) == 1 else asking.multi_questions(scenes, rng)
        hit = next((q for q in asks if q.task == task and holds in q.question), None)
        if hit:
            return scenes, hit
        seed += 100


def cases(rng: random.Random) -> list[Case]:
    out: list[Case] = []

    def add(name: str, task: str, layouts: list[str], holds: str = "") -> None:
        scenes, q = find(task, layouts, GOLDEN_SEED + 10 * len(out), rng, holds)
        out.append(Case(name, task, scenes, chat(q.question, len(scenes)), q.answer))

    for i, task in enumerate(("color", "shape", "where", "glyph", "relation", "count", "exists", "corner", "whose", "cell")):
        add(f"qa{i}", task, ["4x4"])
    add("wide0", "where", ["6x4"])
    add("tall0", "cell", ["4x6"])
    add("padded0", "relation", ["6x5"])
    add("big0", "glyph", ["8x8"])
    add("two0", "multi_relation", ["4x4", "4x4"], "picture 2")
    add("three0", "multi_where", ["4x4"] * 3, "picture 3")
    scene = make_scene(GOLDEN_SEED + 500)
    out.append(Case("caption0", "caption", [scene], chat(asking.CAPTION_Q), asking.caption(scene), 128))
    scene = make_scene(GOLDEN_SEED + 510, low=5, high=5)
    casts = [stories.make_cast(scene, rng, 4)]
    out.append(Case("story0", "story", [scene], chat(stories.story_question(casts)), stories.story([scene], casts), 480))
    pair = [make_scene(GOLDEN_SEED + 520 + k) for k in (0, 1)]
    turns = [{"task": q.task, "question": q.question, "answer": q.answer} for q in asking.chat_turns(pair, rng, 5)]
    last = turns_of([{"id": "chat0", "prompt": chat(str(turns[0]["question"]), 2), "turns": turns}])[-1]
    out.append(Case("chat0", last["task"], pair, last["prompt"], last["answer"]))
    return out


@torch.no_grad()
def golden(run: Runner, case: Case, out: Path) -> dict[str, Any]:
    """The files and the index entry of one prompt."""
    crops = case.scenes[0].layout.num_crops
    paths = [out / f"{case.name}_{k}.png" for k in range(1, len(case.scenes) + 1)]
    for path, scene in zip(paths, case.scenes):
        draw(scene).save(path, optimize=True)
    ids, x = run.prompt(paths, crops, case.prompt)
    tokens, logits = run.model.greedy(x, run.stop, case.limit)
    entry: dict[str, Any] = {
        "id": case.name, "task": case.task, "images": [p.name for p in paths], "num_crops": crops, "prompt": case.prompt,
        "answer": case.answer, "input_ids": ids, "greedy_ids": tokens, "greedy_text": run.text(tokens),
        "image_spans": [{"image": k, "start": ids.index(-k), "length": ids.count(-k)} for k in range(1, len(paths) + 1)],
        "stopped": tokens[-1] in run.stop, "logits": f"{case.name}_logits.npz",
        "top5": [[int(i), round(float(logits[i]), 5)] for i in logits.topk(5).indices]}

    def save(kind: str, **arrays: Any) -> None:
        entry[kind] = f"{case.name}_{kind}.npz"
        np.savez_compressed(out / entry[kind], **arrays)

    save("logits", logits=logits.numpy())
    if case.name in ("qa0", "tall0", "padded0", "big0", "two0", "story0"):
        save("embeddings", **{f"image_{k}": run.image(p, crops).numpy() for k, p in enumerate(paths, 1)})
    if case.name in ("qa0", "two0", "big0"):
        at = torch.tensor([i for i, v in enumerate(ids) if v < 0])
        size = torch.tensor([len(ids)])
        by_layer = scores(run, Asked([], torch.tensor([ids]), x, size, size, at))
        n = run.cfg["num_hidden_layers"]
        save("scores", **{k: torch.cat([by_layer[f"{k} {i}"] for i in range(n)]).numpy() for k in ("text", "last")})
    if case.name == "qa0":
        save("pixels", pixel_values=preprocess(Image.open(paths[0]), crops)[0][0].numpy())
        probs: list[Tensor] = []
        run.model.hidden(x, probs=probs)
        save("attention", layer_0=probs[0][0].numpy())
    if case.name in ("tall0", "padded0"):
        save("hd", hd=np.array(hd_image(Image.open(paths[0]), crops)))
    return entry


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    run = Runner(a.checkpoint)
    index = []
    for case in cases(random.Random(GOLDEN_SEED)):
        index.append(golden(run, case, a.out))
        print(case.name, index[-1]["greedy_text"] == case.answer, repr(index[-1]["greedy_text"][:60]))
    write_json(a.out / "index.json", {"note": NOTE, "image_token_id": run.tok.image, "stop_ids": sorted(run.stop),
                                      "prompts": index}, indent=None)


if __name__ == "__main__":
    main()
