"""Held-out question sets: python sets.py FOLDER --seed N [--scale X]

Writes images/, understanding.jsonl, chat.jsonl and story.jsonl.  A picture's ``num_crops`` is what
the image processor must be given; ``about`` lists the cells (picture, row, column; from 0) that
hold what is asked for.  Training draws seeds below 2**40; sets use seeds above.
"""
from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import asking
import stories
from asking import Ask
from draw import draw
from tokenizer import chat
from world import LAYOUTS, SMALL, Layout, Scene, make_scene

DEV_SEED, TEST_SEED, GOLDEN_SEED = 5_000_000_000_000, 6_000_000_000_000, 4_000_000_000_000
SINGLES = ["4x4"] * 5 + ["4x3", "3x4", "6x4", "4x6", "6x6", "6x5", "8x6", "8x8"]


class Writer:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.rng = folder, seed, random.Random(seed)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        self.used: Counter[str] = Counter()

    def scenes(self, layout: Layout, count: int, low: int = 0) -> list[Scene]:
        self.seed += count
        return [make_scene(self.seed - k, layout, low and max(low, layout.low)) for k in range(count)]

    def images(self, name: str, scenes: list[Scene]) -> dict[str, Any]:
        paths = []
        for k, s in enumerate(scenes):
            paths.append(f"images/{name}{'abc'[k] if len(scenes) > 1 else ''}.png")
            draw(s).save(self.folder / paths[-1], optimize=True)
        return {"images": paths, "num_crops": scenes[0].layout.num_crops, "layout": scenes[0].layout.name}

    def rarest(self, asks: list[Ask], n: int) -> list[Ask]:
        """n questions of different tasks, those asked least so far first."""
        first: dict[str, Ask] = {}
        for q in asks:
            first.setdefault(q.task, q)
        out = sorted(first.values(), key=lambda q: self.used[q.task])[:n]
        self.used.update(q.task for q in out)
        return out

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def understanding(w: Writer, singles: int, captions: int, multis: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(name: str, scenes: list[Scene], asks: list[Ask]) -> None:
        pics = w.images(name, scenes)
        for q in asks:
            rows.append({"id": f"u{len(rows):04d}", "task": q.task, **pics, "question": q.question,
                         "prompt": chat(q.question, len(scenes)), "answer": q.answer, "about": sorted(q.about)})

    for i in range(singles):
        scenes = w.scenes(LAYOUTS[SINGLES[i % len(SINGLES)]], 1)
        add(f"u{i:03d}", scenes, w.rarest(asking.questions(scenes[0], w.rng), 5)
            + ([asking.ask_caption(scenes[0])] if i < captions else []))
    for i in range(multis):
        many = 2 + i % 2
        scenes = w.scenes(LAYOUTS["6x4"] if i % 8 == 4 else SMALL, many)
        add(f"m{i:03d}", scenes, w.rarest(asking.multi_questions(scenes, w.rng), 6))
    return rows


def chats(w: Writer, count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        many = (1, 2, 3, 1)[i % 4]
        scenes = w.scenes(LAYOUTS["6x6"] if i % 8 == 3 else SMALL, many)
        turns = [{"task": q.task, "question": q.question, "answer": q.answer, "about": sorted(q.about)}
                 for q in asking.chat_turns(scenes, w.rng, 8)]
        rows.append({"id": f"c{i:03d}", **w.images(f"c{i:03d}", scenes), "turns": turns,
                     "prompt": chat(str(turns[0]["question"]), many)})
    return rows


def long_texts(w: Writer, single: int, sagas: int) -> list[dict[str, Any]]:
    """Stories about one picture (300 to 450 tokens) and about two or three (about 1,000 and more)."""
    rows = []
    for i in range(single + sagas):
        many = 1 if i < single else 2 + i % 2
        cast = (4, 5)[i % 2] if many == 1 else {2: 6, 3: 4}[many]
        scenes = w.scenes(LAYOUTS["6x4"] if many == 1 and i % 4 == 3 else SMALL, many, cast)
        casts: list[stories.Cast] = []
        for s in scenes:
            casts.append(stories.make_cast(s, w.rng, cast, {n for c in casts for n, _, _ in c}))
        text, question = stories.story(scenes, casts), stories.story_question(casts)
        facts = [{"name": n, "attribute": a, "value": v, "mentions": c}
                 for (n, a, v), c in Counter(stories.story_facts(text)).items()]
        rows.append({"id": f"s{i:03d}", "kind": "story" if many == 1 else "saga", **w.images(f"s{i:03d}", scenes),
                     "question": question, "prompt": chat(question, many), "facts": facts, "reference": text,
                     "cast": [{"name": n, "picture": k, "color": t.color, "shape": t.shape, "size": t.size,
                               "row": t.row + 1, "column": t.col + 1, "glyph": t.glyph}
                              for k, c in enumerate(casts, 1) for n, t, _ in c]})
    return rows


def make(folder: Path, seed: int, scale: float = 1.0) -> None:
    w = Writer(folder, seed)
    n = lambda x: max(1, round(x * scale))  # noqa: E731
    w.write("understanding.jsonl", understanding(w, n(65), n(20), n(52)))
    w.write("chat.jsonl", chats(w, n(16)))
    w.write("story.jsonl", long_texts(w, n(20), n(8)))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--seed", type=int, default=DEV_SEED)
    p.add_argument("--scale", type=float, default=1.0)
    a = p.parse_args()
    make(a.folder, a.seed, a.scale)
