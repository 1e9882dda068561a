"""Questions with exact answers about one picture or several, and chats of several turns."""
from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

from world import COLORS, GLYPHS, PLURAL, SHAPES, SIDES, Scene, Thing

SINGLE = ("color", "shape", "where", "size", "glyph", "whose", "relation", "cell", "corner", "count", "exists")
MULTI = tuple("multi_" + t for t in SINGLE) + ("multi_which", "multi_more")
TASKS = SINGLE + MULTI + ("caption", "follow")
CAPTION_Q = "List every object row by row."


@dataclass(frozen=True)
class Ask:
    """A question, its answer, and the cells one must see to answer it: (picture from 0, row, column)."""

    task: str
    question: str
    answer: str
    about: frozenset[tuple[int, int, int]]
    thing: Thing | None = None  # what "it" means afterwards


def cap(s: str) -> str:
    return s[0].upper() + s[1:]


def a(s: str) -> str:
    return ("an " if s[0] in "aeiou" else "a ") + s


def _cells(*things: Thing) -> frozenset[tuple[int, int, int]]:
    return frozenset((0, t.row, t.col) for t in things)


def _of_thing(scene: Scene, t: Thing, it: str, rng: random.Random) -> list[Ask]:
    """What can be asked about an object called ``it``."""
    out = [Ask("where", f"Where is {it}?", cap(t.place), _cells(t), t),
           Ask("size", f"Is {it} big or small?", cap(t.size), _cells(t), t)]
    if t.glyph or rng.random() < 0.35:
        out.append(Ask("glyph", f"Which character is on {it}?", t.glyph or "None", _cells(t), t))
    for side, step in SIDES.items():
        other, way = scene.toward(t, step)
        if other or rng.random() < 0.15:
            out.append(Ask("relation", f"What is {side} {it}?", cap(other.name) if other else "Nothing",
                           _cells(t) | {(0, r, c) for r, c in way}))
    return out


def questions(scene: Scene, rng: random.Random) -> list[Ask]:
    """Every kind of question about one picture, several of each kind, in random order."""
    ts = scene.things
    shapes, colors = Counter(t.shape for t in ts), Counter(t.color for t in ts)
    out: list[Ask] = []
    for t in ts:
        if shapes[t.shape] == 1:
            out.append(Ask("color", f"What color is the {t.shape}?", cap(t.color), _cells(t), t))
        if colors[t.color] == 1:
            out.append(Ask("shape", f"What shape is the {t.color} object?", cap(t.shape), _cells(t), t))
        if t.glyph:
            out.append(Ask("whose", f"What has the character {t.glyph}?", cap(t.name), _cells(t), t))
        out.append(Ask("cell", f"What is in {t.place}?", cap(t.name), _cells(t), t))
        out += _of_thing(scene, t, f"the {t.name}", rng)
    for _ in range(2):
        r, c = rng.randrange(scene.layout.rows), rng.randrange(scene.layout.cols)
        if not scene.at(r, c):
            out.append(Ask("cell", f"What is in row {r + 1}, column {c + 1}?", "Nothing", frozenset({(0, r, c)})))
    g = rng.choice(GLYPHS)
    if g not in [t.glyph for t in ts]:
        out.append(Ask("whose", f"What has the character {g}?", "Nothing", frozenset()))
    out += _counts(scene, rng) + _exists(scene, rng)
    for corner, cell in scene.layout.corners.items():
        hit = scene.at(*cell)
        if hit or rng.random() < 0.3:
            out.append(Ask("corner", f"What is in the {corner} corner?", cap(hit.name) if hit else "Nothing",
                           frozenset({(0, *cell)}), hit))
    rng.shuffle(out)
    return out


def _counts(scene: Scene, rng: random.Random) -> list[Ask]:
    ts = scene.things
    out = []
    for s in {*rng.sample(SHAPES, 2), rng.choice(ts).shape, Counter(t.shape for t in ts).most_common(1)[0][0]}:
        hits = [t for t in ts if t.shape == s]
        out.append(Ask("count", f"How many {PLURAL[s]} are there?", str(len(hits)), _cells(*hits)))
    for c in {rng.choice(list(COLORS)), rng.choice(ts).color, Counter(t.color for t in ts).most_common(1)[0][0]}:
        hits = [t for t in ts if t.color == c]
        out.append(Ask("count", f"How many {c} objects are there?", str(len(hits)), _cells(*hits)))
    r = rng.randrange(scene.layout.rows)
    row = [t for t in ts if t.row == r]
    out.append(Ask("count", f"How many objects are in row {r + 1}?", str(len(row)),
                   frozenset((0, r, c) for c in range(scene.layout.cols))))
    if len(ts) <= 8:
        out.append(Ask("count", "How many objects are there?", str(len(ts)), _cells(*ts)))
    return out


def _exists(scene: Scene, rng: random.Random) -> list[Ask]:
    ts = scene.things
    here = {(t.color, t.shape) for t in ts}
    out = []
    for t in rng.sample(ts, min(2, len(ts))):
        out.append(Ask("exists", f"Is there {a(t.name)}?", "Yes", _cells(t), t))
        colors, forms = [o.color for o in ts], [o.shape for o in ts]
        trick = rng.choice([(rng.choice(list(COLORS)), t.shape), (t.color, rng.choice(SHAPES)),
                            (rng.choice(colors), rng.choice(forms))])
        if trick not in here:
            near = [o for o in ts if o.color == trick[0] or o.shape == trick[1]]
            out.append(Ask("exists", f"Is there {a(trick[0])} {trick[1]}?", "No", _cells(*near)))
    return out


def in_picture(ask: Ask, k: int) -> Ask:
    """The same question asked about picture k (from 0) of several."""
    return replace(ask, task="multi_" + ask.task, question=f"In picture {k + 1}: {ask.question}",
                   about=frozenset((k, r, c) for _, r, c in ask.about))


def multi_questions(scenes: list[Scene], rng: random.Random) -> list[Ask]:
    """Questions that name the picture they are about, and questions which picture it is."""
    out = [in_picture(x, k) for k, s in enumerate(scenes) for x in questions(s, rng)]
    names = Counter(t.name for s in scenes for t in s.things)
    glyphs = Counter(t.glyph for s in scenes for t in s.things)
    for k, s in enumerate(scenes):
        for t in s.things:
            spot = frozenset({(k, t.row, t.col)})
            if names[t.name] == 1:
                out.append(Ask("multi_which", f"Which picture has {a(t.name)}?", f"Picture {k + 1}", spot))
            if t.glyph and glyphs[t.glyph] == 1:
                out.append(Ask("multi_which", f"Which picture has the character {t.glyph}?", f"Picture {k + 1}", spot))
    for word, field in [(PLURAL[x], x) for x in SHAPES] + [(f"{x} objects", x) for x in COLORS]:
        hits = [[t for t in s.things if field in (t.shape, t.color)] for s in scenes]
        best = sorted(map(len, hits), reverse=True)
        if best[0] > best[1]:
            out.append(Ask("multi_more", f"Which picture has more {word}?",
                           f"Picture {max(range(len(hits)), key=lambda k: len(hits[k])) + 1}",
                           frozenset((k, t.row, t.col) for k, ts in enumerate(hits) for t in ts)))
    rng.shuffle(out)
    return out


def caption(scene: Scene) -> str:
    rows = []
    for r in range(scene.layout.rows):
        items = [f"{t.size} {t.name}" + (f" with character {t.glyph}" if t.glyph else "")
                 + f" in column {t.col + 1}" for t in scene.things if t.row == r]
        rows.append(f"Row {r + 1}: " + (", ".join(items) if items else "empty") + ".")
    return " ".join(rows)


def ask_caption(scene: Scene) -> Ask:
    return Ask("caption", CAPTION_Q, caption(scene), _cells(*scene.things))


def pick(asks: list[Ask], n: int, rng: random.Random, weight: dict[str, float] | None = None) -> list[Ask]:
    """n questions; tasks are drawn by weight (default: all alike), questions of a task in order."""
    by: dict[str, list[Ask]] = {}
    for q in asks:
        by.setdefault(q.task, []).append(q)
    out: list[Ask] = []
    while by and len(out) < n:
        tasks = list(by)
        task = rng.choices(tasks, [1.0 if weight is None else weight[t] for t in tasks])[0]
        out.append(by[task].pop())
        if not by[task]:
            del by[task]
    return out


def chat_turns(scenes: list[Scene], rng: random.Random, n: int, weight: dict[str, float] | None = None) -> list[Ask]:
    """n turns; about a third ask on with "it" (task ``follow``), which only the turns before explain."""
    asks = questions(scenes[0], rng) if len(scenes) == 1 else multi_questions(scenes, rng)
    out: list[Ask] = []
    for q in pick(asks, n, rng, weight):
        if len(out) >= n:
            break
        out.append(q)
        if q.thing is None or rng.random() < 0.4:
            continue
        k = next(iter(q.about))[0]
        more = [x for x in _of_thing(scenes[k], q.thing, "it", rng) if x.answer != q.answer and
                x.task not in (q.task, "multi_" + q.task)]
        for x in rng.sample(more, min(len(more), rng.choice((1, 1, 2)))):
            out.append(replace(x, task="follow", about=frozenset((k, r, c) for _, r, c in x.about)))
            if x.thing is None:  # after "what is left of it" the next "it" would be unclear
                break
    return out[:n]
