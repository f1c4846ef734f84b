"""Pictures side by side, with labels, made by Pillow."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .charts import shortened

_PAPER, _INK, _MUTED = "#fbfaf8", "#1d2024", "#5b626c"
_GAP = 4
_SMALL, _LARGE = 96, 256  # sides in pixels: smaller pictures are enlarged towards the one, larger reduced to the other


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """PIL images of pictures [n, 3, h, w] in [-1, 1]."""
    pixels = (pictures.detach().float().cpu() + 1).mul(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(p.numpy()) for p in pixels.permute(0, 2, 3, 1).contiguous()]


def shown(image: Image.Image, scale: float) -> Image.Image:
    """The picture enlarged in whole pixels, so that nothing looks softer or sharper than it is, or reduced."""
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def fitting_scale(side: int) -> float:
    """A whole factor for tiny pictures, 1 for those of a handy size, a share for large ones."""
    return max(1, _SMALL // side) if side <= _LARGE else _LARGE / side


def image_grid(pictures: torch.Tensor, cols: int, scale: float = 1) -> Image.Image:
    """One picture of many.

    Args:
        pictures: [rows * cols, 3, h, w] in [-1, 1], row by row; the last row may be short.
        cols: pictures in a row.
        scale: >= 1 enlarges by nearest neighbour, < 1 reduces smoothly.
    """
    images = [shown(image, scale) for image in to_images(pictures)]
    width, height = images[0].size
    rows = -(-len(images) // cols)
    sheet = Image.new("RGB", (cols * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), _PAPER)
    for i, image in enumerate(images):
        sheet.paste(image, (i % cols * (width + _GAP), i // cols * (height + _GAP)))
    return sheet


def labelled_strips(rows: list[tuple[str, torch.Tensor]], title: str = "", text: str = "") -> Image.Image:
    """Strips of pictures under each other, a label beside each, an optional heading above.

    Args:
        rows: (label, pictures [n, 3, h, w] in [-1, 1]).
    """
    head, body = ImageFont.load_default(30), ImageFont.load_default(17)
    # The font does not have that minus.
    rows = [(shortened(label).replace("−", "-"), pictures) for label, pictures in rows if len(pictures)]
    title, text = title.replace("−", "-"), text.replace("−", "-")
    strips = [(label, image_grid(p, len(p), fitting_scale(p.shape[-1]))) for label, p in rows]
    left = max([round(body.getlength(label)) for label, _ in strips], default=0) + 24
    width = max([left + strip.width for _, strip in strips], default=0) + 24
    width = max(width + 24, 960 if text or title else 0)
    titles, lines = _wrap(title, head, width - 48), _wrap(text, body, width - 48)
    below = 24 + 38 * len(titles) + (10 if titles else 0)
    top = below + 26 * len(lines) + (16 if titles or lines else 0)
    sheet = Image.new("RGB", (width, top + sum(strip.height + 8 for _, strip in strips) + 16), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(titles):
        draw.text((24, 22 + 38 * i), line, _INK, head)
    for i, line in enumerate(lines):
        draw.text((24, below + 26 * i), line, _MUTED, body)
    for label, strip in strips:
        draw.text((24, top + strip.height // 2), label, _INK, body, anchor="lm")
        sheet.paste(strip, (24 + left, top))
        top += strip.height + 8
    return sheet


def save_preview(path: str | Path, rows: list[tuple[str, torch.Tensor]]) -> None:
    """Writes labelled strips of pictures as a PNG that appears complete or not at all.

    Args:
        rows: (label, pictures [n, 3, h, w] in [-1, 1]).
    """
    write_atomic(Path(path), png_bytes(labelled_strips(rows)))


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def write_atomic(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _wrap(text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:  # wider than the page: in pieces
            fits = next((n for n in range(1, len(word)) if font.getlength(word[: n + 1]) > width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
