"""Safetensors written a tensor at a time, so that models larger than memory can be; ``weights.py`` reads them."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import InputError, StorageError
from ..storage import sync
from .weights import STORED, Weights

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODES = {dtype: code for code, dtype in STORED.items()}


def write(
    path: Path,
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]],
    make: Callable[[str], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes tensors one after the other; the file appears under its name when complete, or not at all.

    Args:
        layout: name to shape and dtype of every tensor, in the order they are made.
        make: called once for each name, for a tensor of that shape and dtype.
    """
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
    with _replacing(path) as partial, _room(path, size), open(partial, "wb") as file:
        file.write(header(layout, metadata))
        for name, (shape, dtype) in layout.items():
            tensor = make(name)
            got = tuple(tensor.shape), tensor.dtype
            if got != (tuple(shape), dtype):
                raise ValueError(f"write: {name} must be {(tuple(shape), dtype)}, got {got}")
            file.write(raw(tensor))
        file.flush()
        os.fsync(file.fileno())
    return path


def name_as_published(folder: Path) -> None:
    """Gives the weights of a CLIPTextModel's folder the names of published files, which begin with ``text_model.``.

    Recent transformers write them without and read both; earlier ones find none of theirs and go on at random.
    """
    weights, prefix = Weights([folder / "model.safetensors"]), "text_model."
    names = {name if name.startswith(prefix) else prefix + name: name for name in weights}
    if names.keys() != weights.keys():
        shapes = {new: (tuple(weights[old].shape), weights[old].dtype) for new, old in names.items()}
        write(folder / "model.safetensors", shapes, lambda new: weights[names[new]])


def header(layout: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str] | None = None) -> bytes:
    """What a safetensors file begins with; the tensors' bytes follow in the order of ``layout``."""
    entries: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``tensor`` in ``dtype``.

    Raises:
        InputError: a finite number is too large for ``dtype``.
    """
    result = tensor.to(dtype)
    if result.is_floating_point() and result.dtype.itemsize < tensor.dtype.itemsize:
        if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(result.float()).all()):
            short = str(dtype).removeprefix("torch.")
            raise InputError(f"model: {name} must fit {short}, got values up to {tensor.abs().max().item():.3g}")
    return result


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A partial path beside ``path`` that takes its place when the block ends, and is removed when it fails."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb"):
            pass
    except OSError as error:
        raise StorageError(f"model: {path} must be a file that can be written, got {error.strerror}") from error
    try:
        yield partial
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _room(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"model: {path} must have room for {size / 1e6:.0f} MB, got {reason}") from error
