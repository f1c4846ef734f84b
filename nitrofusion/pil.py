"""Pillow's pictures as everything here takes them."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

# What Pillow raises of broken files: SyntaxError on broken chunks; huge pictures and texts with the others.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def upright(image: Image.Image) -> Image.Image:
    """A picture of 8 or 16 bits as RGB, turned as its EXIF orientation says.

    Raises:
        ValueError, OSError: its file cannot be read (any of UNREADABLE), or nobody knows its white.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"Pillow's mode {image.mode}, whose white is not known")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow alone makes white of its upper levels
        levels = np.asarray(image).astype(np.float32) / 257  # 65535 is white
        image = Image.fromarray(levels.round().astype(np.uint8))
    return image.convert("RGB")
