"""Distillation methods: phases and losses. The loop in ``train`` knows none of them."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError


@dataclass(frozen=True)
class Phase:
    """One optimizer's share of a training step.

    Attributes:
        name: what ``Recipe.loss`` is asked for, and the prefix of its log entries.
        module: the only module that requires gradients while the phase runs.
        interval: runs at optimizer steps divisible by it.
        start: first optimizer step at which it runs.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    interval: int = 1
    start: int = 0

    def due(self, step: int) -> bool:
        return step >= self.start and step % self.interval == 0


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        noise: [B, 4, h, w] the x_T both student and teacher start from.
        target: [B, 4, h, w] fp32, the teacher's x0 ("real").
        cond: conditioning of the prompts.
        step: optimizer step.
        plan: generator equal on all processes, for choices they must share.
        shared: work one phase did that another can use.
    """

    noise: torch.Tensor
    target: torch.Tensor
    cond: object
    step: int
    plan: torch.Generator
    shared: dict = field(default_factory=dict)


class Recipe:
    """Protocol, and the empty defaults of its optional parts."""

    phases: tuple[Phase, ...]

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        """Named terms, weights applied, each [B]."""
        raise NotImplementedError

    def end_step(self, step: int) -> dict:
        """After all optimizers stepped; returns entries for the log."""
        return {}


# Module and class of each method; a new one is a file and a line here.
RECIPES = {"nitrofusion": "NitroFusion", "regression": "Regression"}


def check_name(name: str) -> None:
    """Raises InputError unless ``name`` is a recipe."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"config: recipe must be {' or '.join(RECIPES)}, got {name!r}{hint}")


def build(config, model, student) -> Recipe:
    """The recipe ``config.recipe`` names, around a loaded teacher and a student UNet."""
    check_name(config.recipe)
    module = importlib.import_module(f".{config.recipe}", __name__)
    return getattr(module, RECIPES[config.recipe])(config, model, student)
