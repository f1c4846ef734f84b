"""Teacher samples drawn by the workers of a Ray cluster (extra ``[ray]``).

A task is a shard. A worker loads the teacher once and keeps it; a task whose worker dies is given to another one, and
as a shard is a function of its number and appears whole or not at all, nothing else is to be done about it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
from pathlib import Path

import torch
from tqdm import tqdm

import nitrokernels

from . import data, pictures, shards
from .config import TrainConfig
from .errors import InputError, NitroError, StorageError

_RETRIES = 3  # of a shard whose worker died


def prepare(
    config: TrainConfig,
    teacher: Path,
    part: tuple[int, int] = (0, 1),
    verify: bool = False,
    num_cpus: float = 1,
    num_gpus: float | None = None,
) -> Path:
    """As ``data.prepare``, on the cluster that ``RAY_ADDRESS`` names or a local one.

    Args:
        teacher: its folder, which every node must reach, as that of the samples.
        num_cpus, num_gpus: of each worker; a GPU by default where this machine has one.

    Raises:
        InputError: Ray is missing, or as ``data.prepare``. StorageError: also if a shard's workers kept dying.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("prepare: ray must be installed (pip install 'nitrofusion[ray]'), got no ray") from error
    folder = data.cache_folder(config).absolute()
    settings = data.sample_settings(config, teacher)
    todo = data.claim(config, teacher, folder, part, verify)
    if not todo:
        return folder
    if num_gpus is None:
        num_gpus = float(torch.cuda.is_available())
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        # A task on a GPU would end its worker otherwise, and the next one load the teacher again.
        draw = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=_RETRIES, max_calls=0)(_draw)
        told = (*_sent(config, teacher), str(folder), settings)
        waiting = {draw.remote(*told, number): number for number in todo}
        count = functools.partial(data.shard_count, config)
        with tqdm(total=sum(map(count, todo)), desc="teacher samples", unit="img") as bar:
            while waiting:
                done, _ = ray.wait(list(waiting))
                for task in done:
                    number = waiting.pop(task)
                    _result(ray, task, shards.shard_path(folder, number))
                    bar.update(count(number))
    finally:
        if started:
            ray.shutdown()
    shards.sweep(folder, everyone=part == (0, 1))
    return folder


def _sent(config: TrainConfig, teacher: Path) -> tuple[str, str]:
    """Configuration and teacher as any folder of any node understands them: what a worker opens is absolute."""
    paths = {name: getattr(config, name) for name in ("prompts", "images", "teacher_unet")}
    made = {name: str(Path(path).absolute()) for name, path in paths.items() if path not in (None, pictures.WORLD)}
    return json.dumps(dataclasses.replace(config, **made).to_json()), str(Path(teacher).absolute())


def _result(ray, task, path: Path) -> None:
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NitroError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(f"prepare: {path} must be drawn within {_RETRIES + 1} attempts, got {reason}") from error


def _draw(values: str, teacher: str, folder: str, settings: dict, number: int) -> str:
    """The task: one shard."""
    drawer = _drawer(values, teacher, json.dumps(settings))
    backend = drawer.config.backend
    with contextlib.nullcontext() if backend == "auto" else nitrokernels.use(backend):
        return drawer.draw(Path(folder), number)


@functools.lru_cache(maxsize=1)
def _drawer(values: str, teacher: str, settings: str) -> data.ShardDrawer:
    """Raises InputError where this node's teacher or prompts are not those of the node that asked."""
    config, wanted = TrainConfig.from_json(json.loads(values)), json.loads(settings)
    found = json.loads(json.dumps(data.sample_settings(config, Path(teacher))))
    for key in sorted(wanted.keys() | found.keys()):
        if found.get(key) != wanted.get(key):
            where = f"{teacher} of {platform.node()} must draw the samples asked for"
            raise InputError(f"prepare: {where}, of {key} {wanted.get(key)}, got {found.get(key)}")
    return data.ShardDrawer(config, data.load_teacher(config, Path(teacher)), wanted)
