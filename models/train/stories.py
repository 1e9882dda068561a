"""Long texts whose every sentence states facts that can be checked against the picture.

The question says who is who, each by one clue (colour and shape, place, or character); the story
must add everything else from the picture and keep it straight through six paragraphs.  Longer
stories have a chapter for each of two or three pictures and a last one about everybody.
"""
from __future__ import annotations

import random
import re

from world import COLORS, NAMES, SHAPES, Scene, Thing

Cast = list[tuple[str, Thing, int]]  # name, object, how the question introduces it
Fact = tuple[str, str, str]          # (name, attribute, value)


def make_cast(scene: Scene, rng: random.Random, n: int, taken: set[str] | None = None) -> Cast:
    """n of the objects, in reading order, with names that are not taken."""
    free = [x for x in NAMES if x not in (taken or set())]
    things = sorted(rng.sample(scene.things, min(n, len(scene.things))), key=lambda t: t.cell)
    return [(name, t, rng.choice((0, 0, 0, 1, 1, 2 if t.glyph else 0)))
            for name, t in zip(rng.sample(free, len(things)), things)]


def _who(cast: Cast) -> str:
    clue = (lambda t: f"is the {t.name}", lambda t: f"is in {t.place}", lambda t: f"has the character {t.glyph}")
    return ", ".join(f"{n} {clue[k](t)}" for n, t, k in cast)


def story_question(casts: list[Cast]) -> str:
    if len(casts) == 1:
        return f"Tell a long story. {_who(casts[0])}."
    return "Tell a very long story. " + " ".join(f"In picture {k}: {_who(c)}." for k, c in enumerate(casts, 1))


def _chapter(scene: Scene, cast: Cast) -> list[str]:
    """First who they are, then what only the picture tells, twice in other words and orders."""
    owner = {t: n for n, t, _ in cast}

    def sees(t: Thing, step: tuple[int, int], where: str) -> str:
        hit, _ = scene.toward(t, step)
        if hit is None:
            return f"nothing {where}"
        return (f"{owner[hit]} " if hit in owner else "") + f"the {hit.name} {where}"

    count = len(cast)
    return [
        f"Once there were {count} friends in a picture. " + " ".join(f"{n} was the {t.name}." for n, t, _ in cast),
        "In the morning they talked about their homes. " + " ".join(
            f"{n} the {t.shape} lived in {t.place}." for n, t, _ in reversed(cast)),
        "Then they looked at each other. " + " ".join(
            f"{n} was {t.size} and carried " + (f"the character {t.glyph}." if t.glyph else "no character.")
            for n, t, _ in cast),
        "At noon they looked around. " + " ".join(
            f"{n} saw {sees(t, (0, 1), 'on the right')} and {sees(t, (1, 0), 'below')}." for n, t, _ in cast),
        "At night they went home. " + " ".join(
            f"{n} the {t.color} one slept in {t.place}" + (f" under the character {t.glyph}." if t.glyph else ".")
            for n, t, _ in reversed(cast)),
        "In their dreams they met again. " + " ".join(
            f"{n} was still the {t.size} {t.name}." for n, t, _ in cast)]


def story(scenes: list[Scene], casts: list[Cast]) -> str:
    if len(casts) == 1:
        return "\n".join(_chapter(scenes[0], casts[0])) + " The end."
    parts = []
    for k, (scene, cast) in enumerate(zip(scenes, casts), 1):
        parts += [f"Chapter {k}."] + _chapter(scene, cast)
    parts.append(f"Chapter {len(casts) + 1}. One day everybody came together. " + " ".join(
        f"{n} the {t.size} {t.name} came from {t.place} of picture {k}."
        for k, cast in enumerate(casts, 1) for n, t, _ in cast))
    return "\n".join(parts) + " The end."


_THING = r"(?:" + "|".join(COLORS) + r") (?:" + "|".join(SHAPES) + r")"
_ATTR = {
    "color": re.compile(r"\b(" + "|".join(COLORS) + r")\b"),
    "shape": re.compile(r"\b(" + "|".join(SHAPES) + r")\b"),
    "size": re.compile(r"\b(big|small)\b"),
    "place": re.compile(r"\brow (\d+, column \d+)"),
    "glyph": re.compile(r"\b(?:character ([0-9A-Z])|(no) character)\b"),
    "picture": re.compile(r"\bof picture (\d+)"),
}
_SEES = re.compile(r"(?:\b([A-Z][a-z]+) )?(?:the (" + _THING + r")|(nothing)) (on the right|below)")


def story_facts(text: str) -> list[Fact]:
    """Every statement a story makes, one per mention.

    A sentence speaks about its first name; after "saw" it says what stands on which side, and of
    whom it is the colour and shape.
    """
    out: list[Fact] = []
    for sentence in re.split(r"[.\n]", text):
        found = next((m for m in re.finditer(r"\b[A-Z][a-z]+\b", sentence) if m.group() in NAMES), None)
        if not found:
            continue
        who, rest = found.group(), sentence[found.end():]
        if rest.startswith(" saw "):
            for m in _SEES.finditer(rest):
                out.append((who, "sees " + m[4], m[2] or m[3]))
                if m[1]:
                    out.append((m[1], "name", m[2] or m[3]))
            continue
        for attr, pattern in _ATTR.items():
            for m in pattern.finditer(rest):
                out.append((who, attr, next(g for g in m.groups() if g)))
    return out
