"""Folders of pictures: which there are, whether they can be read, and a digest that names them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..errors import InputError
from ..pil import UNREADABLE
from ..report.pictures import write_atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Gallery:
    """Pictures of one folder.

    Attributes:
        paths: by name. digests: SHA-256 of each file. each_size: (width, height) of each.
        format: ``png``, ``jpeg``, ... or several with ``+``.
    """

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    each_size: tuple[tuple[int, int], ...]
    format: str

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over those of the files, in order; their names do not count."""
        return _sha256("".join(self.digests).encode())

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Different (width, height), sorted."""
        return sorted(set(self.each_size))

    def at_least(self, side: int) -> Gallery:
        """The pictures none of whose sides is shorter."""
        kept = [i for i, size in enumerate(self.each_size) if min(size) >= side]
        pick = lambda values: tuple(values[i] for i in kept)  # noqa: E731
        return Gallery(pick(self.paths), pick(self.digests), pick(self.each_size), self.format)


def holds_pictures(folder: str | Path) -> bool:
    """Whether it is a folder with pictures right in it, and no model's or training run's with some beside."""
    folder = Path(folder)
    if not folder.is_dir() or any((folder / name).exists() for name in ("model_index.json", "config.json")):
        return False
    return any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())


def open_gallery(
    folder: str | Path, cache: Path, name: str, files: list[str] | None = None, one_size: bool = False
) -> Gallery:
    """Checks every picture by decoding it; a folder that has not changed since is not read again.

    Args:
        cache: folder where what was found is kept, by names, sizes and times of the files.
        name: of the folder in errors.
        files: the pictures that must be there; None is all.
        one_size: whether they must be of one size.

    Raises:
        InputError: pictures are missing, cannot be read, or differ in size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise InputError(f"evaluate: {name} must be a folder of pictures, got {got} at {folder}")
    if files is None:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    else:
        paths = [folder / file for file in files]
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            raise InputError(
                f"evaluate: {name} must hold the {len(paths)} pictures that the captions name, got {folder} without "
                f"{len(missing)} of them, first {missing[0]}"
            )
    if not paths:
        raise InputError(f"evaluate: {name} must hold pictures ({', '.join(SUFFIXES)}), got none in {folder}")
    listing = [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    known = cache / "checked" / f"{_sha256(json.dumps(listing).encode())}.json"
    found = _seen(known, len(paths))
    if found is None:
        found = _look(paths, name)
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(known, json.dumps(found).encode())
    sizes = tuple(map(tuple, found["sizes"]))
    gallery = Gallery(tuple(paths), tuple(found["digests"]), sizes, found["format"])
    if one_size and len(gallery.sizes) > 1:
        (first, second), count = gallery.sizes[:2], len(gallery.sizes)
        raise InputError(
            f"evaluate: {name} must hold pictures of one size, got {count} sizes in {folder}, such as "
            f"{first[0]}x{first[1]} and {second[0]}x{second[1]}"
        )
    return gallery


def _seen(known: Path, count: int) -> dict | None:
    """What an earlier call found of so many pictures; None without one, or if its file is damaged."""
    try:
        found = json.loads(known.read_text())
        whole = len(found["digests"]) == count and all(len(size) == 2 for size in found["sizes"]) and "format" in found
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if whole else None


def open_picture(path: Path) -> Image.Image:
    """RGB pixels of a picture file; ValueError with its name if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"{path} must be a picture that can be read, got {error}") from error


def _look(paths: list[Path], name: str) -> dict:
    def one(path: Path) -> tuple[str, tuple[int, int], str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    image.load()
                    return _sha256(path.read_bytes()), image.size, str(image.format).lower()
        except UNREADABLE as error:
            raise InputError(f"evaluate: {name} must hold pictures that can be read, got {path}: {error}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(one, paths), total=len(paths), desc=f"checking {name}", unit="image", disable=None)
        digests, sizes, formats = zip(*bar, strict=True)
    return {"digests": digests, "sizes": sizes, "format": "+".join(sorted(set(formats)))}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
