"""Safetensors a tensor at a time: models many times larger than memory can be read, combined and written."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError, StorageError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _NAMES.items()}


class Tensors:
    """Named tensors of one or several safetensors files, mapped into memory and read when asked for.

    Attributes:
        metadata: of the files' headers.
    """

    def __init__(self, files: Iterable[Path], what: str = "model"):
        self.files, self.metadata, self._where = [Path(f) for f in files], {}, {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{what}: {file} must be a readable safetensors file, got {error}") from error
            self.metadata |= handle.metadata() or {}
            self._where |= dict.fromkeys(handle.keys(), handle)
        self._stored = {name: name for name in self._where}

    def renamed(self, names: dict[str, str]) -> Tensors:
        """The same tensors under other names (new to old); those not named are left out."""
        view = object.__new__(Tensors)
        view.files, view.metadata, view._where = self.files, self.metadata, self._where
        view._stored = {new: self._stored[old] for new, old in names.items()}
        return view

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return self._where[stored].get_tensor(stored)

    def _slice(self, name: str):
        stored = self._stored[name]
        return self._where[stored].get_slice(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in _NAMES:
            raise InputError(f"model: {name} must be stored in a type PyTorch has, got {code}")
        return _NAMES[code]


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
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with replacing(path) as partial, _room(path, end), open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, dtype) in layout.items():
            tensor = make(name)
            got = tuple(tensor.shape), tensor.dtype
            if got != (tuple(shape), dtype):
                raise ValueError(f"write: {name} must be {(tuple(shape), dtype)}, got {got}")
            file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return path


def copy(path: Path, source: Tensors, dtype: torch.dtype | None, metadata: dict[str, str] | None = None) -> Path:
    """Writes every tensor of ``source``; floating-point ones in ``dtype``, None as they are stored."""
    layout = {}
    for name in source:
        stored = source.dtype(name)
        layout[name] = source.shape(name), dtype if dtype and stored.is_floating_point else stored
    return write(path, layout, lambda name: cast(source[name], layout[name][1], name), metadata)


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
def replacing(path: Path) -> Iterator[Path]:
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


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
