"""The published weights that metrics need. A stand-in: the dictionary is filled elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import InputError

WEIGHTS: dict = {}


def locate(name: str, folder: str | Path | None, allow_unknown_digest: bool = False) -> Path:
    """The file of a weight below ``folder``, or InputError."""
    path = Path(folder or ".") / name
    if not path.is_file():
        raise InputError(f"weights: {path} must be a file, got nothing")
    return path


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_weights(folder: str | Path | None) -> str:
    """A table of the files, where they come from, and whether they are there."""
    return ""
