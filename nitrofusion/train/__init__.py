"""Distillation: ``train(config)`` runs or resumes, ``launch`` in several processes; ``plan`` says what it takes.

``prepare`` draws the teacher samples beforehand.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import nitrokernels

from .. import data
from ..config import TrainConfig
from ..device import pick_device
from ..models import sdxl
from .launch import launch
from .plan import check_teacher, plan

__all__ = ["launch", "plan", "prepare", "train"]


def train(config: TrainConfig, allow_inexact: bool = False) -> Path:
    """Runs or resumes ``config`` in its folder; in all processes that torchrun started, where it did.

    Args:
        allow_inexact: also go on from a checkpoint of another number of processes, or of another ``parallel``,
            ``batch_size`` or ``accumulation``, as long as an optimizer step has as many images, or of another version
            of torch or of this package; sums then differ in their last bits.

    Returns:
        The run folder: config.json, log.jsonl, previews/, checkpoints/.

    Raises:
        InputError, StorageError, CheckpointError, TrainingError: one line each, see ``errors`` for exit codes.
    """
    from .loop import Trainer

    with _backend(config):
        return Trainer(config, allow_inexact).run()


def prepare(config: TrainConfig, part: tuple[int, int] = (0, 1)) -> Path:
    """Draws the teacher samples that ``train(config)`` reads, or its k-th of n parts; returns their folder.

    Raises:
        InputError: as ``train`` would, of teacher and prompts.
    """
    folder, _ = check_teacher(config)
    with _backend(config):
        fused = config.backend != "ref"
        model = sdxl.load(folder, pick_device(config.device), unet=config.teacher_unet, fused=fused)
        return data.prepare(config, model, data.cache_folder(config), part)


def _backend(config: TrainConfig):
    return contextlib.nullcontext() if config.backend == "auto" else nitrokernels.use(config.backend)
