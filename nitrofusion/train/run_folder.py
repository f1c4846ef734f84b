"""The run folder: one configuration owns it; the log never runs ahead of the checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from .. import __version__, pictures, recipes
from ..config import TrainConfig
from ..data import cache_folder, teacher_digest
from ..errors import CheckpointError, InputError, StorageError
from ..models.folder import unet_files
from ..models.weights import digest, read_json, short, weight_files
from ..presets import FEATURES, MODELS, resolve_folder, resolve_unet
from ..storage import Taken, existing, take_lock

FORMAT = 1  # of what a checkpoint holds
MOST_PREVIEWS = 64
_INEXACT = ("nitrofusion", "torch")  # of an identity: sums may be taken in another order
_FIRST = ("format", "nitrofusion", "torch", "recipe", "teacher")  # what every identity has had from the beginning
_ROOM = 10_000_000  # bytes: a preview of large pictures, and log lines until the next one
# Settings no number depends on. A folder may be moved; what a cache holds is compared when it is claimed.
ASIDE = ("output", "cache", "device", "tensorboard", "async_checkpoints", "num_previews")
_PATHS = ("teacher", "teacher_unet", "init", "backbone", "prompts", "images")
LAYOUT = ("parallel", "batch_size", "accumulation")  # how an optimizer step's images are shared out
LOCK = ".lock"
_PATIENCE = 100.0  # seconds: a run that was told to stop may still be saving, and NFS frees a dead node's lock after 90


def claim_folder(config: TrainConfig, allow_inexact: bool = False) -> Path:
    """Creates the run folder or accepts the one this very configuration made; refuses any other.

    One that ``prepare`` made holds samples, which say themselves what they are of.

    Args:
        allow_inexact: settings may also differ in ``LAYOUT``.
    """
    folder = Path(config.output)
    known = folder / "config.json"
    if known.exists():
        wanted, found = config.to_json(), {"parallel": "ddp"} | read_json(known, "train")  # older runs had nothing else
        for key in wanted:
            if key in ASIDE or found.get(key) == wanted[key] or allow_inexact and key in LAYOUT:
                continue
            if key in _PATHS and _one_path(found.get(key), wanted[key]):
                continue
            hint = " (allow_inexact goes on with it all the same)" if key in LAYOUT else ""
            raise InputError(
                f"train: {folder} must be a new folder or this run's own, got a run with {key} {found.get(key)!r} "
                f"instead of {wanted[key]!r}{hint}"
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(_is_foreign(path, config) for path in folder.iterdir())):
        raise InputError(f"train: {folder} must be a new folder or this run's own, got one with other files")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        located(config).save(folder)
    return folder


def located(config: TrainConfig) -> TrainConfig:
    """With absolute paths of what is read, so that a run draws and goes on from any working folder."""
    names = {"images": (pictures.WORLD,), "prompts": ()}
    found = {k: v for k in _PATHS if (v := getattr(config, k)) and v not in names.get(k, (*MODELS, *FEATURES))}
    return dataclasses.replace(config, **{k: os.path.abspath(v) for k, v in found.items() if os.path.exists(v)})


def _one_path(found: object, wanted: str | None) -> bool:
    """Whether two settings spell one file or folder that is there."""
    if not isinstance(found, str) or wanted is None or not (os.path.exists(found) and os.path.exists(wanted)):
        return False
    return os.path.samefile(found, wanted)


def hold(folder: Path) -> IO | None:
    """Keeps other processes from training in a claimed folder, until it is closed or this process is gone.

    Waits a while for one that is there. None, or no effect, where the system has no locks.

    Raises:
        InputError: another one stays.
    """
    until, told = time.monotonic() + _PATIENCE, False
    while True:
        try:
            with writing(folder):
                return take_lock(folder / LOCK)
        except Taken as error:
            if time.monotonic() > until:
                raise InputError(
                    f"train: {folder} must be of one run at a time, got one that another process trains in (remove "
                    f"{folder / LOCK} if none does)"
                ) from error
        if not told:
            tqdm.write(f"waits for another process that trains in {folder}")
            told = True
        time.sleep(0.1)


def _is_foreign(path: Path, config: TrainConfig) -> bool:
    """Whether something in a folder without a configuration is neither one being written nor the run's samples."""
    samples = config.teacher_samples == "cache" and path.resolve() == cache_folder(config).resolve()
    return not samples and not path.name.startswith(".config-")


def identity(config: TrainConfig, teacher: Path) -> dict[str, str | int]:
    """What a checkpoint belongs to: the recipe, the software, and digests of what it was trained with.

    The digests are of all that the files hold, as of the sample cache: two fine-tunes of one model have the same
    header. They are what a run needs again: frozen weights of the teacher, its VAE, the backbone, the recipe and those
    under adapters; and the prompts, or the captions of pictures.
    """
    own = {
        "format": FORMAT,
        "nitrofusion": __version__,
        "torch": torch.__version__,
        "recipe": config.recipe,
        "teacher": teacher_digest(config, teacher),
        "vae": digest([*weight_files(teacher / "vae"), teacher / "vae" / "config.json"]),
    }
    if config.backbone is not None:
        own["backbone"] = digest(unet_files(resolve_folder(config.backbone)))
    if config.lora_rank and config.init is not None:
        own["init"] = digest(unet_files(resolve_unet(config.init)))
    if config.prompts is not None:
        own["prompts"] = digest([Path(config.prompts)])
    if config.images not in (None, pictures.WORLD):
        own["images"] = digest([Path(config.images) / pictures.METADATA])
    return own | {name: digest(files) for name, files in recipes.find(config.recipe).frozen_files(config).items()}


def check_state(folder: Path, state: dict, phases: list[str]) -> None:
    """Raises CheckpointError for a sealed state that no run wrote: a stranger's folder may say anything."""
    kinds = {"step": int, "world_size": int, "images_per_step": int, "seconds": int | float, "machine": dict}
    # What older runs did not say is not looked at.
    wrong = [f"{k} {short(repr(state[k]))}" for k in kinds if k in state and not isinstance(state[k], kinds[k])]
    bad = state.get("bad_steps")
    if not isinstance(bad, dict) or bad.keys() != {*phases} or not all(isinstance(n, int) for n in bad.values()):
        wrong.append(f"bad_steps {short(repr(bad))}")
    if wrong:
        raise CheckpointError(f"checkpoint: {folder} must hold this run's state, got {wrong[0]}")


def check_identity(folder: Path, state: dict, own: dict, allow_inexact: bool) -> list[str]:
    """What will not be exact, or cannot be told, when training goes on from a checkpoint, one line each.

    Raises:
        InputError: it belongs to something else, or what is not exact was not allowed.
    """
    found = state.get("identity") if isinstance(state, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"train: {folder} must say what it belongs to, got one of an older version")
    lines = []
    for key in sorted(own.keys() | found.keys()):
        if found.get(key) == own.get(key):
            continue
        if key not in found and key not in _FIRST:  # its configuration is this one, so it was one that noted less
            lines.append(f"resumed unchecked: {folder} does not say what its {key} was, so today's is taken for it")
            continue
        if key not in _INEXACT:
            raise InputError(
                f"train: {folder} must be of this run, got {key} {found.get(key)!r} instead of {own.get(key)!r}"
            )
        differs = f"{key} {found.get(key)} instead of {own.get(key)}"
        if not allow_inexact:
            raise InputError(
                f"train: {folder} must be of this software, got {differs} (allow_inexact goes on, not bit for bit)"
            )
        lines.append(f"resumed inexactly: {folder} is of {differs}, so rounding may differ from here on")
    return lines


def check_layout(folder: Path, state: dict, config: TrainConfig, world_size: int, allow_inexact: bool) -> None:
    """Refuses a checkpoint of another number of processes, or of optimizer steps of another number of images.

    Which process has an image changes no draw, but the order in which its gradient is added, and with that last bits.
    """
    before, images = state.get("world_size", world_size), config.images_per_step * world_size
    if state.get("images_per_step", images) != images:
        other = f"; of {before}, which also takes allow_inexact" if before != world_size and not allow_inexact else ""
        raise InputError(
            f"train: {folder} must be resumed with {state['images_per_step']} images per optimizer step, got {images} "
            f"(batch_size {config.batch_size} x accumulation {config.accumulation} x {world_size} processes{other})"
        )
    if before != world_size and not allow_inexact:
        raise InputError(
            f"train: {folder} must be resumed in {before} process{'es' * (before > 1)}, got {world_size} "
            "(allow_inexact goes on all the same; sums then differ in their last bits)"
        )


def other_rounding(folder: Path, state: dict, own: dict) -> list[str]:
    """A line for each part of a machine that was another one when the checkpoint was made: it changes last bits."""
    found = state.get("machine") or {}
    return [
        f"resumed inexactly: {folder} is of {key} {found[key]} instead of {own[key]}, so rounding may differ from here"
        for key in own
        if found.get(key, own[key]) != own[key]
    ]


def truncate_log(path: Path, step: int) -> None:
    """Drops log lines past the checkpoint: the resumed run writes them again."""
    if not path.exists():
        return
    tmp = path.with_suffix(".tmp")
    with writing(path.parent):
        with open(path, "rb") as log, open(tmp, "wb") as kept:
            for line in log:
                try:
                    stays = json.loads(line)["step"] <= step
                except (ValueError, TypeError, KeyError, RecursionError):
                    break  # a line cut short by a kill or a full disk is the last one
                if stays:
                    kept.write(line.rstrip(b"\n") + b"\n")
        os.replace(tmp, path)


def thin_previews(folder: Path) -> None:
    """Keeps at most ``MOST_PREVIEWS``: when there are more, every second of the older half goes.

    The first stays, the newest stay dense, and the further back, the fewer.
    """
    own = [path for path in folder.glob("step-*.png") if path.stem[5:].isdecimal()]
    pictures = sorted(own, key=lambda path: int(path.stem[5:]))
    if len(pictures) > MOST_PREVIEWS:
        for path in pictures[1 : len(pictures) // 2 : 2]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around writing into a run folder: a disk that refuses is a StorageError that says what there is and is needed."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        free = shutil.disk_usage(existing(folder)).free
        raise StorageError(
            f"train: {folder} must be writable with {_ROOM:,} bytes free for its log and previews, "
            f"got {error.strerror} with {free:,} free; rerun the same command to go on from the newest checkpoint"
        ) from error
