"""Drawing a scene, and which part of it each visual token shows."""
from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from world import CELL, COLORS, GLYPHS, SHAPES, Layout, Scene, Thing

TOKEN = 28         # pixels of the HD picture behind one visual token (2 x 2 patches of 14)
PER_CROP = 6       # visual tokens along a crop of 168 pixels
HEADS = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "size": 3, "glyph": len(GLYPHS) + 2,
         "row": PER_CROP, "col": PER_CROP}  # what a token is asked about in training; last class: nothing
FONT = {  # 5 x 7, one string of bits per row
    "0": "01110 10001 10011 10101 11001 10001 01110", "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111", "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010", "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110", "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110", "9": "01110 10001 10001 01111 00001 00010 01100",
    "A": "01110 10001 10001 11111 10001 10001 10001", "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111", "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001", "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001", "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001", "N": "10001 11001 11001 10101 10011 10011 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000", "R": "11110 10001 10001 11110 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100", "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 01010 01010 00100", "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
}
Box = tuple[float, float, float, float]


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r * 0.85), (x - r, y + r * 0.85)]
    if shape == "diamond":
        return [(x, y - r), (x + r * 0.75, y), (x, y + r), (x - r * 0.75, y)]
    if shape == "star":
        return [(x + (r if i % 2 == 0 else r * 0.42) * math.sin(i * math.pi / 5),
                 y - (r if i % 2 == 0 else r * 0.42) * math.cos(i * math.pi / 5)) for i in range(10)]
    if shape == "cross":
        a = r * 0.34
        return [(x + u, y + v) for u, v in ((-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a),
                                            (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a))]
    points = [k * math.tau / 40 for k in range(40)]  # heart
    return [(x + r * math.sin(t) ** 3, y - r / 15 * (13 * math.cos(t) - 5 * math.cos(2 * t)
             - 2 * math.cos(3 * t) - math.cos(4 * t))) for t in points]


def _place(t: Thing, rng: random.Random) -> tuple[float, float, float, tuple[int, int, int] | None, Box]:
    """Centre and radius of the object, corner and dot size of its plate, and the box around both."""
    r = (25 if t.big else 14) + rng.uniform(-1.5, 1.5)
    left, top = t.col * CELL, t.row * CELL
    if t.glyph is None:
        slack = CELL / 2 - r - 3
        x = left + CELL / 2 + rng.uniform(-slack, slack)
        y = top + CELL / 2 + rng.uniform(-slack, slack)
        return x, y, r, None, (x - r, y - r, x + r, y + r)
    dot = 3 if t.big else 2
    w, h = 5 * dot + 4, 7 * dot + 4
    # the plate touches the lower right of the object; its corner sits on a 7-pixel lattice
    reach = r * (0.35 if t.big else 0.55)
    x = left + rng.uniform(r + 3, CELL - 3 - max(r, reach + w))
    y = top + rng.uniform(r + 3, CELL - 3 - max(r, reach + h))
    px, py = (7 * round((v + reach) / 7) for v in (x, y))
    px, py = min(px, left + CELL - w - 1), min(py, top + CELL - h - 1)
    return x, y, r, (px, py, dot), (x - r, y - r, max(x + r, px + w), max(y + r, py + h))


def boxes(scene: Scene) -> list[Box]:
    """Pixel box of every object with its plate, in the drawn picture."""
    rng = random.Random(scene.seed * 7 + 1)
    return [_place(t, rng)[4] for t in scene.things]


def draw(scene: Scene) -> Image.Image:
    place, ink = random.Random(scene.seed * 7 + 1), random.Random(scene.seed * 11 + 5)
    img = Image.new("RGB", (scene.layout.cols * CELL, scene.layout.rows * CELL), scene.page)
    d = ImageDraw.Draw(img)
    for t in scene.things:
        x, y, r, plate, _ = _place(t, place)
        fill = tuple(max(0, min(255, v + ink.randint(-8, 8))) for v in COLORS[t.color])
        if t.shape == "circle":
            d.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif t.shape == "ring":
            d.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * 0.36))
        elif t.shape == "square":
            d.rectangle((x - r * 0.88, y - r * 0.88, x + r * 0.88, y + r * 0.88), fill=fill)
        else:
            d.polygon(_polygon(t.shape, x, y, r), fill=fill)
        if plate and t.glyph:
            px, py, dot = plate
            d.rectangle((px, py, px + 5 * dot + 3, py + 7 * dot + 3), fill=(255, 255, 255), outline=(90, 90, 90))
            for i, bits in enumerate(FONT[t.glyph].split()):
                for j, bit in enumerate(bits):
                    if bit == "1":
                        u, v = px + 2 + j * dot, py + 2 + i * dot
                        d.rectangle((u, v, u + dot - 1, v + dot - 1), fill=(0, 0, 0))
    return img


def pixels(scene: Scene) -> np.ndarray:
    """The HD picture, uint8 [H, W, 3]: the drawn one, padded with white to whole crops."""
    rows, cols = scene.layout.grid
    top, left = scene.layout.pad
    page = np.full((rows * 168, cols * 168, 3), 255, np.uint8)
    art = np.asarray(draw(scene))
    page[top:top + art.shape[0], left:left + art.shape[1]] = art
    return page


# ----------------------------------------------------------------------------- visual tokens
def num_visual(layout: Layout) -> int:
    rows, cols = layout.grid
    return (rows * cols + 1) * PER_CROP**2 + 1 + (rows + 1) * PER_CROP


def token_boxes(layout: Layout) -> np.ndarray:
    """Box of every visual token in drawn-picture pixels, float [tokens, 4]; separators get nan.

    Order of the HD transform "sub_glb": the rows of all crops with a separator after each, one
    separator, the rows of the global view with a separator after each.
    """
    rows, cols = layout.grid
    top, left = layout.pad
    high, wide = rows * PER_CROP, cols * PER_CROP
    out = np.full((num_visual(layout), 4), np.nan)
    for start, h, w, dy, dx in ((0, high, wide, TOKEN, TOKEN),
                                (high * (wide + 1) + 1, PER_CROP, PER_CROP, TOKEN * rows, TOKEN * cols)):
        y, x = np.mgrid[0:h, 0:w]
        index = start + y * (w + 1) + x
        out[index] = np.stack([x * dx - left, y * dy - top, (x + 1) * dx - left, (y + 1) * dy - top], -1)
    return out


def tokens_of(layout: Layout, areas: list[Box]) -> np.ndarray:
    """Which visual tokens show any of the areas, bool [tokens]."""
    b = token_boxes(layout)
    hit = np.zeros(len(b), bool)
    for x0, y0, x1, y1 in areas:
        hit |= (b[:, 0] < x1) & (b[:, 2] > x0) & (b[:, 1] < y1) & (b[:, 3] > y0)
    return hit


def token_cells(layout: Layout) -> np.ndarray:
    """Row and column of the cell at the middle of each visual token, int64 [tokens, 2]; -1 = none."""
    b = token_boxes(layout)
    y, x = (b[:, 1] + b[:, 3]) / 2, (b[:, 0] + b[:, 2]) / 2
    inside = (y > 0) & (y < layout.rows * CELL) & (x > 0) & (x < layout.cols * CELL)  # false for nan
    cells = np.full((len(b), 2), -1, np.int64)
    cells[inside] = np.stack([y[inside] // CELL, x[inside] // CELL], -1)
    return cells


def cell_box(cell: tuple[int, int]) -> Box:
    r, c = cell
    return c * CELL, r * CELL, (c + 1) * CELL, (r + 1) * CELL


_GEOMETRY: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def patch_labels(scene: Scene) -> np.ndarray:
    """What each visual token shows, int64 [tokens, len(HEADS)]; -1 = no question there.

    A token shows the object that covers most of it.  The global view is only asked about colours
    and shapes, and only while its tokens are not larger than a cell.
    """
    lay = scene.layout
    if lay.name not in _GEOMETRY:
        b = token_boxes(lay)
        rows, cols = lay.grid
        high, wide = rows * PER_CROP, cols * PER_CROP
        base = np.full((len(b), len(HEADS)), -1, np.int64)
        for start, h, w, full in ((0, high, wide, True), (high * (wide + 1) + 1, PER_CROP, PER_CROP, False)):
            y, x = np.mgrid[0:h, 0:w]
            index = (start + y * (w + 1) + x).ravel()
            if full or max(rows, cols) <= 3:
                base[index, :2] = HEADS["color"] - 1, HEADS["shape"] - 1
            if full:
                base[index, 2:4] = HEADS["size"] - 1, HEADS["glyph"] - 1
                base[index, 4], base[index, 5] = y.ravel() % PER_CROP, x.ravel() % PER_CROP
        _GEOMETRY[lay.name] = b, base
    b, base = _GEOMETRY[lay.name]
    out, best = base.copy(), np.full(len(b), 60.0)  # a sliver of fewer pixels does not count
    for t, (x0, y0, x1, y1) in zip(scene.things, boxes(scene)):
        area = (np.minimum(b[:, 2], x1) - np.maximum(b[:, 0], x0)).clip(0) * \
               (np.minimum(b[:, 3], y1) - np.maximum(b[:, 1], y0)).clip(0)
        mine = (area > best) & (base[:, 0] >= 0)
        best[mine] = area[mine]
        out[mine, 0], out[mine, 1] = list(COLORS).index(t.color), SHAPES.index(t.shape)
        deep = mine & (base[:, 2] >= 0)
        out[deep, 2] = int(t.big)
        out[deep, 3] = GLYPHS.index(t.glyph) if t.glyph else len(GLYPHS)
    return out
