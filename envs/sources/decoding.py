"""An image file's bytes as RGB pixels: upright, on a background, 8 bits per channel."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Color: TypeAlias = tuple[int, int, int]
Root: TypeAlias = Path | zipfile.Path

WHITE: Color = (255, 255, 255)
RULES = "2"
"""Another value wherever equal bytes may give other pixels than before: what was decoded earlier is decoded again."""
LARGEST_IMAGE = 64 << 20  # bytes in the file; and pixels, by Pillow's own limit
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
ORIENTATION = 0x0112
# EXIF's 2 … 8: what brings an image upright that was stored so.
UPRIGHT = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)  # fmt: skip
UNREADABLE = (  # what Pillow's readers raise for broken files
    UnidentifiedImageError, Image.DecompressionBombError, zipfile.BadZipFile, zlib.error, struct.error, OSError,
    EOFError, SyntaxError, ValueError, KeyError, IndexError, TypeError,
)  # fmt: skip


def seen(*roots: Path) -> str:
    """A fingerprint of files and folders: it changes with any file's name, size or time, and with `RULES`."""
    listed = ""
    for root in roots:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        listed += "".join(f"{f.relative_to(root.parent)} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    return hashlib.sha256(f"{RULES}\n{listed}".encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """An image within a larger file."""

    name: str
    """Which, for messages."""
    content: bytes
    """What a file with this image alone would hold."""

    def open(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.name


File: TypeAlias = Root | Record


def read(file: File) -> bytes:
    """What a file holds. Raises ValueError with its name."""
    try:
        with file.open("rb") as f:
            content: bytes = f.read(LARGEST_IMAGE + 1)
    except (FileNotFoundError, KeyError) as error:
        raise ValueError(f"{file} does not exist") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{file} is not a readable image ({error})") from error
    if len(content) > LARGEST_IMAGE:
        raise ValueError(f"{file} is larger than {LARGEST_IMAGE} bytes")
    return content


def pixels(file: File, content: bytes, size: int, background: Color) -> NDArray[np.uint8]:
    """[3, size, size] uint8, resized by Lanczos; of many frames the first. Raises ValueError with the file's name."""
    mode = ""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            mode = image.mode
            if not mode.startswith("F") and (mode != "I" or image.format in ("PNG", "PPM")):
                return flat(_turned(image), size, background)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not a readable image (its {len(content)} bytes are of no known format)") from error
    except UNREADABLE as error:
        raise ValueError(f"{file} is not a readable image ({error})") from error
    # Numbers without a largest one: no rule says which of them is white.
    raise ValueError(f"{file} has pixels of mode {mode}: 8 or 16 bits per channel wanted")


def ink(file: File, size: int) -> NDArray[np.uint8]:
    """[1, size, size] uint8 of a drawing, dark on light paper: 255 is ink."""
    return 255 - grey(pixels(file, read(file), size, WHITE))


def grey(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[1, height, width] of [3, height, width], by Pillow's weights."""
    return np.asarray(Image.fromarray(rgb.transpose(1, 2, 0)).convert("L"))[None]


def like(file: File, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An image file as bytes [channels, height, width]; raises ValueError for a shape that no rule leads to."""
    channels, height, width = shape
    if channels not in (1, 3) or height != width:
        raise ValueError(f"{file}: no rule makes an image of shape {shape} of a file; .npz wanted")
    rgb = pixels(file, read(file), height, WHITE)
    return rgb if channels == 3 else grey(rgb)


def flat(image: Image.Image, size: int, background: Color) -> NDArray[np.uint8]:
    """An image as [3, size, size] bytes on a background, resized by Lanczos."""
    resized = _flat(_bytes(image), background).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)


def _turned(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, struct.error, ValueError, KeyError):  # a header that nobody can read turns nothing
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _bytes(image: Image.Image) -> Image.Image:
    """16 bits per pixel as 8: 65535 becomes 255. Converting as Pillow does would cut values off at 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _flat(image: Image.Image, background: Color) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")
