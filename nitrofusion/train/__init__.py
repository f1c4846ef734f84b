"""Distillation: ``train(config)`` runs or resumes, ``launch`` in several processes; ``plan`` says what it takes.

``prepare`` draws the teacher samples beforehand.
"""

from __future__ import annotations

import math
from pathlib import Path

from .. import data
from ..config import TrainConfig
from ..errors import InputError
from .launch import launch
from .plan import check_samples, plan, use_backend

__all__ = ["launch", "plan", "prepare", "train"]


def train(config: TrainConfig, allow_inexact: bool = False) -> Path:
    """Runs or resumes ``config`` in its folder; in all processes that torchrun started, where it did.

    Args:
        allow_inexact: also go on from a checkpoint of another number of processes, or of another ``parallel``,
            ``batch_size`` or ``accumulation``, as long as an optimizer step has as many images, or of another version
            of torch or of this package; sums then differ in their last bits. In another number of micro-batches t*,
            heads and noises are drawn anew: it is then another run of the same kind.

    Returns:
        The run folder: config.json, log.jsonl, previews/, checkpoints/.

    Raises:
        InputError, StorageError, CheckpointError, TrainingError: one line each, see ``errors`` for exit codes.
    """
    from .loop import Trainer

    with use_backend(config):
        return Trainer(config, allow_inexact).run()


def prepare(
    config: TrainConfig,
    part: tuple[int, int] = (0, 1),
    *,
    engine: str = "serial",
    verify: bool = False,
    num_cpus: float = 1,
    num_gpus: float | None = None,
) -> Path:
    """Draws the teacher samples that ``train(config)`` reads, or its k-th of n parts; returns their folder.

    The same call goes on where it stopped. Samples are drawn in the precision in which ``train`` holds the teacher.

    Args:
        engine: serial draws here; ray on every worker of a Ray cluster (extra ``[ray]``), which all must reach the
            folders of teacher and samples.
        verify: also compares the digest of each finished shard, and draws again what was altered.
        num_cpus, num_gpus: of a Ray worker; a GPU by default where this machine has one.

    Raises:
        InputError: as ``train`` would, of teacher and prompts; or ``train`` would read no samples, or the folder holds
            others. StorageError: the disk is full.
    """
    is_pair = isinstance(part, tuple | list) and len(part) == 2 and all(isinstance(n, int) for n in part)
    if not is_pair or not 0 <= part[0] < part[1]:
        raise InputError(f"prepare: part must be (k, n) with 0 <= k < n, got {part!r}")
    if engine not in ("serial", "ray"):
        raise InputError(f"prepare: engine must be serial or ray, got {engine!r}")
    _check_share("num_cpus", num_cpus)
    _check_share("num_gpus", 0 if num_gpus is None else num_gpus)
    folder, _ = check_samples(config, part)
    if engine == "ray":
        from ..prepare_ray import prepare as prepare_on_ray

        return prepare_on_ray(config, folder, part, verify, num_cpus, num_gpus)
    with use_backend(config):
        model = data.load_teacher(config, folder)
        return data.prepare(config, model, data.cache_folder(config), part, verify, progress=True)


def _check_share(name: str, value: float) -> None:
    """Of a Ray worker: what Ray itself refuses it refuses late, when a cluster was started and the folder claimed."""
    is_number = isinstance(value, int | float) and 0 <= value < math.inf
    if not is_number or name == "num_gpus" and value > 1 and value != int(value):
        wanted = "a number >= 0, and whole above 1" if name == "num_gpus" else "a number >= 0"
        raise InputError(f"prepare: {name} must be {wanted}, got {value!r}")
