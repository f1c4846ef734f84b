"""What benchmarks are asked for and write, also when something ends them or one variant fails."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path


def write(path: str | Path | None, record: dict) -> None:
    """Whole or not at all: whatever ends the process leaves the record of before. Nothing without a path."""
    if path:
        beside = Path(f"{path}.part")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(beside, path)


def read(path: str | Path) -> dict:
    """The record that more parts go into; a new one where there is no file."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} must be a benchmark's record, got {error}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{path} must be a benchmark's record, got {type(found).__name__}")
    return found


def output(text: str) -> Path:
    """Type of an option: a file that can be written, which is looked at before the work whose result it is to hold."""
    path = Path(text)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written, got {text!r}")
    return path


def count(text: str) -> int:
    """Type of an option: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def failure(error: Exception) -> str:
    """What a record says of a variant that failed."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
