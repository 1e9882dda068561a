"""Writes the pictures that the tests cannot write themselves, because the `image` crate has no
encoder for them. Needs Pillow. The colours are what tests/suite/image.rs expects."""

import io
import sys
from pathlib import Path

from PIL import Image

out = Path(sys.argv[1])
left, right = (200, 40, 40), (40, 40, 200)


def halves(mode="RGB"):
    picture = Image.new("RGB", (32, 16), left)
    picture.paste(right, (16, 0, 32, 16))
    return picture.convert(mode)


halves().save(out / "lossy.webp", quality=90, method=6)
halves().save(
    out / "animated.webp",
    save_all=True,
    append_images=[Image.new("RGB", (32, 16), (0, 255, 0))],
    duration=100,
    lossless=True,
)
halves().save(out / "progressive.jpg", quality=95, progressive=True)
halves("CMYK").save(out / "cmyk.jpg", quality=95)

# Orientation 6: the camera was turned, so viewers show the picture turned clockwise.
exif = Image.Exif()
exif[0x0112] = 6
exif_bytes = io.BytesIO()
halves().save(exif_bytes, "JPEG", quality=95, exif=exif)
(out / "turned.jpg").write_bytes(exif_bytes.getvalue())
# The same in a WebP, with the mark of a block in a JPEG before it, as many write it; Pillow leaves it out.
webp = io.BytesIO()
halves().save(webp, "WEBP", lossless=True, exif=exif)
webp = webp.getvalue()
at = webp.index(b"EXIF") + 8
block = b"Exif\0\0" + webp[at:]
webp = webp[: at - 4] + len(block).to_bytes(4, "little") + block
(out / "turned.webp").write_bytes(webp[:4] + (len(webp) - 8).to_bytes(4, "little") + webp[8:])
