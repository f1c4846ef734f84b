"""Distillation: ``train(config)`` runs or resumes; ``plan(config)`` says what it would take."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nitrokernels

from ..config import TrainConfig
from .plan import plan

__all__ = ["plan", "train"]


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
