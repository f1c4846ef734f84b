"""The run folder: one configuration owns it; the log never runs ahead of the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config import TrainConfig
from ..errors import InputError


def claim_folder(config: TrainConfig) -> Path:
    """Creates the run folder or accepts the one this very configuration made; refuses any other."""
    folder = Path(config.output)
    known = folder / "config.json"
    if known.exists():
        try:
            found = json.loads(known.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"train: {known} must be JSON, got {error}") from error
        wanted = config.to_json()
        for key in wanted:
            if key not in ("device", "tensorboard") and found.get(key) != wanted[key]:
                raise InputError(
                    f"train: {folder} must be a new folder or this run's own, got a run with {key} {found.get(key)!r} "
                    f"instead of {wanted[key]!r}"
                )
        return folder
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".config-") for p in folder.iterdir())):
        raise InputError(f"train: {folder} must be a new folder or this run's own, got one with other files")
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)
    return folder


def truncate_log(path: Path, step: int) -> None:
    """Drops log lines past the checkpoint: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # a line cut short by a kill is the last one
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(line + "\n" for line in kept))
    os.replace(tmp, path)
