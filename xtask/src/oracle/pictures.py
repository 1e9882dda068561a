"""Holds pictures that hae decoded against Pillow's own: python3 pictures.py LIST, a JSON list of [path, PPM or
null]. Prints a JSON list of {format, said, most, apart}: what Pillow said where it refused the file, the largest
difference of a channel and the share of values that are not the same; none where the sizes differ."""

import json
import sys
import warnings

import numpy as np
from PIL import Image, ImageOps

warnings.simplefilter("ignore")
Image.MAX_IMAGE_PIXELS = None

MOST_PIXELS = 64 << 20

MARKS = [(b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"BM", "BMP")]


def format_of(path):
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((name for mark, name in MARKS if head.startswith(mark)), None)


def rgb(path):
    """As hae has it: the first frame, turned as EXIF says, laid on white, 16 bits to 8 by rounding."""
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than hae reads")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I;16", "I;16B", "I"):
            values = np.asarray(image).astype(np.int64)
            gray = ((values * 255 + 32767) // 65535).astype(np.uint8)
            key = image.info.get("transparency")
            if isinstance(key, int):
                gray = np.where(values == key, 255, gray).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
            alpha = rgba[..., 3:]
            return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.asarray(image.convert("RGB"))


def ppm(path):
    with open(path, "rb") as file:
        head = file.readline().split()
        width, height = int(head[1]), int(head[2])
        return np.frombuffer(file.read(), np.uint8).reshape(height, width, 3)


out = []
for path, ours in json.load(open(sys.argv[1])):
    row = {"format": format_of(path), "said": None, "most": None, "apart": None}
    if row["format"]:
        try:
            theirs = rgb(path)
        except Exception as error:
            row["said"] = f"{type(error).__name__}: {error}".splitlines()[0]
            theirs = None
        if ours and theirs is not None:
            ours = ppm(ours)
            if ours.shape == theirs.shape:
                apart = np.abs(ours.astype(int) - theirs.astype(int))
                row["most"], row["apart"] = int(apart.max()), float((apart > 0).mean())
            else:
                row["said"] = f"{theirs.shape[1]}x{theirs.shape[0]}, not {ours.shape[1]}x{ours.shape[0]}"
    out.append(row)
json.dump(out, sys.stdout)
