"""The run folder: one configuration owns it; the log never runs ahead of the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config import TrainConfig
from ..errors import InputError

ASIDE = ("device", "tensorboard")  # settings no number depends on
LAYOUT = ("parallel", "batch_size", "accumulation")  # how an optimizer step's images are shared out


def claim_folder(config: TrainConfig, allow_inexact: bool = False) -> Path:
    """Creates the run folder or accepts the one this very configuration made; refuses any other.

    Args:
        allow_inexact: settings may also differ in ``LAYOUT``.
    """
    folder = Path(config.output)
    known = folder / "config.json"
    if known.exists():
        try:
            found = json.loads(known.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"train: {known} must be JSON, got {error}") from error
        wanted, found = config.to_json(), {"parallel": "ddp"} | found  # older runs had nothing else
        for key in wanted:
            if key in ASIDE or found.get(key) == wanted[key] or allow_inexact and key in LAYOUT:
                continue
            hint = " (allow_inexact goes on with it all the same)" if key in LAYOUT else ""
            raise InputError(
                f"train: {folder} must be a new folder or this run's own, got a run with {key} {found.get(key)!r} "
                f"instead of {wanted[key]!r}{hint}"
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".config-") for p in folder.iterdir())):
        raise InputError(f"train: {folder} must be a new folder or this run's own, got one with other files")
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)
    return folder


def check_layout(folder: Path, state: dict, config: TrainConfig, world_size: int, allow_inexact: bool) -> None:
    """Refuses a checkpoint of another number of processes, or of optimizer steps of another number of images.

    Which process has an image changes no draw, but the order in which its gradient is added, and with that last bits.
    """
    before = state.get("world_size", world_size)
    if before != world_size and not allow_inexact:
        raise InputError(
            f"train: {folder} must be resumed in {before} process{'es' * (before > 1)}, got {world_size} "
            "(allow_inexact goes on all the same; sums then differ in their last bits)"
        )
    images = config.images_per_step * world_size
    if state.get("images_per_step", images) != images:
        raise InputError(
            f"train: {folder} must be resumed with {state['images_per_step']} images per optimizer step, got {images} "
            f"(batch_size {config.batch_size} x accumulation {config.accumulation} x {world_size} processes)"
        )


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
