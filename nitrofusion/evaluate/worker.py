"""What one process of an evaluation does: turn pictures into features, or features into numbers.

A metric lives here, in a process of its own with its weights and libraries: whatever happens to it, the others go on.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from ..errors import InputError
from ..report.pictures import write_atomic
from . import instruments
from .gallery import open_picture

BATCH = 16  # pictures given to an extractor at a time; fixed, because the last bits of features may depend on it
_RESAMPLING_SEED = 0
_POLL = 0.1
_POLITENESS = 5  # where pictures are drawn by the same cores


def work(spec: dict) -> None:
    """``spec["kind"]`` is the name of a function here."""
    for module in spec["modules"]:  # where extractors and metrics register themselves
        importlib.import_module(module)
    {"extract": extract, "measure": measure}[spec["kind"]](spec)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def extract(spec: dict) -> None:
    """Writes the features of each shard that is missing, as soon as its pictures are there.

    Args:
        spec: extractor; weights {name: file}; device; polite; shard_size; sets, each with pictures (the files of all),
            prompts or None, shards (the numbers of those to do) and folder.
    """
    if not any(_missing(each, spec["shard_size"]) for each in spec["sets"]):
        return
    extractor = instruments.EXTRACTORS[spec["extractor"]]
    if spec["polite"] and hasattr(os, "nice"):
        os.nice(_POLITENESS)
    look = extractor.load({name: Path(path) for name, path in spec["weights"].items()}, spec["device"])
    for each in spec["sets"]:
        folder = Path(each["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        for shard, at in _missing(each, spec["shard_size"]):
            features = _features(extractor, look, each, at)
            write_atomic(shard_path(folder, shard), save({"features": features}))


def shard_range(shard: int, size: int, n: int) -> range:
    return range(shard * size, min((shard + 1) * size, n))


def _missing(each: dict, size: int) -> list[tuple[int, range]]:
    """The shards of a set that are not there whole, with the indices of their pictures."""
    ranges = [(shard, shard_range(shard, size, len(each["pictures"]))) for shard in each["shards"]]
    return [(shard, at) for shard, at in ranges if not whole(shard_path(Path(each["folder"]), shard), len(at))]


def whole(path: Path, count: int) -> bool:
    """Whether the features of ``count`` pictures lie there: a machine that lost power may have left a file short."""
    try:
        with safe_open(path, "np") as file:
            return file.get_slice("features").get_shape()[0] == count
    except (OSError, SafetensorError):
        return False


def _features(extractor, look, each: dict, at: range) -> np.ndarray:
    """[len(at), width] of some pictures of a set."""
    paths = [Path(each["pictures"][i]) for i in at]
    _wait(paths)
    prompts = [each["prompts"][i] for i in at] if extractor.needs_prompt else None
    parts = []
    for start, images in _read(paths):
        texts = None if prompts is None else prompts[start : start + len(images)]
        parts.append(_check(look(images, texts), len(images), extractor.name, paths[start]))
    return np.concatenate(parts)


def measure(spec: dict) -> None:
    """Writes ``results/<metric>.json`` for each metric: {value, interval}, or {error}.

    Args:
        spec: metrics {name: result file}; features, shard files in order; reference, the same or None.
    """
    features = _load(spec["features"])
    reference = None if spec["reference"] is None else _load(spec["reference"])
    for name, file in spec["metrics"].items():
        metric = instruments.METRICS[name]
        held = reference if metric.needs_reference else None
        try:
            value = float(metric.value(features, held))
            interval = [float(x) for x in metric.interval(features, held, seed=_RESAMPLING_SEED)]
            if not np.isfinite([value, *interval]).all() or interval[0] > interval[1]:
                raise InputError(f"evaluate: {name} must be a number in an interval, got {value} in {interval}")
            result = {"value": value, "interval": interval}
        except Exception as error:  # whatever one metric does, the next of these features may still do
            result = {"error": f"{type(error).__name__}: {error}"}
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result).encode())


def _load(files: list[str]) -> np.ndarray:
    return np.concatenate([load_file(file)["features"] for file in files])


def _wait(paths: list[Path]) -> None:
    """Until all are there; they appear complete or not at all. The process ends with the one that draws them."""
    missing = paths
    while missing := [path for path in missing if not path.exists()]:
        time.sleep(_POLL)


def _read(paths: list[Path]) -> Iterator[tuple[int, list[Image.Image]]]:
    """(index of the first, RGB pictures) of each batch; the next one is decoded while the caller works."""
    with ThreadPoolExecutor(2) as pool:
        submit = lambda start: [pool.submit(open_picture, path) for path in paths[start : start + BATCH]]  # noqa: E731
        ahead = submit(0)
        for start in range(0, len(paths), BATCH):
            images = [future.result() for future in ahead]
            ahead = submit(start + BATCH)
            yield start, images


def _check(features, count: int, name: str, first: Path) -> np.ndarray:
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) != count or not np.isfinite(features).all():
        kind = "NaN or infinity" if features.ndim == 2 and len(features) == count else str(list(features.shape))
        raise InputError(f"evaluate: {name} must give finite features [{count}, width], got {kind} from {first} on")
    return features
