"""The drawn world: what can be in a picture, and where (deterministic by seed).

A picture is a grid of 84-pixel cells on a pale page.  A cell is empty or holds one object with a
colour, a shape, a size and perhaps a character (digit or letter) on a small plate.  No two objects
of a picture share both colour and shape, so "the red star" means one of them; look-alikes that
share one of the two are common.
"""
from __future__ import annotations

import math
import random
from dataclasses import dataclass

CELL = 84          # pixels; three visual tokens of 28 pixels
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30), "green": (20, 150, 40), "blue": (25, 60, 220), "yellow": (245, 210, 20),
    "purple": (130, 30, 160), "orange": (250, 130, 10), "black": (20, 20, 20), "cyan": (20, 200, 220),
    "pink": (250, 130, 180), "brown": (125, 75, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
PLURAL = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
PAGES = ((255, 255, 255), (250, 248, 240), (240, 246, 252), (244, 250, 242), (250, 242, 246))
GLYPHS = "0123456789ACEFHJKLMNPRTUVXY"  # no letters that look like a digit
NAMES = ("Mia", "Leo", "Ana", "Max", "Zoe", "Sam", "Eva", "Ben", "Tom", "Ruby", "Kai", "Ida",
         "Finn", "Lena", "Hugo", "Nora", "Otto", "Vera", "Paul", "Iris", "Jack", "Alma", "Carl", "Dora")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Layout:
    """Cells of a picture, the crops the model may spend on it, and how many objects it gets."""

    cols: int
    rows: int
    num_crops: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return f"{self.cols}x{self.rows}"

    @property
    def grid(self) -> tuple[int, int]:
        """Crop rows and columns of the HD picture (two cells a crop; the drawn size is the HD size)."""
        return math.ceil(self.rows / 2), math.ceil(self.cols / 2)

    @property
    def pad(self) -> tuple[int, int]:
        """Pixels the HD transform adds above and to the left."""
        rows, cols = self.grid
        return (rows * 2 - self.rows) * CELL // 2, (cols * 2 - self.cols) * CELL // 2

    @property
    def corners(self) -> dict[str, tuple[int, int]]:
        last = self.rows - 1, self.cols - 1
        return dict(zip(CORNERS, ((0, 0), (0, last[1]), (last[0], 0), last)))


# the drawn width (of a tall picture: the height) is a whole number of crops, so nothing is resized
LAYOUTS: dict[str, Layout] = {x.name: x for x in (
    Layout(4, 4, 4, 4, 8), Layout(4, 3, 4, 4, 7), Layout(3, 4, 4, 4, 7),
    Layout(6, 4, 6, 5, 10), Layout(4, 6, 6, 5, 10), Layout(6, 6, 9, 6, 12), Layout(6, 5, 9, 6, 11),
    Layout(8, 6, 12, 8, 13), Layout(8, 8, 16, 8, 14))}
SMALL = LAYOUTS["4x4"]


@dataclass(frozen=True)
class Thing:
    color: str
    shape: str
    big: bool
    glyph: str | None
    row: int  # from 0
    col: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def size(self) -> str:
        return "big" if self.big else "small"

    @property
    def place(self) -> str:
        return f"row {self.row + 1}, column {self.col + 1}"

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.col


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # in reading order
    layout: Layout
    page: tuple[int, int, int]
    seed: int

    def at(self, row: int, col: int) -> Thing | None:
        return next((t for t in self.things if (t.row, t.col) == (row, col)), None)

    def toward(self, t: Thing, step: tuple[int, int]) -> tuple[Thing | None, list[tuple[int, int]]]:
        """The nearest object in the same row or column in that direction, and the cells on the way."""
        r, c, way = t.row + step[0], t.col + step[1], []
        while 0 <= r < self.layout.rows and 0 <= c < self.layout.cols:
            way.append((r, c))
            if hit := self.at(r, c):
                return hit, way
            r, c = r + step[0], c + step[1]
        return None, way


def make_scene(seed: int, layout: Layout = SMALL, low: int = 0, high: int = 0) -> Scene:
    """A picture of ``low`` to ``high`` objects (default: the layout's own range)."""
    rng = random.Random(seed)
    n = rng.randint(low or layout.low, high or layout.high)
    cells = rng.sample([(r, c) for r in range(layout.rows) for c in range(layout.cols)], n)
    corners = [c for c in layout.corners.values() if c not in cells]
    if corners and rng.random() < 0.6:  # corners get asked about: make them common
        cells[0] = rng.choice(corners)
    # few colours and shapes for many objects: look-alikes
    palette = rng.sample(list(COLORS), min(len(COLORS), max(3, round(n * rng.uniform(0.5, 1.0)))))
    forms = rng.sample(SHAPES, min(len(SHAPES), max(3, round(n * rng.uniform(0.5, 1.0)))))
    pairs = rng.sample([(c, s) for c in palette for s in forms], n)
    glyphs = rng.sample(GLYPHS, n)
    share = rng.choice((0.4, 0.6, 0.8))
    things = [Thing(color, shape, rng.random() < 0.5, glyph if rng.random() < share else None, *cell)
              for (color, shape), glyph, cell in zip(pairs, glyphs, sorted(cells))]
    return Scene(tuple(things), layout, rng.choice(PAGES), seed)
