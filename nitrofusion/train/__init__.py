"""Distillation: ``train(config)`` runs or resumes, ``launch`` in several processes; ``plan`` says what it takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nitrokernels

from ..config import TrainConfig
from .launch import launch
from .plan import plan

__all__ = ["launch", "plan", "train"]


def train(config: TrainConfig) -> Path:
    """Runs or resumes ``config`` in its folder.

    Returns:
        The run folder: config.json, log.jsonl, previews/, checkpoints/.

    Raises:
        InputError, StorageError, CheckpointError, TrainingError: one line each, see ``errors`` for exit codes.
    """
    from .loop import Trainer

    with contextlib.nullcontext() if config.backend == "auto" else nitrokernels.use(config.backend):
        return Trainer(config).run()
