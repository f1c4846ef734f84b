"""What benchmarks write, also when something ends them or one variant fails."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write(path: str | Path | None, record: dict) -> None:
    """Whole or not at all: whatever ends the process leaves the record of before. Nothing without a path."""
    if path:
        beside = Path(f"{path}.part")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(beside, path)


def failure(error: Exception) -> str:
    """What a record says of a variant that failed."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
