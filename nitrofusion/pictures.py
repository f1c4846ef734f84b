"""Real pictures with captions, as latents: what some recipes hold a student's pictures against."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from .errors import InputError
from .models import sdxl
from .pil import UNREADABLE, upright

WORLD = "world"  # in place of a folder: rendered scenes
METADATA = "metadata.jsonl"


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """(file, caption) of every line of the folder's ``metadata.jsonl``, the layout of datasets' imagefolder.

    Raises:
        InputError: the file is missing or names none, a line is no {"file_name": .., "text": ..}, or a picture is not
            in the folder.
    """
    from .prompts import read_prompts

    folder = Path(folder)
    listing = folder / METADATA
    if not listing.is_file():
        got = "a folder without it" if folder.is_dir() else "nothing"
        raise InputError(f"images: {folder} must be a folder with {METADATA}, got {got}")
    captions = read_prompts(listing, "text")
    names = []
    with open(listing, encoding="utf-8-sig") as file:  # the lines that read_prompts saw, each JSON
        for line in file:
            values = json.loads(line) if line.strip() else {}
            if isinstance(values, str):
                raise InputError(f"images: {listing} must hold lines of file_name and text, got {values[:40]!r}")
            if (values.get("text") or "").strip():
                names.append(values.get("file_name"))
    root = folder.resolve()
    for name in names:
        if not isinstance(name, str) or not _is_inside(root, name):
            raise InputError(f"images: {listing} must name pictures of its folder, got {repr(name)[:200]}")
    return [(root / name, caption) for name, caption in zip(names, captions, strict=True)]


def _is_inside(root: Path, name: str) -> bool:
    try:
        return (root / name).resolve().is_relative_to(root) and (root / name).is_file()
    except (OSError, ValueError):  # too long; a zero byte, half a character
        return False


class Pictures:
    """Latents [n, 4, h, w] fp32 of real pictures by the index of their prompt, encoded as they are asked for."""

    def __init__(self, source: str, model: sdxl.SDXL, scene_seed: int):
        self.model, self.scene_seed = model, scene_seed
        self.files = None if source == WORLD else [file for file, _ in read_captions(source)]

    def __call__(self, indices: list[int]) -> torch.Tensor:
        pixels = self._render(indices) if self.files is None else torch.stack([self._open(i) for i in indices])
        # Means, not draws: what the posterior's noise adds, heads see before anything else, and the student learns it
        # as grain (10 % of pictures instead of 4 % on the world).
        mean, _ = sdxl.encode_image(self.model, pixels)
        return mean.float() * self.model.vae.config.scaling_factor

    def _render(self, indices: list[int]) -> torch.Tensor:
        from .world.render import render
        from .world.scenes import Scenes, sample_scenes

        return render(Scenes.cat([sample_scenes(1, self.scene_seed, start=i) for i in indices]))

    def _open(self, index: int) -> torch.Tensor:
        """[3, H, W] in [-1, 1]: the middle square at the model's resolution."""
        file, side = self.files[index % len(self.files)], self.model.resolution
        try:
            with Image.open(file) as image:
                image = upright(image)
        except UNREADABLE as error:
            raise InputError(f"images: {file} must be a readable picture, got {error}") from error
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + short, top + short))
        data = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3)
        return data.permute(2, 0, 1) / 127.5 - 1
